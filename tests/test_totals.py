"""What a training took in all. Run: ./run_tests.sh tests/test_totals.py"""

import json
from types import SimpleNamespace

import pytest
from planned import planned
from small_run import make_trainer

from trainers.plan.workload import GIB
from trainers.watch import totals
from trainers.watch.totals import Totals, totals_line


def logged(mean_length, generate, update, peak):
    phases = {"seconds/generate": generate, "seconds/update": update}
    memory = {"memory/generate_peak": peak - 1, "memory/step_peak": peak, "memory/step": 99.0}
    return {"reward": -1.0, "completions/mean_length": mean_length} | phases | memory


@pytest.mark.parametrize("iterations", [1, 2])
def test_totals_weigh_each_log_by_its_steps(tmp_path, monkeypatch, caplog, iterations):
    now = [100.0]
    monkeypatch.setattr(totals.time, "perf_counter", lambda: now[0])
    solved, options = planned("teacher_rlt_mono_80gb")
    options = options.model_copy(update={"train_batch_size": 8, "num_iterations": iterations})
    watch = Totals(options, tmp_path, solved.plan)
    state = SimpleNamespace(global_step=5, is_world_process_zero=True)  # as after a checkpoint
    watch.on_train_begin(None, state, None)
    for step, logs in ((7, logged(10, 20.0, 10.0, 3.0)), (13, logged(20, 40.0, 20.0, 2.5))):
        state.global_step = step
        watch.on_log(None, state, None, logs)
        watch.on_log(None, state, None, {"eval_reward": 1.0, "eval_seconds/generate": 50.0})
    watch.on_log(None, state, None, {"train_runtime": 50.0})
    state.global_step = 14  # not logged
    now[0] += 3700
    with caplog.at_level("INFO"):
        watch.on_train_end(None, state, None)
    found = json.loads((tmp_path / "totals.json").read_text())
    sampled = 8 // iterations
    assert found["steps"] == 9
    assert found["seconds"] == {"wall": 3700, "generate": 2 * 20 + 6 * 40, "update": 2 * 10 + 6 * 20}
    assert found["completions"] == sampled * 8 and found["tokens"] == sampled * (2 * 10 + 6 * 20)
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / 280)
    assert found["peak_gib"] == 3.0 and found["peak_phase"] == "step"
    phases = solved.plan.phases
    most = max(sum(phases[name].values()) for name in ("generate", "score", "update"))
    assert found["planned_peak_gib"] == pytest.approx(most / GIB)
    line = totals_line(found)
    assert line in caplog.text and line.startswith("9 steps in 1:01:40: generate 8%, update 4%, between steps 89%; ")
    assert line.endswith(f" a second while sampled; peak 3.00 GiB (step), planned {most / GIB:.2f}")


def test_a_run_whose_steps_were_not_logged_tells_its_time(tmp_path, monkeypatch, caplog):
    solved, options = planned("teacher_rlt_mono_80gb")
    monkeypatch.setattr(totals.time, "perf_counter", lambda: 0.0)
    watch, state = Totals(options, tmp_path, None), SimpleNamespace(global_step=0, is_world_process_zero=True)
    watch.on_train_begin(None, state, None)
    state.global_step = 3
    with caplog.at_level("INFO"):
        watch.on_train_end(None, state, None)
    assert "3 steps in 0:00" in caplog.text
    assert json.loads((tmp_path / "totals.json").read_text()) == {"steps": 3, "seconds": {"wall": 0.0}}


def test_totals_of_a_real_run_agree_with_its_metrics(renderer, model_dir, tmp_path):
    trainer = make_trainer(renderer, model_dir, tmp_path, max_steps=3, logging_steps=1)
    trainer.add_callback(Totals(trainer.options, tmp_path, None))
    trainer.train()
    trainer.sampler.engine.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "reward" in row]
    found = json.loads((tmp_path / "totals.json").read_text())
    assert found["steps"] == len(rows) == 3
    phases = {name: value for name, value in found["seconds"].items() if name != "wall"}
    for name, value in phases.items():
        assert value == pytest.approx(sum(row[f"seconds/{name}"] for row in rows))
    assert set(phases) == {"kv_cache", "sync", "sentinel", "generate", "score", "update"}
    assert 0 < sum(phases.values()) <= found["seconds"]["wall"]
    assert found["peak_gib"] == max(value for row in rows for name, value in row.items() if name.endswith("_peak"))
    batch = trainer.options.train_batch_size
    assert found["tokens"] == round(batch * sum(row["completions/mean_length"] for row in rows))
