"""Watches that the engine computes with the trainer's weights."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from trainers.engine import Engine
from trainers.models import evaluating

logger = logging.getLogger(__name__)

PROMPT_LENGTH = 4  # tokens after which log-probabilities are compared
NUM_TOKENS = 16  # below vLLM's limit of 20 log-probs a position
TOLERANCE = {torch.float32: 1e-3}  # nats; kernels of trainer and engine differ by about 1e-6 in fp32 on a CPU
# bf16 rounds a logit of 32 by up to 1/8, in the trainer and in the engine; of larger ones the first check tells. So it
# does of fp32 on a GPU, where vLLM's attention may multiply as TF32.
HALF_TOLERANCE = 0.3
LARGEST_TOLERANCE = 1.0  # beyond it no rounding can be at work
# On average over a text: bf16's rounding is some 0.04 (a standard deviation of 0.05 a token, trl#6789).
HALF_MEAN = 0.1
LEAST_TOKENS = 16  # of which a mean says something: of one token, one in twenty would be beyond it
TAIL = 10  # times the tolerance; a single difference beyond that is no rounding's either


class SentinelError(RuntimeError):
    """The engine does not compute with the trainer's weights."""


class Sentinel:
    """After each update, compares log-probabilities after a fixed prompt between trainer and engine, and sees that the
    engine's prefix cache was dropped. A whole text of the first rollout is compared too (`check_text`): not everything
    that trainer and engine may compute differently shows after a few tokens.

    The engine is asked together with the next rollout, ahead of it; a difference stops the rollout at its first token
    (one that rounding may have made only if the next is such too). The prompt is short: the trainer reads it by itself.

    Args:
        engine: The engine.
        model: The trainer's model.
        prompt_ids: A prompt; the fixed one is its beginning.
        dtype: Type of the weights.
        tolerance: Largest difference allowed, in nats; None for the default of the type.
    """

    def __init__(
        self, engine: Engine, model: nn.Module, prompt_ids: list[int], dtype: torch.dtype, tolerance: float | None
    ) -> None:
        self.engine, self.model = engine, model
        self._is_rounded = tolerance is None and (dtype != torch.float32 or engine.device.type == "cuda")
        self._to_calibrate = self._is_rounded
        self._exceeded: torch.Tensor | None = None  # the trainer's, where they differed at the last comparison
        self.tolerance = tolerance or TOLERANCE.get(dtype, HALF_TOLERANCE)
        self.mean_tolerance = HALF_MEAN if self._is_rounded else self.tolerance
        self.prompt_ids = tuple(prompt_ids[: min(PROMPT_LENGTH, engine.max_model_len - 1)])
        self._tokens: list[int] = []

    @torch.no_grad()
    def _trainer_logprobs(self) -> torch.Tensor:
        """`[vocabulary]`, fp32: the log-probabilities of the next token."""
        ids = torch.tensor([self.prompt_ids], device=self.engine.device)
        with evaluating(self.model):
            logits = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
        return logits.float().log_softmax(-1)

    def check(self, report: Callable[[dict[str, float]], None]) -> None:
        """Compare with the next rollout; call after `Engine.sync_weights`.

        Args:
            report: Called with `sentinel/mismatch_mean` and `sentinel/mismatch_max`, in nats.

        Raises:
            SentinelError: If the prefix cache outlived the update, or a weight did not arrive; in that rollout, if the
                difference is beyond the tolerance and no rounding's.
            FloatingPointError: If the trainer's own log-probabilities are no numbers.
        """
        ours = self._trainer_logprobs()
        if ours.isnan().any():
            raise FloatingPointError(
                "the teacher's own log-probabilities are no numbers: its weights, or what it computes of them in "
                f"{self.model.dtype}, are not finite\n  -> begin with weights that are; if it came with training: a "
                "smaller learning_rate, or precision=fp32"
            )
        if cached := self.engine.cached_blocks():
            raise SentinelError(
                f"vLLM's prefix cache holds {cached} blocks right after a weight update: keys and values of older "
                "weights would be used\n  -> enable_prefix_caching=false, and please report this"
            )
        if place := self.engine.bridge.stale():
            raise SentinelError(
                f"the engine has other weights than the trainer at {place}: an update did not reach it\n"
                "  -> weight_bridge=copy does without vLLM's adapter buffers, weight_bridge=restart without copying "
                "into an engine; please report this"
            )
        if not self._tokens:
            self._tokens = ours.topk(min(NUM_TOKENS, len(ours))).indices.tolist()
        ours = ours[self._tokens].cpu()
        self.engine.ask_along(
            self.prompt_ids, self._tokens, lambda theirs: report(self._compare(ours, torch.tensor(theirs)))
        )

    def _compare(self, ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
        difference = (ours - theirs).abs()
        worst = difference.max().item()
        if self._to_calibrate:  # before the first update the weights are equal: this is rounding
            self.tolerance, self._to_calibrate = min(max(self.tolerance, 4 * worst), LARGEST_TOLERANCE), False
            level = logging.WARNING if self.tolerance > HALF_TOLERANCE else logging.INFO
            logger.log(level, "trainer and engine differ by %.3g at first: allowed is %.3g", worst, self.tolerance)
        exceeds = not worst <= self.tolerance  # NaN too
        is_first = self._exceeded is None or torch.equal(self._exceeded, ours)  # or the same weights once more
        if exceeds and self._is_rounded and is_first and worst <= min(TAIL * self.tolerance, LARGEST_TOLERANCE):
            # Rounding has a tail: of 3900 tokens of a bf16 model one differed by 0.66, with equal weights (trl#6789).
            # Wrong weights are still wrong at the next update.
            logger.warning(
                "trainer and engine differ by %.3g, allowed is %.3g: once it may be rounding; if they do so after one "
                "more update, the run stops",
                worst,
                self.tolerance,
            )
        elif exceeds:
            raise SentinelError(
                f"trainer and engine disagree: the log-probability of a token differs by {worst:.3g}, allowed is "
                f"{self.tolerance:g} (sentinel_tolerance). The engine does not compute with the trainer's weights\n"
                "  -> weight_bridge=restart shows whether the bridge is at fault; if the engine is meant to differ "
                "(vllm_kwargs with a quantization), set sentinel_tolerance"
            )
        self._exceeded = ours if exceeds else None
        return {"sentinel/mismatch_mean": difference.mean().item(), "sentinel/mismatch_max": worst}

    def check_text(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Compare what trainer and engine tell of each token of a completion that the engine sampled.

        Args:
            ours, theirs: `[tokens]`, log-probabilities of the sampled tokens.

        Raises:
            SentinelError: If they differ by more, on average, than rounding makes them.
        """
        mean = (ours - theirs).abs().mean().item()
        if not mean <= self.mean_tolerance:  # NaN too
            raise SentinelError(
                f"trainer and engine disagree: log-probabilities of {len(ours)} tokens that the engine sampled differ "
                f"by {mean:.3g} on average, allowed is {self.mean_tolerance:g} (sentinel_tolerance). With the same "
                "weights, they compute different models\n"
                "  -> use_vllm=false generates with the trainer's own model; if the engine is meant to differ "
                "(vllm_kwargs with a quantization), set sentinel_tolerance"
            )
        logger.info("trainer and engine differ by %.3g on average, over a text of %d tokens", mean, len(ours))
