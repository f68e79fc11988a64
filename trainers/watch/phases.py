"""What a run is doing now, the seconds spent in each phase of a step, and the memory in use after it."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from trainers.watch.memory_watch import MemoryWatch


class Now(NamedTuple):
    """A phase that goes on, and the step, evaluation or the like that it is a part of, with when both began."""

    phase: str
    since: float
    whole: str
    began: float


class Written(NamedTuple):
    """How far an engine is: completions that are done, those that were asked for, and tokens, about."""

    done: int
    asked: int
    tokens: int


class PhaseTimer:
    """Adds up wall-clock seconds by phase name, which `take` returns and clears, and says what goes on now.

    Args:
        memory: Notes the memory in use at the end of each phase, if anything.

    Attributes:
        now: Another thread may read it: it is replaced as a whole. Behind an error it stays what failed.
        written: Tells how far the engine is; whoever has one sets it.
    """

    now: Now
    written: Callable[[], Written | None] = staticmethod(lambda: None)

    def __init__(self, memory: MemoryWatch | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory = memory
        self.begin("load")

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        whole = self.now
        self.now = whole._replace(phase=phase, since=start)
        yield
        self.now = whole._replace(since=time.perf_counter())
        self.add(phase, time.perf_counter() - start)

    def begin(self, whole: str, phase: str | None = None) -> None:
        """A part of the run begins, with a phase that lasts wherever no other one is timed."""
        start = time.perf_counter()
        self.now = Now(phase or whole, start, whole, start)

    @contextmanager
    def during(self, whole: str, phase: str | None = None) -> Iterator[None]:
        """As `begin`, until it is done; then the part that it came in between begins anew."""
        before = self.now
        self.begin(whole, phase)
        yield
        self.begin(before.whole, before.phase)

    def add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] += seconds
        if self.memory is not None:
            self.memory.note(phase)

    def take(self) -> dict[str, float]:
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds, or hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
