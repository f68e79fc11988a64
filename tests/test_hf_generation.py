"""Generation with transformers, in place of vLLM. Run: ./run_tests.sh tests/test_hf_generation.py"""

import pytest
import torch
from small_run import make_trainer

from trainers.models import make_tokenizer
from trainers.rollout.hf_generation import _cut, generate_with_transformers


def test_what_is_sampled_and_its_log_probabilities_know_no_dropout(renderer, model_dir, tmp_path):
    trainer = make_trainer(renderer, model_dir, tmp_path, use_vllm=False, use_peft=True, lora_dropout=0.9)
    for name, parameter in trainer.model.named_parameters():
        if ".lora_B." in name:  # fresh adapters change nothing, with dropout or without
            torch.nn.init.normal_(parameter, std=0.5)
    prompts = [renderer.encode_text(text) for text in ("What is 2+3?", "What is 4+5?")]
    trainer.model.train()
    rollout = generate_with_transformers(trainer, renderer, prompts, number=0, given=0)
    assert trainer.model.training
    trainer.model.eval()
    for prompt, completion, found in zip(prompts, rollout.completion_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = trainer.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("words", [["a b."], ["a b.<|end_of_explanation|> c"] * 50], ids=["bytes", "merged"])
def test_a_closing_tag_of_several_tokens_is_where_a_completion_is_cut(tags, words):
    plain = make_tokenizer(words, [], 300)
    tag = tags.explanation[1]

    class Reader:
        tokenizer = plain

    whole = plain("a b." + tag + " c", add_special_tokens=False)["input_ids"]
    ids, ended = _cut(Reader, whole, tag, {plain.eos_token_id})
    assert ended == "closing_tag" and ids == whole[: len(ids)]
    assert tag in plain.decode(ids) and tag not in plain.decode(ids[:-1])
    assert _cut(Reader, whole, None, {plain.eos_token_id}) == (whole, "length")
