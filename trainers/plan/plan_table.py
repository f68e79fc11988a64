"""A plan of memory as a table."""

from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from trainers.memory import cache_share
from trainers.plan.knobs import Change
from trainers.plan.machine import Machine
from trainers.plan.model_shapes import ModelShape
from trainers.plan.solve import DECIDED, written
from trainers.plan.workload import GIB, Plan

WIDTH = 40  # of a bar that fills the memory
SMALL = 0.005  # of a phase: an item of less has no line of its own


def plan_text(plan: Plan, machine: Machine, full: bool = False) -> str:
    """The phases, and with `full` every item of each, as bars."""
    parts = [_heading(plan, machine), _phase_table(plan, full), *_below(plan, machine)]
    return _text(*parts)


def _text(*parts: Any) -> str:
    file = StringIO()
    console = Console(file=file, width=118, soft_wrap=True, highlight=False, color_system=None)
    for part in parts:
        console.print(part, markup=False)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _heading(plan: Plan, machine: Machine) -> str:
    work = plan.work
    name = work.teacher.name or work.teacher.model_type
    method = f"LoRA of rank {work.adapter.rank}" if work.use_peft else "all weights" if work.trains else "only read"
    lines = [f"Memory plan: {name} ({_parameters(work.teacher)}), {method}, {work.precision}"]
    if work.student is not None:
        lines[0] += f"; student {work.student.name} ({_parameters(work.student)}) {work.student_mode}"
    if work.device == "cuda":
        card = machine.card
        lines.append(f"  on {card.name}: {card.free / GIB:.1f} of {card.total / GIB:.1f} GiB free")
        lines += [f"  held by {holder}" for holder in card.held]
    else:
        lines.append(f"  on the CPU: {machine.host_free / GIB:.1f} of {machine.host_total / GIB:.1f} GiB free")
    return "\n".join(lines)


def _parameters(shape: ModelShape) -> str:
    count = shape.num_parameters
    return f"{count / 1e9:.3g}B" if count >= 1e8 else f"{count / 1e6:.3g}M"


def _phase_table(plan: Plan, full: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("phase")
    table.add_column("GiB", justify="right")
    table.add_column("")
    for phase, items in plan.phases.items():
        total = plan.total(phase)
        peak = "  <- peak" if phase == plan.peak_phase else ""
        table.add_row(phase, _gib(total), _bar(total, plan.available, "█") + peak)
        for name, size in _shown(items) if full else []:
            table.add_row(f"  {name}", _gib(size), _bar(size, plan.available, "░"))
    return table


def _shown(items: dict[str, int]) -> list[tuple[str, int]]:
    """The items of a phase, the largest first; those below half a percent of it as one."""
    total = sum(items.values())
    large = [(name, size) for name, size in items.items() if size >= SMALL * total]
    rest = total - sum(size for _, size in large)
    return sorted(large, key=lambda item: -item[1]) + ([("other", rest)] if rest else [])


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.4f}"


def _bar(size: int, available: int, character: str) -> str:
    return character * min(WIDTH, round(WIDTH * size / available)) + ("+" if size > available else "")


def _below(plan: Plan, machine: Machine) -> list[str]:
    options = plan.options
    lines = [
        f"  peak {_gib(plan.peak)} GiB ({plan.peak_phase}) of {_gib(plan.available)} GiB: "
        + (f"{100 * plan.spare:.0f} % to spare" if plan.fits_device else "it does not fit")
    ]
    if plan.host:
        needs = ", ".join(f"{name} {_gib(size)}" for name, size in plan.host.items())
        lines.append(f"  host memory {_gib(plan.host_need)} of {_gib(machine.host_free)} GiB free: {needs}")
        lines[-1] += "" if plan.fits_host else "; it does not fit"
    lines.append(f"  disk {_gib(sum(plan.disk.values()))} of {_gib(machine.disk_free)} GiB free")
    values = {key: getattr(options, key, None) for key in DECIDED} | {"precision": plan.work.precision}
    values["optim"] = plan.work.optimizer
    decided = {k: v for k, v in values.items() if v not in (None, "auto") and v is not False}
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in decided.items()}
    lines.append("  with " + " ".join(f"{key}={written(value)}" for key, value in shown.items()))
    return lines


def knobs_text(plan: Plan, changes: list[Change]) -> str:
    """What each single change would make of the peak."""
    table = Table(box=None, pad_edge=False)
    table.add_column("change")
    table.add_column("peak", justify="right")
    table.add_column("by", justify="right")
    table.add_column("then also")
    for change in sorted(changes, key=lambda c: c.plan.peak):
        peak = change.plan.peak
        table.add_row(str(change), _gib(peak), f"{(peak - plan.peak) / GIB:+.2f}", _also(plan, change))
    return _text(table) if changes else ""


def _also(plan: Plan, change: Change) -> str:
    """What the solver decides differently after a change."""
    found = []
    for key in DECIDED:
        before, after = (getattr(s.options, key, None) for s in (plan, change.plan))
        if before != after and key not in change.settings and after is not None:
            found.append(f"{key}={after:.3g}" if isinstance(after, float) else f"{key}={written(after)}")
    before, after = cache_share(plan.work), cache_share(change.plan.work)
    if after is not None and before != after:
        found.append(f"(cache for {after:.0%} of the completions)")
    if not change.plan.fits_device:
        found.append("does not fit")
    if not change.plan.fits_host:
        found.append(f"host memory of {_gib(change.plan.host_need)} GiB, which is not free")
    return " ".join(found)


def plan_json(plan: Plan, findings: list[Any]) -> dict[str, Any]:
    """The plan as the preflight prints it for programs, in GiB."""
    return {
        "fits": plan.fits,
        "peak_gib": round(plan.peak / GIB, 3),
        "phases": {p: {n: round(s / GIB, 4) for n, s in items.items()} for p, items in plan.phases.items()},
        "host_gib": round(plan.host_need / GIB, 3),
        "disk_gib": round(sum(plan.disk.values()) / GIB, 3),
        "findings": findings,
    }
