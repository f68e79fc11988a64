"""Correction for what the engine samples with and the trainer trains with not being quite the same numbers.

Truncated or masked importance sampling, as TRL does it. TRL takes the trainer's log-probabilities for it from a forward
pass of its own, before the update. Where each rollout serves one optimizer step they are those of the update's own
forward pass, so that one serves for both.
"""

import torch
from torch import Tensor


def importance_sampling_ratio(
    trainer_logps: Tensor,
    sampling_logps: Tensor,
    mask: Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> Tensor:
    """How much more likely the trainer's model makes each token than the engine did.

    Args:
        trainer_logps, sampling_logps: `[rows, tokens]`; NaN in `sampling_logps` means unknown, and counts as equal.
        mask: `[rows, tokens]`, 1 where a token was sampled.
        mode: `token_` or `sequence_`, then `truncate` (to the limits) or `mask` (0 beyond them), as
            `vllm_importance_sampling_mode`.
        clip_min, clip_max: The limits; None for none.

    Returns:
        `[rows, tokens]` by token, `[rows, 1]` by sequence.
    """
    difference = torch.nan_to_num((trainer_logps - sampling_logps) * mask, nan=0.0)
    level, _, treatment = mode.partition("_")
    ratio = torch.exp(difference.sum(dim=-1, keepdim=True) if level == "sequence" else difference)
    if treatment == "truncate":
        return ratio if clip_min is None and clip_max is None else ratio.clamp(min=clip_min, max=clip_max)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if clip_min is not None:
        outside |= ratio < clip_min
    if clip_max is not None:
        outside |= ratio > clip_max
    return ratio.masked_fill(outside, 0.0)


class Mismatch:
    """TRL's metrics of the differences and ratios of one rollout, whose micro-batches come one by one."""

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._ratios: list[Tensor] = []

    def add(self, trainer_logps: Tensor, sampling_logps: Tensor, mask: Tensor, ratio: Tensor) -> None:
        """Note a micro-batch; arguments and the ratio as of `importance_sampling_ratio`."""
        difference = (trainer_logps - sampling_logps).abs()[mask.bool()]
        self._differences.append(difference[~difference.isnan()])
        self._ratios.append(ratio.flatten() if ratio.size(1) == 1 and mask.size(1) != 1 else ratio[mask.bool()])

    def take(self) -> dict[str, float]:
        """The metrics of what was noted since the last call; none if that was nothing."""
        if not sum(map(len, self._differences)):
            return {}
        difference, ratio = torch.cat(self._differences), torch.cat(self._ratios)
        self._differences, self._ratios = [], []
        return {
            "sampling/sampling_logp_difference/mean": difference.mean().item(),
            "sampling/sampling_logp_difference/max": difference.max().item(),
            "sampling/importance_sampling_ratio/min": ratio.min().item(),
            "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
            "sampling/importance_sampling_ratio/max": ratio.max().item(),
        }
