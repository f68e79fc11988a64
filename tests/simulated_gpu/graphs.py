"""CUDA graphs on the simulated GPU: what was computed while one was captured, computed again on the same addresses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

ops = torch.ops.simulated
capturing: list["Graph"] = []  # the one that is
seen = SimpleNamespace(graphs=0, replays=0)


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.captured: list[tuple[int, int]] = []
        seen.graphs += 1

    def begin(self) -> None:
        """Capture what is computed from here."""
        capturing.append(self)
        self.start = ops.capture(True)

    def end(self) -> None:
        """Capture no more, or not for now."""
        begin, end = self.start, ops.capture(False)
        self.captured.append((begin, end))
        self.calls.append(lambda: ops.replay(begin, end))
        capturing.remove(self)

    def __del__(self) -> None:
        for begin, end in self.captured:
            ops.forget(begin, end)

    def replay(self) -> None:
        """Compute it again."""
        seen.replays += 1
        with torch.inference_mode():
            for call in self.calls:
                call()


@contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """Stands for `torch.cuda.graph`."""
    graph.begin()
    try:
        yield
    finally:
        graph.end()


def as_kernel(compute: Callable[..., Any]) -> Callable[..., Any]:
    """What is one kernel on a GPU, whatever it computes here: a graph holds the call itself."""

    def call(*arguments: Any, **named: Any) -> Any:
        if not capturing:
            return compute(*arguments, **named)
        graph = capturing[0]
        graph.end()
        try:
            made = compute(*arguments, **named)
            there, by_name = tree_map_only(torch.Tensor, torch.Tensor.detach, (arguments, named))
            graph.calls.append(lambda: compute(*there, **by_name))
        finally:
            graph.begin()
        return made

    return call


def simulate() -> None:
    """Have torch.cuda capture so."""
    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, capture
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    torch.cuda.is_current_stream_capturing = lambda: bool(capturing)
