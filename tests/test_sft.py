"""The SFT stage: what the loss covers, and what data it refuses. Run: ./run_tests.sh tests/test_sft.py"""

import math

import pytest
import torch
from conftest import ROWS, TINY_MODEL
from datasets import Dataset
from trl import SFTTrainer

from trainers.errors import ConfigError
from trainers.models import load_model
from trainers.options import options_class
from trainers.sft import sft_config
from trainers.texts import check_traces, sft_rows


def options(**values):
    defaults = {
        "stage": "sft",
        "device": "cpu",
        "dataset_id_or_path": "unused",
        "train_batch_size": 1,
        "per_device_train_batch_size": 1,
        "report_to": "none",
        "max_length": 512,
    }
    return options_class("sft")(**{**defaults, **values})


def test_masked_loss_by_hand_on_three_tokens(model_dir, tokenizer, tmp_path):
    model = load_model(str(model_dir), torch.float32, None, "model_name_or_path", False)
    ids, labels = [10, 20, 30], [-100, -100, 30]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    # Only the third token is learned: -log softmax(logits after the second token)[30], written out.
    row = logits[1].tolist()
    by_hand = math.log(sum(math.exp(x) for x in row)) - row[30]
    data = Dataset.from_list([{"input_ids": ids, "labels": labels}] * 2)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(options(), tmp_path, 1, torch.float32),
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [labels]
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize(
    ("role", "learned"),
    [
        ("teacher", "2+3=5<|end_of_explanation|><|im_end|>"),
        (
            "student",
            "<|begin_of_thought|>\n\n2+3=5<|end_of_thought|>\n\n<|begin_of_solution|>5<|end_of_solution|><|im_end|>",
        ),
    ],
)
def test_labels_cover_what_the_model_writes_and_nothing_before(renderer, role, learned):
    rows = sft_rows(Dataset.from_list(ROWS), renderer, options(sft_role=role), "data")
    row = rows[0]
    kept = [label for label in row["labels"] if label != -100]
    assert renderer.tokenizer.decode(kept) == learned
    assert row["input_ids"][-len(kept) :] == kept
    assert kept[-1] == renderer.tokenizer.eos_token_id


def test_data_without_traces_cannot_warm_up():
    rows = Dataset.from_list([{"question": r["question"], "solution": r["solution"]} for r in ROWS])
    with pytest.raises(ConfigError, match=r"no reasoning_trace to imitate[\s\S]*reasoning_trace_column="):
        check_traces(rows, options())


def test_overlong_prompts_are_filtered_cut_or_refused(renderer, caplog):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "question": "What is 2+3? " * 20}])
    caplog.set_level("INFO")
    assert len(sft_rows(rows, renderer, options(max_prompt_length=60), "data")) == len(ROWS)
    assert "1 of 5 prompts are longer than max_prompt_length 60" in caplog.text
    cut = sft_rows(rows, renderer, options(max_prompt_length=60, overlong="truncate_left"), "data")
    labels = cut[4]["labels"]
    assert labels.count(-100) == 60
    with pytest.raises(ConfigError, match="1 of 5 prompts are longer"):
        sft_rows(rows, renderer, options(max_prompt_length=60, overlong="error"), "data")
    with pytest.raises(ConfigError, match="nothing is left"):
        sft_rows(rows, renderer, options(max_prompt_length=3), "data")


def test_max_length_that_leaves_nothing_to_learn_is_refused(renderer):
    with pytest.raises(ConfigError, match="cut before what the model is to learn"):
        sft_rows(Dataset.from_list(ROWS), renderer, options(max_length=20), "data")


def test_trl_s_own_refusal_is_told_as_a_fault(tmp_path):
    with pytest.raises(ConfigError, match="SFTConfig"):
        sft_config(
            options(load_best_model_at_end=True),
            tmp_path,
            1,
            torch.float32,
        )


def test_fresh_model_needs_room_for_the_tokenizer(tokenizer):
    from trainers.models import make_model

    with pytest.raises(ConfigError, match="smaller than the tokenizer"):
        make_model({**TINY_MODEL, "vocab_size": 10}, tokenizer, 0, torch.float32, None)
    with pytest.raises(ConfigError, match="set model_type"):
        make_model({"model_type": "qwen_2"}, tokenizer, 0, torch.float32, None)
