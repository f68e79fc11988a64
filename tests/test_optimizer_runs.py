"""Runs whose optimizer fits: bf16 weights shared with the real engine, in this process.

Run: ./run_tests.sh tests/test_optimizer_runs.py
"""

import json

import pytest
import torch
from datasets import Dataset
from small_run import make_trainer

from trainers.models import load_model
from trainers.optimizers import CombinedOptimizer, MasterAdamW
from trainers.options import options_class
from trainers.sft import WarmupTrainer, sft_config
from trainers.watch.phases import PhaseTimer


@pytest.mark.parametrize(
    ("chosen", "kind", "name"),
    [
        ({}, CombinedOptimizer, "adamw_8bit"),  # by optim=auto
        ({"optim": "cpu_offload"}, MasterAdamW, "cpu_offload"),
        ({"use_peft": True}, torch.optim.AdamW, "adamw_torch"),
    ],
)
def test_engine_follows_the_optimizer(renderer, model_dir, tmp_path, chosen, kind, name):
    trainer = make_trainer(renderer, model_dir, tmp_path, dtype=torch.bfloat16, max_steps=3, **chosen)
    places = [p.data_ptr() for p in trainer.model.parameters()]
    assert trainer.args.to_sanitized_dict()["optim"] == name  # what trackers record, at an evaluation before training
    before = trainer.model.model.layers[0].mlp.up_proj.weight.clone() if not chosen.get("use_peft") else None
    try:
        trainer.train()
        trainer.sampler.sync_weights()
        trainer.sampler.engine.next_logprobs(
            [(5, 6)], [[7]], 1.0
        )  # with it the sentinel compares, after the last step too
    finally:
        trainer.sampler.engine.close()
    assert type(trainer.optimizer.optimizer) is kind
    assert [p.data_ptr() for p in trainer.model.parameters()] == places
    if before is not None:
        assert (trainer.model.model.layers[0].mlp.up_proj.weight != before).float().mean() > 0.5
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in steps if "reward" in line]
    assert len(steps) == 3
    assert steps[0]["sentinel/mismatch_max"] < 0.3 and steps[-1]["sentinel/mismatch_max"] < 0.3
    # 1e-3 beside weights of about 0.02 is seen. (Of adapters, A has no gradient at the first step: B is 0.)
    assert all(0.3 < line["update/visible_fraction"] <= 1 for line in steps)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_no_number_is_not_applied(renderer, model_dir, tmp_path, max_grad_norm):
    trainer = make_trainer(renderer, model_dir, tmp_path, max_steps=3, max_grad_norm=max_grad_norm)
    weights = list(trainer.model.parameters())
    kept, poisoned = [], weights[3]

    def poison(gradient):
        if trainer.state.global_step == 1:
            kept.extend(weight.detach().clone() for weight in weights)
            return gradient * float("nan")
        return gradient

    poisoned.register_hook(poison)
    try:
        with pytest.raises(FloatingPointError, match="gradient of step 2 is nan: it is not applied"):
            trainer.train()
    finally:
        trainer.sampler.engine.close()
    assert len(kept) == len(weights) and all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))


def test_warm_up_uses_the_optimizer_too(model_dir, tokenizer, tmp_path):
    options = options_class("sft")(
        device="cpu",
        train_batch_size=2,
        per_device_train_batch_size=2,
        optim="cpu_offload",
        max_steps=2,
        learning_rate=1e-6,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        max_length=512,
    )
    trainer = WarmupTrainer(
        options=options,
        timer=PhaseTimer(),
        model=load_model(str(model_dir), torch.bfloat16, None, "model_name_or_path", False),
        args=sft_config(options, tmp_path, 1, torch.bfloat16),
        train_dataset=Dataset.from_list([{"input_ids": [10, 20, 30], "labels": [-100, 20, 30]}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    assert type(trainer.optimizer.optimizer) is MasterAdamW
    found = [line["update/visible_fraction"] for line in trainer.state.log_history if "loss" in line]
    assert len(found) == 2 and all(0 < value < 0.1 for value in found)  # 1e-6 is lost on almost every weight of 0.02
