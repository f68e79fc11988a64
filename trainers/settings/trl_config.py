"""What this project tells TRL about precision and device, and the user about TRL's options."""

import logging
from typing import Any

import torch

from trainers.models import resolve_device
from trainers.options import TrainOptions

logger = logging.getLogger(__name__)


def precision_arguments(options: TrainOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a TRL configuration for the type of the weights."""
    return {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": resolve_device(options.device).type == "cpu",
    }


def tell_length(options: TrainOptions) -> None:
    """Say which of two options decides how long a run trains, where both are set: a preset may hold one of them."""
    if options.max_steps and options.max_steps > 0 and "num_train_epochs" in options.model_fields_set:
        unread = f"num_train_epochs={options.num_train_epochs:g} is not read"
        logger.info("max_steps=%d is how long this run trains: %s (it is with max_steps=-1)", options.max_steps, unread)
