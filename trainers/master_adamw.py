"""AdamW on fp32 masters of weights of any type, on their device or in host memory."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from trainers.settings.optim_specs import PIECE, SLOTS


def computed_loss(closure: Callable[[], Any] | None) -> Any:
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
        loss = computed_loss(closure)
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
