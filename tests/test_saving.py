"""How a trained model is written. Run: ./run_tests.sh tests/test_saving.py"""

import json

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small_run import make_trainer
from transformers import AutoModelForCausalLM

from trainers import bridges
from trainers.bridges import RestartBridge
from trainers.options import options_class
from trainers.sft import WarmupTrainer
from trainers.weights import saving
from trainers.weights.model_card import write_model_card

SMALL = 200_000  # bytes; the tiny model has 428 kB, and no tensor as large


def shards(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return sorted({folder / name for name in index["weight_map"].values()})


def test_a_model_is_written_in_shards_and_read_as_it_was(renderer, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD", SMALL)
    trainer = make_trainer(renderer, model_dir, tmp_path, use_vllm=False)
    trainer.save_model(str(tmp_path / "saved"))
    files = shards(tmp_path / "saved")
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    whole = sum(t.nbytes for t in load_file(model_dir / "model.safetensors").values())
    assert len(files) >= 3 and max(sizes) <= SMALL and sum(sizes) == whole
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(read[name], value) for name, value in trainer.model.state_dict().items())
    assert "save_pretrained" not in vars(trainer.model)


def test_the_warm_up_and_the_engine_that_is_built_anew_write_shards_too(model_dir, tmp_path, monkeypatch):
    assert WarmupTrainer._save is saving.OwnSaving._save
    monkeypatch.setattr(bridges, "SHARD", SMALL)
    RestartBridge(AutoModelForCausalLM.from_pretrained(model_dir)).save(str(tmp_path))
    assert len(shards(tmp_path)) >= 3


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
