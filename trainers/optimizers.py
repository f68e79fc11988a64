"""The optimizers of `optim`. Every one writes the weights in place: the engine computes with the same memory."""

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from transformers import Trainer
from transformers.optimization import Adafactor

from trainers.settings.optim_specs import PIECE, SLOTS, is_quantized, optimizer_name, rounding_warning
from trainers.watch.visible_fraction import VisibleFraction

logger = logging.getLogger(__name__)

GRADIENT_SCALE = 4096  # of flash_adamw


def make_optimizer(model: nn.Module, name: str, args: Any) -> Optimizer:
    """Make the optimizer of a model's trainable parameters.

    Args:
        model: On its device, the engine started: states are made where the weights are at the first step.
        name: As `optim_specs.optimizer_name` returns it.
        args: TRL's arguments: learning_rate, weight_decay, adam_beta1, adam_beta2, adam_epsilon and max_grad_norm
            are read.

    Raises:
        ValueError: If there is no such optimizer.
    """
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # as transformers: no norms, no biases
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def groups(chosen: Callable[[Tensor], bool] = lambda _: True, **more: Any) -> list[dict[str, Any]]:
        halves = (
            ([p for n, p in named if chosen(p) and n in decayed], args.weight_decay),
            ([p for n, p in named if chosen(p) and n not in decayed], 0.0),
        )
        return [{"params": params, "weight_decay": decay, **more} for params, decay in halves if params]

    warning = rounding_warning(name, str(named[0][1].dtype), args.learning_rate)
    if warning:
        logger.warning(warning)
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "adamw_torch":
        return torch.optim.AdamW(groups(), fused=True, **adam)
    if name == "adamw_8bit":
        return _adamw_8bit(groups, adam)
    if name == "cpu_offload":
        return MasterAdamW(groups(), on_host=True, **adam)
    if name == "flash_adamw":
        from flashoptim import FlashAdamW

        # 24 bits lose a step of 1e-6 on a norm's weight of 1: vectors get 32.
        by_bits = groups(lambda p: p.ndim > 1) + groups(lambda p: p.ndim < 2, master_bytewidth=4)
        # Gradients that are not clipped might be too large to be scaled.
        scale = GRADIENT_SCALE if 0 < args.max_grad_norm <= 8 else 1
        if scale == 1:
            logger.warning(
                "flash_adamw: max_grad_norm=%g; where gradients are small (1e-6 a weight) its steps are twice Adam's, "
                "which max_grad_norm=1.0 prevents",
                args.max_grad_norm,
            )
        return with_scaled_gradients(FlashAdamW)(
            by_bits, master_weight_bits=24, **adam | {"eps": adam["eps"] * scale}, scale=scale
        )
    if name == "adafactor":
        fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}  # our learning rate counts
        return ExactAdafactor(groups(), lr=args.learning_rate, **fixed)
    raise ValueError(f"there is no optimizer {name}")


def _adamw_8bit(groups: Callable[..., list[dict[str, Any]]], adam: dict[str, Any]) -> Optimizer:
    """torchao's AdamW with 8-bit states (arXiv 2110.02861) and stochastic rounding for matrices; fp32 masters for the
    rest, whose states torchao would keep in bf16, where a beta2 of 0.999 loses what is added."""
    from torchao.optim import AdamW8bit

    def quantized(p: Tensor) -> bool:
        return is_quantized(tuple(p.shape))

    parts: list[Optimizer] = []
    if matrices := groups(quantized):
        parts.append(AdamW8bit(matrices, bf16_stochastic_round=True, **adam))
    if rest := groups(lambda p: not quantized(p)):
        parts.append(MasterAdamW(rest, **adam))
    return parts[0] if len(parts) == 1 else CombinedOptimizer(parts)


def with_scaled_gradients(kind: type[Optimizer]) -> type[Optimizer]:
    """An Adam that sees gradients `scale` times as large; with an eps that is, too, its steps are the same.

    FlashAdamW scales its 8-bit states by fp16 numbers, whose smallest is 6e-8. A clipped gradient of billions of
    weights has elements of 1e-6 and below, and the roots of their second moments begin at a thirtieth of that.
    """

    class Scaled(kind):
        def __init__(self, *args: Any, scale: float, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            for group in self.param_groups:
                group["gradient_scale"] = scale  # a power of two: exact; saved beside the moments and eps it belongs to

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = _loss(closure)
            scaled = [
                ([p.grad for p in group["params"] if p.grad is not None], group.get("gradient_scale", 1))
                for group in self.param_groups
            ]
            for gradients, factor in scaled:
                if gradients:
                    torch._foreach_mul_(gradients, factor)
            super().step()
            for gradients, factor in scaled:
                if gradients:
                    torch._foreach_div_(gradients, factor)
            return loss

    Scaled.__name__ = f"Scaled{kind.__name__}"
    return Scaled


def _loss(closure: Callable[[], Any] | None) -> Any:
    """What a step's closure computes, with gradients, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class ExactStates:
    """States are loaded as they were saved; torch's own loading would round them to the weights' type."""

    def _home(self, p: Tensor) -> torch.device:
        """Where the states of a parameter are."""
        return p.device

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's."""
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        parameters = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[p][name] = value.to(self._home(p)) if is_tensor else value


class MasterAdamW(ExactStates, Optimizer):
    """AdamW on fp32 masters of the weights; the weights get the masters' values, rounded to their own type.

    The masters keep what rounding takes, so nothing is lost. They, their states and the step are on the weights' device
    or on the host. torchao's CPUOffloadOptimizer does not do for the latter: its host copy is bf16 and loses small
    steps, it takes gradients in the backward pass, before they are clipped, and it needs CUDA.

    Args:
        params: Parameters or groups of them.
        lr, betas, eps, weight_decay: As in `torch.optim.AdamW`.
        on_host: Masters and states are in host memory, and the CPU steps them. Gradients come over when the step is
            taken: accumulated and clipped.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        on_host: bool = False,
    ) -> None:
        self.on_host, self._staging = on_host, None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As every optimizer's."""
        loss = _loss(closure)
        held = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for _, p in held:
            if not self.state[p]:
                self.state[p].update(self._first_state(p))
        if self.on_host and held:
            self._step_on_host(held)
        elif held:
            for group, p in held:
                _adamw(self.state[p], slice(None), p.grad.float().view(-1), group)
                p.copy_(self.state[p]["master"])
        for _, p in held:
            self.state[p]["step"] += 1
        return loss

    def _home(self, p: Tensor) -> torch.device:
        return torch.device("cpu") if self.on_host else p.device

    def _first_state(self, p: Tensor) -> dict[str, Tensor]:
        device = self._home(p)
        master = torch.empty(p.shape, dtype=torch.float32, device=device)
        master.copy_(p.to(device))  # moved first: converting on the way would take fp32 room on the GPU
        zeros = [torch.zeros_like(master) for _ in range(2)]
        step = torch.zeros((), dtype=torch.float32, device=device)
        return {"step": step, "master": master, "exp_avg": zeros[0], "exp_avg_sq": zeros[1]}

    def _step_on_host(self, held: list[tuple[dict[str, Any], Tensor]]) -> None:
        if self._staging is None:
            every = [p for group in self.param_groups for p in group["params"]]
            widest = max((p.dtype for p in every), key=lambda dtype: dtype.itemsize)
            self._staging = Staging(min(PIECE, max(p.numel() for p in every)), widest, every[0].device)
        size, slots = self._staging.size, self._staging.slots
        pieces = [(g, p, slice(a, min(a + size, p.numel()))) for g, p in held for a in range(0, p.numel(), size)]

        def fetch(k: int) -> None:
            _, p, where = pieces[k]
            slots[k % SLOTS].fetch(p.grad.view(-1)[where])

        fetch(0)
        for k, (group, p, where) in enumerate(pieces):
            if k + 1 < len(pieces):
                fetch(k + 1)
            slot, state = slots[k % SLOTS], self.state[p]
            grad = self._staging.fp32[: where.stop - where.start]
            grad.copy_(slot.fetched())
            _adamw(state, where, grad, group)
            slot.write(state["master"].view(-1)[where], p.view(-1)[where])
        self._staging.finish()


class ExactAdafactor(ExactStates, Adafactor):
    """transformers' Adafactor (arXiv 1804.04235), whose fp32 states survive being loaded."""


def _adamw(state: dict[str, Tensor], where: slice, grad: Tensor, group: dict[str, Any]) -> None:
    """One AdamW step of a stretch of a flattened parameter; the count of steps stays what it is."""
    beta1, beta2 = group["betas"]
    adamw(
        [state["master"].view(-1)[where]],
        [grad],
        [state["exp_avg"].view(-1)[where]],
        [state["exp_avg_sq"].view(-1)[where]],
        max_exp_avg_sqs=[],
        state_steps=[state["step"].clone()],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


class Staging:
    """What brings gradients to the host and weights back, a piece at a time: pinned buffers, and a stream of its own.

    Args:
        size: Elements of a piece.
        dtype: Of gradients and weights.
        device: Where they are.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size = size
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.fp32 = torch.empty(size, dtype=torch.float32)
        self.slots = [Slot(size, dtype, self.stream) for _ in range(SLOTS)]

    def finish(self) -> None:
        """Let what the device does next wait for the weights."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def bytes(self) -> int:
        buffers = [self.fp32, *(b for slot in self.slots for b in (slot.gradient, slot.weights))]
        return sum(b.nbytes for b in buffers)


class Slot:
    """Buffers of a piece under way, in both directions."""

    def __init__(self, size: int, dtype: torch.dtype, stream: Any) -> None:
        self.stream = stream
        self.gradient, self.weights = (torch.empty(size, dtype=dtype, pin_memory=stream is not None) for _ in range(2))
        self.arrived, self.left = (torch.cuda.Event() if stream is not None else None for _ in range(2))
        self._length = 0

    def fetch(self, gradient: Tensor) -> None:
        """Start to bring a gradient over."""
        self._length = len(gradient)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(gradient.device))
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            self.gradient[: self._length].copy_(gradient, non_blocking=True)
        if self.stream is not None:
            self.arrived.record(self.stream)

    def fetched(self) -> Tensor:
        """The gradient, once it has arrived."""
        if self.stream is not None:
            self.arrived.synchronize()
        return self.gradient[: self._length]

    def write(self, master: Tensor, weights: Tensor) -> None:
        """Round a piece of the masters and start to write it into the weights."""
        if self.stream is not None:
            self.left.synchronize()  # what was written from this buffer before
        rounded = self.weights[: len(master)]
        rounded.copy_(master)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            weights.copy_(rounded, non_blocking=True)
        if self.stream is not None:
            self.left.record(self.stream)


class CombinedOptimizer(Optimizer):
    """Several optimizers of different parameters, presented as one.

    Its groups are theirs, the same dictionaries: a scheduler that sets a learning rate reaches each.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([dict(group) for part in parts for group in part.param_groups], {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {p: held for part in self.parts for p, held in part.state.items()}

    @state.setter
    def state(self, value: dict[Tensor, Any]) -> None:
        assert not value, "states belong to the parts"  # torch's constructor sets it, empty

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As every optimizer's."""
        loss = _loss(closure)
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In torch's form: the parts' groups one after the other, parameters numbered through."""
        state, param_groups, first = {}, [], 0
        for part in self.parts:
            held = part.state_dict()
            state |= {first + i: value for i, value in held["state"].items()}
            param_groups += [g | {"params": [first + i for i in g["params"]]} for g in held["param_groups"]]
            first += sum(len(g["params"]) for g in held["param_groups"])
        return {"state": state, "param_groups": param_groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each part its own.

        Raises:
            ValueError: If it is of other optimizers or parameters.
        """
        saved = list(state_dict["param_groups"])
        if len(saved) != len(self.param_groups):
            theirs, ours = len(saved), len(self.param_groups)
            raise ValueError(f"the state has {theirs} groups of parameters, this optimizer {ours}")
        for part in self.parts:
            groups, saved = saved[: len(part.param_groups)], saved[len(part.param_groups) :]
            ids = {i for group in groups for i in group["params"]}
            states = {i: value for i, value in state_dict["state"].items() if i in ids}
            part.load_state_dict({"state": states, "param_groups": groups})
        self._join()


class OwnOptimizer:
    """Lets a TRL trainer that holds `options` use the optimizer they name, and measure what its steps change."""

    def watch_updates(self) -> None:
        """Log `update/visible_fraction`, averaged over a logging interval like TRL's metrics."""
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def report(value: float) -> None:
            self._metrics["train"]["update/visible_fraction"].append(value)

        self.add_callback(VisibleFraction(trained, self.model.dtype, report))

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As transformers': called when training begins, so after the engine took over the weights."""
        if self.optimizer is None:
            name = optimizer_name(self.options, str(self.model.dtype))
            self.optimizer = make_optimizer(self.model, name, self.args)
        return self.optimizer
