"""Memory in use after each phase of a step."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

WARM_UP, WINDOW = 3, 10  # steps, or times that a phase kept something
CREEP = 1.05
RELEASED = 0.9
GIVES_BACK = ("score", "step")  # phases that end with what they began with, but for a rollout's tokens
ROLLOUT = 128 * 2**20  # bytes: more than those take


def resident_peak() -> int:
    """Bytes of the largest resident set of this process since that was last forgotten."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def forget_resident_peak() -> None:
    """Have the kernel look for the largest resident set from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def used_bytes(device: torch.device) -> int:
    """Bytes in use now: of a GPU all of it that is taken, by whomever; without one this process's resident set."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process().memory_info().rss


class MemoryWatch:
    """Notes the memory in use at the end of each phase: of the GPU, or, without one, the resident set of the process.

    It warns, once each, when the peak creeps up from step to step, and when a phase frees less than it should.

    Args:
        device: Whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.phases: dict[str, int] = {}
        self._step_peak = 0
        self._peaks: list[int] = []
        self._warned: set[str] = set()
        self._kept: Counter[str] = Counter()
        if device.type == "cuda":
            self._since = self._mark()
            self._allocated = torch.cuda.memory_allocated(device)
        else:
            forget_resident_peak()

    def used(self) -> int:
        """Bytes in use now."""
        return used_bytes(self.device)

    def peak(self) -> int:
        """Bytes in use at most since this was last asked. Without a GPU the largest resident set that the kernel saw.

        On a GPU the larger of what was in use then and what is now; or torch's largest reservation in between, beside
        the rest at its smaller: vLLM maps its KV cache anew after torch has given back what it had reserved, so
        the two need never have been there together.
        """
        if self.device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved(self.device)
            then, now = self._since, self._mark()
            self._since = now
            rest = min(used - of_torch for used, of_torch in (then, now))
            return max(then[0], now[0], rest + reserved)
        most = resident_peak()
        forget_resident_peak()
        return most

    def _mark(self) -> tuple[int, int]:
        """Bytes of the GPU in use, and those that torch has reserved, whose peak is looked for from now on."""
        used = self.used()  # it starts CUDA where nothing has yet
        torch.cuda.reset_peak_memory_stats(self.device)
        return used, torch.cuda.memory_reserved(self.device)

    def note(self, phase: str) -> None:
        """A phase has ended."""
        if self.device.type == "cuda":
            self._see_given_back(phase)
        peak = self.peak()
        self._step_peak = max(peak, self._step_peak)
        self.phases[f"{phase}_peak"] = max(peak, self.phases.get(f"{phase}_peak", 0))
        self.phases[phase] = self.used()

    def beside_torch(self) -> int:
        """Bytes in use now, of a GPU without what torch has reserved: a student that scores beside the engine takes and
        gives back meanwhile. What vLLM unmaps of its KV cache torch goes on counting, before and after alike."""
        reserved = torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0
        return self.used() - reserved

    def freed(self, what: str, before: int, expected: int) -> None:
        """Warn if since `before` bytes were in use beside torch clearly less was freed than `expected`."""
        freed = before - self.beside_torch()
        if freed < RELEASED * expected:
            self._warn_of(what, freed, expected)

    def _see_given_back(self, phase: str) -> None:
        """Warn if of what torch took for a phase, since the one before it, more is left than its results.

        Optimizer states and the like come to stay, whenever it is; only what happens several times in a row is told.
        """
        began, most = self._allocated, torch.cuda.max_memory_allocated(self.device)
        self._allocated = torch.cuda.memory_allocated(self.device)
        keeps = phase in GIVES_BACK and self._allocated - began > ROLLOUT
        self._kept[phase] = self._kept[phase] + 1 if keeps else 0
        if self._kept[phase] > WARM_UP:
            self._warn_of(f"the end of phase {phase}", most - self._allocated, most - began)

    def _warn_of(self, what: str, freed: int, expected: int) -> None:
        message = "%s freed %.2f GiB where %.2f were expected: the next phase has that much less room"
        self._warn(what, message, what, freed / 2**30, expected / 2**30)

    def step(self) -> None:
        """An optimizer step has ended: see whether its peak is part of a rise."""
        if not self._step_peak:
            return
        self._peaks.append(self._step_peak)
        self._step_peak = 0
        seen = self._peaks[WARM_UP:]
        if len(seen) >= 2 * WINDOW and min(seen[-WINDOW:]) > CREEP * max(seen[:WINDOW]):
            first, last = max(seen[:WINDOW]) / 2**30, min(seen[-WINDOW:]) / 2**30
            self._warn("creep", "memory creeps up: %.2f GiB at most in the first steps, %.2f at least now", first, last)

    @contextmanager
    def between_steps(self, phase: str) -> Iterator[None]:
        """A phase whose peak is its own: no part of a step's, nor of what came before it."""
        self.peak()
        peak = self._step_peak
        try:
            yield
            self.note(phase)
        finally:
            self._step_peak = peak

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """What is noted meanwhile (an evaluation) is no part of the step and the interval around it."""
        phases, peak = self.phases, self._step_peak
        self.phases = {}
        try:
            yield
        finally:
            self.phases, self._step_peak = phases, peak

    def take(self) -> dict[str, float]:
        """`memory/<phase>`, in GiB, of the phases since the last call."""
        taken = {f"memory/{phase}": used / 2**30 for phase, used in self.phases.items()}
        self.phases.clear()
        return taken

    def _warn(self, about: str, message: str, *values: object) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message, *values)
