"""What training starts from: a whole model, an adapter that is trained on, or an adapter merged into its base."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainers.attention import suit_attention
from trainers.errors import ConfigError, Fault
from trainers.merge import whole_model
from trainers.models import load_config, load_model, resolve_device
from trainers.options import TrainOptions
from trainers.weights.adapter_files import AdapterFiles, is_adapter, is_continued, open_adapter, start_faults
from trainers.weights.adapters import add_adapters, continue_adapter

logger = logging.getLogger(__name__)

KEY = "model_name_or_path"


class Start(NamedTuple):
    """The model whose weights are loaded, a folder or hub id, and the adapter that goes on it and is trained on."""

    path: str
    adapter: AdapterFiles | None = None

    @property
    def tokenizer(self) -> str:
        """Where template and tokenizer are."""
        return self.path if self.adapter is None else str(self.adapter.folder)


def resolve_start(options: TrainOptions, path: str, output_dir: Path, dtype: torch.dtype) -> Start:
    """Recognise what a model to train is, merge it where that is asked for, and say so in the log.

    Args:
        path: `model_name_or_path`, with `run:NAME` resolved to a folder.
        output_dir: Where a merged model may be written.
        dtype: Type of its weights.

    Raises:
        ConfigError: If the options do not go with it (of a `run:NAME` that shows only here).
    """
    if faults := start_faults(options, path):
        raise ConfigError(faults)
    trained = "a fresh adapter is trained on that" if options.use_peft else "every weight of that is trained"
    follows = getattr(options, "sync_ref_model", False) and not options.use_peft  # adapters have another reference
    further = ", without the fresh adapter" if options.use_peft else ""
    further += ", which follows the teacher (sync_ref_model)" if follows else ""
    if not is_adapter(path):
        start, how, reference = Start(path), f"it is a whole model, and {trained}", f"that model{further}"
    elif is_continued(options):
        adapter = open_adapter(KEY, path)
        how = f"its LoRA adapter is trained on, on its base {adapter.base}"
        start, reference = Start(adapter.base, adapter), "that adapter as it is now"
    else:
        start = Start(whole_model(options, KEY, path, output_dir, dtype))
        how = f"its LoRA adapter is merged into its base {open_adapter(KEY, path).base}, and {trained}"
        reference = f"the merged model{further}"
    if options.stage == "rl":
        how += f"; KL reference: {reference}" if options.beta else "; no KL reference (beta=0)"
    logger.info("start from %s: %s", path, how)
    return start


def load_teacher(options: TrainOptions, path: str, dtype: torch.dtype, adapter: AdapterFiles | None = None) -> Any:
    """Load the model to train, with adapters where they are what is trained: fresh ones unless one is given.

    Raises:
        ConfigError: If it cannot be loaded, or is not of the kind that the options speak of.
    """
    config = load_config(path, KEY, options.trust_remote_code).get_text_config()
    if options.router_aux_loss_coef and not hasattr(config, "output_router_logits"):
        cause = f"{path} is no mixture of experts that gives its routers' logits"
        raise ConfigError(Fault("router_aux_loss_coef", options.router_aux_loss_coef, cause, "leave it out"))
    casts = options.use_peft and getattr(options, "cast_lm_head_to_fp32", False)
    if casts and getattr(config, "tie_word_embeddings", False):
        cause = f"{path} has one weight for head and embedding, which TRL does not find behind adapters"
        raise ConfigError(Fault("cast_lm_head_to_fp32", True, cause, "cast_lm_head_to_fp32=false, or use_peft=false"))
    model = load_model(path, dtype, options.attn_implementation, KEY, options.trust_remote_code)
    suit_attention(model, resolve_device(options.device))
    if adapter is not None:
        return continue_adapter(model, adapter, options, reference=bool(getattr(options, "beta", 0)))
    return add_adapters(model, options) if options.use_peft else model
