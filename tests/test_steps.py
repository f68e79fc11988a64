"""What a training step asks of the engine, and when. Run: ./run_tests.sh tests/test_steps.py"""

import json
import threading

import pytest
import torch
from small_run import CPU, make_trainer, small_options

from trainers import rl
from trainers.errors import ConfigError
from trainers.rollout import sampler
from trainers.rollout.hf_generation import generate_with_transformers
from trainers.rollout.overlap import ScoreAhead


@pytest.fixture
def trainer(renderer, model_dir, tmp_path):
    made = make_trainer(renderer, model_dir, tmp_path, max_steps=3)
    yield made
    made.sampler.engine.close()


def noted(trainer, calls, owner, name, describe=lambda *args, **kwargs: None):
    function = getattr(owner, name)

    def note(*args, **kwargs):
        calls.append((name, describe(*args, **kwargs)))
        return function(*args, **kwargs)

    setattr(owner, name, note)


def test_the_cache_is_given_back_between_rollout_and_reward_at_each_step(trainer):
    calls = []
    noted(trainer, calls, trainer.sampler.engine, "sync_weights")
    noted(trainer, calls, trainer.sampler.engine, "generate", lambda prompts, sampling, step, on_group=None: step)
    noted(trainer, calls, trainer.sampler.engine, "release_cache")
    noted(trainer, calls, trainer, "_calculate_rewards")
    trainer.train()
    step = ["sync_weights", "generate", "release_cache", "_calculate_rewards"]
    assert [name for name, _ in calls] == step * 3
    # Another seed at each step: the same question is never answered by the same numbers.
    assert [at for name, at in calls if name == "generate"] == [0, 1, 2]


def test_seeds_do_not_depend_on_the_micro_batch(renderer, model_dir, tmp_path):
    """Which a plan solves for the card: the same run is to sample the same on another one."""
    numbers = []
    trainer = make_trainer(renderer, model_dir, tmp_path, use_vllm=False, per_device_train_batch_size=4)

    def generate(trainer, renderer, prompt_ids, number, given):
        numbers.append(number)
        return generate_with_transformers(trainer, renderer, prompt_ids, number, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "generate_with_transformers", generate)
        trainer.train()
    assert trainer.args.gradient_accumulation_steps == 2 and numbers == [0, 1, 2]


def test_evaluations_sample_with_the_same_seeds(trainer):
    calls = []
    noted(trainer, calls, trainer.sampler.engine, "generate", lambda prompts, sampling, step, on_group=None: step)
    for _ in range(2):
        trainer.evaluate(trainer.train_dataset.select(range(8)))
    assert {at for _, at in calls} == {-1}


def test_an_evaluation_leaves_training_s_completions_and_seconds_alone(trainer, tmp_path):
    held_out = trainer.train_dataset.select(range(8))
    trainer.train()
    written = list(trainer._logs["completion"])
    trainer.evaluate(held_out)
    assert len(written) == 8 and list(trainer._logs["completion"]) == written

    assert trainer.model.training  # what is logged at the end of an epoch that ends with an evaluation is training's

    trainer.timer.seconds["generate"] = 5.0
    trainer.model.eval()
    trainer.log({"train_runtime": 1.0})  # training ends after an evaluation
    trainer.log({"eval_loss": 1.0})
    last, evaluation = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[-2:]]
    assert "train_runtime" in last and not any(name.startswith("eval_") for name in last)
    assert evaluation["eval_seconds/generate"] == 5.0


def test_arguments_that_vllm_refuses_are_told_and_another_engine_can_start(renderer, model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"vllm_kwargs=.*block_size.*vLLM does not start with it[\s\S]*leave it out"):
        make_trainer(renderer, model_dir, tmp_path, vllm_kwargs={"block_size": 16})
    trainer = make_trainer(renderer, model_dir, tmp_path)
    trainer.sampler.engine.close()


def test_each_group_is_handed_on_while_others_are_still_written(trainer):
    groups, unfinished, waited = [], [], []

    class Ahead:
        def submit(self, places, **group):
            groups.append((places, group))
            unfinished.append(trainer.sampler.engine.llm.llm_engine.has_unfinished_requests())

        def wait(self):
            assert not trainer.sampler.engine.llm.llm_engine.has_unfinished_requests()
            waited.append(len(groups))

    trainer.sampler.ahead = Ahead()
    trainer.args.max_steps = 1
    trainer.train()
    assert sorted(place for places, _ in groups for place in places) == list(range(8))
    for places, group in groups:
        assert len(places) == 4 and len(set(group["question"])) == 1
        assert [len(ids) for ids in group["completion_ids"]] == [len(lp) for lp in group["teacher_logprobs"]]
    assert len(groups) == 2 and not unfinished[-1]
    assert waited == [2]  # nothing else computes on the device while the student does


def test_where_sampling_fails_no_group_is_scored_any_more(trainer):
    begun, go, scored = threading.Event(), threading.Event(), []

    def score(question, **group):
        scored.append(question[0])
        begun.set()
        assert go.wait(60)
        return question

    trainer.sampler.ahead = ScoreAhead(score, CPU)
    generate = trainer.sampler.engine.generate

    def interrupted(*args):
        generate(*args)
        assert begun.wait(60)
        raise KeyboardInterrupt

    trainer.sampler.engine.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    go.set()
    trainer.sampler.ahead._thread.shutdown()  # all that is queued is done
    assert len(scored) == 1


def test_an_error_stops_the_engine_and_is_what_a_run_ends_with(renderer, model_dir, tmp_path, caplog, monkeypatch):
    trainer = make_trainer(renderer, model_dir, tmp_path)

    def fails(**_):
        raise ZeroDivisionError

    trainer.reward_funcs = [fails]
    stopping = trainer.sampler
    stopping.ahead = ScoreAhead(lambda: [], CPU)
    with pytest.raises(ZeroDivisionError), stopping.stopped_at_the_end():
        rl.train_and_report(trainer, trainer.options, tmp_path)
    assert stopping.engine.engine_model is None
    with pytest.raises(RuntimeError, match="after shutdown"):
        stopping.ahead.submit([0])
    with pytest.raises(ValueError), stopping.stopped_at_the_end():  # it is stopped already
        raise ValueError
    assert "could not be stopped" not in caplog.text
    monkeypatch.setattr(stopping.ahead, "close", lambda: 1 / 0)
    stopping.trainer = None  # an error before there is one
    with pytest.raises(ValueError), stopping.stopped_at_the_end():
        raise ValueError
    assert caplog.messages[-1] == "vLLM could not be stopped: division by zero"
    caplog.clear()
    with stopping.stopped_at_the_end():  # nor is that what a run ends with that has left its teacher
        pass
    assert caplog.messages == ["vLLM could not be stopped: division by zero"]


@pytest.mark.parametrize("fails", ["trainers.rl.load_reference", "trl.GRPOTrainer.__init__"])
def test_a_run_that_fails_behind_the_engine_s_start_stops_it_and_tells_that_error(
    model_dir, rows_file, tmp_path, monkeypatch, fails
):
    chosen = {"model_name_or_path": str(model_dir), "dataset_id_or_path": str(rows_file), "reward_funcs": ["format"]}
    options = small_options(**chosen, device="cpu", reference_mode="cpu")
    monkeypatch.setattr(fails, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rl.run_rl(options, tmp_path / "out")
    assert not torch.distributed.is_initialized()
