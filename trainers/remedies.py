"""What is offered where a run does not fit, and what each change of its options would lead to."""

from dataclasses import dataclass
from typing import Any

from trainers.batch import batch_plan
from trainers.checks import option_faults
from trainers.config import REPO
from trainers.engine_specs import device_faults
from trainers.errors import ConfigError, Fault
from trainers.machine import Machine
from trainers.memory import cache_share
from trainers.optim_specs import TORCH_DTYPES
from trainers.solve import DECIDED, Problem, Solved, device_of, precision_of, reads_teacher, solve
from trainers.workload import GIB

# What takes less memory, the least painful first: option, value, and where it applies.
FRUGAL: tuple[dict[str, Any], ...] = (
    {"gradient_checkpointing": True},
    {"precision": "bf16"},
    {"per_device_train_batch_size": "auto", "generation_aggregation_steps": None},
    {"vllm_gpu_memory_utilization": "auto", "kv_cache_gib": None},
    {"kv_cache_gib": None},
    {"weight_bridge": None},
    {"student_mode": "streamed", "student_quantization": None},
    {"reference_mode": "streamed"},
    {"student_tokens_per_pass": "auto"},
    {"optim": "adamw_8bit"},
    {"optim": "cpu_offload"},
    # These three take less of the host.
    {"activation_offloading": False},
    {"reference_mode": "resident"},
    {"student_mode": "resident"},
    {"max_completion_length": 0.5},
    {"max_prompt_length": 0.5},
    {"max_length": 0.5},
    {"use_peft": True, "optim": "auto", "sync_ref_model": False, "reference_mode": "auto", "weight_bridge": None},
)


OTHERS: tuple[dict[str, Any], ...] = (
    {"max_completion_length": 2.0},
    {"beta": 0.0, "sync_ref_model": False},
)


@dataclass(frozen=True)
class Change:
    """Other settings, and the plan with them."""

    settings: dict[str, Any]
    solved: Solved

    def as_remedy(self) -> str:
        """To be pasted, and what it leads to."""
        return f"{self}   (peak {self.solved.plan.peak / GIB:.1f} GiB)"

    def __str__(self) -> str:
        return " ".join(f"{key}={_written(value)}" for key, value in self.settings.items())


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _changed(options: Any, knob: dict[str, Any]) -> dict[str, Any]:
    """What a knob changes of these options; empty where it changes nothing or does not apply."""
    settings = {}
    for key, value in knob.items():
        if not hasattr(options, key):
            continue
        now = getattr(options, key)
        if isinstance(value, float) and isinstance(now, int):
            value = max(16, int(now * value))
        if value != now and not (key == "precision" and now != "fp32"):
            settings[key] = value
    leads = next(iter(knob))
    return settings if leads in settings else {}


def _outcome(solved: Solved) -> tuple[Any, ...]:
    """What is told of a plan: where the KV cache takes what is left, the peak alone is always the same."""
    decided = (getattr(solved.options, key, None) for key in DECIDED)
    return solved.plan.peak, solved.plan.host_need, cache_share(solved.plan.work), *decided


def knobs(problem: Problem) -> list[Change]:
    """Each single change that takes another amount of memory or leaves room for another decision of the solver, with
    the plan it leads to."""
    changes = []
    now = _outcome(solve(problem))
    for knob in (*FRUGAL, *OTHERS):
        settings = _changed(problem.options, knob)
        if settings and _applies(problem, settings):
            change = Change(settings, solve(problem.changed(settings)))
            if _outcome(change.solved) != now:
                changes.append(change)
    return changes


def _applies(problem: Problem, settings: dict[str, Any]) -> bool:
    """Whether a change makes sense with the rest of the options, and would be taken."""
    options, machine = problem.options, problem.machine
    if not _makes_sense(options, settings, machine):
        return False
    changed = options.model_copy(update=settings)
    faults = option_faults(changed, problem.devices, REPO, needs_device=False)
    if options.stage == "rl":
        mode = "resident" if changed.student_mode == "auto" else changed.student_mode
        dtype = TORCH_DTYPES[precision_of(changed, machine)]
        faults += device_faults(changed, device_of(changed, machine), dtype, mode)
    return not faults


def _makes_sense(options: Any, settings: dict[str, Any], machine: Machine) -> bool:
    """Whether a change can take less memory with the rest of the options."""
    if settings.keys() & {"max_prompt_length"} and options.stage == "sft":
        return False  # max_length is what counts
    device, adapters = device_of(options, machine), getattr(options, "use_peft", False)
    if settings.get("optim") in ("adamw_8bit", "cpu_offload"):
        return not adapters and precision_of(options, machine) == "bf16"
    if {"student_mode", "reference_mode"} & settings.keys() and "use_peft" not in settings:
        streams_at_all = device == "cuda" or "streamed" in settings.values()
        return streams_at_all and ("student_mode" in settings or reads_teacher(options))
    return settings.get("precision") != "bf16" or device == "cuda"


def nearest_fit(problem: Problem) -> Change | None:
    """Settings that fit device and host: one change after another, the least painful first, and then none of them that
    the others make needless; None if nothing fits."""
    steps: list[dict[str, Any]] = []

    def with_steps(steps: list[dict[str, Any]]) -> Change:
        settings = {k: v for step in steps for k, v in step.items()}
        settings = {k: v for k, v in settings.items() if v != getattr(problem.options, k)}
        return Change(settings, solve(problem.changed(settings)))

    best = with_steps(steps)
    for knob in (*FRUGAL, {"max_completion_length": 0.5}, {"max_completion_length": 0.5}):
        current = problem.changed(best.settings)
        settings = _changed(current.options, knob)
        if not settings or not _applies(current, settings):
            continue
        change = with_steps([*steps, settings])
        if change.solved.plan.missing < best.solved.plan.missing:
            steps, best = [*steps, settings], change
        if best.solved.plan.fits:
            break
    else:
        return None
    for step in reversed(steps):
        fewer = [kept for kept in steps if kept is not step]
        change = with_steps(fewer)
        if change.solved.plan.fits:
            steps, best = fewer, change
    return best


def refuse(solved: Solved, nearest: Change | None) -> ConfigError:
    """What a user reads whose run does not fit the device."""
    plan = solved.plan
    stage = solved.options.stage
    work = batch_plan(solved.options).equation() if stage == "rl" else f"stage={stage}"
    need, free = plan.peak / GIB, plan.available / GIB
    cause = f"the {plan.peak_phase} phase needs {need:.1f} GiB and {free:.1f} GiB are free ({work})"
    remedy = nearest.as_remedy() if nearest else "a smaller model"
    return ConfigError(Fault("memory", ..., cause, f"{remedy}; ignore_memory_plan=true starts it all the same"))
