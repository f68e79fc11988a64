"""Checkpoints whose tensors are not their model's parameters one by one: text and images, mixtures of experts.

Run: ./run_tests.sh tests/test_model_weights.py
"""

from types import SimpleNamespace

import pytest
import torch
from families import COMMON
from planned import planned
from safetensors.torch import load_file, save_file
from test_streaming import CPU, make_texts, plain, save, stream
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trainers.errors import ConfigError
from trainers.plan.model_shapes import model_shape, read_config
from trainers.scoring.frozen import FrozenModel
from trainers.scoring.loading import load_frozen
from trainers.weights.weight_files import HostWeights

# As many layers as the text has: they are not to be taken for each other.
SEES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEES |= {"image_size": 28, "patch_size": 14}
READS = COMMON | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "initializer_range": 0.2}
EXPERTS = {  # more than ten: in the order of their numbers, not of their names
    "qwen3_moe": {"num_experts": 12},
    "mixtral": {"num_local_experts": 12},
}


def save_gemma3(folder, seed=0):
    """A small Gemma 3 of text and images, as those from 4B on are."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("gemma3", text_config=READS, vision_config=SEES, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    model.save_pretrained(folder)
    return model


def save_qwen3_5(folder):
    """transformers loads the text of such a checkpoint alone."""
    torch.manual_seed(0)
    text = COMMON | {"head_dim": 32, "layer_types": ["full_attention"] * 2, "initializer_range": 0.2}
    sees = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=sees)
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_any(family, folder, seed=0):
    return save_gemma3(folder, seed) if family == "gemma3" else save(family, folder, seed=seed, **EXPERTS[family])


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def load(folder, mode, **further):
    options = SimpleNamespace(trust_remote_code=False, attn_implementation=None, stage="rl", student_mode=mode)
    options.student_tokens_per_pass = 500
    return load_frozen(options, str(folder), "student_model", CPU, torch.float32, 0.7, **further)


def assert_scores(frozen, model):
    texts, parts = make_texts()
    for (logprobs, _), expected, spans in zip(frozen.score(texts, parts), plain(model, texts, 0.7), parts, strict=True):
        for start, end in spans:
            assert torch.allclose(logprobs[start:end], expected[start - 1 : end - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["resident", "streamed", "streamed from memory"])
@pytest.mark.parametrize("family", ["gemma3", *EXPERTS])
def test_scores_equal_the_plain_forward_of_the_whole_model(family, mode, tmp_path):
    model = save_any(family, tmp_path)
    assert_scores(load(tmp_path, mode.split()[0], writable="memory" in mode), model)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_the_text_of_a_checkpoint_of_text_and_images_is_found_by_the_names_that_transformers_knows(prefix, tmp_path):
    if prefix == "model.":  # the text alone, saved as a checkpoint of its own
        torch.manual_seed(0)
        model = save("gemma3_text", tmp_path, head_dim=32, sliding_window=8)
    else:
        model = save_gemma3(tmp_path)
        saved = "language_model.model."
        assert sum(name.startswith(saved) for name in load_file(tmp_path / "model.safetensors")) > 20
        rewrite(tmp_path, lambda tensors: {name.replace(saved, prefix): t for name, t in tensors.items()})
        whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert torch.equal(whole.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert_scores(FrozenModel(stream(tmp_path), 0.7, 500), model)


def test_the_text_of_a_model_that_transformers_reads_without_its_images_is_streamed(tmp_path):
    model = save_qwen3_5(tmp_path)
    assert any("visual" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_scores(FrozenModel(stream(tmp_path), 0.7, 500), model)


def test_what_only_images_need_is_neither_read_nor_planned(tmp_path, monkeypatch):
    held = []
    of_host = HostWeights.__init__
    monkeypatch.setattr(
        HostWeights, "__init__", lambda *a, **k: (held.append(a[1].num_elements()), of_host(*a, **k))[0]
    )
    model = save_gemma3(tmp_path)
    backbone = load(tmp_path, "streamed", writable=True).backbone
    text = sum(p.numel() for p in model.model.language_model.parameters())
    shape = model_shape(read_config(str(tmp_path), "student_model"))
    assert held == [text] and shape.num_parameters - shape.beside_text == text < sum(
        p.numel() for p in model.parameters()
    )
    assert shape.can_stream and shape.layer_prefix == "model.language_model.layers."
    beside = [name for name, p in backbone.model.named_parameters() if "language_model" not in name and not p.is_meta]
    assert not beside


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe"])
def test_blend_moves_them_by_the_names_of_the_trained_model(family, tmp_path):
    model, other = save_any(family, tmp_path / "old"), save_any(family, tmp_path / "new", seed=7)
    frozen = load(tmp_path / "old", "streamed", writable=True)
    frozen.backbone.blend(dict(other.named_parameters()), 0.25)
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(0.75 * p + 0.25 * q)
    assert_scores(frozen, model)


@pytest.mark.parametrize("lost", ["an expert", "a row of one", "the text's prefix"])
def test_what_cannot_be_mapped_is_refused(lost, tmp_path):
    family = "gemma3" if "prefix" in lost else "qwen3_moe"
    save_any(family, tmp_path)
    expert = "model.layers.1.mlp.experts.3.up_proj.weight"

    def change(tensors):
        if "prefix" in lost:
            return {name.replace("language_model.model.", "words."): t for name, t in tensors.items()}
        tensors[expert] = tensors[expert][:-1].clone()
        return tensors if "row" in lost else {name: t for name, t in tensors.items() if name != expert}

    rewrite(tmp_path, change)
    first = (
        "model.language_model.embed_tokens.weight" if "prefix" in lost else "model.layers.1.mlp.experts.gate_up_proj"
    )
    with pytest.raises(ConfigError, match=rf"do not hold {first}[\s\S]*cannot be streamed[\s\S]*student_mode=resident"):
        stream(tmp_path)


@pytest.mark.parametrize(
    ("family", "can"), [("qwen3_moe", True), ("mixtral", True), ("gpt_oss", True), ("glm4_moe", False)]
)
def test_which_mixtures_are_told_to_be_streamed(family, can):
    """The layers of GLM 4.5 hold a buffer beside their parameters."""
    shape = model_shape({"model_type": family, **COMMON, "head_dim": 32, "num_hidden_layers": 2})
    assert shape.can_stream is can
    assert (
        model_shape(
            {"model_type": family, **COMMON, "head_dim": 32, "quantization_config": {"quant_method": "fp8"}}
        ).can_stream
        is False
    )


@pytest.mark.parametrize(("mode", "of_images"), [("streamed", False), ("cpu", True)])
def test_a_streamed_model_takes_the_host_memory_of_its_text(mode, of_images, tmp_path):
    text = COMMON | {"vocab_size": 32000, "num_hidden_layers": 4}
    AutoConfig.for_model("gemma3", text_config=text, vision_config=SEES | {"hidden_size": 512}).save_pretrained(
        tmp_path
    )
    plan, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}", f"student_mode={mode}", gb=200)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    of_text = sum(p.numel() for p in model.model.language_model.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert everything > 1.2 * of_text
    assert plan.host["student"] == 2 * (everything if of_images else of_text)
