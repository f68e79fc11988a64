"""Warnings about memory. Run: ./run_tests.sh tests/test_memory_watch.py"""

import logging
from mmap import mmap
from types import SimpleNamespace

import pytest
import torch

from trainers.rollout.sampler import RolloutSampler
from trainers.watch.memory_watch import MemoryWatch
from trainers.watch.outputs import MetricsWriter
from trainers.watch.phases import PhaseTimer

GIB = 2**30


@pytest.fixture
def watch(monkeypatch):
    watch = MemoryWatch(torch.device("cpu"))
    watch.now = 10 * GIB
    monkeypatch.setattr(watch, "used", lambda: int(watch.now))
    monkeypatch.setattr(watch, "peak", lambda: int(watch.now + GIB))
    return watch


def run(watch, sizes):
    for size in sizes:
        watch.now = size * GIB
        watch.note("generate")
        watch.note("step")
        watch.step()
        watch.take()


def test_memory_of_each_phase_is_told_in_gib(watch):
    watch.note("generate")
    watch.now = 4 * GIB
    watch.note("score")
    memory = {"memory/generate": 10.0, "memory/score": 4.0}
    assert watch.take() == memory | {f"{name}_peak": used + 1 for name, used in memory.items()}
    assert watch.take() == {}


def test_rising_peaks_warn_once(watch, caplog):
    run(watch, [10 + 0.1 * step for step in range(60)])
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "creeps up" in caplog.text


def test_steps_of_a_run_are_what_the_rise_is_looked_for_in(watch, caplog, tmp_path):
    writer = MetricsWriter(tmp_path, PhaseTimer(watch))
    for step in range(60):
        watch.now = (10 + 0.1 * step) * GIB
        writer.on_step_begin(None, None, None)
        writer.on_step_end(None, None, None)
    assert "creeps up" in caplog.text


def test_a_jump_at_the_start_and_noise_do_not_warn(watch, caplog):
    run(watch, [5, 8, 10] + [10 + 0.2 * (step % 2) for step in range(60)])
    assert not caplog.records


def test_a_single_peak_between_two_logs_does_not_warn(watch, caplog):
    for step in range(60):
        watch.now = (12 if step == 20 else 10) * GIB
        watch.note("step")
        watch.step()  # nothing is logged, so nothing is taken
    assert not caplog.records


def test_an_evaluation_between_two_steps_is_no_part_of_them(watch):
    watch.note("step")
    with watch.interrupted():
        watch.now = 90 * GIB
        watch.note("generate")
        assert watch.take()["memory/generate"] == 90.0
    watch.step()
    assert watch._peaks == [11 * GIB] and watch.take() == {"memory/step": 10.0, "memory/step_peak": 11.0}


def test_too_little_freed_warns_once(watch, caplog):
    before = watch.used()
    watch.now = 9.5 * GIB
    watch.freed("the KV cache", before, GIB // 2)
    assert not caplog.records
    watch.freed("the KV cache", before, GIB)
    watch.freed("the KV cache", before, GIB)
    assert len(caplog.records) == 1
    assert "the KV cache freed 0.50 GiB where 1.00 were expected" in caplog.text


def pages(size):
    """Memory that is really taken; not of the allocator's, which may have as much at hand."""
    taken = mmap(-1, size)
    while taken.tell() < size:
        taken.write(bytes([1]) * 2**20)
    return taken


def test_peak_of_a_phase_without_a_gpu_is_what_was_resident_at_most_in_it():
    watch = MemoryWatch(torch.device("cpu"))
    watch.note("load")
    size = 256 * 2**20
    taken = pages(size)
    taken.close()
    watch.note("generate")
    watch.note("score")
    phases = watch.phases
    assert phases["generate_peak"] - phases["generate"] > 0.9 * size
    assert phases["score_peak"] - phases["score"] < 0.1 * size


class Card:
    """A GPU of 80 GiB in made-up figures, in GiB: torch's pool, and the rest (1: the driver's, and vLLM's KV cache)."""

    def __init__(self, monkeypatch, reserved, rest):
        self.reserved = self.most = reserved
        self.rest, self.peak = rest, reserved + rest
        found = {
            "mem_get_info": lambda device: ((80 - self.reserved - self.rest) * GIB, 80 * GIB),
            "memory_reserved": lambda device: self.reserved * GIB,
            "max_memory_reserved": lambda device: self.most * GIB,
            "memory_allocated": lambda device: self.reserved * GIB,  # none of the pool is free
            "max_memory_allocated": lambda device: self.most * GIB,
            "reset_peak_memory_stats": lambda device: setattr(self, "most", self.reserved),
        }
        for name, function in found.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def becomes(self, reserved, rest):
        self.reserved, self.rest = reserved, rest
        self.most, self.peak = max(self.most, reserved), max(self.peak, reserved + rest)


@pytest.mark.parametrize(
    ("begin", "course", "expected"),
    [
        ((60, 1), [(32, 1), (32, 18)], 61),  # torch gives back, then the KV cache is mapped: 78 were never in use
        ((32, 18), [(32, 1), (45, 1)], 50),  # the KV cache goes, then torch grows
        ((32, 18), [(45, 18), (32, 18)], 63),  # torch alone rises and falls
        ((32, 1), [(32, 18)], 50),  # the KV cache alone
        ((40, 1), [(32, 1)], 41),
    ],
)
def test_peak_on_a_gpu_is_no_more_than_was_in_use_together(monkeypatch, begin, course, expected):
    card = Card(monkeypatch, 70, 1)
    card.becomes(*begin)
    watch = MemoryWatch(torch.device("cuda"))  # what was before is not asked for
    card.peak = sum(begin)
    for figures in course:
        card.becomes(*figures)
    watch.note("kv_cache")
    assert watch.take() == {"memory/kv_cache": sum(course[-1]), "memory/kv_cache_peak": expected}
    assert expected == card.peak
    watch.note("sync")
    assert watch.take()["memory/sync_peak"] == sum(course[-1])


def test_peak_of_a_save_is_its_own(monkeypatch):
    """Neither the next step's nor that of the phase that follows, and what came before is none of it."""
    card = Card(monkeypatch, 32, 1)
    watch = MemoryWatch(torch.device("cuda"))
    card.becomes(60, 1)
    card.becomes(32, 1)
    watch.note("step")
    watch.step()
    card.becomes(70, 1)  # an evaluation's last pass
    card.becomes(32, 1)
    with watch.between_steps("save"):
        card.becomes(65, 1)
        card.becomes(34, 1)
    watch.note("kv_cache")
    assert watch.take() == {
        **{"memory/step": 33, "memory/step_peak": 61, "memory/save": 35, "memory/save_peak": 66},
        **{"memory/kv_cache": 35, "memory/kv_cache_peak": 35},
    }
    watch.step()
    assert watch._peaks == [61 * GIB, 35 * GIB]


@pytest.mark.parametrize(
    ("of_torch", "rest", "freed"),
    [
        (45, 1, None),  # a student scores meanwhile
        (20, 1, None),
        (20, 18, "0.00"),  # what torch gives back is not the cache's
        (45, 10, "8.00"),
    ],
)
def test_release_of_the_cache_is_seen_whatever_torch_takes_meanwhile(monkeypatch, caplog, of_torch, rest, freed):
    card = Card(monkeypatch, 32, 18)
    engine = SimpleNamespace(can_release=True, kv_cache_bytes=lambda: 17 * GIB)
    engine.release_cache = lambda: card.becomes(of_torch, rest)
    timer = PhaseTimer(MemoryWatch(torch.device("cuda")))
    RolloutSampler(SimpleNamespace(record_rollouts=None, replay_rollouts=None), None, timer, engine)._release_cache()
    told = [record.message for record in caplog.records]
    if freed is None:
        assert not told
    else:
        assert len(told) == 1 and f"the KV cache freed {freed} GiB where 17.00 were expected" in told[0]


@pytest.mark.parametrize("leaks", ["score", "step", "sync", None])
def test_a_phase_that_keeps_what_it_took_warns_once(monkeypatch, caplog, leaks):
    card = Card(monkeypatch, 32, 1)
    watch = MemoryWatch(torch.device("cuda"))
    for step in range(8):
        for phase, takes in (("sync", 0), ("score", 4), ("step", 20)):
            held = card.reserved
            card.becomes(held + takes, 1)
            states = 1 if phase == "step" and step in (0, 4) else 0  # of fp16, whose scaler leaves out first steps
            card.becomes(held + (phase == leaks) + states, 1)
            watch.note(phase)
        watch.step()
    if leaks in ("score", "step"):
        took = {"score": 4, "step": 20}[leaks]
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert f"the end of phase {leaks} freed {took - 1}.00 GiB where {took}.00 were expected" in caplog.text
    else:
        assert not caplog.records


def test_what_a_phase_keeps_now_and_then_does_not_warn(monkeypatch, caplog):
    card = Card(monkeypatch, 32, 1)
    watch = MemoryWatch(torch.device("cuda"))
    for step in range(12):
        held = card.reserved
        card.becomes(held + 4, 1)
        card.becomes(held + (step % 3 != 2), 1)
        watch.note("score")
        watch.step()
    assert not [r for r in caplog.records if "freed" in r.message]


def test_resident_set_is_what_is_read_without_a_gpu():
    watch = MemoryWatch(torch.device("cpu"))
    before = watch.used()
    held = pages(64 * 2**20)
    assert watch.used() - before > 0.9 * len(held)
