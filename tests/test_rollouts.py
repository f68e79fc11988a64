"""Rollouts on disk, and scoring ahead. Run: ./run_tests.sh tests/test_rollouts.py"""

import threading
from dataclasses import replace

import pandas as pd
import pytest
import torch
from small_run import make_trainer

from trainers.errors import ConfigError
from trainers.rollout.overlap import ScoreAhead
from trainers.rollout.rollouts import Rollout, RolloutFiles

ROLLOUT = Rollout(
    prompt_ids=[[1, 2], [3]],
    completion_ids=[[4, 5, 6], [7]],
    logprobs=[[-0.1, -2.0, -1e-9], [-30.25]],
    given_logprobs=[[-13.5], [-12.0]],
    ended=["eos", "length"],
)


def test_what_is_read_is_what_was_written_in_the_same_order(tmp_path):
    second = replace(ROLLOUT, prompt_ids=[[9]] * 2, given_logprobs=[[], []])
    files = RolloutFiles(tmp_path / "new" / "folder")
    files.write(ROLLOUT, 0.7, 0, "train")
    files.write(second, 0.7, 0, "train")
    files.write(second, 0.7, 0, "eval")
    again = RolloutFiles(files.folder)
    assert again.read(ROLLOUT.prompt_ids, 1, 0.7, 3, 0, "train") == ROLLOUT
    assert again.read([[9]] * 2, 0, 0.7, 3, 0, "eval") == second
    assert again.read([[9]] * 2, 0, 0.7, 3, 0, "train") == second
    with pytest.raises(ConfigError, match=r"2 train rollouts were recorded[\s\S]*train-00002"):
        again.read([[9]] * 2, 0, 0.7, 3, 0, "train")


def test_recording_of_other_prompts_or_without_the_padding_is_refused(tmp_path):
    RolloutFiles(tmp_path).write(ROLLOUT, 0.7, 0, "train")
    with pytest.raises(ConfigError, match="sampled from other prompts"):
        RolloutFiles(tmp_path).read([[1, 2], [4]], 1, 0.7, 3, 0, "train")
    with pytest.raises(ConfigError, match=r"temperature=0\.7"):
        RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 1, 1.0, 3, 0, "train")
    with pytest.raises(ConfigError, match="padding_in_kl=true"):
        RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 0, 0.7, 3, 0, "train")
    with pytest.raises(ConfigError, match="a completion of 3 tokens, and this run's are up to 2"):
        RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 1, 0.7, 2, 0, "train")


@pytest.mark.parametrize(("mode", "remedy"), [("eval", "report_before_after"), ("train", "num_iterations")])
def test_recording_of_another_step_is_refused(tmp_path, mode, remedy):
    """Held-out prompts are the same at every evaluation."""
    RolloutFiles(tmp_path).write(ROLLOUT, 0.7, 0, mode)
    with pytest.raises(ConfigError, match=rf"{mode}-00000[\s\S]*step 0, and this run is at step 2[\s\S]*{remedy}"):
        RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 1, 0.7, 3, 2, mode)
    assert RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 1, 0.7, 3, 0, mode) == ROLLOUT


def test_recording_that_does_not_tell_its_steps_is_refused(tmp_path):
    RolloutFiles(tmp_path).write(ROLLOUT, 0.7, 0, "train")
    path = tmp_path / "train-00000.parquet"
    pd.read_parquet(path).drop(columns="step").to_parquet(path)
    with pytest.raises(ConfigError, match=r"an earlier version wrote it[\s\S]*record_rollouts"):
        RolloutFiles(tmp_path).read(ROLLOUT.prompt_ids, 1, 0.7, 3, 0, "train")


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({"num_iterations": 2}, [0, 2]),  # a rollout serves two steps
        ({"per_device_train_batch_size": 4, "generation_aggregation_steps": 1}, [0, 0, 1, 1, 2, 2]),  # half of one
    ],
)
def test_an_equal_run_asks_at_the_steps_that_were_recorded(renderer, model_dir, tmp_path, chosen, steps):
    chosen = chosen | {"use_vllm": False, "max_steps": 3}
    make_trainer(renderer, model_dir, tmp_path, **chosen, record_rollouts=str(tmp_path / "kept")).train()
    files = sorted((tmp_path / "kept").glob("train-*.parquet"))
    assert [pd.read_parquet(path)["step"][0] for path in files] == steps
    make_trainer(renderer, model_dir, tmp_path, **chosen, replay_rollouts=str(tmp_path / "kept")).train()


def test_groups_scored_ahead_come_back_in_the_order_of_the_batch():
    threads = set()

    def score(values):
        threads.add(threading.current_thread().name)
        return [value * 10 for value in values]

    ahead = ScoreAhead(score, torch.device("cpu"))
    assert ahead.take() is None
    ahead.submit([2, 0], values=[2, 0])
    ahead.submit([1, 3], values=[1, 3])
    assert ahead.take() == [0, 10, 20, 30]
    assert ahead.take() is None
    assert threads == {"score-ahead_0"}


def test_fault_while_scoring_ahead_reaches_the_run():
    def score(values):
        raise FloatingPointError("the reward of explanation 0 is nan")

    ahead = ScoreAhead(score, torch.device("cpu"))
    ahead.submit([0], values=[0])
    with pytest.raises(FloatingPointError, match="explanation 0 is nan"):
        ahead.take()


def test_waiting_ends_when_all_is_scored_or_one_has_failed():
    go, second, scored = threading.Event(), threading.Event(), []

    def score(values):
        assert go.wait(60)
        scored.append(values)
        if values == [1]:
            raise ZeroDivisionError
        if values == [2]:  # it may be in work by the time that the first has failed
            assert second.wait(60)
        return values

    ahead = ScoreAhead(score, torch.device("cpu"))
    threading.Timer(0.2, go.set).start()
    ahead.submit([0], values=[0])
    ahead.wait()
    assert scored == [[0]] and ahead.take() == [0]
    go.clear()
    for value in (1, 2, 3):
        ahead.submit([value - 1], values=[value])
    threading.Timer(0.2, go.set).start()
    ahead.wait()
    second.set()
    with pytest.raises(ZeroDivisionError):
        ahead.take()
    ahead.close()
    assert [1] in scored and [3] not in scored


def test_what_is_cancelled_is_not_scored_and_the_next_batch_is():
    begun, go, scored = threading.Event(), threading.Event(), []

    def score(values):
        begun.set()
        assert go.wait(60)
        scored.extend(values)
        return values

    ahead = ScoreAhead(score, torch.device("cpu"))
    for value in range(3):
        ahead.submit([value], values=[value])
    assert begun.wait(60)
    ahead.cancel()
    go.set()
    ahead.submit([0], values=[7])
    assert ahead.take() == [7]
    assert scored == [0, 7]
