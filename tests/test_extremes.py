"""What is logged of the largest and the smallest. Run: ./run_tests.sh tests/test_extremes.py"""

import inspect
import math
import re
from copy import deepcopy
from statistics import mean

import pytest
from small_run import make_trainer
from trl import GRPOTrainer

from trainers.scoring.evaluation import Evaluation
from trainers.watch.extremes import LARGEST, SHORTEST_ENDED, SMALLEST, keep_extremes

NO = float("nan")


def test_one_value_is_left_of_what_is_an_extreme_and_all_of_a_mean():
    means = {"completions/mean_length": [3.0, 5.0], "answer_log_prob_min": [-3.0, -1.0], "own_max": [1.0, 2.0]}
    extremes = {"completions/max_length": [3.0, 7.0, 5.0], "clip_ratio/high_max": [0.0, NO, 0.5]}
    extremes |= {"completions/min_length": [3.0, 2.0], "clip_ratio/low_min": [NO]}
    extremes |= {SHORTEST_ENDED: [4.0, 0.0, 3.0]}  # of the second nothing has ended
    metrics = deepcopy(means | extremes)
    keep_extremes(metrics)
    assert math.isnan(metrics.pop("clip_ratio/low_min")[0])
    left = {"completions/max_length": [7.0], "clip_ratio/high_max": [0.5], "completions/min_length": [2.0]}
    assert metrics == means | left | {SHORTEST_ENDED: [3.0]}
    keep_extremes(none_ended := {SHORTEST_ENDED: [0.0, 0.0]})
    assert none_ended == {SHORTEST_ENDED: [0.0]}


def test_every_extreme_that_trl_logs_is_known():
    """A newer TRL may have others."""
    written = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', inspect.getsource(GRPOTrainer)))
    assert len(written) > 20
    assert {name for name in written if re.search(r"[/_](min|max)(_|$)", name)} == (LARGEST | SMALLEST) - {
        "sentinel/mismatch_max"
    }


def test_what_several_steps_log_is_their_largest_and_smallest(renderer, model_dir, tmp_path, monkeypatch):
    """In training and in an evaluation, whose batches TRL takes the mean of as well."""
    chosen = {"logging_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    trainer = make_trainer(renderer, model_dir, tmp_path, max_completion_length=48, **chosen)
    values, log = [], trainer.log

    def watching(logs, start_time=None):
        trainer._note_mismatch()
        values.append(deepcopy(trainer._metrics[trainer.mode]))
        log(logs, start_time)

    monkeypatch.setattr(trainer, "log", watching)
    try:
        trainer.train()
        trainer.evaluate(trainer.train_dataset.select(range(4)))
    finally:
        trainer.sampler.engine.close()
    *steps, end, evaluation = zip(values, trainer.state.log_history, strict=True)
    assert not end[0] and len(steps) == 2
    unlike_means = set()
    for prefix, (noted, logged) in [("", each) for each in steps] + [("eval_", evaluation)]:
        seen = {"completions/max_length": max, "completions/min_length": min, "sentinel/mismatch_max": max}
        seen |= {f"sampling/importance_sampling_ratio/{kind.__name__}": kind for kind in (min, max)}
        seen |= {"sampling/sampling_logp_difference/max": max, "clip_ratio/high_max": max, "clip_ratio/low_min": min}
        for name, extreme in seen.items():
            assert logged[prefix + name] == extreme(noted[name]), name
            if extreme(noted[name]) != mean(noted[name]):
                unlike_means.add(prefix + name)
        for name in ("completions/mean_length", "sampling/sampling_logp_difference/mean", "entropy"):
            assert len(noted[name]) > 1 and logged[prefix + name] == pytest.approx(mean(noted[name]))
    assert {"completions/min_length", "eval_completions/min_length"} <= unlike_means


def test_an_evaluation_weighs_no_extreme():
    metrics = {"completions/max_length": [3.0, 9.0], "completions/mean_length": [3.0, 9.0]}
    evaluation = Evaluation(batch_sizes=[3, 1], with_reward=[(3, {}), (1, {})])
    keep_extremes(metrics)
    evaluation.weigh_batches(metrics, set())
    assert metrics == {"completions/max_length": [9.0], "completions/mean_length": [4.5]}
