"""What this project tells TRL about precision and device."""

from typing import Any

import torch

from trainers.models import resolve_device


def precision_arguments(options: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a TRL configuration for the type of the weights."""
    return {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": resolve_device(options.device).type == "cpu",
    }
