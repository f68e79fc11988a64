"""The models that a run names, those behind its warm-ups too: what they are, before any is loaded."""

from dataclasses import replace
from typing import Any

from trainers.config import named_run
from trainers.errors import ConfigError
from trainers.options import CommonOptions, ModelOptions
from trainers.plan.model_shapes import AdapterShape, ModelShape, model_shape, read_config
from trainers.settings.reward_specs import model_keys
from trainers.warmup import Waiting, waiting, warmup_options
from trainers.weights.adapter_files import base_of, is_adapter, is_continued, open_adapter


def shapes_of(options: CommonOptions) -> tuple[ModelShape, ModelShape | None]:
    """The sizes of the teacher and of the student, if one is asked.

    Raises:
        ConfigError: If the config of one cannot be had, or of both.
    """
    shapes: list[ModelShape | None] = []
    faults = []
    for key in model_keys(options):
        path = getattr(options, key)
        try:
            fresh = path is None and options.stage == "sft"
            shapes.append(
                _named(options.model_init, "model_init", options) if fresh else _with_adapter(path, key, options)
            )
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError(faults)
    teacher, student = (*shapes, None)[:2]
    return teacher, student


def _with_adapter(path: str, key: str, options: CommonOptions) -> ModelShape:
    return replace(shape_of(path, key, options), adapter=_adapter(path, key, options))


def shape_of(path: str, key: str, options: CommonOptions) -> ModelShape:
    """The sizes of one of them; of an adapter those of its base.

    Raises:
        ConfigError: If its config cannot be had.
    """
    start, its = first_start(path, options)
    if start is None:
        return _named(its.model_init, path, options)
    return model_shape(read_config(base_of(start, key), key), start, options.trust_remote_code)


def first_start(path: str | None, options: CommonOptions) -> tuple[str | None, CommonOptions]:
    """Where the weights of a model first come from, and the options that name it: those of the first warm-up behind a
    `run:NAME`, and no path where it begins with fresh weights."""
    if name := named_run(path):
        warmup = warmup_options(name, options, needs_device=False)[1]
        return first_start(warmup.model_name_or_path, warmup)
    return path, options


def _adapter(path: str, key: str, options: CommonOptions) -> AdapterShape | None:
    """Of the adapter that a path is, or will be once its warm-up has trained it."""
    if name := named_run(path):
        warmup = warmup_options(name, options, needs_device=False)[1]
        start = warmup.model_name_or_path
        kept = _adapter(start, "model_name_or_path", warmup) if start is not None and is_continued(warmup) else None
        return (kept or AdapterShape(warmup.lora_r, warmup.lora_target_modules)) if warmup.use_peft else None
    config = open_adapter(key, path).config if is_adapter(path) else {}
    return AdapterShape(config["r"], config["target_modules"]) if config.get("peft_type") == "LORA" else None


def _named(model_init: dict[str, Any], name: str, options: ModelOptions) -> ModelShape:
    return model_shape({"vocab_size": 512} | model_init, name, options.trust_remote_code)


def warmups_ahead(options: CommonOptions) -> list[Waiting]:
    """The warm-ups that a run would train first, in turn, those of both models once.

    Raises:
        ConfigError: If one is not valid.
    """
    named = (getattr(options, key) for key in model_keys(options))
    return list({warmup.folder: warmup for path in named for warmup in waiting(path, options)}.values())
