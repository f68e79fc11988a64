"""LoRA adapters on the teacher: fresh ones, and those of an earlier run."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel, set_seed

from trainers.errors import ConfigError, Fault
from trainers.options import TrainOptions
from trainers.weights.adapter_files import AdapterFiles

ADAPTER = "default"  # peft's name for the adapter in training
REFERENCE = "ref"  # TRL's name for the adapter that beta's KL is taken to, where there is one


def add_adapters(model: PreTrainedModel, options: TrainOptions) -> PeftModel:
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
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        remedy = "lora_target_modules=all-linear, or names of layers, e.g. [q_proj, v_proj]"
        fault = Fault("lora_target_modules", options.lora_target_modules, str(error).splitlines()[0], remedy)
        raise ConfigError(fault) from error
    _name_base(adapted, model.name_or_path)
    return adapted


def load_adapter(model: PreTrainedModel, adapter: AdapterFiles, key: str, is_trainable: bool) -> PeftModel:
    """Put a saved adapter on its base.

    Args:
        key: The option that named the adapter.
        is_trainable: False freezes it, as peft does unless told otherwise.

    Raises:
        ConfigError: If it was not made for this base. (peft itself only warns of weights that are missing.)
    """
    path = str(adapter.folder)
    remedy = f"another base than {adapter.base}: base_model=<its base> in stage=merge"
    try:
        adapted = PeftModel.from_pretrained(
            model, path, adapter_name=ADAPTER, is_trainable=is_trainable, torch_device="cpu"
        )
        saved = set(load_peft_weights(path, device="cpu"))
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        raise ConfigError(Fault(key, path, f"it does not fit its base: {' '.join(lines[:2])}", remedy)) from error
    wanted = set(get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False))
    if wrong := {name for name in wanted ^ saved if "embed" not in name and "lm_head" not in name}:
        cause = (
            f"it does not fit its base: {len(wrong)} of its weights or layers have no counterpart, e.g. {min(wrong)}"
        )
        raise ConfigError(Fault(key, path, cause, remedy))
    _name_base(adapted, adapter.base)
    return adapted


def continue_adapter(
    model: PreTrainedModel, adapter: AdapterFiles, options: TrainOptions, reference: bool
) -> PeftModel:
    """Put a saved adapter on its base and train it on.

    Args:
        reference: Whether a frozen copy of it is kept, as what beta's KL is taken to.

    Raises:
        ConfigError: If the adapter does not fit its base or the options.
    """
    adapted = load_adapter(model, adapter, "model_name_or_path", is_trainable=True)
    if "lora_target_modules" in options.model_fields_set and options.lora_target_modules == "all-linear":
        # What that stands for is known only with the model at hand: all other contradictions were told before.
        if free := next(_layers_without_adapter(adapted), None):
            cause = f"the adapter that is trained on has none for {free}"
            remedy = "leave lora_target_modules out, or adapter_start=merge for a fresh adapter on the merged model"
            raise ConfigError(Fault("lora_target_modules", "all-linear", cause, remedy))
    if reference:
        _copy_as_reference(adapted)
    return adapted


def _layers_without_adapter(model: PeftModel) -> Any:
    base = model.get_base_model()
    inside = [module for module in base.modules() if isinstance(module, LoraLayer)]
    adapted = {id(part) for module in inside for part in module.modules()} | {id(base.get_output_embeddings())}
    return (n for n, module in base.named_modules() if isinstance(module, nn.Linear) and id(module) not in adapted)


def _copy_as_reference(model: PeftModel) -> None:
    """Keep the adapter as it is now under the name by which TRL asks for the reference.

    As `GRPOTrainer.__init__` does with an adapter that it is given and a beta above 0; here it is told a beta of 0
    (see teacher_grpo.py). Without the copy the reference would be the base as it was before the warm-up.
    """
    config = deepcopy(model.peft_config[ADAPTER])
    config.lora_dropout, config.init_lora_weights = 0.0, True  # scored in training mode; and overwritten below
    model.add_adapter(REFERENCE, config)
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            model.get_parameter(name.replace(f".{ADAPTER}.", f".{REFERENCE}.")).data.copy_(parameter.data)


def _name_base(model: PeftModel, base: str) -> None:
    """Write into the adapter's config where its base is, so that it is found from any folder."""
    local = Path(base).expanduser()
    model.peft_config[ADAPTER].base_model_name_or_path = str(local.absolute()) if local.is_dir() else base


def base_model(model: Any) -> Any:
    """The transformers model itself, with its adapters in place, if it has any."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
