"""Reductions of per-token values to one number.

Each takes a non-empty tensor `[tokens]`. As in the reference implementation the median of an even number of values is
the lower of the two in the middle, and quartiles interpolate linearly.
"""

import torch
from torch import Tensor

REDUCTIONS = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
    "median": torch.median,
    "first_quartile": lambda x: torch.quantile(x, 0.25),
    "last_quartile": lambda x: torch.quantile(x, 0.75),
}


def normalize(values: Tensor, kind: str | None, clip_min: float | None = None, clip_max: float | None = None) -> Tensor:
    """Transform `[tokens]` values, then clip them: `exp` is e^x, `exp_norm` is 1 - e^(-x), None leaves them."""
    if kind == "exp":
        values = values.exp()
    elif kind == "exp_norm":
        values = 1 - (-values).exp()
    elif kind is not None:
        raise ValueError(f"normalization {kind!r}: one of exp, exp_norm, None")
    if clip_min is None and clip_max is None:
        return values
    return values.clamp(min=clip_min, max=clip_max)


def as_list(value: object) -> list:
    """A scalar option as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]
