"""What a trainer's completions come from: the engine, transformers, or a recording."""

import logging
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.render import Renderer
from trainers.engine import Engine
from trainers.options import RLOptions
from trainers.plan.model_shapes import max_positions
from trainers.rollout.hf_generation import generate_with_transformers
from trainers.rollout.overlap import ScoreAhead
from trainers.rollout.rollouts import Rollout, RolloutFiles
from trainers.rollout.sentinel import Sentinel
from trainers.watch.phases import PhaseTimer

logger = logging.getLogger(__name__)

# In place of a rollout's number: evaluations sample with the same seeds whenever they happen, so that they compare.
EVALUATION = -1


class RolloutSampler:
    """Samples for a `TeacherGRPOTrainer`, in the two places where TRL has a seam for it: it is TRL's `rollout_func`,
    and stands for TRL's own vLLM (`vllm_generation`), which is asked to fetch the weights before each rollout.

    Args:
        options: RL options.
        renderer: The teacher's template and tokenizer.
        timer: Seconds of kv_cache, sync, sentinel and generate are added here.
        engine: What generates; None for transformers, or where rollouts are replayed.
        sentinel: Compares engine and trainer after each update; where there is an engine, there is one.

    Attributes:
        ahead: Scores groups while others are still generated, if anything does; set when there is a student, which is
            loaded after the engine.
        sampled: How many `completions` and `tokens` were sampled or read for training.
        trainer: Whom this serves; the trainer sets it, None before.
        rows: The questions and solutions whose prompts are to be sampled from; the trainer sets them before each
            rollout.
    """

    ahead: ScoreAhead | None = None
    trainer: Any = None
    rows: list[dict[str, Any]]

    def __init__(
        self,
        options: RLOptions,
        renderer: Renderer,
        timer: PhaseTimer,
        engine: Engine | None = None,
        sentinel: Sentinel | None = None,
    ) -> None:
        self.options, self.renderer, self.timer = options, renderer, timer
        self.engine, self.sentinel = engine, sentinel
        if engine is not None:
            timer.written = lambda: engine.written
        self.sampled = Counter(completions=0, tokens=0)
        self.record, self.replay = (
            RolloutFiles(Path(folder).expanduser()) if folder else None
            for folder in (options.record_rollouts, options.replay_rollouts)
        )

    def sync_weights(self, report: Callable[[dict[str, float]], None] | None = None) -> None:
        """Bring the current weights to the engine, and see that they are there.

        Args:
            report: Called with the sentinel's metrics; None counts them among the trainer's.
        """
        if self.engine is None:  # transformers computes with the trainer's own; a recording with none
            return
        with self.timer("kv_cache"):
            self.engine.restore_cache()
        with self.timer("sync"):
            self.engine.sync_weights()
        with self.timer("sentinel"):
            self.sentinel.check(report or self.trainer.note_metrics)

    def check_last_update(self) -> None:
        """See that the engine computes with the trainer's weights after an update that no rollout follows; not where
        an engine would be built from them for that alone (weight_bridge=restart).

        Raises:
            SentinelError: If it does not.
        """
        if self.engine is None or not self.engine.bridge.keeps_engine:
            return
        found: dict[str, float] = {}
        self.sync_weights(found.update)
        self.engine.answer_along()
        most = found["sentinel/mismatch_max"]
        logger.info("trainer and engine differ by %.3g nats at most after the last update", most)

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Sample one completion for each prompt (a prompt comes once for each completion wanted of it).

        Returns:
            What TRL expects of a rollout_func; `teacher_logprobs` and `ended` reach the reward functions as columns.
        """
        prompt_ids = [self.renderer.encode_prompt(prompt)[-self.options.max_prompt_length :] for prompt in prompts]
        with self.timer("generate"):
            sampled = self.sample(prompt_ids)
        if trainer.model.training:
            self.sampled.update(completions=len(prompt_ids), tokens=sum(map(len, sampled.completion_ids)))
        if self.engine is not None:
            self._release_cache()
        if self.ahead is not None:
            with self.timer("score"):
                self.ahead.wait()
        completions, logprobs, env_mask = [], [], []
        positions, longest = max_positions(trainer.model.config), max(map(len, prompt_ids))
        for ids, logps, ended in zip(sampled.completion_ids, sampled.logprobs, sampled.ended, strict=True):
            # TRL knows a finished completion by its end of turn. Where the closing tag took its place, one is put there
            # that the loss leaves out, if the model has a position for it behind the batch's longest prompt.
            room = longest + len(ids) < positions
            forced = [self.renderer.tokenizer.eos_token_id] if ended == "closing_tag" and room else []
            completions.append(ids + forced)
            logprobs.append(logps + [0.0] * len(forced))
            env_mask.append([1] * len(ids) + [0] * len(forced))
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completions,
            "logprobs": logprobs,
            "env_mask": env_mask,
            "teacher_logprobs": [g + own for g, own in zip(sampled.given_logprobs, sampled.logprobs, strict=True)],
            "ended": sampled.ended,
        }

    def sample(self, prompt_ids: list[list[int]]) -> Rollout:
        """Sample a completion for each prompt, or read what was sampled for it."""
        trainer = self.trainer
        # TRL's `_step` counts micro-batches; how many a rollout has may be solved for the card, and the same run is to
        # sample the same tokens on another one.
        micro_batches = trainer.args.steps_per_generation * trainer.num_iterations
        number = trainer._step // micro_batches if trainer.model.training else EVALUATION
        given = len(self.renderer.padding_ids) if self.options.padding_in_kl else 0
        step = trainer.state.global_step
        if self.replay is not None:
            limit = trainer.max_completion_length
            return self.replay.read(prompt_ids, given, trainer.temperature, limit, step, trainer.mode)
        if self.engine is None:
            sampled = generate_with_transformers(trainer, self.renderer, prompt_ids, number, given)
        else:
            sampled = self._sample_with_engine(prompt_ids, number, given)
        if self.record is not None:
            self.record.write(sampled, trainer.temperature, step, trainer.mode)
        return sampled

    def _sample_with_engine(self, prompt_ids: list[list[int]], number: int, given: int) -> Rollout:
        trainer = self.trainer
        given_logprobs = self.engine.given_logprobs(prompt_ids, given, trainer.temperature)

        def score_group(places: list[int], completion_ids: list[list[int]], logprobs: list[list[float]]) -> None:
            self.ahead.submit(
                places,
                completion_ids=completion_ids,
                question=[self.rows[i]["question"] for i in places],
                solution=[self.rows[i]["solution"] for i in places],
                teacher_logprobs=[given_logprobs[i] + own for i, own in zip(places, logprobs, strict=True)],
            )

        sampling = {
            "temperature": trainer.temperature,
            "top_p": trainer.top_p,
            "top_k": trainer.top_k,
            "min_p": trainer.min_p or 0.0,
            "repetition_penalty": trainer.repetition_penalty,
            "max_tokens": trainer.max_completion_length,
            **(trainer.args.generation_kwargs or {}),
        }
        sampled = self.engine.generate(prompt_ids, sampling, number, None if self.ahead is None else score_group)
        return replace(sampled, given_logprobs=given_logprobs)

    def _release_cache(self) -> None:
        """Give the engine's KV cache back to the device until the next rollout, and see how much that freed."""
        memory = self.timer.memory
        before = memory.beside_torch() if memory is not None else 0
        with self.timer("kv_cache"):
            self.engine.release_cache()
        if memory is not None and self.engine.can_release:
            memory.freed("the KV cache", before, self.engine.kv_cache_bytes())

    def cancel(self) -> None:
        """Score nothing more of a rollout that failed."""
        if self.ahead is not None:
            self.ahead.cancel()

    @contextmanager
    def stopped_at_the_end(self) -> Iterator[None]:
        """Stop the engine, if there is one, and the thread that scores beside it; behind an error too."""
        try:
            yield
        except BaseException as error:
            self._make_room(error)
            self._close()
            raise
        self._close()

    def _close(self) -> None:
        try:
            if self.ahead is not None:
                self.ahead.close()
            if self.engine is not None and self.engine.engine_model is not None:
                self.engine.restore_cache()  # vLLM frees at its end what it holds, and a cache that rests is not there
                self.engine.close()
        except Exception as error:  # whatever it is: the run has left what it was to leave, or ends with another error
            logger.warning("vLLM could not be stopped: %s", error)

    def _make_room(self, error: BaseException) -> None:
        """Left to the process's end, vLLM would free a cache that rests, and CUDA's message about that would stand
        below the error's own."""
        behind: BaseException | None = error
        while behind is not None:
            traceback.clear_frames(behind.__traceback__)  # what they hold of the device makes room for the cache
            behind = behind.__cause__ or behind.__context__
        if (model := getattr(self.trainer, "model", None)) is not None:  # its constructor may be what failed
            model.zero_grad(set_to_none=True)
