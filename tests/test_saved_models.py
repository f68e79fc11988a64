"""What a trainer has saved, read by fresh engines. Run: ./run_tests.sh tests/test_saved_models.py

vLLM allows one engine in a process at a time: each test closes its own before it starts the fresh one.
"""

import pytest
import torch
from conftest import ROWS
from small_run import make_trainer
from test_engine import largest_difference, train_some, trainer_logprobs
from test_weight_bridges import WAYS
from transformers import AutoModelForCausalLM

from trainers.merge import merge_adapter
from trainers.weights.adapter_files import open_adapter

LENGTH = 16


@pytest.fixture(scope="module")
def prompts(renderer):
    return [renderer.encode_prompt(renderer.teacher_prompt(row["question"], row["solution"])) for row in ROWS]


def saved_by_a_trainer(renderer, model_dir, folder, prompts, **chosen):
    """A trainer's model after some updates, which is in `folder` now, and whose engine is gone."""
    trainer = make_trainer(renderer, model_dir, folder.parent, **chosen)
    try:
        train_some(trainer.model, [ids for ids in prompts for _ in range(4)])  # it reads every fourth
        trainer.sampler.engine.sync_weights()
        trainer.save_model(str(folder))
    finally:
        trainer.sampler.engine.close()
    return trainer.model


def completions_of(model_path, prompts, adapter=None):
    """What a fresh vLLM samples (a random model's likeliest token is ever the same): tokens and log-probabilities."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 160, "logprobs_mode": "processed_logprobs"}
    settings |= {"kv_cache_memory_bytes": 2**26, "gpu_memory_utilization": 0.01}
    settings |= {} if adapter is None else {"enable_lora": True, "max_lora_rank": 16}
    llm = LLM(str(model_path), **settings)
    try:
        request = None if adapter is None else LoRARequest("saved", 1, str(adapter))
        texts = [{"prompt_token_ids": ids} for ids in prompts]
        params = SamplingParams(max_tokens=LENGTH, seed=0, logprobs=0, ignore_eos=True, detokenize=False)
        outputs = [o.outputs[0] for o in llm.generate(texts, params, use_tqdm=False, lora_request=request)]
    finally:
        llm.llm_engine.engine_core.shutdown()
    tokens = [list(output.token_ids) for output in outputs]
    return tokens, [
        [position[token].logprob for token, position in zip(output.token_ids, output.logprobs, strict=True)]
        for output in outputs
    ]


def assert_written_by(model, start, prompts, tokens, logprobs):
    """Every token is as likely as `model` says, which is not what the model it began as says."""
    assert [len(ids) for ids in tokens] == [LENGTH] * len(prompts)
    assert largest_difference(logprobs, trainer_logprobs(model, prompts, tokens)) < 1e-5
    assert largest_difference(logprobs, trainer_logprobs(start, prompts, tokens)) > 0.01


@pytest.mark.parametrize("way", ["shared", "copy with adapters"])
def test_checkpoint_is_a_normal_one_for_fresh_transformers_and_fresh_vllm(renderer, model_dir, tmp_path, prompts, way):
    saved = tmp_path / "saved"
    model = saved_by_a_trainer(renderer, model_dir, saved, prompts, **WAYS[way])
    if way != "shared":
        adapter, saved = open_adapter("k", str(saved)), tmp_path / "merged"
        merge_adapter(adapter, torch.float32, False, saved, "k")
    assert (saved / "model.safetensors").is_file()
    fresh = AutoModelForCausalLM.from_pretrained(saved)
    assert "model.layers.0.self_attn.q_proj.weight" in fresh.state_dict()
    tokens, logprobs = completions_of(saved, prompts)
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    for trained in (model, fresh):
        assert_written_by(trained, start, prompts, tokens, logprobs)


def test_a_fresh_vllm_serves_a_saved_adapter_beside_its_base(renderer, model_dir, tmp_path, prompts):
    saved = tmp_path / "saved"
    model = saved_by_a_trainer(renderer, model_dir, saved, prompts, use_peft=True)
    assert (saved / "adapter_model.safetensors").is_file()
    tokens, logprobs = completions_of(model_dir, prompts, adapter=saved)
    assert_written_by(model, AutoModelForCausalLM.from_pretrained(model_dir), prompts, tokens, logprobs)
