"""The scripts of benchmarks/gpu, rehearsed on a CPU in small: what they would do on a card, they can do."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import REPO

from benchmarks import bridge_ways, gpu_memory, preset_run
from benchmarks.commands import last_error, run
from benchmarks.gpu import report
from benchmarks.preset_run import PresetRun, compose, read_run
from benchmarks.shapes import SHAPES
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.machine import GB, Card, Machine
from trainers.plan.model_shapes import model_shape
from trainers.plan.run_models import shapes_of
from trainers.plan.solve import Problem
from trainers.settings.engine_specs import sampling_arguments, vllm_arguments

SCRIPTS = ("ceilings", "student", "update", "engine", "step")
SMALL = {
    "ceilings": [],
    "student": ["--model", "tiny", "--passes", "256", "--mean-tokens", "32", "--slow-completions", "2"],
    "update": ["--model", "tiny", "--optimizers", "adamw_torch", "--completions", "4", "--micro-batch", "2"]
    + ["--prompt", "64", "--completion", "16"],
    "engine": ["--model", "tiny", "--bridges", "shared", "--ways", "--questions", "2", "--generations", "2"]
    + ["--prompt", "64", "--completion", "16", "--cycles", "7", "--updates", "2"],
    "step": ["--model", "tiny", "--presets", "80gb", "--group", "4", "--prompt", "64", "--completion", "16"]
    + ["--stock"],
}


def rehearse(name, out, **environment):
    if torch.cuda.is_available():
        pytest.skip("vLLM for CUDA does not run on a CPU")
    command = [sys.executable, f"benchmarks/gpu/{name}.py", "--device", "cpu", "--out", str(out), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / f"{name}.json").read_text())
    assert "rehearsal" in found["card"] and found["versions"]["torch"]
    assert all("error" not in row for row in found["rows"]), found["rows"]
    return found


def test_without_a_gpu_they_say_so_and_claim_nothing(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu/all.sh", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == list(SCRIPTS)
    assert done.stdout.count("nothing was measured") == len(SCRIPTS)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_a_preset_is_not_claimed_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_memory.py", "--out", str(tmp_path / "out"), "--whole"],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    assert said.startswith("gpu_memory-teacher_rlt_mono_80gb: ") and "nothing was measured" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("whole", [False, True])
def test_the_whole_step_of_a_preset_is_its_own(whole):
    asked = Namespace(device="cpu", config="teacher_rlt_mono_80gb", group=4, completion=16, whole=whole, overrides=[])
    options = load_options(compose_run(asked.config, gpu_memory.chosen(asked)), needs_device=False)
    told = options.train_batch_size, options.num_generations, options.max_completion_length
    assert told == ((64, 16, 8192) if whole else (4, 4, 16))


@pytest.mark.parametrize(("script", "package"), [("student", "trl"), ("update", "torchao"), ("engine", "vllm")])
def test_a_missing_package_is_named(script, package, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a script chooses its GPU there
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "argv", [script, "--device", "cpu"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(REPO / f"benchmarks/gpu/{script}.py"), run_name="__main__")
    assert stopped.value.code == 0
    assert f"{package} missing here: nothing was measured" in capsys.readouterr().out


def test_the_engine_of_a_gpu_needs_torchvision_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a script chooses its GPU there
    monkeypatch.setattr(report, "installed", lambda: {"vllm"})  # its build for GPUs, of the same version
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(sys, "argv", ["step", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(REPO / "benchmarks/gpu/step.py"), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == "step: torchvision missing here: nothing was measured\n"


def test_no_run_of_the_update_reads_vllm(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for read in (sampling_arguments, vllm_arguments):
        read.cache_clear()
    from benchmarks.gpu import update

    sizes = {"completions": 4, "micro_batch": 2, "prompt": 64, "completion": 16, "steps": 2}
    settings = update.work(Namespace(device="cpu", **sizes))
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/train-00000.parquet").touch()
    for further in ([], update.replayed(settings, tmp_path / "rollouts", "adamw_8bit", True)):
        options = compose(update.PRESET, [*settings, *further], tmp_path, tmp_path / "models", "tiny")
        assert options.generation_kwargs == {"min_new_tokens": 16} and not options.use_vllm


def test_what_a_preset_measured_before_it_was_cut_off_is_told(tmp_path):
    assert read_run(tmp_path, "killed by signal 9") == PresetRun(error="killed by signal 9")
    plan = {"optim": "adamw_8bit", "host memory": "it would take 90.0 GiB"}
    begin = {"planned": {"update": 6.0}, "plan": plan, "used_before": 0.5}
    (tmp_path / "plan.json").write_text(json.dumps(begin))
    (tmp_path / "out").mkdir()
    first = {"step": 1, "num_tokens": 300.0, "seconds/update": 3.0, "memory/step_peak": 5.0, "memory/generate_peak": 4}
    first["memory/load_peak"] = 2.5
    second = {"step": 2, "num_tokens": 500.0, "seconds/update": 2.0, "memory/step_peak": 5.5}
    lines = [json.dumps(row) + "\n" for row in (first, {"step": 1, "train_runtime": 9.0}, second)]
    (tmp_path / "out/metrics.jsonl").write_text(lines[0] + lines[1][:9])
    run = read_run(tmp_path, "killed by signal 9")
    assert (run.steps, run.tokens, run.seconds) == (1, 300, {"update": 3.0})
    assert run.error == "killed by signal 9: it would take 90.0 GiB"
    (tmp_path / "out/metrics.jsonl").write_text("".join(lines))
    run = read_run(tmp_path, None)
    assert (run.steps, run.tokens, run.seconds, run.error) == (2, 200, {"update": 2.0}, None)
    assert run.measured == {"load": 2.0, "generate": 3.5, "update": 5.0}
    assert run.phase("update") == {"planned_gib": 6.0, "measured_gib": 5.0, "plan_off": pytest.approx(0.2)}
    assert run.phase("generate") == {"measured_gib": 3.5} and run.phase("score") == {}


def test_the_shapes_of_qwen_have_as_many_parameters_as_its_models():
    # As their model cards and the hub's count of tensors say.
    known = {"0.5b": 494_032_768, "1.5b": 1_543_714_304, "7b": 7_615_616_512}
    for name, parameters in known.items():
        assert model_shape({"model_type": "qwen2", **SHAPES[name]}, name).num_parameters == parameters


@pytest.mark.parametrize(
    ("gb", "student", "update", "engine", "step", "left_out"),
    [
        (85, "7b", "7b", "1.5b", "--presets 80gb 48gb", ""),
        (48, "7b", "1.5b", "1.5b", "--presets 48gb 24gb --stock", "On a card of 48 GB"),
        (
            25,
            "7b",
            "1.5b",
            "1.5b",
            "--presets 24gb 16gb --stock",
            "step.py with\n24gb 16gb. Left out: 7B with all weights",
        ),
        (12, "1.5b", "0.5b", "0.5b", "--presets 12gb --stock", "On a card of 12 GB"),
        (8, "1.5b", "0.5b", "0.5b", "--presets --stock", "no preset, as the smallest is for 12 GB"),
    ],
)
def test_a_smaller_card_gets_smaller_models_and_is_told_what_is_left_out(
    gb, student, update, engine, step, left_out, tmp_path
):
    (tmp_path / "python").write_text(f'#!/usr/bin/env bash\n[[ $1 != -c ]] || {{ echo {gb}; exit; }}\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    command = ["bash", "benchmarks/gpu/all.sh", str(tmp_path / "out"), str(tmp_path / "models")]
    environment = os.environ | {"PYTHON": str(tmp_path / "python")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=environment)
    assert done.returncode == 0, done.stderr
    told = [line.partition(f"--models {tmp_path / 'models'}")[2].strip() for line in done.stdout.splitlines()]
    assert told == ["", f"--model {student}", f"--model {update}", f"--model {engine}", step]
    assert left_out in done.stderr and bool(done.stderr) == (gb < 80)


def test_all_of_them_end_within_25_minutes():
    limits = re.findall(r"^measure (\d+) (\w+)", Path(REPO, "benchmarks/gpu/all.sh").read_text(), re.MULTILINE)
    assert [script for _, script in limits] == list(SCRIPTS)
    assert sum(int(seconds) + 10 for seconds, _ in limits) <= 25 * 60


def test_a_way_is_told_with_the_free_memory_about_a_release(monkeypatch, tmp_path):
    told = ("step", "sync", "sentinel", "sentinel_share", "generate", "rest", "tokens_per_second", "weight_mib")
    times = dict.fromkeys(told, 1.0)
    free = {"free_before_release_gib": 10.0, "free_after_release_gib": 30.0}
    monkeypatch.setattr(report, "run", lambda *_: {"ways": {"shared": times | free}})
    assert report.bridge_way("shared", tmp_path / "log").items() >= free.items()
    monkeypatch.setattr(report, "run", lambda *_: {"ways": {"trl": times}})
    assert not free.keys() & report.bridge_way("trl", tmp_path / "log").keys()


def test_the_peak_of_a_way_is_beyond_what_others_use_of_the_card(monkeypatch):
    monkeypatch.setattr(bridge_ways, "used_of_card", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (68, 80))
    peak = bridge_ways.Peak(torch.device("cuda"))
    with peak:
        deadline = time.monotonic() + 30
        while peak.bytes is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert peak.bytes == 80 - 68 - 2


def test_host_memory_that_is_not_free_yet_is_told_and_tried(monkeypatch):
    small = Machine(Card("a card", 80 * GB, 80 * GB), 64 * 2**30, 2 * 2**30, 10**12)  # it may grow
    options = load_options(compose_run("teacher_rlt_mono_48gb"), needs_device=False)
    monkeypatch.setattr(preset_run, "problem_of", lambda asked: Problem(asked, *shapes_of(asked), small))
    plan, host = preset_run.planned(options.model_copy(update={"optim": "cpu_offload"}))
    need = plan.host_need / 2**30
    assert plan.fits and need > 64
    assert host == f"it would take {need:.1f} GiB of host memory; 2.0 of 64.0 GiB were free before"


def test_ceilings(tmp_path):
    rows = rehearse("ceilings", tmp_path)["rows"]
    assert len(rows) == 3 and all(row["value"] > 0 for row in rows)


def test_student(tmp_path):
    row, slow = rehearse("student", tmp_path)["rows"]
    assert row["completions"] == 8
    assert 0.9 < row["weights_moved"] <= 1  # once in a pass; the tied head is not moved twice
    assert min(row["streamed_s"], row["resident_s"], slow["one_by_one_s"]) > 0


def test_engine(tmp_path):
    (row,) = rehearse("engine", tmp_path)["rows"]
    assert row["bridge"] == "shared" and row["tokens_per_s"] > 0
    assert row["max_before"] < 1e-5 and row["max_after"] < 1e-5
    assert row["updates_moved"] > 0.01  # or it would have compared the weights of the begin with themselves


@pytest.mark.slow
def test_step(tmp_path):
    rows = rehearse("step", tmp_path)["rows"]
    assert [row["phase"] for row in rows[:4]] == ["load", "generate", "score", "update"]
    assert all(row["planned_gib"] > 0 and row["measured_gib"] > 0 for row in rows[:4])
    assert all(row["seconds"] > 0 for row in rows[1:4])


@pytest.mark.slow
def test_the_memory_of_a_preset_is_told_in_a_file(tmp_path):
    small = ["--device", "cpu", "--model", "tiny", "--group", "4", "--completion", "16", "max_prompt_length=64"]
    command = [sys.executable, "benchmarks/gpu_memory.py", "--out", str(tmp_path), *small]
    subprocess.run(command, cwd=REPO)  # of so small a run the plan is off
    found = json.loads((tmp_path / "gpu_memory-teacher_rlt_mono_80gb.json").read_text())
    assert [row["phase"] for row in found["rows"]] == ["load", "generate", "score", "update", "save"]
    assert all(row["planned_gib"] > 0 and row["measured_gib"] > 0 for row in found["rows"])
    assert found["notes"][0].startswith("2 steps measured")
    assert not list(tmp_path.rglob("*.safetensors")), "what was written to measure saving is left"


@pytest.mark.slow
def test_update_in_an_environment_without_vllm(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")
    rows = rehearse("update", tmp_path, PYTHONPATH=str(hidden))["rows"]
    assert [row["checkpointing"] for row in rows] == [True, False]
    assert all(row["tokens_per_s"] > 0 and row["visible_fraction"] > 0 for row in rows)


def test_a_command_that_fails_gives_its_last_error(tmp_path):
    log = tmp_path / "log"
    assert run([sys.executable, "-c", "print('{\"a\": 1}')"], log) == {"a": 1}
    failed = run([sys.executable, "-c", "print('well'); raise ValueError('too small')"], log)
    assert failed == "ValueError: too small" and "well" in log.read_text()
    assert last_error("loading\n[rank0]: torch.OutOfMemoryError: CUDA out of memory\n  tried 2 GiB") == (
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory tried 2 GiB"
    )
    assert run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == "killed by signal 9"
    assert run([sys.executable, "-c", "print('well')"]) == "well"
    assert run([sys.executable, "-c", "print('{1: 2}')"]) == "{1: 2}"
    ends = "import atexit, os; from benchmarks.commands import tell; atexit.register(os.abort); tell({'a': 1})"
    assert run([sys.executable, "-c", ends]) == {"a": 1}  # it would crash on its way out
    killed = "import os; print('{\"step\": 1}', flush=True); os.kill(os.getpid(), 9)"
    assert run([sys.executable, "-c", killed]) == "killed by signal 9"


def test_one_that_is_told_to_end_tells_first_what_its_command_measured(tmp_path):
    code = "from benchmarks.commands import end_when_told, run; from pathlib import Path; import sys; end_when_told()\n"
    code += "command = [sys.executable, '-c', 'import time; print(1); time.sleep(60)']\n"
    code += "print(run(command, Path(sys.argv[1])), flush=True); run(command); print('another')"
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", code, log], cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.terminate()
        assert process.communicate(timeout=30)[0] == "killed by signal 15\n"
    assert process.returncode == 128 + 15


def test_what_a_command_says_is_kept_while_it_runs(tmp_path):
    log = tmp_path / "log"
    go = str(tmp_path / "go")
    wait = f"import time, pathlib; print('begun')\nwhile not pathlib.Path({go!r}).exists(): time.sleep(0.01)"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run, [sys.executable, "-c", wait], log)
        deadline = time.monotonic() + 60
        while "begun" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "begun" in log.read_text() and not running.done()
        Path(go).touch()
        assert running.result() == "begun"
