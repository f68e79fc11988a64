"""What reaches TRL, and the prompts of RL. Run: ./run_tests.sh tests/test_rl_config.py"""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROWS
from datasets import Dataset
from families import COMMON

from trainers.checks import load_options
from trainers.config import REPO, compose_run
from trainers.errors import ConfigError
from trainers.options import options_class
from trainers.plan.planning import planned
from trainers.rl import check_best_metric, grpo_config
from trainers.rollout.importance_sampling import Mismatch, importance_sampling_ratio
from trainers.texts import check_enough, rl_rows, tell_whole_questions


def options(*overrides):
    return load_options(compose_run("teacher_rlt_tiny", ["device=cpu", *overrides]), repo=REPO)


def test_trl_options_reach_trl(tmp_path):
    chosen = {
        "loss_type": "dr_grpo",
        "epsilon_high": 0.28,
        "num_iterations": 2,
        "scale_rewards": "batch",
        "mask_truncated_completions": True,
        "beta": 0.04,
        "sync_ref_model": True,
        "ref_model_sync_steps": 7,
        "top_p": 0.9,
        "vllm_importance_sampling_correction": False,
        "learning_rate": 3e-5,
        "vllm_importance_sampling_clip_max": None,
    }
    overrides = [f"{name}={'null' if value is None else value}" for name, value in chosen.items()]
    config = grpo_config(options(*overrides, "kl_penalty_reward_coeff=0"), tmp_path, torch.float32)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert (config.gradient_accumulation_steps, config.steps_per_generation) == (1, 1)
    assert (config.bf16, config.use_vllm, config.remove_unused_columns) == (False, False, False)


def test_adapters_have_a_reference_that_follows_nothing(tmp_path, caplog):
    chosen = ["use_peft=true", "beta=0.04", "sync_ref_model=true"]
    assert grpo_config(options(*chosen), tmp_path, torch.float32).sync_ref_model is False
    assert "sync_ref_model=true is not read" in caplog.text


def test_a_metric_that_evaluations_have_not_is_told_with_those_they_have():
    evaluated = {"eval_reward": -1.0, "eval_student_accuracy": 0.5}
    best = ["load_best_model_at_end=true", "eval_strategy=steps", "save_steps=25", "eval_steps=25"]
    best.append("greater_is_better=true")
    for metric in ("reward", "eval_student_accuracy"):
        check_best_metric(options(*best, f"metric_for_best_model={metric}"), evaluated)
    with pytest.raises(ConfigError, match="no such metric[\\s\\S]*did you mean student_accuracy"):
        check_best_metric(options(*best, "metric_for_best_model=student_acuracy"), evaluated)
    check_best_metric(options("metric_for_best_model=student_acuracy"), evaluated)  # nothing asks for it


def test_what_is_not_set_stays_trl_s_default(tmp_path):
    from trl import GRPOConfig

    ours = grpo_config(options(), tmp_path, torch.float32)
    default = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    for name in ("loss_type", "epsilon", "num_iterations", "top_p", "adam_beta2", "shuffle_dataset"):
        assert getattr(ours, name) == getattr(default, name), name


def test_batch_becomes_accumulation_and_aggregation(tmp_path):
    small = options("per_device_train_batch_size=8", "generation_aggregation_steps=2")
    config = grpo_config(small, tmp_path, torch.float32)
    assert (config.gradient_accumulation_steps, config.steps_per_generation) == (8, 2)
    assert config.generation_batch_size == 16


def test_overlong_questions_are_filtered_kept_or_refused(renderer):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "question": "What is 2+3? " * 20}])
    assert len(rl_rows(rows, renderer, options("max_prompt_length=60"), "data")) == len(ROWS)
    kept = rl_rows(rows, renderer, options("max_prompt_length=60", "overlong=truncate_left"), "data")
    assert len(kept) == len(ROWS) + 1
    with pytest.raises(ConfigError, match="1 of 5 prompts are longer than max_prompt_length 60"):
        rl_rows(rows, renderer, options("max_prompt_length=60", "overlong=error"), "data")


def test_rl_needs_no_reasoning_trace(renderer):
    rows = Dataset.from_list([{"question": r["question"], "solution": r["solution"]} for r in ROWS])
    prompts = rl_rows(rows, renderer, options(), "data")
    assert prompts[0]["prompt"].endswith("<|begin_of_solution|>5<|end_of_solution|>\n\n<|begin_of_explanation|>\n\n")


def test_lengths_beyond_the_teacher_s_positions_are_refused(model_dir):
    long = options("max_prompt_length=300", "max_completion_length=300")
    with pytest.raises(ConfigError, match=r"512 positions[\s\S]*max_completion_length=212"):
        planned(long.model_copy(update={"model_name_or_path": str(model_dir)}))


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_lengths_at_which_a_long_rotary_embedding_is_another_one_for_the_engine_are_refused(tmp_path, key):
    """Of Phi-3.5-mini's kind: vLLM takes the long factors for every text once a text may be long."""
    config = COMMON | {"model_type": "phi3", "original_max_position_embeddings": 64}
    kind = {"rope_type": "longrope"} if key == "rope_parameters" else {"type": "su"}
    (tmp_path / "config.json").write_text(json.dumps(config | {key: kind}))
    chosen = {"model_name_or_path": str(tmp_path), "student_model": str(tmp_path)}
    long = options("max_prompt_length=30", "max_completion_length=40").model_copy(update=chosen)
    with pytest.raises(ConfigError, match=r"exceeds 64 tokens.*longrope[\s\S]*max_completion_length=34"):
        planned(long)
    short = long.model_copy(update={"max_completion_length": 34})
    planned(short)
    with pytest.raises(ConfigError, match="vllm_max_model_length=65: it exceeds 64 tokens"):
        planned(short.model_copy(update={"vllm_max_model_length": 65}))


def test_fewer_questions_than_a_rollout_takes_would_train_nothing(caplog):
    """TRL leaves out what does not fill a rollout, and ends at step 0."""
    rows = Dataset.from_dict({"question": [str(i) for i in range(5)]})
    small = SimpleNamespace(train_batch_size=8, per_device_train_batch_size=8, generation_aggregation_steps=None)
    small.num_generations, small.dataset_id_or_path, small.eval_size = 4, "d.jsonl", None
    check_enough(rows, small)
    assert "each epoch leaves out 1 of 5 questions: a rollout takes 2" in caplog.text
    small.train_batch_size = small.per_device_train_batch_size = 24
    with pytest.raises(ConfigError, match=r"a rollout takes 6[\s\S]*train_batch_size=20"):
        check_enough(rows, small)


def test_questions_that_only_the_student_reads_whole_are_told(renderer, caplog):
    chosen = options_class("rl")(overlong="truncate_left", max_prompt_length=40, max_completion_length=8)
    row = {"question": "What is 2+3? " * 9, "solution": "5", "prompt_tokens": 90}
    tell_whole_questions(Dataset.from_list([row | {"prompt_tokens": 40}]), renderer, chosen)
    assert not caplog.text
    tell_whole_questions(Dataset.from_list([row]), renderer, chosen)
    assert "the student reads questions whole" in caplog.text and "counts 48" in caplog.text


def test_micro_batches_of_a_rollout_are_told_as_one():
    generator = torch.Generator().manual_seed(0)
    trainer, sampling = (torch.randn(8, 5, generator=generator) for _ in range(2))
    mask = (torch.rand(8, 5, generator=generator) < 0.7).int()
    for mode in ("sequence_truncate", "token_truncate"):
        found = []
        for size in (8, 3, 1):
            mismatch = Mismatch()
            for rows in zip(*(t.split(size) for t in (trainer, sampling, mask)), strict=True):
                mismatch.add(*rows, importance_sampling_ratio(*rows, mode, None, 3.0))
            found.append(mismatch.take())
            assert mismatch.take() == {}
        difference = (trainer - sampling).abs()[mask.bool()]
        assert found[0]["sampling/sampling_logp_difference/max"] == difference.max().item()
        assert found[1] == pytest.approx(found[0]) and found[2] == pytest.approx(found[0])


def test_home_is_known_in_the_names_of_models(monkeypatch, model_dir):
    monkeypatch.setenv("HOME", str(model_dir.parent))
    chosen = options(f'model_name_or_path="~/{model_dir.name}"')
    assert chosen.model_name_or_path == str(model_dir)
