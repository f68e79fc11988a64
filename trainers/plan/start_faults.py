"""What a run refuses once it knows its device and its models' configs, before it loads or trains any of them."""

import os
import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainers.config import named_run
from trainers.errors import Fault
from trainers.options import TRAINING, CommonOptions, RLOptions, TrainOptions
from trainers.plan.machine import MIN_COMPUTE, Machine
from trainers.plan.model_shapes import longrope_limit, read_config
from trainers.plan.run_models import first_start, shape_of
from trainers.plan.workload import Plan, Workload
from trainers.settings.engine_specs import bridge_name, device_faults, has_engine
from trainers.settings.optim_specs import TORCH_DTYPES, optimizer_faults, precision_faults
from trainers.warmup import warmup_options
from trainers.weights.adapter_files import LORA_OPTIONS, base_of, is_continued, lora_differences

# What transformers and checkpoints call the layers of an expert, and all of them.
EXPERTS = frozenset(("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "experts"))
COMPILERS = "apt install build-essential python3-dev, or as your system has it"


def card_faults(plan: Plan, machine: Machine) -> list[Fault]:
    """What is wrong with a card, however much memory it has."""
    if plan.work.device == "cpu":
        return []
    faults = []
    if machine.card.compute < MIN_COMPUTE:
        cause = f"{machine.card.name} has compute capability {machine.card.compute}, and the packages, built for CUDA "
        cause += f"13, have no kernels below {MIN_COMPUTE}"
        faults.append(Fault("GPU", ..., cause, "a newer card, or device=cpu"))
    if machine.is_here and (fault := compiler_fault()):
        faults.append(fault)
    return faults


def compiler_fault() -> Fault | None:
    """Of a machine without what Triton builds the callers of its kernels with: vLLM's, TRL's and torch.compile's."""
    missing = [] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler"]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing += [] if header.is_file() else [str(header)]
    if not missing:
        return None
    cause = f"missing here: {', '.join(missing)}; kernels are compiled when a run starts"
    return Fault("compiler", ..., cause, COMPILERS)


def start_faults(plan: Plan) -> list[Fault]:
    """What a run refuses when it knows its device and its models' configs, before it loads any of them."""
    work = plan.work
    faults = device_choice_faults(plan.options, work.device, work.precision) + _frozen_faults(work)
    return faults + (config_faults(plan.options) if work.trains else [])


def _frozen_faults(work: Workload) -> list[Fault]:
    """What the checkpoints of models that are only read do not admit."""
    faults, kind = [], getattr(work.options, "student_quantization", None)
    for key, shape in (("student_mode", work.student), ("reference_mode", work.teacher)):
        if shape is not None and getattr(work, key) == "streamed" and not shape.can_stream:
            what = f"a checkpoint in {shape.quantized}" if shape.quantized else shape.model_type
            remedy = f"{key}=resident, or cpu, where it is read slowly"
            faults.append(Fault(key, "streamed", f"{what} cannot be streamed", remedy))
    if kind and work.student is not None and work.student.quantized:
        cause = f"the student's checkpoint is quantized already ({work.student.quantized})"
        faults.append(Fault("student_quantization", kind, cause, "leave it out"))
    return faults


def device_choice_faults(options: CommonOptions, device: str, precision: str) -> list[Fault]:
    """What speaks against the options on this device, in this precision."""
    dtype, faults = TORCH_DTYPES[precision], precision_faults(options, device)
    if options.stage in TRAINING:
        faults += optimizer_faults(options, device, dtype)
    if options.stage == "rl":
        faults += device_faults(options, device, dtype)
        faults += _differences_from_warmup(options, options.model_name_or_path)
    return faults


def config_faults(options: TrainOptions) -> list[Fault]:
    """What speaks against training a model of such a config. That of a warm-up's start speaks against the warm-up."""
    path, key, faults = options.model_name_or_path, "model_name_or_path", []
    start, its = first_start(path, options)
    if start is None:
        config = its.model_init
    else:
        base = base_of(start, key)
        config = read_config(base, key)
        if its is options and config.get("quantization_config") is not None:
            faults += _quantized_faults(options, base)
    if options.stage == "rl":
        faults += _position_faults(options, shape_of(path, key, options).max_positions, longrope_limit(config))
        faults += _mixture_faults(options) if has_experts(config) else []
    return faults


def _quantized_faults(options: TrainOptions, base: str) -> list[Fault]:
    """What a model to train is refused with where its checkpoint, or its adapter's base, is quantized.

    Args:
        base: Where its config is: the model itself, or the base of the adapter that it is.
    """
    path = options.model_name_or_path
    whose = "its weights are" if base == path else f"the weights of its base {base} are"
    cause = (
        f"{whose} quantized: they take no steps themselves, and adapters on them are not supported: in RL the engine "
        "is to share the base, and vLLM has no bitsandbytes weights, and repacks others (GPTQ, AWQ) for its kernels"
    )
    remedy = "model_name_or_path=<the same model's bf16 checkpoint>, with use_peft=true where memory is short"
    if base != path:
        remedy = f"merge it into the base's bf16 checkpoint: ./launch_mono.sh stage=merge model_name_or_path={path} "
        remedy += "base_model=<that> output_dir=<new folder>"
    return [Fault("model_name_or_path", path, cause, remedy)]


def _position_faults(options: RLOptions, positions: int, longrope: int | None) -> list[Fault]:
    """Lengths that a teacher of so many positions has no room for, with the longest that fit.

    Args:
        longrope: Up to how many tokens trainer and engine have the same rotary embedding; None for any number.
    """
    faults, limit, what = [], positions, f"the teacher's {positions} positions"
    if longrope is not None and longrope < positions:
        limit = longrope
        what = f"{limit} tokens, above which the teacher's rotary embedding (longrope) takes its long factors: vLLM "
        what += "then does so for every text, transformers for batches with a long one in them"
    if options.max_prompt_length + options.max_completion_length > limit:
        cause = f"with max_prompt_length {options.max_prompt_length} it exceeds {what}"
        remedy = f"max_completion_length={limit - options.max_prompt_length}"
        if options.max_prompt_length >= limit:
            remedy = f"max_prompt_length={limit // 2} max_completion_length={limit - limit // 2}"
        faults.append(Fault("max_completion_length", options.max_completion_length, cause, remedy))
    if (options.vllm_max_model_length or 0) > limit:
        cause, remedy = f"it exceeds {what}", "leave it out: prompt and completion decide it"
        faults.append(Fault("vllm_max_model_length", options.vllm_max_model_length, cause, remedy))
    return faults


def has_experts(config: dict[str, Any]) -> bool:
    """Whether it is the config of a mixture of experts: each family has its own names for how many there are."""
    named = {key: value for key, value in config.items() if "expert" in key or "moe" in key}
    inner = [value for value in config.values() if isinstance(value, dict)]
    return any(type(value) is int and value > 0 for value in named.values()) or any(map(has_experts, inner))


def _mixture_faults(options: RLOptions) -> list[Fault]:
    """What a mixture of experts as a teacher is refused with. vLLM arranges experts for its kernels when it has loaded
    them; where that was tried (on a CPU) neither `load_weights` nor vLLM's own reloading reached them any more."""
    if not has_engine(options):
        return []
    faults, bridge = [], bridge_name(options)
    if bridge != "restart":
        cause = (
            "the teacher is a mixture of experts, which vLLM arranges anew as it loads them: an engine that runs does "
        )
        cause += "not see what they learn"
        remedy = "weight_bridge=restart, which takes seconds at each step, or use_vllm=false"
        faults.append(Fault("weight_bridge", options.weight_bridge or bridge, cause, remedy))
    targets = options.lora_target_modules
    chosen = EXPERTS if isinstance(targets, str) else {name.rpartition(".")[2] for name in targets}
    if options.use_peft and EXPERTS & chosen:
        cause = "the teacher is a mixture of experts, and adapters of experts do not reach the engine"
        remedy = "lora_target_modules=[q_proj,k_proj,v_proj,o_proj]"
        faults.append(Fault("lora_target_modules", options.lora_target_modules, cause, remedy))
    return faults


def _differences_from_warmup(options: TrainOptions, path: str) -> list[Fault]:
    """What is wrong with training on the adapter that a warm-up will leave, or with there being none."""
    name = named_run(path)
    if name is None or not is_continued(options):
        return []
    warmup = warmup_options(name, options, needs_device=False)[1]
    if warmup.use_peft:
        return list(lora_differences(options, {theirs: getattr(warmup, ours) for ours, theirs in LORA_OPTIONS.items()}))
    if options.adapter_start == "auto":  # a fresh adapter on what it leaves
        return []
    cause = f"{path} leaves no adapter: it trains every weight"
    return [Fault("adapter_start", options.adapter_start, cause, "adapter_start=auto")]


def of_warmup(name: str, fault: Fault) -> Fault:
    remedy = f"train it by itself (./launch_mono.sh {name}.yaml ...) and name its folder: {fault.remedy}"
    return replace(fault, key=f"run:{name}: {fault.key}", remedy=remedy)
