"""What stops a run whose engine has other weights than its trainer; long runs. Real engine, in this process.

Run: ./run_tests.sh tests/test_sentinel.py
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import REPO
from small_run import make_trainer
from torch import nn
from transformers import TrainerCallback

from trainers import teacher_grpo
from trainers.bridges import make_bridge
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.rl import train_and_report
from trainers.rollout.importance_sampling import importance_sampling_ratio
from trainers.rollout.sampler import RolloutSampler
from trainers.rollout.sentinel import Sentinel, SentinelError
from trainers.watch.phases import PhaseTimer


class AtStep(TrainerCallback):
    """Does something to the trainer after an optimizer step."""

    def __init__(self, step, action):
        self.step, self.action, self.trainer = step, action, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(self.trainer)


@pytest.fixture
def start(renderer, model_dir, tmp_path):
    started = []

    def make(action=None, step=2, **options):
        callback = AtStep(step, action or (lambda _: None))
        trainer = make_trainer(renderer, model_dir, tmp_path, [callback], max_steps=4, **options)
        callback.trainer = trainer
        started.append(trainer)
        return trainer

    yield make
    for trainer in started:
        trainer.sampler.engine.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_mismatch_is_measured_after_every_update(start, tmp_path):
    start().train()
    steps = [line for line in lines(tmp_path) if "reward" in line]
    assert len(steps) == 4
    for line in steps:
        assert 0 <= line["sentinel/mismatch_mean"] <= line["sentinel/mismatch_max"] < 1e-5
        assert line["seconds/sentinel"] > 0
        assert line["memory/generate"] > 0.1 and line["memory/step"] > 0.1
        assert line["sampling/sampling_logp_difference/max"] < 1e-5
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def keep_the_prefix_cache(trainer):
    trainer.sampler.engine.llm.reset_prefix_cache = lambda: True


def test_stale_prefix_cache_stops_the_run(start):
    trainer = start(keep_the_prefix_cache)
    with pytest.raises(SentinelError, match="prefix cache"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_prefix_cache_that_cannot_be_reset_stops_the_run(start):
    trainer = start(lambda t: setattr(t.sampler.engine.llm, "reset_prefix_cache", lambda: False))
    with pytest.raises(RuntimeError, match="could not reset its prefix cache"):
        trainer.train()


def move_away(trainer):
    parameter = trainer.model.model.layers[0].mlp.down_proj.weight
    parameter.data = parameter.data.clone()


def break_the_view(trainer):
    """The engine gets a tensor of its own for one layer, equal as yet."""
    layer = trainer.sampler.engine.engine_model.model.layers[1].mlp.gate_up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


@pytest.mark.parametrize(
    ("action", "moved"),
    [
        (move_away, r"model\.layers\.0\.mlp\.down_proj\.weight"),
        (break_the_view, r"the engine's model\.layers\.1\.mlp\.gate_up_proj\.weight"),
    ],
)
def test_weights_that_are_shared_no_more_stop_the_run(start, action, moved):
    trainer = start(action)
    with pytest.raises(RuntimeError, match=f"{moved} was moved away"):
        trainer.train()
    assert trainer.state.global_step == 2


def compute_otherwise(trainer):
    """As if the engine had packed a layer's weights away: the tensor is where it was, and nothing reads it."""
    layer = trainer.sampler.engine.engine_model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: (output[0] * 1.3, *output[1:]))


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"use_peft": True}, 1e-5),
        ({"weight_bridge": "copy"}, 1e-6),
        ({"weight_bridge": "copy", "use_peft": True}, 1e-6),
    ],
)
def test_updates_that_no_longer_arrive_stop_the_run(start, options, rate):
    """At rates at which log-probabilities move by less than half precision's rounding, or than fp32's tolerance."""
    trainer = start(lambda t: setattr(t.sampler.engine.bridge, "sync", lambda: None), learning_rate=rate, **options)
    with pytest.raises(SentinelError, match=r"other weights than the trainer at model\.(layers\.\d|embed_tokens)"):
        trainer.train()
    assert trainer.state.global_step == 2


def poison(trainer):
    trainer.model.model.norm.weight.data[0] = float("nan")


@pytest.mark.parametrize("bridge", ["shared", "copy"])
def test_weights_that_are_no_numbers_are_not_laid_to_the_bridge(start, bridge):
    trainer = start(poison, weight_bridge=bridge)
    with pytest.raises(FloatingPointError, match="own log-probabilities are no numbers"):
        trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("options", [{"weight_bridge": "shared"}, {"weight_bridge": "copy"}, {"use_peft": True}])
def test_engine_with_other_weights_stops_the_run(start, options):
    steps = []

    def action(trainer):
        engine = trainer.sampler.engine.llm.llm_engine
        step = engine.step
        engine.step = lambda: steps.append(None) or step()
        compute_otherwise(trainer)

    trainer = start(action, learning_rate=1e-2, **options)  # at the tolerance of a run
    with pytest.raises(SentinelError, match="trainer and engine disagree"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert len(steps) == 1  # at the first token of the rollout
    # Of which nothing is left: the engine can go on.
    assert not trainer.sampler.engine.llm.llm_engine.has_unfinished_requests()
    found = trainer.sampler.engine.next_logprobs([(5, 6, 7)], [[8]], 1.0)
    assert len(found) == 1 and found[0][0] < 0


def compute_otherwise_behind(trainer, position=12):
    """As of rotary embeddings that are others where a text is long: after the fixed prompt nothing shows."""

    def scaled(module, inputs, output):
        far = (inputs[0] > position).to(output[0].dtype)[:, None]
        return output[0] * (1 + 0.3 * far), *output[1:]

    trainer.sampler.engine.engine_model.model.layers[1].register_forward_hook(scaled)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_whole_text_of_the_first_rollout_is_compared(start, caplog, is_broken):
    trainer = start()
    if is_broken:
        compute_otherwise_behind(trainer)
    with caplog.at_level("INFO"):
        if is_broken:
            with pytest.raises(SentinelError, match=r"log-probabilities of \d+ tokens[\s\S]* on average"):
                trainer.train()
        else:
            trainer.train()
    assert trainer.state.global_step == (0 if is_broken else 4)
    assert caplog.text.count("on average, over a text of") == (0 if is_broken else 1)


def test_a_text_of_a_reshaped_distribution_is_not_compared(start, caplog):
    """vLLM tells log-probabilities of what is left once the ends of a turn are masked; the trainer of all."""
    chosen = {"kl_penalty_reward_coeff": 0, "generation_kwargs": {"min_tokens": 8}, "stop_at_closing_tag": False}
    with caplog.at_level("INFO"):
        start(**chosen).train()
    assert "on average, over a text of" not in caplog.text


def test_a_text_is_compared_where_an_evaluation_comes_first_and_once_one_is_long_enough(start, caplog, monkeypatch):
    trainer = start()
    monkeypatch.setattr(teacher_grpo, "LEAST_TOKENS", 10_000)
    with caplog.at_level("INFO"):
        trainer.evaluate(trainer.train_dataset.select(range(2)))
        assert "on average, over a text of" not in caplog.text
        monkeypatch.setattr(teacher_grpo, "LEAST_TOKENS", 2)
        trainer.evaluate(trainer.train_dataset.select(range(2)))
    assert caplog.text.count("on average, over a text of") == 1 and not trainer.model.training


@pytest.mark.parametrize(("mean", "stops"), [(0.04, False), (0.11, True), (float("nan"), True)])
def test_of_a_text_in_half_precision_only_what_rounding_makes_passes(mean, stops):
    engine = SimpleNamespace(device=torch.device("cpu"), max_model_len=64)
    sentinel = Sentinel(engine, nn.Module(), [1, 2, 3], torch.bfloat16, None)
    sampled = torch.linspace(-9, 0, 60)
    with pytest.raises(SentinelError, match=r"allowed is 0\.1") if stops else nullcontext():
        sentinel.check_text(sampled + mean, sampled)


@pytest.mark.parametrize("is_broken", [False, True])
def test_the_last_update_is_compared_too_and_what_was_trained_is_saved_first(start, tmp_path, caplog, is_broken):
    trainer = start(compute_otherwise if is_broken else None, step=4, report_before_after=False)
    with caplog.at_level("INFO"):
        if is_broken:
            with pytest.raises(SentinelError, match="trainer and engine disagree"):
                train_and_report(trainer, trainer.options, tmp_path)
        else:
            train_and_report(trainer, trainer.options, tmp_path)
    assert trainer.state.global_step == 4
    assert (tmp_path / "model.safetensors").is_file()
    assert caplog.text.count("nats at most after the last update") == (0 if is_broken else 1)
    assert len([line for line in lines(tmp_path) if "reward" in line]) == 4


def test_no_engine_is_built_to_be_compared_with_what_it_was_built_from():
    options = SimpleNamespace(record_rollouts=None, replay_rollouts=None)
    engine = SimpleNamespace(bridge=make_bridge("restart", nn.Module()))
    RolloutSampler(options, None, PhaseTimer(), engine).check_last_update()  # asks nothing further of it


def test_a_tolerance_is_measured_no_further_than_rounding_goes(start):
    sentinel = start().sampler.sentinel
    for tolerance, first, then in [(0.3, 0.01, 0.3), (0.3, 0.2, 0.8), (0.3, 0.9, 1.0)]:
        sentinel.tolerance, sentinel._to_calibrate = tolerance, True
        sentinel._compare(torch.zeros(3), torch.tensor([0.0, first, -first]))
        assert sentinel.tolerance == pytest.approx(then)
    sentinel.tolerance, sentinel._to_calibrate = 0.3, True
    with pytest.raises(SentinelError, match="differs by 1.5, allowed is 1 "):
        sentinel._compare(torch.zeros(1), torch.tensor([1.5]))


def test_a_difference_that_rounding_may_make_stops_a_run_when_it_comes_twice(start, caplog):
    sentinel = start().sampler.sentinel
    sentinel.tolerance, sentinel._is_rounded = 0.3, True

    def compare(difference, update=[0.0]):  # noqa: B006 - counts
        update[0] += 1
        ours = torch.full((2,), update[0])
        return sentinel._compare(ours, ours + torch.tensor([0.0, difference]))["sentinel/mismatch_max"]

    assert [compare(d) for d in (0.1, 0.5, 0.1, 0.5)] == pytest.approx([0.1, 0.5, 0.1, 0.5])
    assert caplog.text.count("if they do so after one more update, the run stops") == 2
    with pytest.raises(SentinelError, match="differs by 0.4, allowed is 0.3 "):
        compare(0.4)
    for at_once in (1.1, float("nan")):  # no rounding
        sentinel._exceeded = None
        with pytest.raises(SentinelError):
            compare(at_once)
    sentinel._exceeded, sentinel.tolerance = None, 2e-3  # as of fp32 on a GPU: no more than its own rounding's tail
    assert compare(0.015) == pytest.approx(0.015, rel=1e-3)
    sentinel._exceeded = None
    with pytest.raises(SentinelError, match="differs by 0.03"):
        compare(0.03)
    sentinel._exceeded, sentinel.tolerance = None, 0.3
    for _ in range(2):  # the same weights, at an evaluation and at the end
        sentinel._compare(torch.zeros(1), torch.tensor([0.5]))
    sentinel._exceeded, sentinel._is_rounded = None, False  # fp32 on a CPU, or a tolerance of the user's
    with pytest.raises(SentinelError):
        compare(0.5)


def test_resident_memory_stays_flat_over_200_steps(renderer, model_dir, tmp_path):
    trainer = make_trainer(renderer, model_dir, tmp_path, max_steps=200, learning_rate=1e-5, max_completion_length=8)
    held = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            held.append(psutil.Process().memory_info().rss)

    trainer.add_callback(Watch())
    trainer.train()
    trainer.sampler.engine.close()
    assert len(held) == 200
    assert max(held[150:]) < 1.02 * max(held[20:50])


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limits", [(None, 1.2), (0.9, None), (0.9, 1.2)])
def test_put_off_correction_is_trl_s(start, mode, limits):
    """The same batch through TRL's forward pass before the update and through ours in it."""
    trainer = start(
        sentinel_tolerance=1.0,  # of the other numbers below
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=limits[0],
        vllm_importance_sampling_clip_max=limits[1],
    )
    generate = trainer.sampler.engine.generate

    def with_other_numbers(*args, **kwargs):
        sampled = generate(*args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        for row in sampled.logprobs:
            noise = (torch.randn(len(row), generator=generator) * 0.2).tolist()
            row[:] = [value + more for value, more in zip(row, noise, strict=True)]
        return sampled

    trainer.sampler.engine.generate = with_other_numbers
    trainer.current_gradient_accumulation_steps = 1
    rows = [trainer.train_dataset[i // 4] for i in range(8)]
    losses, ratios = [], []
    for accumulation in (1, 3):  # at 3 the rollout serves several steps, and TRL corrects by itself
        trainer.args.gradient_accumulation_steps = accumulation
        trainer.args.steps_per_generation = 1 if accumulation == 1 else 2
        inputs = trainer._generate_and_score_completions([dict(row) for row in rows])
        assert ("importance_sampling_ratio" in inputs) == (accumulation == 3)
        losses.append(trainer._compute_loss(trainer.model, inputs))
        ratios.append(inputs["importance_sampling_ratio"])
    assert torch.allclose(ratios[0], ratios[1], atol=1e-5)
    assert ratios[0].std() > 0.01
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)


def test_bf16_s_rounding_does_not_take_the_gradient_of_long_completions():
    """With the difference of trl#6789, a standard deviation of 0.05 a token."""
    random = torch.Generator().manual_seed(0)
    sampling = torch.zeros(64, 4096)
    logps, mask = torch.randn(sampling.shape, generator=random) * 0.05, torch.ones(sampling.shape)
    for name in ("teacher_rlt_mono_24gb", "teacher_rlt_mono_80gb", "teacher_rlt_tiny"):
        options = load_options(compose_run(name), repo=REPO, needs_device=False)
        limits = options.vllm_importance_sampling_clip_min, options.vllm_importance_sampling_clip_max
        ratio = importance_sampling_ratio(logps, sampling, mask, options.vllm_importance_sampling_mode, *limits)
        assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    by_sequence = importance_sampling_ratio(logps, sampling, mask, "sequence_mask", *limits)
    assert by_sequence.mean().item() < 0.5, "TRL's choice would do, and is to be preferred"


def test_unknown_sampling_logprobs_count_as_equal():
    logps, mask = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])
    sampling = torch.tensor([[float("nan"), -1.0, 5.0]])
    ratio = importance_sampling_ratio(logps, sampling, mask, "token_truncate", None, 2.0)
    assert ratio.tolist() == [[1.0, 2.0, 1.0]]
    assert importance_sampling_ratio(logps, sampling, mask, "sequence_mask", None, 2.0).tolist() == [[0.0]]
