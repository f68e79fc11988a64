"""Scoring while the engine still generates."""

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import torch


class ScoreAhead:
    """Scores each group of completions in a thread, as the engine finishes it.

    Args:
        score: Called with keyword arguments for a group; returns a result for each of its completions.
        device: Where it computes; on a GPU it gets a stream of its own, beside the engine's.
    """

    def __init__(self, score: Callable[..., list[Any]], device: torch.device) -> None:
        self.score = score
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="score-ahead")
        self._pending: list[tuple[list[int], Future]] = []

    def submit(self, places: list[int], **group: Any) -> None:
        """Score a group; `places` says where its results belong in the batch."""
        self._pending.append((places, self._thread.submit(self._run, group)))

    def _run(self, group: dict[str, Any]) -> list[Any]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return self.score(**group)

    def wait(self) -> None:
        """Return when all groups are scored, or one has failed: `take` raises what it raised. Neither the trainer nor
        a reference is to compute before: for its head the student switches TF32, and the size of TRL's tiles, for the
        whole process."""
        futures = [future for _, future in self._pending]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if len(done) < len(futures):
            _cancel(self._pending)

    def take(self) -> list[Any] | None:
        """The results of all groups since the last call, in the order of the batch; None if there were none."""
        if not self._pending:
            return None
        pending, self._pending = self._pending, []
        found = {}
        for places, future in pending:
            try:
                found |= zip(places, future.result(), strict=True)
            except BaseException:
                _cancel(pending)
                raise
        if self._stream is not None:
            torch.cuda.empty_cache()  # what is freed on our stream no other can use: the update has need of it
        return [found[place] for place in range(len(found))]

    def cancel(self) -> None:
        """Forget all groups since the last `take`; at most the one in work is still scored."""
        pending, self._pending = self._pending, []
        _cancel(pending)

    def close(self) -> None:
        """Forget all groups, and end the thread when it is done with the one in work."""
        self.cancel()
        self._thread.shutdown(wait=True)


def _cancel(pending: list[tuple[list[int], Future]]) -> None:
    for _, future in pending:
        future.cancel()
