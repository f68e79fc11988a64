"""A LoRA adapter merged into its base: an ordinary checkpoint, for stage=merge and for runs that start from one."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import align_special_tokens

from trainers.errors import ConfigError, Fault
from trainers.models import DTYPES, load_config, load_model, load_tokenizer
from trainers.options import MergeOptions, ModelOptions
from trainers.weights.adapter_files import CONFIG, WEIGHTS, AdapterFiles, is_adapter, open_adapter, tokenizer_of
from trainers.weights.adapters import load_adapter

logger = logging.getLogger(__name__)

RECORD = "merged_from.json"  # what a merged model was made of
MERGED = {"model_name_or_path": "merged_start", "student_model": "merged_student"}
LARGEST_CHANGE = 0.01  # nats that merging may move a log-probability by, in fp32; on tiny models it is 1e-6


def run_merge(options: MergeOptions, output_dir: Path) -> None:
    """Merge the adapter of stage=merge; the model is in `output_dir` then."""
    adapter = open_adapter("model_name_or_path", options.model_name_or_path, options.base_model)
    merge_adapter(adapter, DTYPES.get(options.precision), options.trust_remote_code, output_dir, "model_name_or_path")


def whole_model(options: ModelOptions, key: str, path: str, output_dir: Path, dtype: torch.dtype) -> str:
    """The folder or hub id of an ordinary model: an adapter is merged into its base, in a folder of the run.

    Everything behind this (engine, reference, streamed layers) reads a checkpoint's files and knows no adapters.

    Raises:
        ConfigError: If it cannot be merged, or the folder holds what another adapter was merged to.
    """
    if not is_adapter(path):
        return path
    adapter, folder = open_adapter(key, path), output_dir / MERGED[key]
    if (folder / RECORD).is_file():
        if json.loads((folder / RECORD).read_text(encoding="utf-8")) != _record(adapter, dtype):
            cause = f"its folder {folder.name} holds the merge of another adapter"
            raise ConfigError(Fault("output_dir", str(output_dir), cause, "name a new folder"))
        logger.info("%s: merged before, in %s", key, folder)
        return str(folder)
    merge_adapter(adapter, dtype, options.trust_remote_code, folder, key)
    return str(folder)


def merge_adapter(adapter: AdapterFiles, dtype: torch.dtype | None, trust: bool, folder: Path, key: str) -> None:
    """Merge an adapter into its base and save the model with its tokenizer, template and generation config.

    Args:
        adapter: The adapter.
        dtype: Type of the weights; None for the base's own.
        trust: See trust_remote_code.
        folder: Where to; its config.json is written last, so that an interrupted merge is not taken for a model.
        key: The option that named the adapter.

    Raises:
        ConfigError: If base or adapter cannot be loaded, do not fit, or do not give finite weights.
    """
    config = load_config(adapter.base, key, trust)
    if getattr(config, "quantization_config", None) is not None:
        cause = f"its base {adapter.base} is quantized, and a merge would round what the adapter learned once more"
        remedy = "./launch_mono.sh stage=merge ... base_model=<the same model's bf16 checkpoint>"
        raise ConfigError(Fault(key, str(adapter.folder), cause, remedy))
    dtype = dtype or config.get_text_config().dtype or torch.float32
    tokenizer = load_tokenizer(tokenizer_of(str(adapter.folder), key), None, None, key, trust)
    logger.info("merging the adapter of %s into %s (fp32, on the CPU)", adapter.folder, adapter.base)
    # Summed in fp32 and rounded once: in bf16 the adapter's part would be rounded by itself first, and most of what a
    # short training learned is smaller than what a bf16 weight can take up.
    model = load_model(adapter.base, torch.float32, None, key, trust)
    model = _merged(load_adapter(model, adapter, key, is_trainable=False), adapter, key).to(dtype)
    if bad := next((name for name, p in model.named_parameters() if not p.isfinite().all()), None):
        cause = f"{name_of(dtype)} has no room for the merged weight {bad}"
        raise ConfigError(Fault("precision", name_of(dtype), cause, "precision=bf16 or fp32"))
    align_special_tokens(model, tokenizer)  # as transformers' Trainer does before it saves a whole model
    partial = folder / f".partial-{os.getpid()}"
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / RECORD).write_text(json.dumps(_record(adapter, dtype), indent=1) + "\n", encoding="utf-8")
    files = sorted(partial.iterdir(), key=lambda file: file.name in ("config.json", RECORD))
    size = sum(file.stat().st_size for file in files) / 2**20
    for file in files:
        file.rename(folder / file.name)
    partial.rmdir()
    logger.info("merged model, %s, %.1f MiB: %s", name_of(dtype), size, folder)


@torch.no_grad()
def _merged(model: Any, adapter: AdapterFiles, key: str) -> PreTrainedModel:
    """Merge, and see that what the model says did not change (a tied head, say, cannot have an adapter of its own)."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(16).remainder(vocabulary)[None]
    before = _logprobs(model.eval(), ids)
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # peft found weights that are not finite
        cause = f"the adapter is broken: {str(error).splitlines()[0]}"
        raise ConfigError(Fault(key, str(adapter.folder), cause, "an earlier checkpoint of that run")) from error
    change = (_logprobs(merged, ids) - before).abs().max().item()
    if not change < LARGEST_CHANGE:  # NaN too
        cause = f"merging it into {adapter.base} changes log-probabilities by {change:.3g}"
        raise ConfigError(
            Fault(
                key,
                str(adapter.folder),
                cause,
                "use it as it is (use_peft=true), or, where it adapts a tied head, train one that does not",
            )
        )
    logger.info("log-probabilities of base + adapter and of the merged model differ by at most %.1e", change)
    return merged


def _logprobs(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _record(adapter: AdapterFiles, dtype: torch.dtype) -> dict[str, str]:
    digest = hashlib.sha256()
    for name in (CONFIG, *WEIGHTS):
        if (adapter.folder / name).is_file():
            digest.update((adapter.folder / name).read_bytes())
    folder = str(adapter.folder.absolute())
    return {"adapter": folder, "sha256": digest.hexdigest(), "base": adapter.base, "precision": name_of(dtype)}


def name_of(dtype: torch.dtype) -> str:
    """A type by this project's name for it, else torch's."""
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype))
