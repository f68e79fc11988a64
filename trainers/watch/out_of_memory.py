"""What a run ends with whose device ran out of memory: the phase, what it took, and what makes that phase smaller."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from trainers.checks import option_faults
from trainers.config import REPO
from trainers.errors import OutOfMemory
from trainers.memory import kv_least, make_plan
from trainers.plan.knobs import Change
from trainers.plan.workload import GIB, Plan, Workload
from trainers.settings.batch import micro_batch_choices
from trainers.watch.memory_watch import used_bytes
from trainers.watch.phases import PhaseTimer

# Of vLLM, which has no class for it: at its start there is no room for its cache, or a pool's pages are not to be had.
# And of CUDA, Triton and the libraries, whose handles, graphs and kernels come from what torch has left.
IN_OTHER_WORDS = ("no available memory for the cache blocks", "larger than the available kv cache memory")
IN_OTHER_WORDS += ("less than desired gpu memory utilization", "cuda error: out of memory", "_status_alloc_failed")
IN_OTHER_WORDS += ("triton error [cuda]: out of memory", "cuda driver error: out of memory")
# Where a phase that is timed is planned with another one; whatever is not named is the update's.
PLANNED_WITH = {"kv_cache": "generate", "sync": "generate", "sentinel": "generate", "probe": "score"}
PLANNED_WITH |= {name: name for name in ("load", "generate", "score", "save")}
LESS = 2**24  # bytes: what makes a phase smaller by no more than that is no help
Settings = dict[str, Any]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, is that the device has no memory left."""
    while error is not None:
        told = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or any(words in told for words in IN_OTHER_WORDS):
            return True
        error = error.__cause__
    return False


@contextmanager
def out_of_memory_told(timer: PhaseTimer, device: torch.device, plan: Plan | None, output_dir: Path) -> Iterator[None]:
    """Turn such an error into what the run ends with.

    Args:
        timer: Knows in which phase it came.
        plan: Of the run's memory; without one no remedies are found.

    Raises:
        OutOfMemory: From the error.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        used = _used(timer, device)
        raise OutOfMemory(_message(timer.now.phase, used, plan, error, output_dir)) from error


def _used(timer: PhaseTimer, device: torch.device) -> str:
    """How much of the device was in use, in words."""
    try:
        if timer.memory is not None:
            return f"{timer.memory.peak() / GIB:.2f} GiB of the device were in use at most"
        return f"{used_bytes(device) / GIB:.2f} GiB of the device are in use after it"
    except RuntimeError as error:  # such an error may leave CUDA unusable
        return f"what was in use cannot be read any more ({str(error).partition(chr(10))[0]})"


def _message(named: str, used: str, plan: Plan | None, error: Exception, output_dir: Path) -> str:
    phase = PLANNED_WITH.get(named, "update")
    lines = [f"out of memory in the phase {named}: {used}"]
    remedies = []
    if plan is not None:
        of = "" if named == phase else f" (as {phase})"
        lines[0] += (
            f"; {plan.total(phase) / GIB:.2f} are planned for it{of}, of {plan.available / GIB:.2f} that were free"
        )
        remedies = [f"{words}   ({size / GIB:.2f} GiB are planned then)" for words, size in remedies_of(plan, phase)]
    remedies = remedies or ["a card that nothing else uses, a smaller model, or what stage=plan shows of each option"]
    lines.append(f"  {' '.join(str(error).split())}")
    lines += [f"  {'or' if i else '->'} {remedy}" for i, remedy in enumerate(remedies)]
    return "\n".join([*lines, f"  the traceback is in {output_dir / 'training.log'}"])


def remedies_of(plan: Plan, phase: str) -> list[tuple[str, int]]:
    """Overrides that make a phase smaller, the least painful first, and the bytes that are planned for it then."""
    work, found = plan.work, []
    known = [fault.key for fault in option_faults(work.options, work.devices, REPO, needs_device=False)]
    for settings in _smaller(work, phase):
        settings = settings | {key: value for key, value in _kept(work, phase).items() if key not in settings}
        options = work.options.model_copy(update=settings)
        faults = option_faults(options, work.devices, REPO, needs_device=False)
        if any(fault.key not in known for fault in faults):
            continue
        cache = int(settings["kv_cache_gib"] * GIB) if "kv_cache_gib" in settings else work.kv_cache
        smaller = make_plan(replace(work, options=options, kv_cache=cache), plan.available, plan.host_free)
        if smaller.total(phase) < plan.total(phase) - LESS:
            found.append((str(Change(settings, smaller)), smaller.total(phase)))
    return found


def _smaller(work: Workload, phase: str) -> Iterator[Settings]:
    """What may make a phase smaller; whether it does, the plan tells."""
    o = work.options
    if phase in ("load", "generate", "score") and work.is_rl:
        yield {"overlap_scoring": False}
    if phase in ("load", "generate") and work.has_engine:
        smaller = float(f"{0.8 * work.kv_cache / GIB:.2g}")
        if smaller * GIB >= kv_least(o, work.teacher, work.itemsize):  # else vLLM would not start
            yield {"kv_cache_gib": smaller}
        yield {"enforce_eager": True}
    if phase == "score":
        yield {"student_tokens_per_pass": o.student_tokens_per_pass // 2}
        for key, mode in (("student_mode", work.student_mode), ("reference_mode", work.reference_mode)):
            shape = work.student if key == "student_mode" else work.teacher
            if mode == "resident" and shape.can_stream:
                yield {key: "streamed"}
            if mode in ("resident", "streamed") and work.device == "cuda":
                yield {key: "cpu"}
    if phase == "update":
        yield {"gradient_checkpointing": True}
        if work.device == "cuda":
            yield {"activation_offloading": True}
        smaller = [n for n in micro_batch_choices(o, work.devices) if 2 * n <= o.per_device_train_batch_size]
        yield from ({"per_device_train_batch_size": n} for n in smaller[:1])
    if work.is_rl:
        yield {"max_completion_length": o.max_completion_length // 2}
    elif work.trains:
        yield {"max_length": work.length // 2}


def _kept(work: Workload, phase: str) -> Settings:
    """What `auto` would make larger in the room that a remedy leaves: it stays what it was."""
    o, kept = work.options, {}
    if phase in ("load", "generate") and work.has_engine:
        kept["kv_cache_gib"] = ceil(1000 * work.kv_cache / GIB) / 1000
    if phase == "score":
        kept["student_tokens_per_pass"] = o.student_tokens_per_pass
    if phase == "update":
        kept["per_device_train_batch_size"] = o.per_device_train_batch_size
        kept |= {"optim": work.optimizer} if work.optimizer == "cpu_offload" else {}
        kept |= {"activation_offloading": True} if o.activation_offloading else {}
    if work.is_rl and work.student_mode == "streamed" and not o.offload_untrained_models:
        kept["student_mode"] = "streamed"
    if work.is_rl and work.reference_mode == "streamed" and not o.offload_untrained_models:
        kept["reference_mode"] = "streamed"
    return kept
