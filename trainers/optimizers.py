"""The optimizers of `optim`. Every one writes the weights in place: the engine computes with the same memory."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.optimization import Adafactor

from trainers.master_adamw import ExactStates, MasterAdamW, computed_loss
from trainers.settings.optim_specs import is_quantized, optimizer_name, rounding_warning
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
    rest, whose states torchao would keep in bf16, where a beta2 of 0.999 loses what is added.

    The 256 numbers of a second moment are spaced evenly in their logarithm, over ten decades below its block's largest.
    torchao's come to an end after six, and round to 0 below: where gradients within a block differ by a factor of 1000,
    the first moment, which has more, was divided by nothing (steps of a hundred times Adam's; docs/LOG.md).
    """
    from torchao.optim import AdamW8bit

    class LogAdamW8bit(AdamW8bit):
        @staticmethod
        def _subclass_zeros(p: Tensor, signed: bool, block_size: int) -> Tensor:
            state = AdamW8bit._subclass_zeros(p, signed, block_size)
            if not signed:
                state.qmap.copy_(torch.logspace(-10, 0, len(state.qmap)))
            return state

    def quantized(p: Tensor) -> bool:
        return is_quantized(tuple(p.shape))

    parts: list[Optimizer] = []
    if matrices := groups(quantized):
        parts.append(LogAdamW8bit(matrices, bf16_stochastic_round=True, **adam))
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
            loss = computed_loss(closure)
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


class ExactAdafactor(ExactStates, Adafactor):
    """transformers' Adafactor (arXiv 1804.04235), whose fp32 states survive being loaded."""


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
        loss = computed_loss(closure)
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
    """Lets a TRL trainer that holds `options` use the optimizer they name, and measure what its steps change.

    A gradient that is not finite stops the run ahead of the step: after it no weight would be a number.
    """

    def watch_updates(self) -> None:
        """Log `update/visible_fraction`, averaged over a logging interval like TRL's metrics, and let trackers record
        the optimizer's name: transformers' default is not the one, and an evaluation may come before training."""
        self.args.optim = optimizer_name(self.options, str(self.model.dtype))
        trained = [p for p in self.model.parameters() if p.requires_grad]

        def report(value: float) -> None:
            self._metrics["train"]["update/visible_fraction"].append(value)

        self.add_callback(VisibleFraction(trained, self.model.dtype, report))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        """As transformers', which calls it between clipping and the optimizer's step.

        Raises:
            FloatingPointError: If it is not finite. Where the loss is scaled (fp16), the scaler skips such a step.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None and not math.isfinite(norm):
            step, metrics = self.state.global_step, Path(self.args.output_dir) / "metrics.jsonl"
            wider = "" if self.model.dtype == torch.float32 else ", or precision=fp32"
            raise FloatingPointError(
                f"the gradient of step {step + 1} is {float(norm)}: it is not applied, the weights are those after "
                f"step {step}\n  -> {metrics} shows what came before; a smaller learning_rate (now "
                f"{self.args.learning_rate:g}){wider}"
            )
        return norm

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """As transformers': called when training begins, so after the engine took over the weights."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model, self.args.optim, self.args)
        return self.optimizer
