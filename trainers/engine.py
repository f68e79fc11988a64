"""vLLM inside the trainer's process."""

import hashlib
import logging
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainers.bridges import copy_weights, keep_linear_weights_on_cpu, share_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rollout:
    """Sampled completions, in the order of the prompts.

    Attributes:
        completion_ids: Sampled tokens of each completion, the end of turn included where it was written.
        logprobs: Log-probability of each sampled token, at the sampling temperature.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]


def prepare_environment(device: torch.device) -> None:
    """Set what vLLM reads from the environment; call before vLLM is imported. What the user has set stays."""
    defaults = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in this process
        "VLLM_CONFIGURE_LOGGING": "0",  # its messages go where ours go
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device.type == "cpu":
        # Otherwise vLLM binds torch to one core, and training in the same process slows down.
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


class Engine:
    """A vLLM engine on the trainer's weights.

    Args:
        model: The trainer's model; with the shared bridge its parameters become views of the engine's tensors.
        model_path: Folder with the model's config.
        options: RL options.
        eos_ids: Tokens that end a completion.
    """

    def __init__(self, model: nn.Module, model_path: str, options: Any, dtype: torch.dtype, eos_ids: list[int]) -> None:
        device = next(model.parameters()).device
        prepare_environment(device)
        from vllm import LLM

        if device.type == "cpu":
            keep_linear_weights_on_cpu()
        self.seed, self.eos_ids, self.bridge, self.model = options.seed, eos_ids, options.weight_bridge, model
        arguments = {
            "model": model_path,
            "load_format": "dummy",  # the weights are the trainer's
            "dtype": str(dtype).removeprefix("torch."),
            "seed": options.seed,
            "max_model_len": options.vllm_max_model_length or options.max_prompt_length + options.max_completion_length,
            "enforce_eager": options.enforce_eager or device.type == "cpu",
            "enable_prefix_caching": options.enable_prefix_caching,
            "logprobs_mode": "processed_logprobs",
            "trust_remote_code": options.trust_remote_code,
            "disable_log_stats": True,
        }
        if device.type == "cuda":
            arguments["gpu_memory_utilization"] = options.vllm_gpu_memory_utilization
        else:
            # A prompt cut in two makes vLLM rewind the request's generator, which torch cannot do on a CPU.
            arguments["enable_chunked_prefill"] = False
            arguments["max_num_batched_tokens"] = max(8192, arguments["max_model_len"])
        self.llm = LLM(**{**arguments, **options.vllm_kwargs})
        if self.bridge == "shared":
            held = share_weights(model, self.engine_model)
            logger.info("one copy of the weights for trainer and engine: %.1f MiB", held / 2**20)
            self._shared = {name: p.data_ptr() for name, p in model.named_parameters()}
        else:
            self.sync_weights()

    @property
    def engine_model(self) -> nn.Module:
        """vLLM's own module."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def sync_weights(self) -> None:
        """Make the engine see the trainer's current weights; keys and values cached under older ones are dropped."""
        if self.bridge == "copy":
            copy_weights(self.model, self.engine_model)
        else:
            for name, parameter in self.model.named_parameters():
                if parameter.data_ptr() != self._shared[name]:
                    raise RuntimeError(f"{name} was moved away from the engine's weights: updates must be in place")
        self.llm.reset_prefix_cache()

    def generate(self, prompt_ids: list[list[int]], sampling: dict[str, Any], step: int) -> Rollout:
        """Sample one completion for each prompt.

        Each request has its own seed, a hash of (run seed, step, prompt, how often the prompt came before in this
        call): the same run samples the same tokens whatever else is in the batch.

        Args:
            prompt_ids: Token ids, with a prompt repeated for each completion wanted of it.
            sampling: Arguments of `vllm.SamplingParams`.
            step: Training step; evaluations use a step of their own.
        """
        from vllm import SamplingParams

        seen: Counter[tuple[int, ...]] = Counter()
        params = []
        for ids in prompt_ids:
            key = tuple(ids)
            seed = request_seed(self.seed, step, ids, seen[key])
            seen[key] += 1
            params.append(
                SamplingParams(**sampling, seed=seed, logprobs=0, stop_token_ids=self.eos_ids, detokenize=False)
            )
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        outputs = [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]
        logprobs = [
            [position[token].logprob for token, position in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs
        ]
        return Rollout([list(o.token_ids) for o in outputs], logprobs)

    def given_logprobs(self, prompt_ids: list[list[int]], count: int, temperature: float) -> list[list[float]]:
        """How likely the model would have been to write the last `count` tokens of each prompt itself.

        Each distinct prompt is asked once for each of these tokens. What it reads for that stays in the prefix cache,
        where `generate` finds it.

        Returns:
            For each prompt the log-probabilities of its last `count` tokens, at `temperature`.
        """
        from vllm import SamplingParams

        distinct = list(dict.fromkeys(tuple(ids) for ids in prompt_ids))
        prompts, params = [], []
        for ids in distinct:
            for position in range(len(ids) - count, len(ids)):
                prompts.append({"prompt_token_ids": list(ids[:position])})
                asked = [ids[position]]
                params.append(
                    SamplingParams(
                        temperature=temperature, max_tokens=1, seed=0, logprob_token_ids=asked, detokenize=False
                    )
                )
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if prompts else []
        asked = (param.logprob_token_ids[0] for param in params)
        values = iter(o.outputs[0].logprobs[0][token].logprob for o, token in zip(outputs, asked, strict=True))
        found = {ids: [next(values) for _ in range(count)] for ids in distinct}
        return [found[tuple(ids)] for ids in prompt_ids]


def request_seed(run_seed: int, step: int, prompt_ids: list[int], sample: int) -> int:
    """Return the seed of one completion, a number below 2^63."""
    text = f"{run_seed},{step},{sample}:{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
