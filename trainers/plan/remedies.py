"""What is offered where a run does not fit, and what each change of its options would lead to."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from trainers.checks import option_faults
from trainers.config import CONFIG_DIR, REPO
from trainers.errors import ConfigError, Fault
from trainers.memory import cache_share
from trainers.options import CommonOptions
from trainers.plan.machine import GB
from trainers.plan.solve import (
    DECIDED,
    SPARE,
    Problem,
    device_of,
    precision_of,
    reads_teacher,
    share_faults,
    solve,
    written,
)
from trainers.plan.workload import GIB, Plan
from trainers.settings.batch import batch_plan
from trainers.settings.engine_specs import device_faults
from trainers.settings.optim_specs import TORCH_DTYPES

Settings = dict[str, Any]


class Times(float):
    """In place of a value: so many times what it is."""


# What takes less of the device, no more of the host, and leaves the method as it is, the least painful first: options
# that were set go back to what they are by default, or to what is slower.
FRUGAL: tuple[Settings, ...] = (
    {"overlap_scoring": False},
    {"enable_prefix_caching": True},
    {"share_prompts": True},
    {"attn_implementation": None},
    {"use_vllm": True, "vllm_gpu_memory_utilization": "auto"},
    {"gradient_checkpointing": True},
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"per_device_train_batch_size": "auto", "generation_aggregation_steps": None},
    {"vllm_gpu_memory_utilization": "auto", "kv_cache_gib": None},
    {"kv_cache_gib": None},
    {"weight_bridge": None},
    {"student_tokens_per_pass": "auto"},
    {"num_probes": 0},
    {"report_before_after": False},
    {"enforce_eager": True},
)
# What takes from the one memory for the other, with how painful it is: of each row what is best for the device, and
# what is best for the host.
PLACES: tuple[tuple[tuple[Settings, int], ...], ...] = (
    (({"student_mode": "streamed", "student_quantization": None}, 0), ({"student_mode": "resident"}, 6)),
    (({"reference_mode": "streamed"}, 1), ({"reference_mode": "resident"}, 5)),
    (({"optim": "cpu_offload"}, 3), ({"optim": "adamw_8bit"}, 2)),
    (({"activation_offloading": True}, 7), ({"activation_offloading": False}, 4)),
)
# What takes the place of a student on the card where explanations are scored beside the engine.
ON_HOST: Settings = {"student_mode": "cpu"}
# Adapters take ten times the rate of all weights, as in the presets (cfgs/trainer_cfg/grpo_mono_lora.yaml); one that is
# above what all weights have there was made larger by the user, and stays.
FULL_RATES = {"rl": 1e-6, "sft": 1e-5}
LORA = {"use_peft": True, "learning_rate": Times(10), "optim": "auto", "sync_ref_model": False}
LORA |= {"reference_mode": "auto", "weight_bridge": None}
# What changes the method.
RANK: Settings = {"lora_r": 16}
HALF = Times(0.5)
SHORTER: tuple[Settings, ...] = ({"max_completion_length": HALF}, {"max_prompt_length": HALF}, {"max_length": HALF})
OTHERS: tuple[Settings, ...] = (
    {"max_completion_length": Times(2)},
    {"beta": 0.0, "sync_ref_model": False},
)


@dataclass(frozen=True)
class Change:
    """Other settings, the plan with them, what fits with less of a change, but with less to spare, and what fits too
    and keeps scoring beside the engine, where these give it up."""

    settings: Settings
    plan: Plan
    tighter: "Change | None" = None
    overlapped: "Change | None" = None

    def as_remedy(self) -> str:
        """To be pasted, and what it leads to."""
        plan = self.plan
        spare = "" if is_roomy(plan) else f", only {100 * plan.spare:.1f} % to spare"
        others = "".join(f", or {other.as_remedy()}" for other in (self.tighter, self.overlapped) if other is not None)
        return f"{self}   (peak {plan.peak / GIB:.1f} GiB{spare}){others}"

    def __str__(self) -> str:
        return " ".join(f"{key}={written(value)}" for key, value in self.settings.items())


def is_roomy(plan: Plan) -> bool:
    """Whether it keeps free what the solver does."""
    return plan.peak <= int(plan.available * (1 - SPARE))


def _changed(options: CommonOptions, knob: Settings, longest: int | None = None) -> Settings:
    """What a knob changes of these options; empty where it changes nothing or does not apply.

    Args:
        longest: Tokens that the model can read, which a length that is not set stands for.
    """
    settings = {}
    for key, value in knob.items():
        if not hasattr(options, key):
            continue
        now = getattr(options, key)
        if key == "learning_rate":
            value = float(f"{now * value:.6g}") if now <= FULL_RATES[options.stage] else now
        elif isinstance(value, Times):
            length = longest if now is None else now
            value = None if length is None else max(16, int(length * value))
        if value != now:
            settings[key] = value
    leads = next(iter(knob))
    return settings if leads in settings else {}


def _outcome(plan: Plan) -> tuple[Any, ...]:
    """What is told of a plan: where the KV cache takes what is left, the peak alone is always the same."""
    decided = (getattr(plan.options, key, None) for key in DECIDED)
    return plan.peak, plan.host_need, cache_share(plan.work), *decided


def knobs(problem: Problem) -> list[Change]:
    """Each single change that takes another amount of memory or leaves room for another decision of the solver, with
    the plan it leads to."""
    changes = []
    now = _outcome(solve(problem))
    places = (settings for row in PLACES for settings, _ in row)
    for knob in (*FRUGAL, *places, ON_HOST, RANK, *SHORTER, LORA, *OTHERS):
        settings = _changed(problem.options, knob, problem.teacher.max_positions)
        if settings and _applies(problem, settings):
            try:
                change = Change(settings, solve(problem.changed(settings)))
            except ConfigError:  # a KV cache of a size that was asked for is too small for longer texts
                continue
            if _outcome(change.plan) != now:
                changes.append(change)
    return changes


def _applies(problem: Problem, settings: dict[str, Any]) -> bool:
    """Whether a change makes sense with the rest of the options, and would be taken."""
    options, machine = problem.options, problem.machine
    if not _makes_sense(problem, settings):
        return False
    changed = options.model_copy(update=settings)
    faults = option_faults(changed, problem.devices, REPO, needs_device=False)
    if options.stage == "rl":
        dtype = TORCH_DTYPES[precision_of(changed, machine)]
        faults += device_faults(changed, device_of(changed, machine), dtype)
    return not faults


def _makes_sense(problem: Problem, settings: Settings) -> bool:
    """Whether a change can take less memory with the rest of the options."""
    options, machine = problem.options, problem.machine
    device, adapters = device_of(options, machine), getattr(options, "use_peft", False)
    if "precision" in settings and "use_peft" not in settings:
        if device != "cuda" or options.precision != "fp32":
            return False
        has_bf16 = machine.card.compute >= 8
        return has_bf16 if settings["precision"] == "bf16" else adapters and not has_bf16
    if "max_prompt_length" in settings:
        return options.stage != "sft"  # there max_length is what counts
    if "lora_r" in settings:
        return adapters and options.lora_r > settings["lora_r"]
    if "attn_implementation" in settings:
        return options.attn_implementation == "eager"
    if "activation_offloading" in settings:
        return device == "cuda" and options.activation_offloading != "auto"  # both were tried
    if "enforce_eager" in settings:
        return device == "cuda"
    if settings.get("optim") in ("adamw_8bit", "cpu_offload"):
        return not adapters and precision_of(options, machine) == "bf16"
    if {"student_mode", "reference_mode"} & settings.keys() and "use_peft" not in settings:
        return _may_rest(problem, settings, device)
    return True


def _may_rest(problem: Problem, settings: Settings, device: str) -> bool:
    """Whether a frozen model that is there can be streamed, or kept resident."""
    of_student = "student_mode" in settings
    shape = problem.student if of_student else problem.teacher if reads_teacher(problem.options) else None
    if shape is None:
        return False
    if settings == ON_HOST:  # elsewhere a streamed one is faster
        return device == "cuda" and getattr(problem.options, "overlap_scoring", False)
    return shape.can_stream if "streamed" in settings.values() else device == "cuda"


def nearest_fit(problem: Problem) -> Change | None:
    """Settings that fit device and host; None if nothing does.

    What leaves the method as it is comes first, in all combinations of where things rest; then, one after the other,
    what changes it. None of it is needless. The solver's share is kept free if that can be had, and then what fits
    with less of a change, but more tightly, is told beside it.
    """
    found = _nearest(problem)
    return None if found is None else replace(found, overlapped=_overlapped(problem, found))


def _overlapped(problem: Problem, found: Change) -> Change | None:
    """What fits with a student that is read on the host, where scoring beside the engine would be given up."""
    if "overlap_scoring" not in found.settings:
        return None
    given_up = ("overlap_scoring", "student_mode", "student_quantization")
    settings = {key: value for key, value in found.settings.items() if key not in given_up} | ON_HOST
    if problem.options.student_mode == "cpu" or not _applies(problem, settings):
        return None
    change = Change(settings, solve(problem.changed(settings)))
    as_roomy = is_roomy(change.plan) or not is_roomy(found.plan)
    return change if change.plan.fits and as_roomy else None


def _nearest(problem: Problem) -> Change | None:
    tighter = None
    for steps in _methods(problem):
        found = _nearest_with(problem, steps)
        if found is not None and is_roomy(found.plan):
            return replace(found, tighter=tighter or found.tighter)
        tighter = tighter or found
    return tighter


def roomier(problem: Problem) -> Change | None:
    """Settings that keep free what the solver does, for a run that fits with less; None if nothing does."""
    found = nearest_fit(problem)
    return replace(found, tighter=None) if found is not None and is_roomy(found.plan) else None


def _methods(problem: Problem) -> Iterator[list[Settings]]:
    """What changes the method, more and more: shorter texts, then adapters in place of all weights, and those with
    shorter texts."""

    def further(steps: list[Settings], knobs: Sequence[Settings]) -> Iterator[list[Settings]]:
        for knob in knobs:
            current = problem.changed(_merged(steps))
            settings = _changed(current.options, knob, current.teacher.max_positions)
            if settings and _applies(current, settings):
                steps = [*steps, settings]
                yield steps

    steps: list[Settings] = []
    yield steps
    for steps in further([], (RANK, *SHORTER)):
        yield steps
    # Nothing, where they are adapters already; and those of fp32 weights are none for vLLM on a GPU.
    for adapters in further([], (LORA, LORA | {"precision": "auto"})):
        yield adapters
        for steps in further(adapters, SHORTER):
            yield steps
    yield from further(steps, (*SHORTER[:1] * 2, *SHORTER[2:] * 5))


def _merged(steps: Sequence[Settings]) -> Settings:
    return {key: value for step in steps for key, value in step.items()}


def _change(problem: Problem, steps: Sequence[Settings]) -> Change:
    settings = {k: v for k, v in _merged(steps).items() if v != getattr(problem.options, k)}
    return Change(settings, solve(problem.changed(settings)))


def _nearest_with(problem: Problem, method: list[Settings]) -> Change | None:
    """What fits with these steps and others that leave the method as it is, roomily if it can be had."""
    steps = list(method)
    for knob in FRUGAL:
        current = problem.changed(_merged(steps))
        settings = _changed(current.options, knob)
        if settings and _applies(current, settings):
            steps.append(settings)
    tight = None
    for places in _placings(problem.changed(_merged(steps))):
        plan = _change(problem, [*steps, *places]).plan
        if plan.fits and is_roomy(plan):
            return replace(_without_needless(problem, method, [*steps, *places], is_roomy), tighter=tight)
        if plan.fits and tight is None:
            tight = _without_needless(problem, method, [*steps, *places], lambda plan: True)
    return tight


def _placings(problem: Problem) -> Iterator[list[Settings]]:
    """Combinations of `PLACES` that would be taken, the fewest changes and the least painful first; none where even the
    best for the device, or for the host, does not fit there."""
    decided = solve(problem).options
    choices: list[list[tuple[Settings, int] | None]] = []
    best: tuple[list[Settings], list[Settings]] = ([], [])
    for row in PLACES:
        choices.append([None])
        for (knob, pain), kind in zip(row, best, strict=True):
            settings = _changed(problem.options, knob)
            if settings and _makes_sense(problem, settings):
                kind.append(settings)
                if _changed(decided, settings):
                    choices[-1].append((settings, pain))
    on_device, on_host = (solve(problem.changed(_merged(kind))) for kind in best)
    if not (on_device.fits_device and on_host.fits_host):
        return
    combined = [[choice for choice in chosen if choice] for chosen in product(*choices)]
    for chosen in sorted(combined, key=lambda chosen: (len(chosen), sum(pain for _, pain in chosen))):
        settings = [settings for settings, _ in chosen]
        if not settings or _applies(problem, _merged(settings)):
            yield settings


def _without_needless(
    problem: Problem, method: list[Settings], steps: list[Settings], is_enough: Callable[[Plan], bool]
) -> Change:
    """Leave out what is not needed to fit: first of what changes the method, then of the rest, and of each the last."""
    best = _change(problem, steps)
    for step in (*reversed(method), *reversed(steps[len(method) :])):
        fewer = [kept for kept in steps if kept is not step]
        change = _change(problem, fewer)
        starts = _applies(problem, change.settings) and not share_faults(change.plan, problem.machine)
        if change.plan.fits and is_enough(change.plan) and starts:
            steps, best = fewer, change
    return best


# By item of the host plan: what takes it away, or some of it.
OF_HOST: dict[str, tuple[Settings, ...]] = {
    "activations": ({"activation_offloading": False},),
    "optimizer on the host": ({"optim": "adamw_8bit"},),
    "reference": ({"reference_mode": "resident"}, {"beta": 0.0, "sync_ref_model": False}),
    "teacher": ({"reference_mode": "resident"}, {"reference_mode": "streamed"}),
    "student": ({"student_mode": "resident"}, {"student_mode": "streamed"}),  # from disk, where the host has no room
}


def host_remedy(problem: Problem, plan: Plan) -> str:
    """What fits, device and host, by a single change that takes less of the host, where nothing was found that leaves
    the method as it is; or else how much memory a machine would need at the least."""
    changes = [Change({}, plan)]
    knobs = [knob for item, knobs in OF_HOST.items() if item in plan.host for knob in knobs]
    for knob in (*knobs, LORA):
        settings = _changed(problem.options, knob)
        if settings and _applies(problem, settings):
            changes.append(Change(settings, solve(problem.changed(settings))))
    on_device = [change for change in changes if change.plan.fits_device]
    fit = [change for change in on_device if change.plan.host_need <= problem.machine.host_free]
    if fit:
        offered = (f"{change} (it then needs {change.plan.host_need / GIB:.1f} GiB)" for change in fit)
        return ", ".join([*offered, "or a machine with more memory"])
    if not on_device:
        return "a machine with more memory"
    least = min(on_device, key=lambda change: _tenths(change.plan.host_need))
    so = f", with {least}" if least.settings else ""
    return f"a machine with {_tenths(least.plan.host_need):.1f} GiB of free host memory{so}"


def _tenths(size: int) -> float:
    """GiB, rounded up."""
    return math.ceil(10 * size / GIB) / 10


SHIPPED = {
    "rl": "teacher_rlt_mono_{}gb",
    "sft": "teacher_sft_{}gb",
}  # by stage: runs named by the card they are made for


def made_for(stage: str, free: int) -> str | None:
    """The run that comes with the project and is made for the largest card of no more memory than is free."""
    if stage not in SHIPPED:
        return None
    before, after = SHIPPED[stage].split("{}")
    names = (path.stem for path in (CONFIG_DIR / "run_cfg").glob(f"{before}*{after}.yaml"))
    sizes = [int(name.removeprefix(before).removesuffix(after)) for name in names]
    size = max((size for size in sizes if size * GB <= free), default=None)
    return None if size is None else f"{SHIPPED[stage].format(size)}, made for {size} GB"


def refuse(plan: Plan, nearest: Change | None) -> ConfigError:
    """What a user reads whose run does not fit the device."""
    stage = plan.options.stage
    work = batch_plan(plan.options).equation() if stage == "rl" else f"stage={stage}"
    need, free = plan.peak / GIB, plan.available / GIB
    cause = f"the {plan.peak_phase} phase needs {need:.1f} GiB and {free:.1f} GiB are free ({work})"
    smaller = made_for(stage, plan.available) if plan.work.device == "cuda" else None
    remedy = nearest.as_remedy() if nearest else "a smaller model" + (f", or the run {smaller}" if smaller else "")
    return ConfigError(Fault("memory", ..., cause, f"{remedy}; ignore_memory_plan=true starts it all the same"))
