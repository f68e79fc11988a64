"""The SFT stage: what the loss covers, and what data it refuses. Run: ./run_tests.sh tests/test_sft.py"""

import json
import math
import shutil

import pytest
import torch
from conftest import REPO, ROWS, TINY_MODEL
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from trainers import sft
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.models import load_model
from trainers.options import options_class
from trainers.plan.planning import planned
from trainers.settings.trl_config import tell_length
from trainers.sft import run_sft, sft_config
from trainers.texts import check_traces, sft_rows
from trainers.weights.adapter_files import open_adapter
from trainers.weights.adapters import ADAPTER
from trainers.weights.shared_weights import base_parameters


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
        check_traces(rows, options(), "training data")


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


@pytest.mark.parametrize(
    "sizes",
    [{"num_attention_heads": 3}, {"num_key_value_heads": 3}, {"num_attention_heads": 0}, {"hidden_size": "many"}],
    ids=str,
)
def test_sizes_of_a_fresh_model_that_do_not_go_together_are_told(sizes, tokenizer):
    from trainers.models import make_model

    with pytest.raises(ConfigError, match="model_init"):
        make_model({**TINY_MODEL, **sizes}, tokenizer, 0, torch.float32, None)


def test_routers_of_a_model_without_them_are_told(model_dir):
    from trainers.weights.starts import load_teacher

    with pytest.raises(ConfigError, match="router_aux_loss_coef=0.1: .* no mixture of experts"):
        load_teacher(options(router_aux_loss_coef=0.1), str(model_dir), torch.float32)


def test_a_tied_head_in_fp32_behind_adapters_is_told(model_dir):
    from trainers.weights.starts import load_teacher

    asked = options_class("rl")(use_peft=True, cast_lm_head_to_fp32=True, device="cpu")
    with pytest.raises(ConfigError, match="cast_lm_head_to_fp32=True: .* one weight for head and embedding"):
        load_teacher(asked, str(model_dir), torch.float32)


def test_which_of_two_lengths_counts_is_said(caplog):
    caplog.set_level("INFO")
    tell_length(options(max_steps=3))
    assert not caplog.records
    tell_length(options(max_steps=3, num_train_epochs=2))
    assert "num_train_epochs=2 is not read" in caplog.text


@pytest.fixture(scope="module")
def adapter_run(model_dir, rows_file, tmp_path_factory):
    """Two steps of the whole stage with use_peft; the trainer is kept to look into."""
    return sft_run(tmp_path_factory.mktemp("sft"), rows_file, model_name_or_path=str(model_dir), use_peft=True)


def sft_run(out, rows_file, **values):
    seen = []

    class Watched(sft.WarmupTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            self.gradients = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None}
            return loss

    chosen = {"dataset_id_or_path": str(rows_file), "max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "WarmupTrainer", Watched)
        chosen = options(**chosen, **values)
        path = chosen.model_name_or_path
        run_sft(chosen, out, path)
        return out, seen[0]


def test_adapters_alone_are_trained_with_checkpointing_on_by_itself(model_dir, adapter_run):
    out, trainer = adapter_run
    assert trainer.args.gradient_checkpointing is True  # nothing was set
    layer = trainer.model.get_base_model().model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}
    assert all(f".{ADAPTER}." in name for name in trainer.gradients)
    assert len(trainer.gradients) == 28  # A and B of seven layers in each of two blocks
    assert min(value for name, value in trainer.gradients.items() if "lora_B" in name) > 0
    for name, weight in AutoModelForCausalLM.from_pretrained(model_dir).named_parameters():
        now = base_parameters(trainer.model)[name]
        assert torch.equal(now, weight), name


def test_adapter_is_saved_with_its_tokenizer_and_the_way_to_its_base(model_dir, adapter_run):
    out, trainer = adapter_run
    adapter = open_adapter("model_name_or_path", str(out))
    assert adapter.base == str(model_dir)
    assert AutoTokenizer.from_pretrained(out).chat_template
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).state_dict()
    ours = trainer.model.state_dict()
    assert all(torch.equal(loaded[name], ours[name]) for name in loaded if "lora_" in name)


def test_sft_trains_an_adapter_on_or_every_weight_of_its_merge(adapter_run, rows_file, tmp_path):
    first, _ = adapter_run
    start = str(first)
    out, trainer = sft_run(tmp_path / "a", rows_file, model_name_or_path=start, use_peft=True)
    assert "ref" not in trainer.model.peft_config
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (first, out))
    assert set(before) == set(after) and all(not torch.equal(before[name], after[name]) for name in before)
    assert open_adapter("k", str(out)).base == open_adapter("k", start).base
    out, trainer = sft_run(tmp_path / "b", rows_file, model_name_or_path=start)
    assert not isinstance(trainer.model, PeftModel) and trainer.model.model.layers[0].gradient_checkpointing
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == trainer.model.num_parameters()
    assert len(trainer.gradients) == len(dict(trainer.model.named_parameters()))


def test_held_out_data_may_be_evaluated_at_the_start_alone(model_dir, rows_file, tmp_path):
    held_out = {"eval_on_start": True, "eval_dataset_id_or_path": str(rows_file)}
    _, trainer = sft_run(tmp_path, rows_file, model_name_or_path=str(model_dir), **held_out)
    assert [log["step"] for log in trainer.state.log_history if "eval_loss" in log] == [0]


def test_fresh_adapter_on_a_merge_finds_its_base_where_the_folder_moved(adapter_run, rows_file, tmp_path):
    start, chosen = str(adapter_run[0]), {"use_peft": True, "adapter_start": "merge", "lora_r": 2}
    out, _ = sft_run(tmp_path / "partial", rows_file, model_name_or_path=start, **chosen)
    assert open_adapter("k", str(out)).base == str(out / "merged_start")
    moved = out.rename(tmp_path / "kept")  # as a warm-up is, once it is whole
    assert open_adapter("k", str(moved)).base == str(moved / "merged_start")
    assert open_adapter("k", str(moved)).config["r"] == 2


def test_a_tokenizer_that_goes_beyond_the_embedding_is_refused(model_dir, tokenizer, rows_file, tmp_path):
    short = tmp_path / "model"
    shutil.copytree(model_dir, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer) - 1}))
    words = [f"model_name_or_path={short}", "model_init=null", f"dataset_id_or_path={rows_file}", "device=cpu"]
    options = load_options(compose_run("teacher_sft_tiny", words), repo=REPO)
    with pytest.raises(ConfigError, match="goes up to"):
        run_sft(planned(options).options, tmp_path, str(short))


def test_adapters_on_random_weights_are_refused(rows_file):
    with pytest.raises(ConfigError, match=r"use_peft=True: a model of fresh random weights"):
        load_options(
            {"stage": "sft", "device": "cpu", "model_init": TINY_MODEL, "dataset_id_or_path": str(rows_file)}
            | {"use_peft": True, "train_batch_size": 8}
        )


def test_rows_that_lose_all_they_teach_are_left_out_and_counted(renderer, caplog):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "question": "What is 2+3? " * 20}])
    kept = sft_rows(rows, renderer, options(max_length=100, max_prompt_length=1000), "data")
    assert len(kept) == len(ROWS) and "1 before what is to be learned" in caplog.text
    for kept in ({"truncation_mode": "keep_end"}, {"packing": True, "packing_strategy": "bfd_split"}):
        chosen = options(max_length=20, max_prompt_length=1000, **kept)
        assert len(sft_rows(rows, renderer, chosen, "data")) == len(rows)


def test_rows_without_a_trace_are_counted(caplog):
    rows = Dataset.from_list([*ROWS, {**ROWS[0], "reasoning_trace": ""}])
    check_traces(rows, options(), "held-out data")
    assert f"held-out data: 1 of {len(rows)} rows have no reasoning_trace" in caplog.text
