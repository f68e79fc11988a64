"""LoRA adapters on the teacher."""

from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed

from trainers.errors import ConfigError, Fault


def add_adapters(model: PreTrainedModel, options: Any) -> PeftModel:
    """Freeze a model and put fresh LoRA adapters (arXiv 2106.09685) on it, in fp32 whatever the type of its weights.

    Raises:
        ConfigError: If the model has no such layers.
    """
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    set_seed(options.seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        remedy = "lora_target_modules=all-linear, or names of layers, e.g. [q_proj, v_proj]"
        fault = Fault("lora_target_modules", options.lora_target_modules, str(error).splitlines()[0], remedy)
        raise ConfigError(fault) from error


def base_model(model: Any) -> Any:
    """The transformers model itself, with its adapters in place, if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
