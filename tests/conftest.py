"""Shared pieces of the tests: a tiny tokenizer, models and rows, made here, without network."""

import logging
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("ours", deadline=None)  # the machine is shared: no test asserts a time
settings.load_profile("ours")

ROWS = [
    {"question": "What is 2+3?", "solution": "5", "reasoning_trace": "2+3=5"},
    {"question": "What is 4+5?", "solution": "9", "reasoning_trace": "4+5=9"},
    {"question": "What is 10+7+1?", "solution": "18", "reasoning_trace": "10+7=17\n17+1=18"},
    {"question": "What is 6+6?", "solution": "12", "reasoning_trace": "6+6=12"},
]
TINY_MODEL = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A stage that is run within a test sets up logging for good; the next test finds it as the last one did."""
    base = logging.getLogger()
    level, handlers = base.level, list(base.handlers)
    yield
    logging.captureWarnings(False)
    base.setLevel(level)
    for handler in [h for h in base.handlers if h not in handlers]:
        base.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def tags():
    from data.formats import TAG_FORMATS

    return TAG_FORMATS["stratos"].with_prompts("Explain.", "Solve.")


@pytest.fixture(scope="session")
def tokenizer(tags):
    from trainers.models import make_tokenizer

    texts = [" ".join(row.values()) + "\nExplain. Solve. system\nuser\nassistant\n" for row in ROWS] * 4
    return make_tokenizer(texts, tags.every_tag, 400)


@pytest.fixture(scope="session")
def renderer(tokenizer, tags):
    from data.render import Renderer

    return Renderer(tokenizer, tags, None, "model_name_or_path")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory):
    """A folder with a random two-layer Qwen2 and its tokenizer."""
    import torch

    from trainers.models import make_model

    path = tmp_path_factory.mktemp("model")
    make_model(TINY_MODEL, tokenizer, 0, torch.float32, None).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter_dir(model_dir, tokenizer, tmp_path_factory):
    """An adapter of rank 4 for the model of `model_dir` that has learned something, as a run leaves it."""
    import torch
    from transformers import AutoModelForCausalLM

    from trainers.options import options_class
    from trainers.weights.adapters import add_adapters

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model = add_adapters(model, options_class("rl")(use_peft=True, lora_r=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory):
    """A function that lets a case of simulated_gpu/cases.py run."""
    from simulated_gpu.run import on_simulated_gpu

    return on_simulated_gpu(tmp_path_factory.mktemp("simulated") / "libsimulated.so")
