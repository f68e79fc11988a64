"""Means of an evaluation in several batches. Run: ./run_tests.sh tests/test_evaluation.py"""

import pytest
import torch

from trainers.scoring.evaluation import Evaluation

NO = float("nan")


def evaluated(*batches, names=("student", "own")):
    evaluation = Evaluation({"kl_reward"})
    for rewards in batches:
        evaluation.add_batch(torch.tensor(rewards), list(names))
    return evaluation


def test_batches_count_by_their_rows():
    """Five rows in batches of 4 and 1, a reward of 1 for the first row alone."""
    metrics = {"reward": [0.25, 0.0], "entropy": [NO, 2.0], "once": [1.0]}
    evaluated([[1.0, 1.0]] * 4, [[1.0, 1.0]]).weigh_batches(metrics)
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
    evaluated([both] * 4, [both] + [only_own] * 3, [none] * 4).weigh_batches(metrics)
    assert metrics.pop("kl_reward") == metrics.pop("rewards/student/mean") == [-0.8]
    assert metrics.pop("rewards/own/mean") == metrics.pop("reward") == [0.5]
    assert metrics == {
        "completions/mean_length": [2.0],
        "own_metric": [2.0],
        "unscorable_fraction": [pytest.approx(7 / 12)],
    }
