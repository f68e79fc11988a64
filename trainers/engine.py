"""vLLM inside the trainer's process."""

import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.bridges import make_bridge
from trainers.engine_setup import engine_arguments, kept_process_state, prepare_environment, refused_arguments
from trainers.options import RLOptions
from trainers.plan.hardware import vllm_releases_cache
from trainers.rollout.rollouts import Ended, Rollout, request_seed
from trainers.settings.engine_specs import bridge_name
from trainers.watch.out_of_memory import is_out_of_memory
from trainers.watch.phases import Written
from trainers.weights.shared_weights import held_bytes

logger = logging.getLogger(__name__)

OnGroup = Callable[[list[int], list[list[int]], list[list[float]]], None]
OnAnswer = Callable[[list[float]], None]


class Engine:
    """A vLLM engine on the trainer's weights.

    Args:
        model: The trainer's model; with the shared bridge its parameters become views of the engine's tensors, and so
            move to the engine's device.
        model_path: Folder or hub id of the model's config; of one with adapters its base.
        options: RL options.
        device: Where the engine computes.
        dtype: Type of the weights.
        end_ids: Tokens that end a completion.
        closing_tag: A text that ends a completion too, if any.
        closing_tag_ids: Its tokens; they come with the tag, or both are left out.
        output_dir: Where the restart bridge may write.
        tokenizer_path: Folder or hub id of the tokenizer, if not the model's.

    Raises:
        ValueError: If one of `closing_tag` and `closing_tag_ids` is given without the other.
        ConfigError: If vLLM refuses `vllm_kwargs`, or the bridge cannot serve this model.
    """

    def __init__(
        self,
        model: nn.Module,
        model_path: str,
        options: RLOptions,
        device: torch.device,
        dtype: torch.dtype,
        end_ids: list[int],
        closing_tag: str | None = None,
        closing_tag_ids: list[int] | None = None,
        output_dir: Path = Path(),
        tokenizer_path: str | None = None,
    ) -> None:
        if (closing_tag is None) != (closing_tag_ids is None):
            raise ValueError("closing_tag and closing_tag_ids go together: neither ends a completion alone")
        prepare_environment(device)
        if device.type == "cpu":
            from trainers.weights.cpu_kernels import adapt_vllm

            adapt_vllm()
        self.seed, self.end_ids, self.device = options.seed, list(end_ids), device
        self.bridge = make_bridge(bridge_name(options), model)
        self._stop: dict[str, Any] = {"stop_token_ids": self.end_ids, "detokenize": False}
        self.closing_tag: str | int | None = closing_tag  # as vLLM names what stopped it
        if closing_tag is not None and len(closing_tag_ids) == 1:
            self.closing_tag = closing_tag_ids[0]
            self._stop["stop_token_ids"] = self.end_ids + closing_tag_ids
        elif closing_tag is not None:
            self._stop |= {"stop": [closing_tag], "include_stop_str_in_output": True, "detokenize": True}
            self._stop["skip_special_tokens"] = False  # the tag may be made of them
        self._arguments = engine_arguments(options, model_path, device, dtype) | self.bridge.arguments()
        self._asked = options.vllm_kwargs
        self._arguments |= {"tokenizer": tokenizer_path or model_path} | self._asked
        self.can_release = device.type == "cuda" and self.bridge.keeps_engine and vllm_releases_cache()
        if device.type == "cuda" and not vllm_releases_cache():
            logger.warning("this vLLM cannot give its KV cache back (0.31 can): it stays on the GPU during the update")
        if self.can_release:
            self._arguments["enable_sleep_mode"] = True  # its allocator is what can release the KV cache
        self._released = False
        self.written: Written | None = None  # while `generate` is at work; another thread may read it
        self._output_dir = output_dir
        self._along: list[tuple[tuple[tuple[int, ...], Any], list[int], OnAnswer]] = []  # asked with the next requests
        self._build()
        held = self.bridge.weight_bytes() / 2**20
        logger.info("weight_bridge=%s: trainer and engine hold %.1f MiB of weights", bridge_name(options), held)

    def _build(self) -> None:
        """Start vLLM on the trainer's current weights."""
        with kept_process_state(), self.bridge.loading(self._output_dir) as source:
            self.llm = self._start(self._arguments | source)
        try:
            self.bridge.attach(self.llm.llm_engine.model_executor.driver_worker.worker.model_runner, self._rebuild)
        except BaseException:
            self.close()  # nobody else has this engine yet
            raise

    def _rebuild(self) -> None:
        self.close()
        self._build()

    def _start(self, arguments: dict[str, Any]) -> Any:
        from vllm import LLM

        try:
            return LLM(**arguments)
        except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
            if not self._asked or is_out_of_memory(error):
                raise
            raise refused_arguments(self._asked, error) from error

    def close(self) -> None:
        """Stop vLLM and free what it holds, if it runs; parameters that are shared keep their memory."""
        if self.engine_model is None:
            return
        from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
        from vllm.distributed import cleanup_dist_env_and_memory

        for module in self.bridge.engine_model.modules():
            if isinstance(module, TorchCompileWithNoGuardsWrapper):
                module.cleanup()  # a hook of torch's would keep the whole model
        self.llm.llm_engine.engine_core.shutdown()
        self.bridge.engine_model = None
        del self.llm
        cleanup_dist_env_and_memory()
        gc.collect()

    @property
    def engine_model(self) -> nn.Module | None:
        """vLLM's own module, None where it does not run."""
        return self.bridge.engine_model

    @property
    def _core(self) -> Any:
        """vLLM's scheduler and executor, in this process."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.llm.llm_engine.vllm_config.model_config.max_model_len

    def sync_weights(self) -> None:
        """Make the engine see the trainer's current weights; keys and values cached under older ones are dropped.

        Raises:
            RuntimeError: If either is not possible.
        """
        self.restore_cache()
        self._along.clear()
        self.bridge.sync()
        # vLLM's reset walks through every block there is. A pool without running requests has all but its null block.
        is_idle = all(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 for pool in self._pools())
        if not (is_idle and self.cached_blocks() == 0) and not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM could not reset its prefix cache: requests are still running")

    def cached_blocks(self) -> int:
        """Blocks of keys and values that vLLM would use again for a prompt that begins as an earlier one."""
        return sum(len(pool.cached_block_hash_to_block) for pool in self._pools())

    def _pools(self) -> dict[Any, None]:
        """vLLM's pools of KV blocks, those that its reset goes through."""
        managers = self._core.scheduler.kv_cache_manager.coordinator.single_type_managers
        return dict.fromkeys(manager.block_pool for manager in managers)

    def release_cache(self) -> None:
        """Give the memory of the KV cache back to the device, until the next request.

        vLLM's CPU build cannot: it is only paused. So is an engine that will be rebuilt (weight_bridge=restart): its
        cache stays on the device until the next `sync_weights`, and the plan of memory counts it there.
        """
        if self._released:
            return
        core = self._core
        while core.scheduler.has_requests() or core.batch_queue:  # finished ones are only forgotten by a further step
            self.llm.llm_engine.step()
        self.llm.sleep(level=0)
        if self.can_release:
            self.llm.release_kv_cache_memory()
        self._released = True

    def restore_cache(self) -> None:
        """Take the KV cache's memory again.

        Raises:
            RuntimeError: If the device has no room for it.
        """
        if not self._released:
            return
        try:
            self.llm.wake_up(tags=["kv_cache" if self.can_release else "scheduling"])
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            size = self.kv_cache_bytes() / 2**30
            cause = f"the KV cache of {size:.1f} GiB, given back for the update, finds no room again"
            raise RuntimeError(f"{cause}: choose a smaller one, kv_cache_gib={0.8 * size:.1f}") from error
        if self.can_release:
            self._empty_cache()
        self._released = False

    @torch.inference_mode()
    def _empty_cache(self) -> None:
        """As vLLM makes it: behind a sliding window its kernels read the block of zeros, and 0 times NaN is NaN."""
        for cache in self._kv_caches():
            cache.zero_()

    def _kv_caches(self) -> list[Tensor]:
        """Of each layer one, or several (as of layers with a state in place of keys and values)."""
        found = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
        return [cache for each in found for cache in (each if isinstance(each, list | tuple) else [each])]

    def kv_cache_bytes(self) -> int:
        """Bytes of the KV cache."""
        return held_bytes(self._kv_caches())

    def generate(
        self, prompt_ids: list[list[int]], sampling: dict[str, Any], number: int, on_group: OnGroup | None = None
    ) -> Rollout:
        """Sample one completion for each prompt.

        The completions of one prompt are one request. Each has its own seed: a hash of (run seed, number, prompt), plus
        how often the prompt came before in this call. On a CPU the same run samples the same tokens whatever else is
        in the batch; on a GPU vLLM's kernels may round differently in another batch.

        Args:
            prompt_ids: Token ids, with a prompt repeated for each completion wanted of it.
            sampling: Arguments of `vllm.SamplingParams`.
            number: Of the rollout; evaluations have one of their own.
            on_group: Called when all completions of one prompt are there, while others are still written, with their
                places in `prompt_ids`, their tokens and their log-probabilities.
        """
        from vllm import SamplingParams

        places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, ids in enumerate(prompt_ids):
            places[tuple(ids)].append(place)
        seeds = {ids: request_seed(self.seed, number, ids) for ids in places}
        requests = [
            (ids, SamplingParams(**self._stop | sampling, n=len(at), seed=seeds[ids], logprobs=0))
            for ids, at in places.items()
        ]
        groups = list(places.values())
        completions: list[list[int]] = [[]] * len(prompt_ids)
        logprobs: list[list[float]] = [[]] * len(prompt_ids)
        ended: list[Ended] = ["length"] * len(prompt_ids)
        self.written = Written(0, len(prompt_ids), 0)
        for index, output in self._run(requests):
            for place, sample in zip(groups[index], sorted(output.outputs, key=lambda o: o.index), strict=True):
                completions[place] = list(sample.token_ids)
                pairs = zip(sample.token_ids, sample.logprobs, strict=True)
                logprobs[place] = [position[token].logprob for token, position in pairs]
                if sample.finish_reason == "stop":
                    is_tag = self.closing_tag is not None and sample.stop_reason == self.closing_tag
                    ended[place] = "closing_tag" if is_tag else "eos"
            if on_group is not None:
                at = groups[index]
                on_group(at, [completions[i] for i in at], [logprobs[i] for i in at])
        self.written = None
        return Rollout(prompt_ids, completions, logprobs, [[] for _ in prompt_ids], ended)

    def given_logprobs(self, prompt_ids: list[list[int]], count: int, temperature: float) -> list[list[float]]:
        """How likely the model would have been to write the last `count` tokens of each prompt itself.

        Each distinct prompt is asked once for each of these tokens. What it reads for that stays in the prefix cache,
        where `generate` finds it.

        Returns:
            For each prompt the log-probabilities of its last `count` tokens, at `temperature`.
        """
        distinct = list(dict.fromkeys(tuple(ids) for ids in prompt_ids))
        asked = [(ids, at) for ids in distinct for at in range(len(ids) - count, len(ids))]
        found: dict[tuple[int, ...], list[float]] = {ids: [] for ids in distinct}
        answers = self.next_logprobs([ids[:at] for ids, at in asked], [[ids[at]] for ids, at in asked], temperature)
        for (ids, _), values in zip(asked, answers, strict=True):
            found[ids] += values
        return [found[tuple(ids)] for ids in prompt_ids]

    def next_logprobs(
        self, prompt_ids: list[tuple[int, ...]], tokens: list[list[int]], temperature: float
    ) -> list[list[float]]:
        """For each prompt the log-probabilities of some tokens as the next one."""
        if not prompt_ids:  # what is asked along waits for requests
            return []
        pairs = zip(prompt_ids, tokens, strict=True)
        requests = [(ids, next_token_params(wanted, temperature)) for ids, wanted in pairs]
        answers: list[list[float]] = [[]] * len(requests)
        for index, output in self._run(requests):
            answers[index] = next_token_answer(output, tokens[index])
        return answers

    def ask_along(self, prompt_ids: tuple[int, ...], tokens: list[int], on_answer: OnAnswer) -> None:
        """Ask what `next_logprobs` tells of one prompt together with the next requests, ahead of them, or at
        `answer_along`; a later `sync_weights` takes the question back.

        Args:
            on_answer: Called with the log-probabilities while the other requests are still in work; what it raises
                stops them.
        """
        self._along.append(((prompt_ids, next_token_params(tokens, 1.0)), tokens, on_answer))

    def answer_along(self) -> None:
        """Answer what was to be asked along with requests, where none follow."""
        for _ in self._run([]):
            pass

    def _run(self, requests: list[tuple[tuple[int, ...], Any]]) -> Iterator[tuple[int, Any]]:
        """Process requests, and what is asked along; yield the place and vLLM's output of each as it finishes."""
        self.restore_cache()
        along, self._along = self._along, []
        requests = [request for request, _, _ in along] + requests
        prompts = [{"prompt_token_ids": list(ids)} for ids, _ in requests]
        params = [p for _, p in requests]
        ids = self.llm.enqueue(prompts, params, lora_request=self.bridge.lora_request, use_tqdm=False)
        place = {request_id.partition("-")[0]: index for index, request_id in enumerate(ids)}
        engine = self.llm.llm_engine
        try:
            while engine.has_unfinished_requests():
                outputs = engine.step()
                self._note_written()
                for output in outputs:
                    if not output.finished:
                        continue
                    at = place[output.request_id] - len(along)
                    if at < 0:
                        _, tokens, on_answer = along[at]
                        on_answer(next_token_answer(output, tokens))
                    else:
                        yield at, output
        finally:
            engine.abort_request(ids, internal=True)  # those that an error has left

    def _note_written(self) -> None:
        """A step of vLLM's is done, in which each completion in work got a token."""
        if self.written is not None:
            scheduler, (_, asked, tokens) = self._core.scheduler, self.written
            done = max(0, asked - scheduler.get_num_unfinished_requests())
            self.written = Written(done, asked, tokens + len(scheduler.running))


def next_token_params(tokens: list[int], temperature: float) -> Any:
    """vllm.SamplingParams that ask for the log-probabilities of these tokens as the next one."""
    from vllm import SamplingParams

    return SamplingParams(temperature=temperature, max_tokens=1, seed=0, logprob_token_ids=tokens, detokenize=False)


def next_token_answer(output: Any, tokens: list[int]) -> list[float]:
    """What vLLM answered to that."""
    first = output.outputs[0].logprobs[0]
    return [first[token].logprob for token in tokens]
