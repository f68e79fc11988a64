"""How a trained model is written. Run: ./run_tests.sh tests/test_saving.py"""

import json
import shutil
from collections import defaultdict

import pytest
import torch
from command_line import code_of_its_card
from conftest import REPO
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small_run import make_trainer
from transformers import AutoModelForCausalLM

from trainers import bridges
from trainers.bridges import RestartBridge
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.options import options_class
from trainers.rl import grpo_config
from trainers.sft import WarmupTrainer, sft_config
from trainers.weights import saving
from trainers.weights.model_card import write_model_card

SMALL = 200_000  # bytes; the tiny model has 428 kB, and no tensor as large


def shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted({folder / name for name in index["weight_map"].values()})


def split_tensors(model, folder):
    """Whether weights that are views of one tensor lie in several files."""
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    places = defaultdict(set)
    for name, parameter in model.named_parameters():
        places[parameter.untyped_storage().data_ptr()].add(files[name])
    return max(map(len, places.values())) > 1


@pytest.mark.parametrize("use_vllm", [False, True])
def test_a_model_is_written_in_shards_and_read_as_it_was(renderer, model_dir, tmp_path, monkeypatch, use_vllm):
    """With vLLM, whose fused tensors the weights are views of then, those of one tensor in several files, too."""
    monkeypatch.setattr(saving, "SHARD", SMALL)
    trainer = make_trainer(renderer, model_dir, tmp_path, use_vllm=use_vllm)
    try:
        trainer.save_model(str(tmp_path / "saved"))
    finally:
        if use_vllm:
            trainer.sampler.engine.close()
    assert split_tensors(trainer.model, tmp_path / "saved") == use_vllm
    files = shards(tmp_path / "saved")
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    whole = sum(t.nbytes for t in load_file(model_dir / "model.safetensors").values())
    assert len(files) >= 3 and max(sizes) <= SMALL and sum(sizes) == whole
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(read[name], value) for name, value in trainer.model.state_dict().items())
    assert "save_pretrained" not in vars(trainer.model)
    assert trainer.timer.memory.phases["save_peak"] > 0


def test_the_warm_up_and_the_engine_that_is_built_anew_write_shards_too(model_dir, tmp_path, monkeypatch):
    assert WarmupTrainer._save is saving.OwnSaving._save
    monkeypatch.setattr(bridges, "SHARD", SMALL)
    RestartBridge(AutoModelForCausalLM.from_pretrained(model_dir)).save(str(tmp_path))
    assert len(shards(tmp_path)) >= 3


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_the_token_of_the_hub_is_at_hand_and_pickled_nowhere(tmp_path, stage):
    """transformers writes its arguments into training_args.bin, which push_to_hub uploads."""
    run = "teacher_rlt_tiny" if stage == "rl" else "teacher_sft_tiny"
    options = load_options(compose_run(run, ["device=cpu", "hub_token=hf_SECRET", "max_steps=7"]), repo=REPO)
    if stage == "rl":
        arguments = grpo_config(options, tmp_path, torch.float32)
    else:
        arguments = sft_config(options, tmp_path, 1, torch.float32)
    assert arguments.hub_token == "hf_SECRET"
    file = tmp_path / "training_args.bin"
    torch.save(arguments, file)
    assert b"SECRET" not in file.read_bytes()
    read = torch.load(file, weights_only=False)
    assert type(read) is type(arguments)
    assert (read.hub_token, read.max_steps, read.learning_rate) == (None, 7, arguments.learning_rate)


def test_a_readme_that_is_not_ours_is_kept(model_dir, tmp_path):
    options = options_class("sft")(stage="sft", model_name_or_path="some/base")
    write_model_card(tmp_path, options, (2,))
    assert "`some/base`" in (tmp_path / "README.md").read_text()
    write_model_card(tmp_path, options.model_copy(update={"model_name_or_path": "other/base"}), (2,))
    assert "`other/base`" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").unlink()
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    PeftModel(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    write_model_card(tmp_path, options, (2,))  # in place of peft's, which tells nothing
    assert "`some/base`" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    write_model_card(tmp_path, options, (2,))
    assert (tmp_path / "README.md").read_text() == "mine"


def explain_by_the_card(model_dir, folder, of_the_model, **options):
    """The function of a card, beside a model whose own generation_config.json says something, too."""
    shutil.copytree(model_dir, folder)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True} | of_the_model))
    lengths = {"max_completion_length": 8, "teacher_system_prompt": "Explain."}
    write_model_card(folder, options_class("rl")(**lengths, **options), ())
    names = {}
    exec(code_of_its_card(folder), names)  # noqa: S102
    return names["explain"]


def test_the_card_samples_as_the_run_did(model_dir, tmp_path):
    explain = explain_by_the_card(model_dir, tmp_path / "free", {"top_k": 1})
    assert len({explain("What is 2+3?", "5") for _ in range(4)}) > 1
    altered = {"temperature": 0.5, "top_k": 1, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    explain = explain_by_the_card(model_dir, tmp_path / "one", {"top_k": 50}, **altered, use_vllm=False)
    assert len({explain("What is 2+3?", "5") for _ in range(4)}) == 1
    assert f"sampling = {altered}" in (tmp_path / "one" / "README.md").read_text()
    own = {"use_vllm": False, "generation_kwargs": {"no_repeat_ngram_size": 2}, "top_k": -1}
    explain_by_the_card(model_dir, tmp_path / "own", {}, **own)
    card = (tmp_path / "own" / "README.md").read_text()
    assert "'top_k': 0" in card and "    stops |= {'no_repeat_ngram_size': 2}\n" in card
    assert "with `**sampling`, `stop" in card
    explain_by_the_card(model_dir, tmp_path / "engine", {}, generation_kwargs={"min_tokens": 2})
    card = (tmp_path / "engine" / "README.md").read_text()
    assert "with `**sampling`, `**{'min_tokens': 2}`, `stop" in card and "stops |=" not in card


def test_what_the_card_prints_is_the_explanation_alone(model_dir, tokenizer, tmp_path):
    (five,) = tokenizer.encode("5", add_special_tokens=False)
    ends = [[[tokenizer.eos_token_id], 100.0], [[five], 200.0], [[five, five], -200.0]]  # "5", then the end of turn
    explain = explain_by_the_card(model_dir, tmp_path / "ends", {"sequence_bias": ends})
    assert explain("What is 2+3?", "5") == "5"
