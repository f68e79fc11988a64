"""A line each minute while something lasts, and the stacks of all threads where nothing moves."""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from trainers.watch.phases import Now, PhaseTimer, Written, clock

logger = logging.getLogger(__name__)

EVERY = 60.0  # seconds between two lines
# Seconds without progress after which the stacks are written. That may be no hang: a large batch that is streamed or a
# first compilation can take as long, so a run only tells it, and goes on.
STUCK = 600.0


@contextmanager
def heartbeat(timer: PhaseTimer, output_dir: Path) -> Iterator[None]:
    """Tell each minute, in a thread, what goes on, where a step, an evaluation or the like lasts longer than that."""
    ended = threading.Event()
    beats = Heartbeat(timer, output_dir / "training.log")
    thread = threading.Thread(target=beats.run, args=(ended,), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Heartbeat:
    """What the thread does.

    Args:
        timer: Knows what goes on.
        log: The file that stacks are added to.
    """

    def __init__(self, timer: PhaseTimer, log: Path) -> None:
        self.timer, self.log = timer, log
        self._last: tuple[Now, Written | None] = (timer.now, None)
        self._told_at = self._moved_at = time.perf_counter()
        self._patience: dict[str, float] = {}
        self._written_of: Now | None = None

    def run(self, ended: threading.Event) -> None:
        """Until the event is set; between two lines the thread sleeps."""
        due = self._told_at + EVERY
        while not ended.wait(max(0.0, due - time.perf_counter())):
            now, written, at = self.timer.now, self.timer.written(), time.perf_counter()
            if at - now.began < EVERY:
                due = now.began + EVERY
                continue
            self._tell(now, written, at)
            due = at + EVERY

    def _tell(self, now: Now, written: Written | None, at: float) -> None:
        written = written if now.phase == "generate" else None
        (last, before), told_at = self._last, self._told_at
        if (now, written) != self._last:
            self._moved_at = at if now == last else now.since
        self._last, self._told_at = (now, written), at
        line = f"{now.phase}: {clock(at - now.since)} so far"
        if written is not None:
            tokens, since = (before.tokens, told_at) if now == last and before is not None else (0, now.since)
            rate = max(0, written.tokens - tokens) / (at - since)
            line += f", {written.done} of {written.asked} completions are done, {rate:.0f} tokens a second"
        if now.whole != now.phase:
            line += f" ({clock(at - now.began)} of this {now.whole})"
        with tqdm.external_write_mode():  # a bar is taken away before, and shown again behind it
            logger.info("%s", line)
            self._see_that_it_moves(now, at - self._moved_at)

    def _see_that_it_moves(self, now: Now, still: float) -> None:
        """Write the stacks, once, where nothing has moved for long; of the next phase of this name twice as much is
        put up with."""
        phase, patience = now.phase, self._patience.get(now.phase, STUCK)
        if still < patience or now == self._written_of:
            return
        self._written_of, self._patience[phase] = now, 2 * patience
        # Of an update or the student's scoring nothing is seen but its end.
        what = "still in %s, for %s without a sign of progress, which may be normal: the stacks are in %s"
        logger.info(what, phase, clock(still), self.log)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"Process {os.getpid()}, still in {phase}\n")
            file.flush()
            faulthandler.dump_traceback(file)
