"""What a GPU without FlashAttention for a model's type is given: keys repeated for each head, the same numbers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from trainers import attention
from trainers.attention import REPEATED_KEYS, suit_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
}


def make(family="qwen2", attn="sdpa", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn).eval()


@pytest.fixture
def gpu(monkeypatch):
    def have(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return have


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "gemma3_text"])
@pytest.mark.parametrize("padded", [False, True])
def test_repeated_keys_give_the_same_numbers_and_gradients(family, padded, gpu, monkeypatch):
    gpu((7, 5))
    shared, repeated = make(family), make(family)
    suit_attention(repeated, CUDA)
    assert repeated.config._attn_implementation == REPEATED_KEYS
    ids = torch.randint(0, 480, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = 0
    groups = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, value, **kwargs):
        groups.append((query.size(1) // key.size(1), kwargs.get("enable_gqa", False)))
        return sdpa(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    results = []
    for model in (shared, repeated):
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        results.append((logits, [p.grad for p in model.parameters()]))
    assert set(groups[-2:]) == {(1, False)} and (padded or set(groups[:2]) == {(2, True)})
    (a, a_grads), (b, b_grads) = results
    assert torch.allclose(a, b, atol=1e-5)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a_grads, b_grads, strict=True))


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "repeats"),
    [
        (CUDA, (9, 0), torch.bfloat16, False),
        (CUDA, (8, 0), torch.float16, False),
        (CUDA, (9, 0), torch.float32, True),
        (CUDA, (7, 5), torch.float16, True),
        (CPU, None, torch.float32, False),
    ],
)
def test_only_where_no_kernel_takes_shared_keys(device, capability, dtype, repeats, gpu):
    gpu(capability)
    model = make(dtype=dtype)
    suit_attention(model, device)
    assert (model.config._attn_implementation == REPEATED_KEYS) is repeats


def test_adapters_and_other_kinds_of_attention(gpu):
    gpu((7, 5))
    adapted, eager = get_peft_model(make(), LoraConfig(target_modules=["q_proj"])), make(attn="eager")
    for model in (adapted, eager):
        suit_attention(model, CUDA)
    assert adapted.get_base_model().config._attn_implementation == REPEATED_KEYS
    assert eager.config._attn_implementation == "eager"


def test_a_config_does_not_keep_it(gpu, tmp_path):
    gpu((7, 5))
    model = make()
    suit_attention(model, CUDA)
    model.save_pretrained(tmp_path)
    assert REPEATED_KEYS not in (tmp_path / "config.json").read_text()
    assert attention.attention_of(None, AutoConfig.from_pretrained(tmp_path)) is None
