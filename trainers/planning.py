"""The plan of memory of a run as a user meets it: found from checked options, shown, and enforced."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainers.adapter_files import base_of, is_adapter, is_continued, open_adapter
from trainers.engine_specs import device_faults, position_faults, quantized_teacher_faults
from trainers.errors import ConfigError, Fault
from trainers.machine import Machine, read_machine
from trainers.model_shapes import AdapterShape, ModelShape, model_shape, read_config
from trainers.optim_specs import TORCH_DTYPES, optimizer_faults, precision_faults
from trainers.plan_table import knobs_text, plan_text
from trainers.reward_specs import asked_student
from trainers.solve import Change, Solved, device_of, knobs, nearest_fit, refuse, solve
from trainers.warmup import warmup_options
from trainers.workload import GIB

logger = logging.getLogger(__name__)


def machine_for(options: Any, vram_gb: float | None = None) -> Machine:
    """The machine to plan for: this one, with the card of `vram_gb` if that is given, or if it has none and the run
    needs one."""
    folder = Path(options.output_dir or "results").expanduser().absolute()
    machine = read_machine(folder, vram_gb)
    wants = options.vram_gb if options.device != "cpu" else None
    if machine.card is None and wants is not None and device_of(options, machine) == "cuda":
        return read_machine(folder, wants)
    return machine


def check_planned(options: Any) -> None:
    """Only what trains is planned.

    Raises:
        ConfigError: If the stage does not.
    """
    if options.stage not in ("rl", "sft"):
        cause = "only the memory of runs that train is planned"
        raise ConfigError(Fault("stage", options.stage, cause, "name a run with stage=rl or stage=sft"))


def shapes_of(options: Any) -> tuple[ModelShape, ModelShape | None]:
    """The sizes of the teacher and of the student, if one is asked.

    Raises:
        ConfigError: If the config of one cannot be had.
    """
    if options.model_name_or_path is None:
        teacher = _named(options.model_init, "model_init", options)
    else:
        teacher = _with_adapter(options.model_name_or_path, "model_name_or_path", options)
    if not asked_student(options):
        return teacher, None
    return teacher, _with_adapter(options.student_model, "student_model", options)


def _with_adapter(path: str, key: str, options: Any) -> ModelShape:
    return replace(_shape(path, key, options), adapter=_adapter(path, key, options))


def _shape(path: str, key: str, options: Any) -> ModelShape:
    if path.startswith("run:"):
        warmup = warmup_options(path[4:], options, needs_device=False)[1]
        if warmup.model_name_or_path is None:
            return _named(warmup.model_init, path, options)
        return _shape(warmup.model_name_or_path, key, warmup)
    return model_shape(read_config(base_of(path, key), key), path, options.trust_remote_code)


def _adapter(path: str, key: str, options: Any) -> AdapterShape | None:
    """Of the adapter that a path is, or will be once its warm-up has trained it."""
    if path.startswith("run:"):
        warmup = warmup_options(path[4:], options, needs_device=False)[1]
        start = warmup.model_name_or_path
        kept = _adapter(start, "model_name_or_path", warmup) if start is not None and is_continued(warmup) else None
        return (kept or AdapterShape(warmup.lora_r, warmup.lora_target_modules)) if warmup.use_peft else None
    config = open_adapter(key, path).config if is_adapter(path) else {}
    return AdapterShape(config["r"], config["target_modules"]) if config.get("peft_type") == "LORA" else None


def _named(model_init: dict[str, Any], name: str, options: Any) -> ModelShape:
    return model_shape({"vocab_size": 512} | model_init, name, options.trust_remote_code)


def plan_run(options: Any, machine: Machine, devices: int = 1) -> Solved:
    """Decide every `auto` of a run that trains, and plan its memory."""
    teacher, student = shapes_of(options)
    return solve(options, teacher, student, machine, devices)


def planned_options(options: Any, devices: int = 1) -> Any:
    """Show the plan of a run that is about to start, and return its options with every `auto` decided.

    Raises:
        ConfigError: If it does not fit, with the nearest settings that do.
    """
    machine = machine_for(options)
    teacher, student = shapes_of(options)
    solved = solve(options, teacher, student, machine, devices)
    logger.info("%s", plan_text(solved, machine, full=solved.plan.work.device == "cuda"))
    nearest = None if solved.plan.fits else nearest_fit(options, teacher, student, machine, devices)
    faults = memory_faults(solved, machine, nearest)
    if faults and not options.ignore_memory_plan:
        raise ConfigError(faults)
    for fault in faults:
        logger.warning("ignore_memory_plan: %s", fault)
    return solved.options


def start_faults(solved: Solved) -> list[Fault]:
    """What a run refuses when it knows its device and its models' configs, before it loads any of them."""
    options, work = solved.options, solved.plan.work
    dtype = TORCH_DTYPES[work.precision]
    faults = precision_faults(options, work.device) + optimizer_faults(options, work.device, dtype)
    if work.is_rl:
        faults += device_faults(options, work.device, dtype, work.student_mode)
        faults += position_faults(options, work.teacher.max_positions)
        path, key = options.model_name_or_path, "model_name_or_path"
        config = {} if path.startswith("run:") else read_config(base_of(path, key), key)
        faults += quantized_teacher_faults(options, config.get("quantization_config"))
    return faults


def memory_faults(solved: Solved, machine: Machine, nearest: Change | None) -> list[Fault]:
    """What does not fit onto the device, into host memory or onto the disk.

    Args:
        nearest: Settings that fit, if any were found.
    """
    faults = [] if solved.plan.fits_device else list(refuse(solved, nearest).faults)
    host, disk = solved.plan.host_need, sum(solved.plan.disk.values())
    needs = ", ".join(f"{name} {size / GIB:.1f}" for name, size in solved.plan.host.items())
    if host > machine.host_free:
        cause = f"it needs {host / GIB:.1f} GiB ({needs}) and {machine.host_free / GIB:.1f} GiB are free"
        faults.append(Fault("host memory", ..., cause, nearest.as_remedy() if nearest else _host_remedy(solved)))
    if disk > machine.disk_free:
        cause = f"its checkpoints take up to {disk / GIB:.1f} GiB and {machine.disk_free / GIB:.1f} GiB are free"
        remedy = "output_dir=<a larger disk>, save_total_limit=1, save_only_model=true or save_strategy=no"
        faults.append(Fault("disk", ..., cause, remedy))
    return faults


def _host_remedy(solved: Solved) -> str:
    if solved.plan.work.optimizer == "cpu_offload":
        return "use_peft=true, or a machine with more memory"
    return "beta=0 sync_ref_model=false (no reference), student_mode=resident, or a machine with more memory"


def run_plan(options: Any, vram_gb: float | None = None) -> bool:
    """Print the plan of a run and what each knob would change; start nothing.

    Returns:
        Whether it fits.
    """
    check_planned(options)
    machine = machine_for(options, vram_gb)
    teacher, student = shapes_of(options)
    solved = solve(options, teacher, student, machine)
    print(plan_text(solved, machine, full=True))
    print("\n" + knobs_text(solved, knobs(options, teacher, student, machine)))
    nearest = None if solved.plan.fits else nearest_fit(options, teacher, student, machine)
    faults = memory_faults(solved, machine, nearest)
    if not machine.is_here:
        faults = [fault for fault in faults if fault.key == "memory"]
    faults += start_faults(solved)
    if faults:
        print(f"\n{ConfigError(faults)}")
    return not faults
