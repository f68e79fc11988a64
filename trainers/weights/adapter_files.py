"""LoRA adapters as far as their files tell: what one holds, where its base is, whether a run may start from it.

Imports neither torch nor peft: a fault here is told before anything is loaded.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.config import named_run
from trainers.errors import ConfigError, Fault
from trainers.options import CommonOptions, MergeOptions, TrainOptions
from trainers.settings.reward_specs import model_keys

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER = "tokenizer_config.json"

# Our options and what adapter_config.json calls them.
LORA_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
# What peft can put into an adapter beside two plain matrices for each layer; vLLM's buffers have no place for it.
BEYOND_PLAIN_LORA = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "rank_pattern",
    "use_dora",
    "lora_bias",
)
# What takes no adapter, by the names of its modules in a transformers model.
OUTER = {"lm_head": ("lm_head",), "embed_tokens": ("embed_tokens", "model.embed_tokens")}
NO_ADAPTER = "TRL computes log-probabilities from the head's weight, and vLLM takes adapters of linear layers"


@dataclass(frozen=True)
class AdapterFiles:
    """A folder with a LoRA adapter; `config` is its adapter_config.json, `base` the folder or hub id of its base."""

    folder: Path
    config: dict[str, Any]
    base: str


def looks_local(path: str) -> bool:
    """Whether a name means a folder here rather than a hub id (owner/name)."""
    return path.startswith((".", "/", "~", "results/")) or path.count("/") > 1 or Path(path).exists()


def is_adapter(path: str | None) -> bool:
    """Whether a path is a folder with a LoRA adapter."""
    return path is not None and (Path(path).expanduser() / CONFIG).is_file()


def open_adapter(key: str, path: str, base: str | None = None) -> AdapterFiles:
    """Read what an adapter's folder says.

    Args:
        key: The option that names it.
        path: Its folder.
        base: Where its base is, if not where it says.

    Raises:
        ConfigError: If its files are not whole, or its base is not to be found.
    """
    folder = Path(path).expanduser()
    faults = []
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        cause = f"its {CONFIG} cannot be read: {error}"
        raise ConfigError(Fault(key, path, cause, "name a folder that save_pretrained() wrote, whole")) from error
    if not any((folder / name).is_file() for name in WEIGHTS):
        cause = f"it has an {CONFIG}, but no {WEIGHTS[0]} beside it"
        faults.append(Fault(key, path, cause, "name a folder that save_pretrained() wrote, whole"))
    if any((folder / name).is_file() for name in WHOLE_MODEL):
        cause = "it holds both a LoRA adapter and a whole model, perhaps of two runs with one output_dir"
        faults.append(Fault(key, path, cause, "move one of them to a folder of its own"))
    found = base or find_base(folder, config.get("base_model_name_or_path"))
    remedy = "./launch_mono.sh stage=merge model_name_or_path=<it> base_model=<its base> output_dir=<new folder>"
    if not found:
        cause = f"its {CONFIG} names no base model (base_model_name_or_path)"
        faults.append(Fault(key, path, cause, remedy))
    elif is_adapter(found):
        cause = f"its base {found} is a LoRA adapter itself"
        faults.append(Fault(key, path, cause, f"merge that one first: {merge_command(found)}"))
    elif looks_local(found) and not (Path(found).expanduser() / "config.json").is_file():
        cause = f"its base {found} is no model folder on this machine"
        where = "base_model" if base else key
        faults.append(Fault(where, found if base else path, cause, remedy))
    if faults:
        raise ConfigError(faults)
    return AdapterFiles(folder, config, found)


def find_base(folder: Path, recorded: str | None) -> str | None:
    """The base that an adapter names; it may have moved, together with the adapter's folder."""
    if not recorded:
        return None
    name = Path(recorded).name
    moved = (place / name for place in (folder, folder.parent))
    if looks_local(recorded) and not (Path(recorded).expanduser() / "config.json").is_file():
        recorded = next((str(path) for path in moved if (path / "config.json").is_file()), recorded)
    return recorded


def base_of(path: str, key: str) -> str:
    """Where the config and the weights of a model are: an adapter's base, any other path itself."""
    return open_adapter(key, path).base if is_adapter(path) else path


def tokenizer_of(path: str, key: str) -> str:
    """Where the tokenizer of a model is: with an adapter if it was saved there, else with its base."""
    if is_adapter(path) and not (Path(path).expanduser() / TOKENIZER).is_file():
        return base_of(path, key)
    return path


def merge_command(path: str) -> str:
    """The command that merges an adapter."""
    return f"./launch_mono.sh stage=merge model_name_or_path={path} output_dir=<new folder>"


def is_continued(options: TrainOptions) -> bool:
    """Whether an adapter in model_name_or_path is trained on; else it is merged."""
    if options.adapter_start == "auto":
        return options.use_peft
    return options.adapter_start == "continue"


def start_faults(options: TrainOptions, path: str | None, num_devices: int = 1) -> list[Fault]:
    """What is wrong with starting to train from `path`, as far as adapters go."""
    key, how = "model_name_or_path", options.adapter_start
    if how == "continue" and not options.use_peft:
        return [
            Fault("adapter_start", how, "use_peft=false trains every weight", "use_peft=true, or adapter_start=merge")
        ]
    if path is None or named_run(path):
        return []
    if not is_adapter(path):
        if how == "auto":
            return []
        cause = f"{key}={path} is no folder with a LoRA adapter"
        return [Fault("adapter_start", how, cause, "adapter_start=auto, or name an adapter's folder")]
    try:
        adapter = open_adapter(key, path)
    except ConfigError as error:
        return error.faults
    if is_continued(options):
        return list(_continue_faults(options, adapter))
    if num_devices > 1:
        cause = "an adapter is merged in one process"
        return [Fault(key, path, cause, f"merge it first: {merge_command(path)}")]
    return []


def adapter_faults(options: CommonOptions, num_devices: int, trains: bool) -> list[Fault]:
    """What is wrong with the adapters of a run: those it starts from, those it reads and those it makes."""
    faults = []
    if trains:
        faults += start_faults(options, options.model_name_or_path, num_devices) + list(_fresh_faults(options))
    for key in model_keys(options)[1 if trains else 0 :]:
        if is_adapter(path := getattr(options, key)):
            try:
                open_adapter(key, path)
            except ConfigError as error:
                faults += error.faults
    return faults


def _is_target(targets: str | list[str] | None, module: str) -> bool:
    """Whether peft finds a module with these `target_modules`: a regular expression for all of its name, or ends of it.

    Raises:
        re.error: If it is neither.
    """
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, module) is not None  # all-linear leaves the head out
    return any(module == name or module.endswith(f".{name}") for name in targets or ())


def _outer_targets(targets: str | list[str] | None, excluded: str | list[str] | None = None) -> list[str]:
    """Head and embedding, where they are among these targets."""

    def adapted(module: str) -> bool:
        return _is_target(targets, module) and not _is_target(excluded, module)

    return [name for name, modules in OUTER.items() if any(map(adapted, modules))]


def _fresh_faults(options: TrainOptions) -> Iterator[Fault]:
    targets = options.lora_target_modules
    try:
        outer = _outer_targets(targets)
    except re.error as error:
        cause = f"it is neither all-linear, a list of names nor a regular expression: {error}"
        yield Fault("lora_target_modules", targets, cause, "lora_target_modules=all-linear, or e.g. [q_proj, v_proj]")
        outer = []
    for name in outer:
        yield Fault("lora_target_modules", name, NO_ADAPTER, "lora_target_modules=all-linear")
    for name in () if options.use_peft else LORA_OPTIONS:
        if getattr(options, name) != TrainOptions.model_fields[name].default:
            cause = "use_peft=false trains every weight, and no adapter reads it"
            yield Fault(name, getattr(options, name), cause, "use_peft=true, or leave it out")
    if options.use_peft and getattr(options, "model_init", None) is not None:
        cause = "a model of fresh random weights has nothing to keep: adapters are for a trained one"
        yield Fault("use_peft", True, cause, "use_peft=false, or model_name_or_path with model_init=null")


def _continue_faults(options: TrainOptions, adapter: AdapterFiles) -> Iterator[Fault]:
    config, path = adapter.config, str(adapter.folder)
    beyond = [name for name in BEYOND_PLAIN_LORA if config.get(name)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if config.get("peft_type") != "LORA" or beyond:
        cause = f"an adapter with {', '.join(beyond)}" if beyond else f"an adapter of type {config.get('peft_type')}"
        remedy = f"adapter_start=merge, or {merge_command(path)}"
        yield Fault("model_name_or_path", path, f"{cause} cannot be trained on: the engine takes plain LoRA", remedy)
        return
    if outer := _outer_targets(config.get("target_modules"), config.get("exclude_modules")):
        cause = f"an adapter on {' and '.join(outer)} cannot be trained on: {NO_ADAPTER}"
        yield Fault("model_name_or_path", path, cause, "adapter_start=merge")
        return
    yield from lora_differences(options, config)


def lora_differences(options: TrainOptions, config: Mapping[str, Any]) -> Iterator[Fault]:
    """Options of a fresh adapter that are set, and are not what the adapter that is trained on has.

    Args:
        config: Of that adapter, as peft writes it.
    """
    for key, name in LORA_OPTIONS.items():
        ours, theirs = getattr(options, key), config.get(name)
        if key not in options.model_fields_set or ours == "all-linear":  # that one needs the model: see adapters.py
            continue
        if isinstance(ours, list) and isinstance(theirs, list):
            ours, theirs = sorted(ours), sorted(theirs)
        if ours != theirs:
            cause = f"the adapter that is trained on has {name}={theirs}"
            remedy = f"leave {key} out, or adapter_start=merge for a fresh adapter on the merged model"
            yield Fault(key, getattr(options, key), cause, remedy)


def merge_faults(options: MergeOptions, num_devices: int) -> list[Fault]:
    """What is wrong with the options of stage=merge."""
    faults = []
    path, output = options.model_name_or_path, options.output_dir
    if num_devices > 1:
        faults.append(
            Fault("num_processes", num_devices, "merging takes one process", "./launch_mono.sh stage=merge ...")
        )
    if path is None:
        remedy = "model_name_or_path=<a folder with adapter_config.json>"
        faults.append(Fault("model_name_or_path", None, "no adapter is named", remedy))
    elif not is_adapter(path):
        there = Path(path).expanduser().is_dir()
        cause = f"the folder has no {CONFIG}: it holds no LoRA adapter" if there else "there is no such folder"
        faults.append(Fault("model_name_or_path", path, cause, "name the folder that a run with use_peft=true wrote"))
    else:
        try:
            open_adapter("model_name_or_path", path, options.base_model)
        except ConfigError as error:
            faults += error.faults
    if output is not None and holds_model(Path(output).expanduser()):
        faults.append(Fault("output_dir", output, "the folder already holds a model", "name a new folder"))
    return faults


def output_faults(options: TrainOptions) -> list[Fault]:
    """What a run that trains would spoil in its `output_dir`."""
    if options.output_dir is None:
        return []
    folder = Path(options.output_dir).expanduser()
    models = {key: getattr(options, key, None) for key in ("model_name_or_path", "student_model")}
    faults = [
        Fault("output_dir", options.output_dir, f"{key} lies there and would be overwritten", "name another folder")
        for key, path in models.items()
        if path is not None and folder.is_dir() and Path(path).absolute() == folder.absolute()
    ]
    if options.save_strategy != "no" and (kept := sorted(folder.glob("checkpoint-*"))):
        cause = f"it holds {kept[0].name} of an earlier run, which this one's checkpoints would take the place of"
        faults.append(Fault("output_dir", options.output_dir, cause, "name another folder, or remove the checkpoints"))
    other, kind = (WHOLE_MODEL, "whole model") if options.use_peft else ((CONFIG, *WEIGHTS), "LoRA adapter")
    if not faults and any((folder / name).exists() for name in other):
        cause = f"it holds a {kind} of another run: beside this one's neither could be told apart"
        faults.append(Fault("output_dir", options.output_dir, cause, "name another folder"))
    return faults


def holds_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return any((folder / name).exists() for name in (CONFIG, *WEIGHTS, *WHOLE_MODEL, "config.json"))
