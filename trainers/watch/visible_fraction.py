"""How much of an optimizer step the engine sees: bf16 weights change only where a step outlives their rounding."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

SAMPLED = 2**20  # elements, of all parameters together
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class VisibleFraction(TrainerCallback):
    """Measures `update/visible_fraction` at each optimizer step: the share of the weights whose bits change by it.

    An estimate where there are more than `SAMPLED` weights: from a fixed random sample, as many of each parameter as
    its share of all. The values are compared as the engine reads them; of LoRA adapters, fp32 in the trainer, their
    rounding to the engine's type counts (vLLM's scaling by lora_alpha / lora_r left aside).

    Args:
        parameters: What is trained.
        dtype: The engine's type.
        report: Takes the fraction of each step.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype, report: Callable[[float], None]) -> None:
        self.parameters, self.dtype, self.report = list(parameters), dtype, report
        self._places: list[Tensor | None] = []
        self._before: Tensor | None = None

    def _choose(self) -> None:
        """Places in each flattened parameter, None for all; on its device. Random ones may come twice."""
        total = sum(p.numel() for p in self.parameters)
        generator = torch.Generator().manual_seed(0)  # its own: the run's random numbers stay what they are
        for p in self.parameters:
            count = max(1, round(SAMPLED * p.numel() / total))
            places = None if total <= SAMPLED else torch.randint(p.numel(), (count,), generator=generator).to(p.device)
            self._places.append(places)

    @torch.no_grad()
    def _sample(self) -> Tensor:
        """`[elements]`: the bits of the sampled weights, in the engine's type."""
        if not self._places:
            self._choose()
        taken = []
        for p, places in zip(self.parameters, self._places, strict=True):
            flat = p.reshape(-1)
            taken.append((flat.clone() if places is None else flat[places]).to(self.dtype))
        return torch.cat(taken).view(BITS[self.dtype.itemsize])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = self._sample()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.report((self._sample() != self._before).float().mean().item())
        self._before = None
