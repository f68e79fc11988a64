"""What is evaluated, and what is not trained on. Run: ./run_tests.sh tests/test_held_out.py"""

import json
import os
import random
import subprocess
import sys

import pytest
from conftest import REPO, ROWS
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from planned import machine, planned, problem
from safetensors.torch import load_file

from data.load import hold_out
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.memory import PROBES
from trainers.plan.knobs import knobs
from trainers.scoring.probes import MEANING
from trainers.texts import check_enough, load_train_and_eval_rows
from trainers.warmup import warmup_options


@given(st.lists(st.integers(0, 30), min_size=2, max_size=60), st.integers(1, 40), st.randoms(use_true_random=False))
def test_questions_are_held_out_once_and_whatever_their_order(numbers, count, shuffler):
    rows = [{"question": f"What is {n}?", "solution": str(i)} for i, n in enumerate(numbers)]
    if count >= len(set(numbers)):
        with pytest.raises(ConfigError, match=rf"eval_size={count}: the training data has {len(set(numbers))} "):
            hold_out(Dataset.from_list(rows), count)
        return
    left, apart = (part.to_list() for part in hold_out(Dataset.from_list(rows), count))
    held = {row["question"] for row in apart}
    assert len(held) == len(apart) == count
    assert left == [row for row in rows if row["question"] not in held]
    assert all(row == next(r for r in rows if r["question"] == row["question"]) for row in apart)
    shuffler.shuffle(rows)
    assert {row["question"] for row in hold_out(Dataset.from_list(rows), count)[1]} == held


def test_what_is_held_out_is_a_sample_and_not_the_first_rows():
    rows = Dataset.from_list([{"question": f"What is {n}?"} for n in range(1000)])
    places = [int(row["question"][8:-1]) for row in hold_out(rows, 100)[1]]
    assert 350 < sum(places) / 100 < 650


@pytest.fixture
def file(tmp_path):
    rows = [{**ROWS[i % 4], "question": f"{i}: {ROWS[i % 4]['question']}"} for i in range(20)]
    random.Random(0).shuffle(rows)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(run, file, *words):
    here = ["device=cpu", f"dataset_id_or_path={file}", "eval_dataset_split=null"]
    here += ["train_batch_size=8", "per_device_train_batch_size=8"]
    return load_options(compose_run(run, here + list(words)), repo=REPO)


def test_warm_up_and_rl_hold_out_the_same_questions(file):
    def kept(run, *words):
        rows, held_out = load_train_and_eval_rows(options(run, file, "eval_size=5", *words))
        return set(rows["question"]), None if held_out is None else set(held_out["question"])

    left, held_out = kept("teacher_rlt_tiny")
    assert (len(left), len(held_out)) == (15, 5)
    assert kept("teacher_rlt_tiny", "seed=3", "eval_strategy=steps") == (left, held_out)
    assert kept("teacher_sft_tiny") == (left, None)  # which evaluates nothing, and does not see them either
    assert kept("teacher_sft_tiny", "eval_strategy=epoch") == (left, held_out)
    assert kept("teacher_rlt_tiny", "max_samples=8")[1] == held_out  # out of all rows
    assert len(kept("teacher_rlt_tiny", "max_samples=8")[0] & left) == 8
    assert kept("teacher_rlt_tiny", "max_eval_samples=2")[0] == left
    assert len(kept("teacher_rlt_tiny", "max_eval_samples=2")[1]) == 2


@pytest.mark.parametrize("empty", ["eval_dataset_id_or_path=", "eval_dataset_split="])
def test_what_is_named_by_nothing_is_not_named(file, empty):
    rows, held_out = load_train_and_eval_rows(options("teacher_rlt_tiny", file, "eval_size=5", empty))
    assert not set(rows["question"]) & set(held_out["question"])


def test_rows_that_are_trained_on_as_well_are_told(file, caplog):
    load_train_and_eval_rows(options("teacher_rlt_tiny", file, f"eval_dataset_id_or_path={file}"))
    assert "20 of 20 held-out rows have a question that is trained on" in caplog.text


def test_much_of_the_data_is_held_out_with_a_warning_and_too_much_not(file, caplog):
    load_train_and_eval_rows(options("teacher_rlt_tiny", file, "eval_size=3"))
    assert not caplog.text
    rows, _ = load_train_and_eval_rows(options("teacher_rlt_tiny", file, "eval_size=19"))
    assert "19 questions of the training data are held out, 1 rows are left" in caplog.text
    with pytest.raises(ConfigError, match="hold out fewer: eval_size below 19"):
        check_enough(rows, options("teacher_rlt_tiny", file, "eval_size=19", "num_generations=4"))


def test_named_data_comes_before_eval_size(file, rows_file):
    named = options("teacher_rlt_tiny", file, "eval_size=5", f"eval_dataset_id_or_path={rows_file}")
    rows, held_out = load_train_and_eval_rows(named)
    assert len(rows) == 20 and set(held_out["question"]) == {row["question"] for row in ROWS}


def test_questions_are_set_apart_or_a_split_is_evaluated_and_not_both(file):
    for run in ("teacher_rlt_tiny", "teacher_sft_tiny"):
        with pytest.raises(ConfigError, match="eval_size=5: eval_dataset_split=test is evaluated") as error:
            load_options(compose_run(run, ["device=cpu", f"dataset_id_or_path={file}", "eval_size=5"]), repo=REPO)
        assert [fault.remedy for fault in error.value.faults] == ["eval_dataset_split=null"]  # a file has no splits


def test_a_run_that_names_a_file_beside_both_has_warm_ups_that_follow_its_split(file):
    words = [f"eval_dataset_id_or_path={file}", "eval_size=5", "device=cpu"]
    asking = load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    asked = warmup_options("student_sft_tiny", asking)[1]
    assert (asked.eval_dataset_split, asked.eval_size) == ("test", None)


def test_a_file_of_one_s_own_is_not_judged_by_the_data_that_ships(file):
    words = ["device=cpu", f"dataset_id_or_path={file}"]
    with pytest.raises(ConfigError, match="eval_dataset_split=.*has no splits[\\s\\S]*eval_size=64"):
        load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    load_options(compose_run("teacher_rlt_tiny", [*words, "report_before_after=false"]), repo=REPO)
    folder = options("teacher_rlt_tiny", file.parent, "eval_dataset_split=test")
    with pytest.raises(ConfigError, match="eval_dataset_split='test'[\\s\\S]*no such split[\\s\\S]*eval_size=64"):
        load_train_and_eval_rows(folder)


def test_the_best_checkpoint_is_not_told_by_a_loss_that_tells_nothing():
    best = ["device=cpu", "load_best_model_at_end=true", "eval_strategy=steps", "save_steps=25", "eval_steps=25"]
    for metric in ("null", "eval_loss"):
        with pytest.raises(ConfigError, match="metric_for_best_model=reward"):
            load_options(compose_run("teacher_rlt_tiny", [*best, f"metric_for_best_model={metric}"]), repo=REPO)
    load_options(compose_run("teacher_rlt_tiny", [*best, "metric_for_best_model=student_accuracy"]), repo=REPO)
    best.append("metric_for_best_model=completions/clipped_ratio")  # the higher, the worse
    with pytest.raises(ConfigError, match="greater_is_better=false"):
        load_options(compose_run("teacher_rlt_tiny", best), repo=REPO)
    load_options(compose_run("teacher_rlt_tiny", [*best, "greater_is_better=false"]), repo=REPO)
    saved = ["device=cpu", "eval_strategy=steps", "eval_steps=25", "save_strategy=best", "metric_for_best_model=loss"]
    with pytest.raises(ConfigError, match="metric_for_best_model=reward"):
        load_options(compose_run("teacher_rlt_tiny", saved), repo=REPO)


def test_teacher_that_reads_probes_is_planned():
    assert len(MEANING) + 1 == PROBES
    small = ["student_model=Qwen/Qwen2.5-0.5B-Instruct", "beta=0", "sync_ref_model=false"]
    probed, plain = (planned("teacher_rlt_mono_80gb", *small, f"num_probes={n}")[0] for n in (32, 0))
    assert probed.phases["score"]["scoring buffers"] > 2 * plain.phases["score"]["scoring buffers"]
    for never in ("report_before_after=false", "reward_funcs=[student_answer]"):
        silent = planned("teacher_rlt_mono_80gb", *small, never)[0]
        assert silent.phases["score"] == plain.phases["score"]
    ahead = planned("teacher_rlt_mono_80gb", *small, "overlap_scoring=true", "student_mode=resident")[0]
    assert ahead.phases["generate"]["scoring buffers"] < probed.phases["score"]["scoring buffers"] / 2


def test_an_evaluation_counts_for_the_engine_only_where_there_is_one():
    words = "train_batch_size=8", "num_generations=8", "per_device_train_batch_size=1"
    assert planned("teacher_rlt_mono_24gb", *words)[0].options.max_num_seqs == 32
    assert planned("teacher_rlt_mono_24gb", *words, "report_before_after=false")[0].options.max_num_seqs == 8
    large = planned("teacher_rlt_mono_24gb", *words, "use_vllm=false", "per_device_eval_batch_size=64")
    assert not large[0].fits
    fits = [str(change) for change in knobs(problem(large[1], machine(24))) if change.plan.fits]
    assert "report_before_after=false" in fits


@pytest.mark.parametrize(("adapters", "file"), [("false", "model.safetensors"), ("true", "adapter_model.safetensors")])
def test_the_best_checkpoint_is_kept_and_the_engine_follows_it(model_dir, rows_file, tmp_path, adapters, file):
    """The reward falls with each evaluation: the first checkpoint is the best, and that is what the run ends with."""
    (tmp_path / "own_best.py").write_text(
        "calls = 0\n"
        "def falling(completion_ids, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [sum(ids) % 2 - 10.0 * calls for ids in completion_ids]\n"
    )
    words = [f"model_name_or_path={model_dir}", f"dataset_id_or_path={rows_file}", f"use_peft={adapters}"]
    words += ["student_model=null", "reward_funcs=[{_target_: own_best.falling}]", f"output_dir={tmp_path}/out"]
    words += ["eval_dataset_split=null", "eval_size=2", "train_batch_size=4", "per_device_train_batch_size=4"]
    words += ["num_generations=2", "per_device_eval_batch_size=8", "max_completion_length=16", "max_steps=3"]
    words += ["eval_strategy=steps", "eval_steps=1", "save_steps=1", "load_best_model_at_end=true", "device=cpu"]
    words += ["metric_for_best_model=reward", "teacher_system_prompt=Explain.", "save_total_limit=3"]
    command = [sys.executable, str(REPO / "train.py"), *words, "student_system_prompt=Solve.", "learning_rate=1e-2"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kept, best, last = (load_file(tmp_path / "out" / f / file) for f in (".", "checkpoint-1", "checkpoint-3"))
    assert all(kept[name].equal(best[name]) for name in best) and not all(kept[name].equal(last[name]) for name in last)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    after = [line for line in lines if "eval_reward" in line][-1]
    files = sorted((tmp_path / "out/held_out").iterdir())  # before training, after each step, and of the best
    steps = ["001_after_step_00000", "002_after_step_00001", "003_after_step_00002", "004_after_step_00003"]
    assert [file.stem for file in files] == [*steps, "005_after_step_00003"]
    texts = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert all(len({line["question"] for line in lines}) == 2 for lines in texts)
    words = [[line["explanation"] for line in lines] for lines in texts]
    assert words[4] == words[1] != words[3]
    # Neither would be so if the engine still had the last step's weights.
    assert max(value for name, value in after.items() if name.startswith("eval_sentinel/")) < 1e-4
    assert after["eval_sampling/sampling_logp_difference/max"] < 1e-4
