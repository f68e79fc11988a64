"""Seconds spent in each phase of a step, and the memory in use after it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from trainers.watch.memory_watch import MemoryWatch


class PhaseTimer:
    """Adds up wall-clock seconds by phase name; `take` returns and clears them.

    Args:
        memory: Notes the memory in use at the end of each phase, if anything.
    """

    def __init__(self, memory: MemoryWatch | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory = memory

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - start)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        if self.memory is not None:
            self.memory.note(phase)

    def take(self) -> dict[str, float]:
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
