"""Sizes of models from their configs alone. Run: ./run_tests.sh tests/test_model_shapes.py"""

import json

import pytest
import torch
from families import COMMON, FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.attention import attention_of
from trainers.errors import ConfigError
from trainers.plan.known_models import KNOWN_MODELS
from trainers.plan.model_shapes import FAMILY_DEFAULTS, model_shape, read_config

UNKNOWN = {
    "gpt_neox": {"num_key_value_heads": 2},
    "starcoder2": {"num_key_value_heads": 1},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 480},
}


def transformers_model(config):
    arguments = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **arguments))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_transformers(family):
    config = {"model_type": family} | COMMON | FAMILIES[family]
    assert family in FAMILY_DEFAULTS  # worked out here, not asked of transformers
    expected = {name: tuple(p.shape) for name, p in transformers_model(config).named_parameters()}
    assert model_shape(config).parameters == expected


@pytest.mark.parametrize("extra", [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_biases_and_ties_of_the_config_count(extra):
    config = {"model_type": "llama"} | COMMON | extra
    expected = {name: tuple(p.shape) for name, p in transformers_model(config).named_parameters()}
    assert model_shape(config).parameters == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_leaves_out_what_it_may_means_what_transformers_takes_it_for(family):
    """Sizes alone; 64 heads, so that no family's own number of key heads is that of the heads."""
    config = {"model_type": family, "hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 64, "vocab_size": 480, "pad_token_id": 0, "eos_token_id": 1}
    model, shape = transformers_model(config), model_shape(config)
    assert shape.parameters == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shape.max_positions == model.config.max_position_embeddings
    key_heads = model.config.num_key_value_heads
    assert (shape.num_kv_heads, shape.kv_width) == (key_heads, 2 * key_heads * shape.head_dim)


def test_key_heads_that_are_null_are_as_many_as_heads():
    config = {"model_type": "qwen2"} | COMMON | {"num_key_value_heads": None}
    assert model_shape(config).num_kv_heads == COMMON["num_attention_heads"]
    assert transformers_model(config).config.num_key_value_heads == COMMON["num_attention_heads"]


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_that_a_family_ignores_do_not_count(family):
    config = {"model_type": family} | COMMON | FAMILIES[family] | {"attention_bias": True, "mlp_bias": True}
    expected = {name: tuple(p.shape) for name, p in transformers_model(config).named_parameters()}
    assert model_shape(config).parameters == expected


@pytest.mark.parametrize("family", UNKNOWN)
def test_any_other_decoder_is_built_by_transformers_without_memory(family):
    config = {"model_type": family} | ({} if family == "gpt2" else COMMON) | UNKNOWN[family]
    shape = model_shape(config)
    assert shape.num_parameters == sum(p.numel() for p in transformers_model(config).parameters())
    assert (shape.hidden, shape.num_layers, shape.vocab) == (64, 2, 480)
    assert shape.linear_shapes


@pytest.mark.parametrize(
    ("name", "billions"),  # of the model cards: 0.49, 1.54, 3.09, 7.61, 14.7 and 32.5
    [("0.5B", 0.494), ("1.5B", 1.544), ("3B", 3.086), ("7B", 7.616), ("14B", 14.770), ("32B", 32.764)],
)
def test_known_models_have_the_sizes_of_their_cards(name, billions):
    shape = model_shape(KNOWN_MODELS[f"Qwen/Qwen2.5-{name}-Instruct"])
    assert round(shape.num_parameters / 1e9, 3) == billions


def test_seven_billion_by_hand():
    shape = model_shape(KNOWN_MODELS["Qwen/Qwen2.5-7B-Instruct"])
    attention = 3584 * 3584 * 2 + 2 * 512 * 3584 + 3584 + 2 * 512  # q, o; k, v; their biases
    layer = attention + 3 * 18944 * 3584 + 2 * 3584
    assert shape.num_parameters == 28 * layer + 2 * 152064 * 3584 + 3584 == 7_615_616_512
    assert shape.kv_bytes(2) == 57344  # 2 x 28 layers x 4 heads x 128 x 2 bytes
    assert shape.largest_layer == layer
    rank = 16
    adapters = sum(rank * (out + inner) for out, inner in shape.linears("all-linear"))
    assert adapters == 28 * rank * ((3584 + 3584) * 2 + (3584 + 512) * 2 + (3584 + 18944) * 3)
    assert len(shape.linears(["q_proj", "v_proj"])) == 56


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, 2 * 16),
        ({"model_type": "deepseek_v2", "num_hidden_layers": 2, "kv_lora_rank": 32, "qk_rope_head_dim": 8}, 40),
        ({"model_type": "llama", **COMMON}, 2 * COMMON["num_key_value_heads"] * 32),
    ],
    ids=["one key for all heads", "a latent", "by heads"],
)
def test_keys_and_values_of_a_token(config, width):
    assert model_shape(config).kv_width == width


def test_the_widest_of_unlike_layers_counts():
    assert model_shape({"model_type": "gemma3n_text", "intermediate_size": [64] * 34 + [128]}).intermediate == 128
    shape = model_shape({"model_type": "gemma4_text"})
    assert (shape.head_dim, shape.num_kv_heads, shape.intermediate) == (512, 4, 9216)


@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_what_is_no_stack_of_like_layers_is_told(family):
    with pytest.raises(ConfigError, match=f"{family} has layers without attention only"):
        model_shape({"model_type": family})


@pytest.mark.parametrize("value", ["many", 0, 2.5])
def test_a_size_that_is_none_is_told(value):
    with pytest.raises(ConfigError, match=r"num_attention_heads=.*above 0"):
        model_shape({"model_type": "qwen2", "num_attention_heads": value})


def test_config_of_a_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "Qwen" / "Qwen2.5-7B-Instruct"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert read_config("Qwen/Qwen2.5-7B-Instruct", "student_model") == {"model_type": "llama"}


def test_config_that_cannot_be_had_is_told():
    with pytest.raises(ConfigError, match="nobody/nothing.*its config cannot be had"):
        read_config("nobody/nothing", "student_model")


def test_family_that_transformers_does_not_know_is_told():
    with pytest.raises(ConfigError, match="transformers cannot build it"):
        model_shape({"model_type": "nothing"}, "a/b")


@pytest.mark.parametrize(("given", "capped"), [({}, True), ({"attn_logit_softcapping": None}, False)])
def test_a_cap_of_the_scores_is_what_transformers_takes_a_config_for(given, capped):
    config = {"model_type": "gemma2", **COMMON, **given}
    shape = model_shape(config)
    assert (shape.caps_scores, shape.eager_unless_told) == (capped, capped)
    full = AutoConfig.for_model(**config)
    assert (attention_of(None, full) == "eager") is capped


def test_an_infinite_float_of_a_saved_config(tmp_path):
    """As the limit of Mamba 2's time steps."""
    sizes = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
    config = AutoConfig.for_model("falcon_h1", **COMMON | sizes)
    config.save_pretrained(tmp_path)
    assert "__float__" in (tmp_path / "config.json").read_text()
    model = AutoModelForCausalLM.from_config(config)
    assert model_shape(read_config(str(tmp_path), "student_model")).num_parameters == model.num_parameters()
