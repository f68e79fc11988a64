"""What is offered where a run does not fit."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

from trainers.config import CONFIG_DIR
from trainers.errors import ConfigError, Fault
from trainers.plan.knobs import (
    FRUGAL,
    LORA,
    ON_HOST,
    PLACES,
    RANK,
    SHORTER,
    Change,
    Settings,
    applies,
    changed,
    is_roomy,
    makes_sense,
)
from trainers.plan.machine import GB
from trainers.plan.solve import Problem, share_faults, solve
from trainers.plan.workload import GIB, Plan
from trainers.settings.batch import batch_plan


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
    if problem.options.student_mode == "cpu" or not applies(problem, settings):
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
            settings = changed(current.options, knob, current.teacher.max_positions)
            if settings and applies(current, settings):
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
        settings = changed(current.options, knob)
        if settings and applies(current, settings):
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
            settings = changed(problem.options, knob)
            if settings and makes_sense(problem, settings):
                kind.append(settings)
                if changed(decided, settings):
                    choices[-1].append((settings, pain))
    on_device, on_host = (solve(problem.changed(_merged(kind))) for kind in best)
    if not (on_device.fits_device and on_host.fits_host):
        return
    combined = [[choice for choice in chosen if choice] for chosen in product(*choices)]
    for chosen in sorted(combined, key=lambda chosen: (len(chosen), sum(pain for _, pain in chosen))):
        settings = [settings for settings, _ in chosen]
        if not settings or applies(problem, _merged(settings)):
            yield settings


def _without_needless(
    problem: Problem, method: list[Settings], steps: list[Settings], is_enough: Callable[[Plan], bool]
) -> Change:
    """Leave out what is not needed to fit: first of what changes the method, then of the rest, and of each the last."""
    best = _change(problem, steps)
    for step in (*reversed(method), *reversed(steps[len(method) :])):
        fewer = [kept for kept in steps if kept is not step]
        change = _change(problem, fewer)
        starts = applies(problem, change.settings) and not share_faults(change.plan, problem.machine)
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
        settings = changed(problem.options, knob)
        if settings and applies(problem, settings):
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
