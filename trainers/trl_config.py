"""What this project tells TRL about precision and device."""

import logging
from typing import Any

import torch

from trainers.models import resolve_device

logger = logging.getLogger(__name__)


def precision_arguments(options: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a TRL configuration for the type of the weights."""
    if dtype == torch.bfloat16 and options.learning_rate < 1e-4 and not getattr(options, "use_peft", False):
        logger.warning(
            "bf16 weights at learning_rate %g: steps far smaller than a weight / 256 are lost to rounding "
            "(arXiv 2602.03839); precision=fp32 keeps them, at twice the memory",
            options.learning_rate,
        )
    return {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": resolve_device(options.device).type == "cpu",
    }
