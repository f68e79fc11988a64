"""Rows that begin at their first token: the numbers and gradients of padded rows, and no mask."""

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from test_shared_prompts import KEEP, batch, equal, learned, make, masked_rows
from transformers import AutoConfig, AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from trainers.rollout.whole_rows import can_align, whole_row_outputs


def outcomes(model, ids, mask):
    """As TRL reads the rows, and as they are read here."""
    found = []
    for read in (masked_rows, lambda *given: whole_row_outputs(*given, KEEP)):
        model.zero_grad()
        found.append(learned(model, *read(model, ids, mask)))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_and_gradients_are_those_of_padded_rows(family, checkpointing):
    model = make(family)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    equal(*outcomes(model, *batch()))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_a_window_shorter_than_the_rows(family):
    equal(*outcomes(make(family, sliding_window=8), *batch()))


def test_adapters_learn_the_same():
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    equal(*outcomes(get_peft_model(make("qwen2"), adapters), *batch()))


def test_no_mask_is_made_and_no_key_is_repeated(monkeypatch):
    seen = []

    def attention(*args, **kwargs):
        seen.append(kwargs)
        return plain(*args, **kwargs)

    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model, (ids, mask) = make("qwen2"), batch()
    masked_rows(model, ids, mask)
    assert all(call["attn_mask"] is not None and not call["is_causal"] for call in seen)
    seen.clear()
    whole_row_outputs(model, ids, mask, KEEP)
    assert seen and all(call["attn_mask"] is None and call["is_causal"] and call["enable_gqa"] for call in seen)


def test_positions_begin_at_the_first_token():
    """A model with absolute positions reads a row of a padded batch as it reads the row by itself, as the engine does;
    with padding before it, it would not."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", vocab_size=480, n_embd=64, n_layer=2, n_head=2, n_positions=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    ids, mask = batch()
    with torch.no_grad():
        together, _ = whole_row_outputs(model, ids, mask, KEEP)
        shifted, _ = masked_rows(model, ids, mask)
        for row, real, found in zip(ids, mask.bool(), together, strict=True):
            logits = model(input_ids=row[real][None]).logits[0]
            logps = torch.log_softmax(logits[:-1].float(), -1).gather(1, row[real][1:, None])[:, 0]
            own = real[-KEEP:]
            assert torch.allclose(found[own], logps[-int(own.sum()) :], atol=1e-5)
            assert not found[~own].any()
    assert (together - shifted).abs().max() > 1e-3


def test_a_compiled_model_keeps_its_width():
    assert can_align(make("qwen2")) and not can_align(torch.nn.DataParallel(make("qwen2")))
