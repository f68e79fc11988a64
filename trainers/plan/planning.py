"""The plan of memory of a run as a user meets it: found from checked options, shown, and enforced."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainers.config import REPO, named_run
from trainers.errors import ConfigError, Fault
from trainers.options import TRAINING, WITH_MODELS, BaseOptions, CommonOptions
from trainers.plan.disks import Written, download_folder, downloads, in_turn
from trainers.plan.knobs import Change, knobs
from trainers.plan.known_models import KNOWN_MODELS
from trainers.plan.machine import Machine, read_machine
from trainers.plan.model_shapes import local_config
from trainers.plan.plan_table import knobs_text, plan_text
from trainers.plan.remedies import host_remedy, nearest_fit, refuse
from trainers.plan.run_models import first_start, shape_of, shapes_of, warmups_ahead
from trainers.plan.solve import Problem, device_of, precision_of, share_faults, solve, unasked_modes
from trainers.plan.start_faults import card_faults, config_faults, device_choice_faults, of_warmup, start_faults
from trainers.plan.workload import GIB, Plan
from trainers.settings.engine_specs import short_student
from trainers.settings.reward_specs import model_keys
from trainers.warmup import Waiting, warmup_folder
from trainers.weights.adapter_files import base_of, looks_local
from trainers.weights.hub import download_config

logger = logging.getLogger(__name__)


def machine_for(options: CommonOptions, vram_gb: float | None = None) -> Machine:
    """The machine to plan for: this one, with the card of `vram_gb` if that is given, or if it has none and the run
    needs one."""
    folder = run_folder(options)
    machine = read_machine(folder, vram_gb)
    wants = getattr(options, "vram_gb", None) if options.device != "cpu" else None
    if machine.card is None and wants is not None and device_of(options, machine) == "cuda":
        return read_machine(folder, wants)
    return machine


def run_folder(options: BaseOptions) -> Path:
    """Where a run writes, or above that (watch/outputs.py)."""
    return Path(options.output_dir or REPO / "results").expanduser().absolute()


def check_planned(options: CommonOptions) -> None:
    """Only what trains is planned ahead: what stage=score takes depends on its texts.

    Raises:
        ConfigError: If the stage does not.
    """
    if options.stage not in TRAINING:
        cause = "only the memory of runs that train is planned"
        raise ConfigError(Fault("stage", options.stage, cause, "name a run with stage=rl or stage=sft"))


@dataclass(frozen=True)
class Assessment:
    """A plan, and what speaks against starting with it.

    Attributes:
        nearest: Settings that fit, where these do not and any were found.
        memory: What does not fit onto the device or into host memory.
        start: What the run would refuse once it knows its device and its models' configs.
        written: What goes onto which disk, in turn.
        warmups: The same of the models `run:NAME` that are trained first, in turn; their disk is in `written`.
    """

    problem: Problem
    plan: Plan
    nearest: Change | None
    memory: list[Fault]
    start: list[Fault]
    written: list[Written] = field(default_factory=list)
    warmups: dict[str, "Assessment"] = field(default_factory=dict)

    def text(self, full: bool) -> str:
        """The table; with `full` the items of each phase, and what each knob would change."""
        lines = [plan_text(self.plan, self.problem.machine, full)]
        for told in unasked_modes(self.problem, self.plan):
            lines.append(f"  warning: {told.key}={told.value}: {told.cause}")
        for name, warmup in self.warmups.items():
            plan = warmup.plan
            lines.append(f"  run:{name} is trained first: peak {plan.peak / GIB:.2f} GiB ({plan.peak_phase})")
        lines += [f"  {written}" for written in self.written if written.kind != "disk" and written.size]
        if full and (changes := knobs_text(self.plan, knobs(self.problem))):
            lines += ["", changes]
        return "\n".join(lines)

    @property
    def disk(self) -> list[Fault]:
        return [fault for written in self.written for fault in written.faults]

    def with_warmups(self, kind: str) -> list[Fault]:
        """The faults of a kind, `memory` or `start`, with those of the warm-ups, which are named."""
        faults = list(getattr(self, kind))
        for name, warmup in self.warmups.items():
            faults += [of_warmup(name, fault) for fault in getattr(warmup, kind)]
        return faults


def problem_of(
    options: CommonOptions, vram_gb: float | None = None, devices: int = 1, longest: int | None = None
) -> Problem:
    """What is to be planned for a run, from its options and what this machine and the models' configs tell.

    Args:
        vram_gb: Plan for a card of so many GB that need not be here; None for the one that is.
        longest: Tokens of the longest text of stage=score.

    Raises:
        ConfigError: If a config or the card cannot be read.
    """
    return Problem(options, *shapes_of(options), machine_for(options, vram_gb), devices, longest)


def assess(problem: Problem, ahead: list[Waiting] | None = None) -> Assessment:
    """Decide every `auto`, plan the memory, and collect what speaks against a start.

    Args:
        ahead: Its `warmups_ahead`, where they are known already.

    Raises:
        ConfigError: If the config of a model that a warm-up starts from cannot be had.
    """
    found, options, folder = _assess_alone(problem), problem.options, run_folder(problem.options)
    hub, kept, warmups = downloads(options, (problem.teacher, problem.student)), 0, {}
    for warmup in warmups_ahead(options) if ahead is None else ahead:
        teacher, student = shapes_of(warmup.options)
        its = replace(problem, options=warmup.options, teacher=teacher, student=student, longest=None)
        warmups[warmup.name] = _assess_alone(its)
        kept += sum(warmups[warmup.name].plan.disk.values())
        hub |= downloads(warmup.options, (teacher, student))
    sizes = [("downloads", download_folder(), sum(hub.values())), ("warm-ups", warmup_folder(), kept)]
    sizes.append(("disk", folder, sum(found.plan.disk.values())))
    start = card_faults(found.plan, problem.machine) + found.start
    return replace(found, start=start, written=in_turn(sizes, folder, problem.machine.disk_free), warmups=warmups)


def _assess_alone(problem: Problem) -> Assessment:
    plan = solve(problem)
    nearest = None if plan.fits else nearest_fit(problem)
    start = share_faults(plan, problem.machine) + start_faults(plan)
    return Assessment(problem, plan, nearest, memory_faults(problem, plan, nearest), start)


def planned(options: CommonOptions, devices: int = 1, longest: int | None = None) -> Plan:
    """Show the plan of a run that is about to start, and return it, every `auto` decided.

    Args:
        longest: Tokens of the longest text of stage=score.

    Raises:
        ConfigError: If it does not fit, with the nearest settings that do, or could not start.
    """
    _download_configs(options)
    found = assess(problem_of(options, devices=devices, longest=longest))
    logger.info("%s", found.text(full=found.plan.work.device == "cuda"))
    start, memory = found.with_warmups("start"), found.with_warmups("memory") + found.disk
    if faults := start + ([] if options.ignore_memory_plan else memory):
        raise ConfigError(faults)
    for fault in memory:
        logger.warning("ignore_memory_plan: %s", fault)
    work = found.plan.work
    if work.is_rl and work.student is not None and (told := short_student(options, work.student.max_positions)):
        logger.warning("%s", told)
    return found.plan


def _download_configs(options: CommonOptions) -> None:
    """Take time for what a plan asks the hub of in passing: the models' configs, those of their adapters' bases and
    those of the warm-ups."""
    for warmup in warmups_ahead(options):
        _download_configs(warmup.options)
    for key, path in {key: getattr(options, key) for key in model_keys(options)}.items():
        base = None if path is None or named_run(path) else base_of(path, key)
        if base is not None and not looks_local(base) and base not in KNOWN_MODELS:
            download_config(base)


def faults_ahead(options: CommonOptions) -> list[Fault]:
    """What `planned` would refuse of a run and of the warm-ups before it that needs no plan and nothing of the hub: of
    a model that is neither here nor well known, nothing.

    Raises:
        ConfigError: If a warm-up is not valid.
    """
    if options.stage not in WITH_MODELS:
        return []
    machine, faults = machine_for(options), []
    runs = [(warmup.name, warmup.options) for warmup in warmups_ahead(options)]
    for name, its in (*runs, ("", options)):
        found = device_choice_faults(its, device_of(its, machine), precision_of(its, machine))
        found += _faults_of_configs_here(its)
        faults += [of_warmup(name, fault) for fault in found] if name else found
    return faults


def _faults_of_configs_here(options: CommonOptions) -> list[Fault]:
    """What the configs of a run's models tell that are here or well known; its warm-ups' own are not looked at."""
    faults = []
    for key in model_keys(options):
        path = getattr(options, key)
        try:
            start, _ = first_start(path, options)
            base = None if start is None else base_of(start, key)
            if base is None or base in KNOWN_MODELS or local_config(base) is not None:
                shape_of(path, key, options)
                if key == "model_name_or_path" and options.stage in TRAINING:
                    faults += config_faults(options)
        except ConfigError as error:
            faults += error.faults
    return faults


def memory_faults(problem: Problem, plan: Plan, nearest: Change | None) -> list[Fault]:
    """What does not fit onto the device or into host memory.

    Args:
        nearest: Settings that fit, if any were found.
    """
    faults = [] if plan.fits_device else list(refuse(plan, nearest).faults)
    host, machine = plan.host_need, problem.machine
    needs = ", ".join(f"{name} {size / GIB:.1f}" for name, size in plan.host.items())
    if host > machine.host_free:
        cause = f"it needs {host / GIB:.1f} GiB ({needs}) and {machine.host_free / GIB:.1f} GiB are free"
        faults.append(Fault("host memory", ..., cause, nearest.as_remedy() if nearest else host_remedy(problem, plan)))
    return faults


def run_plan(options: CommonOptions, vram_gb: float | None = None) -> bool:
    """Print the plan of a run and what each knob would change; start nothing.

    Returns:
        Whether it fits.
    """
    check_planned(options)
    found = assess(problem_of(options, vram_gb))
    print(found.text(full=True))
    memory = found.with_warmups("memory")
    if found.problem.machine.is_here:
        memory += found.disk
    else:
        memory = [fault for fault in memory if not fault.key.endswith("host memory")]
    if faults := memory + found.with_warmups("start"):
        print(f"\n{ConfigError(faults)}")
    return not faults
