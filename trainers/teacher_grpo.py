"""GRPO for a teacher: TRL's GRPOTrainer with our engine, our rollout and a reference that need not live on the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from data.render import Encoded, Renderer
from trainers.engine import Engine
from trainers.frozen import FrozenModel
from trainers.phases import PhaseTimer
from trainers.probes import Evaluated, Probes

EVAL_STEP = -1  # evaluations sample with the same seeds whenever they happen, so that they compare


def rollout(prompts: list[str], trainer: "TeacherGRPOTrainer") -> dict[str, Any]:
    """Sample one completion for each prompt (a prompt comes once for each completion wanted of it)."""
    limit = trainer.options.max_prompt_length
    prompt_ids = [trainer.renderer.encode_prompt(prompt)[-limit:] for prompt in prompts]
    sampling = {
        "temperature": trainer.temperature,
        "top_p": trainer.top_p,
        "top_k": trainer.top_k,
        "min_p": trainer.min_p or 0.0,
        "repetition_penalty": trainer.repetition_penalty,
        "max_tokens": trainer.max_completion_length,
        **(trainer.args.generation_kwargs or {}),
    }
    step = trainer._step if trainer.model.training else EVAL_STEP
    with trainer.timer("generate"):
        count = len(trainer.renderer.padding_ids) if trainer.options.padding_in_kl else 0
        padding = trainer.engine.given_logprobs(prompt_ids, count, trainer.temperature)
        sampled = trainer.engine.generate(prompt_ids, sampling, step)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": sampled.completion_ids,
        "logprobs": sampled.logprobs,
        # Reaches the reward function as a column.
        "teacher_logprobs": [given + own for given, own in zip(padding, sampled.logprobs, strict=True)],
    }


class TeacherGRPOTrainer(GRPOTrainer):
    """TRL's trainer, generating with an engine in this process.

    TRL's `rollout_func` is the seam: it hands over prompts and takes back token ids and log-probabilities; TRL's
    importance-sampling correction, losses and metrics work on them as they do on its own vLLM.

    Args:
        options: RL options.
        renderer: The teacher's template and tokenizer.
        timer: Seconds of the phases `generate`, `score` and `step` are added here.
        args: TRL's arguments; `use_vllm` must be false.
        reference: The teacher as it was, where `args.beta` is not 0.
        probes: What is scored beside the teacher's explanations at every evaluation, if anything.
        kwargs: Further arguments of `trl.GRPOTrainer`.
    """

    def __init__(
        self,
        options: Any,
        renderer: Renderer,
        timer: PhaseTimer,
        args: GRPOConfig,
        reference: FrozenModel | None,
        probes: Probes | None,
        **kwargs: Any,
    ) -> None:
        self.options, self.renderer, self.timer = options, renderer, timer
        self.probes, self._evaluated = probes, []
        self._logged_step = 0
        with _no_reference_of_trl(args):
            super().__init__(args=args, rollout_func=rollout, **kwargs)
        self.beta, self.ref_model = args.beta, reference
        if args.sync_ref_model:
            self.add_callback(ReferenceSync(reference, self.accelerator))
        path = self.model.config._name_or_path
        self.engine = Engine(self.model, path, options, self.model.dtype, self.eos_token_ids)
        # From here on TRL treats the rollouts as vLLM's: it calls sync_weights before each and corrects for the
        # difference between the sampling and the training log-probabilities.
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, self.engine, -1

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's; the reference scores the whole batch in one pass over its weights."""
        if model is self.ref_model is not None:
            logps = completion_logps(model, input_ids, attention_mask, logits_to_keep)
            return logps.to(self.accelerator.device), None, None
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's; the seconds of a training interval that an evaluation interrupts are put back."""
        interrupted = self.timer.take()
        self._evaluated.clear()
        metrics = super().evaluate(*args, **kwargs)
        for phase, value in interrupted.items():
            self.timer.seconds[phase] += value
        return metrics

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, ids: list[list[int]]) -> Tensor:
        """As TRL's, every reward function timed as scoring; an evaluation's completions are kept for the probes."""
        if self.probes is not None and not self.model.training:
            self._evaluated += [Evaluated(x["question"], x["solution"], i) for x, i in zip(inputs, ids, strict=True)]
        with self.timer("score"):
            return super()._calculate_rewards(inputs, prompts, completions, ids)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of each phase: per optimizer step while training, in total for an evaluation."""
        seconds = self.timer.take()
        if not self.model.training:
            logs |= {f"eval_seconds/{phase}": value for phase, value in seconds.items()}
            if self._evaluated:
                teacher = self.accelerator.unwrap_model(self.model)
                means = self.probes(self._evaluated, teacher, self.temperature)
                logs |= {f"eval_{name}": value for name, value in means.items()}
                self._evaluated.clear()
        elif steps := self.state.global_step - self._logged_step:
            self._logged_step = self.state.global_step
            phases = {phase: seconds.get(phase, 0.0) for phase in ("generate", "score")}
            phases["update"] = seconds["step"] - sum(phases.values())
            logs |= {f"seconds/{phase}": value / steps for phase, value in phases.items()}
        # TRL names the file of completions by the step alone: an evaluation would overwrite the training step's.
        keep, self.log_completions = self.log_completions, self.log_completions and self.model.training
        super().log(logs, start_time)
        self.log_completions = keep


def completion_logps(model: FrozenModel, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
    """Log-probabilities of the completions in a padded batch.

    Args:
        input_ids, attention_mask: `[rows, tokens]`, prompts padded on the left, completions on the right.
        logits_to_keep: The last so many columns are the completions.

    Returns:
        `[rows, logits_to_keep]`, fp32 on the CPU, 0 at the padding.
    """
    mask = attention_mask.bool().cpu()
    texts, spans = [], []
    for ids, real in zip(input_ids.cpu(), mask, strict=True):
        text = ids[real].tolist()
        texts.append(Encoded(text, {}, []))
        spans.append([(len(text) - int(real[-logits_to_keep:].sum()), len(text))])
    logps = torch.zeros(len(texts), logits_to_keep)
    for row, ((scores, _), ((start, end),)) in enumerate(zip(model.score(texts, spans), spans, strict=True)):
        logps[row, mask[row, -logits_to_keep:]] = scores[start:end]
    return logps


@contextmanager
def _no_reference_of_trl(args: Any) -> Iterator[None]:
    """TRL would load a reference of its own onto the device; ours may rest on the host or on disk."""
    beta, sync = args.beta, args.sync_ref_model
    args.beta, args.sync_ref_model = 0.0, False
    try:
        yield
    finally:
        args.beta, args.sync_ref_model = beta, sync


class ReferenceSync(SyncRefModelCallback):
    """TRL's slow copy of the teacher into the reference (TR-DPO, arXiv 2404.09656), wherever the reference rests."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            model = self.accelerator.unwrap_model(kwargs["model"])
            self.ref_model.backbone.blend(dict(model.named_parameters()), args.ref_model_mixup_alpha)
