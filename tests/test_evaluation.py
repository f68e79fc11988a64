"""Means of an evaluation in several batches. Run: ./run_tests.sh tests/test_evaluation.py"""

import json
from functools import partial

import pytest
import torch

from data.explanation import sampled_explanation
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.score import load_score_rows
from trainers.scoring.evaluation import Evaluation, HeldOutFiles
from trainers.scoring.explanation_scorer import Scored
from trainers.scoring.probes import Evaluated

NO = float("nan")


def evaluated(*batches, names=("student", "own")):
    evaluation = Evaluation()
    for rewards in batches:
        evaluation.add_batch([], torch.tensor(rewards), list(names))
    return evaluation


def test_batches_count_by_their_rows():
    """Five rows in batches of 4 and 1, a reward of 1 for the first row alone."""
    metrics = {"reward": [0.25, 0.0], "entropy": [NO, 2.0], "once": [1.0]}
    evaluated([[1.0, 1.0]] * 4, [[1.0, 1.0]]).weigh_batches(metrics, {"kl_reward"})
    assert metrics == {"reward": [0.2], "entropy": [2.0], "once": [1.0]}


def test_what_has_a_reward_counts_by_function():
    """The student scores all four rows, then one of four, then none; the other function all but the last batch."""
    both, only_own, none = [-1.0, 1.0], [NO, 1.0], [NO, NO]
    metrics = {
        "kl_reward": [-1.0, 0.0],
        "rewards/student/mean": [-1.0, 0.0, NO],
        "rewards/own/mean": [1.0, 0.0, NO],
        "reward": [0.0, 1.0, NO],
        "completions/mean_length": [1.0, 2.0, 3.0],
        "own_metric": [1.0, 2.0, 3.0],
        "unscorable_fraction": [0.0, 0.75, 1.0],
    }
    evaluated([both] * 4, [both] + [only_own] * 3, [none] * 4).weigh_batches(metrics, {"kl_reward"})
    assert metrics.pop("kl_reward") == metrics.pop("rewards/student/mean") == [-0.8]
    assert metrics.pop("rewards/own/mean") == metrics.pop("reward") == [0.5]
    assert metrics == {
        "completions/mean_length": [2.0],
        "own_metric": [2.0],
        "unscorable_fraction": [pytest.approx(7 / 12)],
    }


def test_what_the_teacher_wrote_is_there_to_read_and_to_score_again(renderer, tmp_path):
    ids = [renderer.encode_text(text) for text in ("2+3=5" + renderer.tags.explanation[1], "2+3")]
    rows = [Evaluated("What is 2+3?", "5", own + [renderer.tokenizer.eos_token_id]) for own in ids]
    evaluation = Evaluation()
    scores = [Scored(-0.5, {"kl_reward": 0.25}, True), "too long"]
    evaluation.add_batch(rows, torch.tensor([[-0.5], [NO]]), ["teacher_logprob_kl"], scores)
    (tmp_path / "held_out").mkdir()
    (tmp_path / "held_out" / "of an earlier run").write_text("")
    files = HeldOutFiles(tmp_path / "held_out", partial(sampled_explanation, renderer))
    for _ in range(2):
        files.write(evaluation, 7)
    names = ["001_after_step_00007.jsonl", "002_after_step_00007.jsonl"]
    assert sorted(file.name for file in (tmp_path / "held_out").iterdir()) == names
    assert len(list(tmp_path.glob("held_out-*/of an earlier run"))) == 1
    path = tmp_path / "held_out" / names[1]
    first, second = map(json.loads, path.read_text().splitlines())
    asked = {"question": "What is 2+3?", "solution": "5"}
    assert first == asked | {
        "explanation": "2+3=5",
        "closed": True,
        "rewards/teacher_logprob_kl": -0.5,
        "kl_reward": 0.25,
        "student_solves": True,
    }
    unscored = {"explanation": "2+3", "closed": False, "rewards/teacher_logprob_kl": None, "reason": "too long"}
    assert second == asked | unscored
    words = [f"dataset_id_or_path={path}", "model_name_or_path=a", "student_model=b", "stage=score", "device=cpu"]
    again = load_score_rows(load_options(compose_run("", words)))
    assert (again["explanation"], again["closed"]) == (["2+3=5", "2+3"], [True, False])
