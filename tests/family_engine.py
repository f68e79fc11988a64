"""One family's tiny random model on the real engine: all weights shared, then the base shared and adapters trained.

    python tests/family_engine.py FAMILY

Prints the largest differences as JSON. tests/test_families.py starts this once for each family.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from families import COMMON, FAMILIES, LAID_OUT_OTHERWISE
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.engine import Engine
from trainers.engine_setup import prepare_environment
from trainers.models import load_model, make_tokenizer
from trainers.options import options_class
from trainers.weights.adapters import add_adapters


def largest_difference(model, prompts, rollout) -> float:
    differences = []
    for prompt, completion, logprobs in zip(prompts, rollout.completion_ids, rollout.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion], device=model.device)).logits[0].float().cpu()
        positions = list(range(len(prompt) - 1, len(prompt) + len(completion) - 1))
        expected = logits.log_softmax(-1)[positions, completion]
        differences.append((expected - torch.tensor(logprobs)).abs().max())
    return torch.stack(differences).max().item()  # NaN if one is


def measure(
    family: str,
    use_peft: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    completions: int = 8,
    max_tokens: int = 16,
    fresh: bool = False,
    **chosen: Any,
) -> dict[str, float]:
    """Differences before and after three updates, and how far the least moved parameter went; `chosen` are options.

    With `fresh` also those of what is saved, read by a transformers model and a vLLM engine of their own.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _measure(folder, family, use_peft, device, dtype, completions, max_tokens, fresh, **chosen)


def _measure(
    folder: str,
    family: str,
    use_peft: bool,
    device: str,
    dtype: torch.dtype,
    completions: int,
    max_tokens: int,
    fresh: bool,
    **chosen: Any,
) -> dict[str, float]:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **(FAMILIES | LAID_OUT_OTHERWISE)[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # scores that are worth capping
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                parameter.mul_(8)
    model.save_pretrained(folder)
    make_tokenizer(["a b c"], [], 300).save_pretrained(folder)
    model = load_model(folder, dtype, None, "model_name_or_path", False)
    options = options_class("rl")(max_prompt_length=64, max_completion_length=64, seed=1, use_peft=use_peft, **chosen)
    if use_peft:
        model = add_adapters(model, options)
    engine = Engine(model, folder, options, torch.device(device), dtype, [2], output_dir=Path(folder))
    model.to(device)
    prompts = [torch.randint(3, 470, (20,)).tolist() for _ in range(completions)]
    sampling = {"temperature": 1.0, "max_tokens": max_tokens}
    before = largest_difference(model, prompts, engine.generate(prompts, sampling, 0))
    engine.release_cache()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2 if use_peft else 1e-3)
    for _ in range(3):
        ids = torch.tensor(prompts, device=device)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = min((p - weights[name]).abs().max().item() for name, p in model.named_parameters() if name in weights)
    for _ in getattr(engine.bridge, "_layers", [None]):  # each layer's adapters are looked at in turn
        engine.sync_weights()
        assert engine.bridge.stale() is None
    in_cache = sum(int(cache.count_nonzero()) for cache in engine._kv_caches())
    after = largest_difference(model, prompts, engine.generate(prompts, sampling, 1))
    found = {"before": before, "after": after, "least_moved": moved, "in_cache": in_cache}
    if fresh:
        sampled = engine.generate(prompts, sampling, 2)
        engine.close()
        return found | fresh_differences(model, prompts, sampled)
    engine.close()
    return found


def fresh_differences(model, prompts, sampled) -> dict[str, float]:
    """The saved checkpoint in a transformers model and a vLLM engine that know of nothing but its folder."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        make_tokenizer(["a b c"], [], 300).save_pretrained(folder)
        fresh = load_model(folder, torch.float32, None, "model_name_or_path", False)
        by_transformers = largest_difference(fresh, prompts, sampled)
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "kv_cache_memory_bytes": 2**26}
        llm = LLM(folder, gpu_memory_utilization=0.01, logprobs_mode="processed_logprobs", **settings)
        pairs = list(zip(prompts, sampled.completion_ids, strict=True))
        texts = [{"prompt_token_ids": prompt + ids[:-1]} for prompt, ids in pairs]
        params = [SamplingParams(max_tokens=1, logprob_token_ids=[ids[-1]], detokenize=False) for _, ids in pairs]
        outputs = llm.generate(texts, params, use_tqdm=False)
    found = [o.outputs[0].logprobs[0][ids[-1]].logprob for o, (_, ids) in zip(outputs, pairs, strict=True)]
    by_vllm = max(abs(a - logps[-1]) for a, logps in zip(found, sampled.logprobs, strict=True))
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return {"fresh transformers": by_transformers, "fresh vllm": by_vllm}


def main(family: str) -> None:
    prepare_environment(torch.device("cpu"))
    print(json.dumps({"all weights": measure(family, False, fresh=True), "adapters": measure(family, True)}))


if __name__ == "__main__":
    main(sys.argv[1])
