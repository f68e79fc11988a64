"""Watches that the engine computes with the trainer's weights."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from trainers.engine import Engine

logger = logging.getLogger(__name__)

COMPARED_LENGTH = 8  # tokens of the prompt after which log-probabilities are compared
NUM_TOKENS = 16  # below vLLM's limit of 20 log-probs a position
TOLERANCE = {torch.float32: 1e-3}  # nats; kernels of trainer and engine differ by about 1e-6 in fp32 on a CPU
# bf16 rounds a logit of 32 by up to 1/8, in the trainer and in the engine; of larger ones the first check tells. So it
# does of fp32 on a GPU, where vLLM's attention may multiply as TF32.
HALF_TOLERANCE = 0.3


class SentinelError(RuntimeError):
    """The engine does not compute with the trainer's weights."""


class Sentinel:
    """After each update, compares log-probabilities after a fixed prompt between trainer and engine, and sees that the
    engine's prefix cache was dropped.

    The engine is asked together with the next rollout, ahead of it; a difference stops the rollout at its first token.
    The compared prompt is short, since the trainer reads it by itself. A second one, longer than a block of the prefix
    cache, is put to the engine alone: its keys and values stay there until the next update, which must drop them.

    Args:
        engine: The engine.
        model: The trainer's model.
        prompt_ids: A prompt; the fixed ones are made of it.
        dtype: Type of the weights.
        tolerance: Largest difference allowed, in nats; None for the default of the type.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, prompt_ids: list[int], dtype: torch.dtype, tolerance: float | None
    ) -> None:
        self.engine, self.model = engine, model
        self._to_calibrate = tolerance is None and (dtype != torch.float32 or engine.device.type == "cuda")
        self.tolerance = tolerance or TOLERANCE.get(dtype, HALF_TOLERANCE)
        length = min(engine.block_size + 1, engine.max_model_len - 1)
        self.cached_ids = tuple((prompt_ids * (length // len(prompt_ids) + 1))[:length])
        # Less than a block: it must not put the other's first one into the cache.
        self.compared_ids = self.cached_ids[: min(COMPARED_LENGTH, max(1, engine.block_size - 1))]
        self._tokens: list[int] = []

    @torch.no_grad()
    def _trainer_logprobs(self) -> torch.Tensor:
        """`[vocabulary]`, fp32: the log-probabilities of the next token."""
        training = self.model.training
        self.model.eval()
        ids = torch.tensor([self.compared_ids], device=self.engine.device)
        logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        self.model.train(training)
        return logits.float().log_softmax(-1)

    def check(self, report: Callable[[dict[str, float]], None]) -> None:
        """Compare with the next rollout; call after `Engine.sync_weights`.

        Args:
            report: Called with `sentinel/mismatch_mean` and `sentinel/mismatch_max`, in nats.

        Raises:
            SentinelError: In that rollout, if the difference is beyond the tolerance, or the prefix cache outlived the
                update.
        """
        ours = self._trainer_logprobs()
        if not self._tokens:
            self._tokens = ours.topk(min(NUM_TOKENS, len(ours))).indices.tolist()
        ours = ours[self._tokens].cpu()
        self.engine.ask_along(
            self.compared_ids,
            self._tokens,
            lambda theirs, _: report(self._compare(ours, torch.tensor(theirs))),
        )
        self.engine.ask_along(self.cached_ids, self._tokens[:1], lambda _, cached: self._none_cached(cached))

    def _none_cached(self, cached: int) -> None:
        if cached:
            raise SentinelError(
                f"vLLM found {cached} tokens of a prompt in its prefix cache right after a weight update: keys and "
                "values of older weights would be used\n  -> enable_prefix_caching=false, and please report this"
            )

    def _compare(self, ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
        difference = (ours - theirs).abs()
        worst = difference.max().item()
        if self._to_calibrate:  # before the first update the weights are equal: this is rounding
            self.tolerance, self._to_calibrate = max(self.tolerance, 4 * worst), False
        if not worst <= self.tolerance:  # NaN too
            raise SentinelError(
                f"trainer and engine disagree: the log-probability of a token differs by {worst:.3g}, allowed is "
                f"{self.tolerance:g} (sentinel_tolerance). The engine does not compute with the trainer's weights\n"
                "  -> weight_bridge=restart shows whether the bridge is at fault; if the engine is meant to differ "
                "(vllm_kwargs with a quantization), set sentinel_tolerance"
            )
        return {"sentinel/mismatch_mean": difference.mean().item(), "sentinel/mismatch_max": worst}
