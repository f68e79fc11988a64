"""What a run says while something lasts. Run: ./run_tests.sh tests/test_heartbeat.py"""

import logging
import re
import sys
import threading
import time

import pytest
from conftest import REPO
from small_run import make_trainer
from tqdm.auto import tqdm

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.planning import planned
from trainers.rl import run_rl
from trainers.sft import run_sft
from trainers.watch import heartbeat as beats
from trainers.watch.heartbeat import Heartbeat, heartbeat
from trainers.watch.phases import PhaseTimer, Written


def slow(completion_ids, **_):
    time.sleep(0.5)
    return [float(sum(ids) % 2) for ids in completion_ids]


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(beats, "EVERY", 0.05)


def test_a_run_and_its_evaluation_tell_what_goes_on_and_the_stacks_once(
    renderer, model_dir, tmp_path, caplog, monkeypatch, quick
):
    """The engine's steps are slowed down, and a reward function takes longer than a phase may without progress."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(beats, "STUCK", 0.35)
    trainer = make_trainer(renderer, model_dir, tmp_path, max_steps=2, reward_funcs=[slow], max_completion_length=32)
    engine = trainer.sampler.engine
    step = engine.llm.llm_engine.step
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: time.sleep(0.01) or step())
    with heartbeat(trainer.timer, tmp_path):
        assert len(threads()) == 1
        trainer.train()
        told, caplog.records[:] = list(caplog.messages), []
        trainer.evaluate(trainer.train_dataset.select(range(4)))
    assert not threads()
    evaluated = list(caplog.messages)
    engine.close()
    assert engine.written is None and trainer.timer.now.phase == "between steps"
    pattern = r"generate: 0:00 so far, \d of 8 completions are done, (\d+) tokens a second \(0:00 of this step\)"
    rates = [int(found[1]) for line in told if (found := re.fullmatch(pattern, line))]
    assert rates and max(rates) > 50, told
    assert any(re.fullmatch(r"score: 0:0\d so far \(0:0\d of this step\)", line) for line in told)
    assert any(re.fullmatch(r"score: 0:0\d so far \(0:0\d of this evaluation\)", line) for line in evaluated)
    stuck = [line for line in told if line.startswith("still in score")]
    assert len(stuck) == 1 and f"the stacks are in {tmp_path}/training.log" in stuck[0]
    stacks = (tmp_path / "training.log").read_text()
    assert stacks.count("still in score") == 1 and "in slow\n" in stacks


class Clock:
    """A time of its own, in place of the machine's."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def wait(self, seconds):
        """As an event's that is set after 25 minutes."""
        self.now += seconds
        return self.now > 1500


def told(timer, tmp_path, clock, caplog):
    caplog.clear()
    Heartbeat(timer, tmp_path / "training.log").run(clock)
    return list(caplog.messages)


def test_a_phase_tells_each_minute_and_a_hang_its_stacks_after_ten(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    lines = told(PhaseTimer(), tmp_path, clock, caplog)
    assert lines[:3] == [f"load: {minute}:00 so far" for minute in (1, 2, 3)]
    (still,) = [line for line in lines if line.startswith("still")]
    assert lines.index(still) == 10 and still.startswith("still in load, for 10:00 without a sign of progress")
    assert (tmp_path / "training.log").read_text().count("Process ") == 1


def test_tokens_that_are_written_are_progress(tmp_path, caplog, monkeypatch):
    """No completion is done in all that time: all of them are long."""
    caplog.set_level(logging.INFO)
    clock = Clock(monkeypatch)
    timer = PhaseTimer()
    timer.begin("step", "generate")
    timer.written = lambda: Written(0, 64, int(812 * clock.now))
    lines = told(timer, tmp_path, clock, caplog)
    assert lines[1] == "generate: 2:00 so far, 0 of 64 completions are done, 812 tokens a second (2:00 of this step)"
    assert len(lines) == 25 and not (tmp_path / "training.log").exists()


def test_steps_of_less_than_a_minute_say_nothing(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    clock, timer = Clock(monkeypatch), PhaseTimer()
    wait = clock.wait

    def a_step_every_half_minute(seconds):
        ended = wait(seconds)
        clock.now, now = clock.now - clock.now % 30, clock.now
        timer.begin("step", "update")
        clock.now = now
        return ended

    clock.wait = a_step_every_half_minute
    assert told(timer, tmp_path, clock, caplog) == []


def test_a_line_makes_room_for_itself_beside_a_bar(tmp_path, capfd):
    terminal = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(terminal)
    logging.getLogger().setLevel(logging.INFO)
    timer = PhaseTimer()
    bar = tqdm(total=3)
    shown = capfd.readouterr().err
    Heartbeat(timer, tmp_path / "training.log")._tell(timer.now, None, timer.now.since + 61)
    written = capfd.readouterr()
    bar.close()
    assert "0/3 [" in shown and written.out == "load: 1:01 so far\n"
    assert re.match(r"\r +\r\s*0%", written.err)  # taken away, and shown again


def test_a_timer_names_what_failed_and_times_what_did_not():
    timer = PhaseTimer()
    timer.begin("step", "update")
    with timer("score"):
        assert (timer.now.phase, timer.now.whole) == ("score", "step")
    assert timer.now.phase == "update" and list(timer.seconds) == ["score"]
    with pytest.raises(ZeroDivisionError), timer.during("evaluation", "loss"), timer("generate"):
        1 / 0  # noqa: B018
    assert (timer.now.phase, timer.now.whole) == ("generate", "evaluation")


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_run_has_one_thread_for_it_from_loading_on_and_none_behind_an_error(
    model_dir, rows_file, tmp_path, monkeypatch, stage
):
    def failing(*_):
        assert len(threads()) == 1
        raise ZeroDivisionError

    monkeypatch.setattr(f"trainers.{stage}.load_teacher", failing)
    words = [f"model_name_or_path={model_dir}", f"dataset_id_or_path={rows_file}", "device=cpu", "report_to=none"]
    words += ["eval_dataset_split=null", "report_before_after=false", "num_probes=0"] if stage == "rl" else []
    words += [f"student_model={model_dir}"] if stage == "rl" else ["model_init=null", "eval_dataset_split=null"]
    run = "teacher_rlt_tiny" if stage == "rl" else "teacher_sft_tiny"
    options = planned(load_options(compose_run(run, [*words, f"output_dir={tmp_path}"]), repo=REPO)).options
    with pytest.raises(ZeroDivisionError):
        run_rl(options, tmp_path) if stage == "rl" else run_sft(options, tmp_path, str(model_dir))
    assert not threads()
