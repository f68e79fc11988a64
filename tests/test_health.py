"""Runs that learn nothing say so. Run: ./run_tests.sh tests/test_health.py"""

from types import SimpleNamespace

import pytest

from trainers.options import options_class
from trainers.watch.health import NEEDED, HealthWatch, verdicts

WELL = dict(zip(NEEDED, (0.1, -0.1, 0.0, 0.3, 0.98, 0.7, 0.0), strict=True))
OPTIONS = options_class("rl")(max_completion_length=300, learning_rate=1e-6, num_generations=8, temperature=0.7)


def test_a_run_that_learns_is_told_nothing():
    assert verdicts(WELL, OPTIONS) == {} == verdicts({}, OPTIONS)


@pytest.mark.parametrize(
    ("metrics", "name", "words"),
    [
        ({"completions/clipped_ratio": 0.97, "match_reward": -0.97}, "cut", ("97% of", "max_completion_length=600")),
        ({"completions/clipped_ratio": 0.97, "match_reward": 0.0}, "cut", ("97% of", "-> max_completion_length=600")),
        ({"unscorable_fraction": 0.9}, "unscored", ("90% of the completions have no reward",)),
        ({"overflows": 0.6, "update/visible_fraction": 0.0}, "skipped", ("overflow in 60%", "precision=fp32")),
        ({"match_reward": -0.8}, "open", ("80% of", "stage=sft")),
        ({"frac_reward_zero_std": 1.0}, "same", ("100% of the questions", "temperature (now 0.7)")),
        ({"update/visible_fraction": 0.0}, "still", ("no weight", "learning_rate (now 1e-06)")),
        ({"sampling/importance_sampling_ratio/mean": 0.2}, "apart", ("counts for 20%", "token_truncate")),
    ],
)
def test_each_reason_has_a_figure_and_a_remedy(metrics, name, words):
    (found,) = verdicts(WELL | metrics, OPTIONS).items()
    assert found[0] == name and all(word in found[1] for word in words)


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [
        ({"grad_norm": 0.0, "update/visible_fraction": 0.0}, {}),  # nothing to change them by
        ({"frac_reward_zero_std": 0.7}, {}),  # as it comes to be where most has been learned
        ({"frac_reward_zero_std": 1.0}, {"scale_rewards": "batch"}),  # where it says something else
    ],
)
def test_what_a_figure_does_not_mean_is_not_told(metrics, chosen):
    assert verdicts(WELL | metrics, OPTIONS.model_copy(update=chosen)) == {}


def test_a_few_overflows_at_the_start_are_no_verdict(caplog):
    """Of an fp16 run, whose scaler is looking for a scale."""
    for most, told in ((2, 0), (3, 1)):
        watch = HealthWatch(OPTIONS)
        for step in range(1, 6):
            norm = {"grad_norm": float("inf" if step <= most else 0.5)}
            watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"reward": -1.0} | WELL | norm)
        assert (
            sum("gradients overflow in 60%" in message for message in caplog.messages) == told == len(caplog.messages)
        )


def test_a_log_counts_by_its_steps(caplog):
    """Three steps of cut completions, then two of whole ones."""
    watch = HealthWatch(OPTIONS)
    for step, cut in ((3, 1.0), (5, 0.0)):
        logs = {"reward": -1.0} | WELL | {"completions/clipped_ratio": cut}
        watch.on_log(None, SimpleNamespace(global_step=step), None, logs=logs)
    assert caplog.messages[0].startswith("the last 5 steps: 60% of the completions")


def test_what_is_not_known_is_not_judged(caplog):
    watch = HealthWatch(OPTIONS)
    watch.on_log(None, SimpleNamespace(global_step=5), None, logs={"reward": None} | dict.fromkeys(NEEDED))
    assert not caplog.messages


def test_without_a_penalty_a_missing_tag_is_no_verdict():
    free = OPTIONS.model_copy(update={"not_matched_penalty": 0.0})
    assert verdicts(WELL | {"match_reward": 0.0}, free) == {}


@pytest.mark.parametrize("every", [1, 2, 5, 20])
def test_a_verdict_takes_five_steps_and_is_told_once_and_at_the_end(caplog, every):
    watch = HealthWatch(OPTIONS)

    def run(steps, **logs):
        for step in steps:
            if step % every == 0:
                watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"reward": -1.0} | WELL | logs)
                watch.on_log(None, SimpleNamespace(global_step=step), None, logs={"eval_reward": -1.0})

    cut = {"completions/clipped_ratio": 1.0}
    cut |= {"match_reward": -1.0}
    run(range(1, 5), **cut)
    assert not caplog.messages
    run(range(5, 41), **cut)
    first = -(-5 // every) * every
    assert [m.partition(":")[0] for m in caplog.messages] == [f"the last {first} steps"]
    run(range(41, 61))
    watch.on_train_end(None, None, None)
    assert len(caplog.messages) == 1  # it got over it
    run(range(61, 81), **cut)
    watch.on_train_end(None, None, None)
    assert len(caplog.messages) == 2 and caplog.messages[1].startswith("at the end still: 100% of the completions")


def test_what_was_told_at_the_last_step_is_not_told_again(caplog):
    watch = HealthWatch(OPTIONS)
    state = SimpleNamespace(global_step=5)
    watch.on_log(None, state, None, logs={"reward": -1.0, "completions/clipped_ratio": 1.0})
    watch.on_train_end(None, state, None)
    assert len(caplog.messages) == 1
