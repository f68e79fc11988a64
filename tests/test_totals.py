"""What a training took in all. Run: ./run_tests.sh tests/test_totals.py"""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from planned import planned
from small_run import make_trainer

from trainers.plan.workload import GIB
from trainers.watch import totals
from trainers.watch.totals import Totals, totals_line


def sampler(device="cpu"):
    memory = SimpleNamespace(device=torch.device(device))
    return SimpleNamespace(timer=SimpleNamespace(memory=memory), sampled=Counter(), replay=None)


def logged(generate, update, peak):
    phases = {"seconds/generate": generate, "seconds/update": update}
    return phases | {"memory/load_peak": 70.0, "memory/step_peak": peak, "memory/score_peak": 1.0, "memory/step": 99.0}


def test_totals_weigh_each_log_by_its_steps(tmp_path, monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(totals.time, "perf_counter", lambda: now[0])
    plan, _ = planned("teacher_rlt_mono_80gb")
    source, state = sampler(), SimpleNamespace(global_step=5, is_world_process_zero=True)  # as after a checkpoint
    watch = Totals(source, tmp_path, plan)
    (tmp_path / "totals.json").write_text("an earlier run's")
    watch.on_train_begin(None, state, None)
    assert not (tmp_path / "totals.json").exists()
    for step, logs in ((7, logged(20.0, 10.0, 3.0)), (13, logged(40.0, 20.0, 2.5))):
        state.global_step = step
        source.sampled.update(completions=8, tokens=280)
        watch.on_log(None, state, None, logs)
        watch.on_log(None, state, None, {"eval_reward": 1.0, "eval_seconds/generate": 50.0})
    watch.on_log(None, state, None, {"train_runtime": 50.0})
    state.global_step = 14  # not logged
    source.sampled.update(completions=8, tokens=280)
    now[0] += 3700
    with caplog.at_level("INFO"):
        watch.on_train_end(None, state, None)
    found = json.loads((tmp_path / "totals.json").read_text())
    assert found["steps"] == 9
    assert found["seconds"] == {"wall": 3700, "generate": 2 * 20 + 6 * 40, "update": 2 * 10 + 6 * 20}
    assert (found["completions"], found["tokens"], found["tokens_per_second"]) == (16, 560, 2.0)
    assert found["peak_gib"] == 3.0 and found["peak_phase"] == "step"
    most = max(sum(plan.phases[name].values()) for name in ("generate", "score", "update"))
    assert found["planned_peak_gib"] == pytest.approx(most / GIB)
    source.replay = object()  # read, not sampled
    assert "tokens_per_second" not in watch.totals(9) and watch.totals(9)["tokens"] == 560
    line = totals_line(found)
    assert line in caplog.text and line.startswith(
        "9 steps in 1:01:40: generate 8%, update 4%, the rest 89%; 16 completions, together 560 tokens, "
    )
    assert line.endswith(f"2 a second while sampled; peak 3.00 GiB (step), planned {most / GIB:.2f}")


def test_what_others_hold_of_a_card_is_no_part_of_the_peak(tmp_path, monkeypatch):
    plan, _ = planned("teacher_rlt_mono_24gb")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, plan.available + 2 * GIB))
    watch = Totals(sampler("cuda"), tmp_path, plan)
    watch.on_log(None, SimpleNamespace(global_step=1), None, logged(1.0, 1.0, 21.5))
    assert watch.totals(1)["peak_gib"] == 19.5


def test_a_checkpoint_that_took_the_most_is_compared_with_what_was_planned_for_it(tmp_path):
    plan, _ = planned("teacher_rlt_mono_80gb")
    plan.phases["save"] = {"clones": 90 * GIB}
    watch, state = Totals(sampler(), tmp_path, plan), SimpleNamespace(global_step=1)
    watch.on_log(None, state, None, logged(1.0, 1.0, 2.0))
    assert watch.totals(1)["peak_phase"] == "step" and watch.totals(1)["planned_peak_gib"] < 80
    watch.on_log(None, state, None, logged(1.0, 1.0, 2.0) | {"memory/save_peak": 4.0})
    found = watch.totals(1)
    assert (found["peak_phase"], found["peak_gib"], found["planned_peak_gib"]) == ("save", 4.0, 90.0)


def test_a_run_whose_steps_were_not_logged_tells_its_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(totals.time, "perf_counter", lambda: 0.0)
    watch, state = Totals(sampler(), tmp_path, None), SimpleNamespace(global_step=0, is_world_process_zero=True)
    watch.on_train_begin(None, state, None)
    state.global_step = 3
    with caplog.at_level("INFO"):
        watch.on_train_end(None, state, None)
    assert "3 steps in 0:00" in caplog.text
    assert json.loads((tmp_path / "totals.json").read_text()) == {"steps": 3, "seconds": {"wall": 0.0}}


@pytest.mark.parametrize("iterations", [1, 2])
def test_totals_of_a_real_run_agree_with_its_metrics(renderer, model_dir, tmp_path, iterations):
    """With two iterations every other step has no rollout, and no reward in its log."""
    trainer = make_trainer(renderer, model_dir, tmp_path, max_steps=4, logging_steps=1, num_iterations=iterations)
    trainer.add_callback(Totals(trainer.sampler, tmp_path, None))
    trainer.train()
    trainer.sampler.engine.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "seconds/update" in row]
    found = json.loads((tmp_path / "totals.json").read_text())
    assert found["steps"] == len(rows) == 4
    phases = {name: value for name, value in found["seconds"].items() if name != "wall"}
    for name, value in phases.items():
        assert value == pytest.approx(sum(row[f"seconds/{name}"] for row in rows))
    assert set(phases) == {"kv_cache", "sync", "sentinel", "generate", "score", "update"}
    assert 0 < sum(phases.values()) <= found["seconds"]["wall"]
    peaks = [v for row in rows for k, v in row.items() if k.endswith("_peak") and k != "memory/load_peak"]
    assert found["peak_gib"] == max(peaks)
    rollouts = [row for row in rows if "reward" in row]
    assert len(rollouts) == 4 // iterations
    batch = trainer.options.train_batch_size
    assert found["completions"] == batch * len(rollouts)
    lengths = batch * sum(row["completions/mean_length"] for row in rollouts)  # with an end that TRL is told
    assert 0 <= round(lengths) - found["tokens"] <= found["completions"] < found["tokens"]
