"""GRPO for a teacher: TRL's GRPOTrainer with our engine, our rollout and a reference that need not live on the GPU."""

from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from data.render import Renderer
from trainers.engine import Engine
from trainers.phases import PhaseTimer

EVAL_STEP = -1  # evaluations sample with the same seeds whenever they happen, so that they compare


def rollout(prompts: list[str], trainer: "TeacherGRPOTrainer") -> dict[str, Any]:
    """Sample one completion for each prompt (a prompt comes once for each completion wanted of it)."""
    limit = trainer.options.max_prompt_length
    prompt_ids = [trainer.renderer.encode_text(prompt)[-limit:] for prompt in prompts]
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
        sampled = trainer.engine.generate(prompt_ids, sampling, step)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": sampled.completion_ids,
        "logprobs": sampled.logprobs,
        "teacher_logprobs": sampled.logprobs,  # reaches the reward function as a column
    }


class TeacherGRPOTrainer(GRPOTrainer):
    """TRL's trainer, generating with an engine in this process.

    TRL's `rollout_func` is the seam: it hands over prompts and takes back token ids and log-probabilities; TRL's
    importance-sampling correction, losses and metrics work on them as they do on its own vLLM.

    Args:
        options: RL options.
        renderer: The teacher's template and tokenizer.
        timer: Seconds of the phases `generate`, `score` and `step` are added here.
        kwargs: Arguments of `trl.GRPOTrainer`; `args.use_vllm` must be false.
    """

    def __init__(self, options: Any, renderer: Renderer, timer: PhaseTimer, **kwargs: Any) -> None:
        self.options, self.renderer, self.timer = options, renderer, timer
        self._logged_step = 0
        super().__init__(rollout_func=rollout, **kwargs)
        self.offload_reference = options.offload_untrained_models and self.accelerator.device.type != "cpu"
        if self.ref_model is not None and self.offload_reference:
            self._offload_reference()
        path = self.model.config._name_or_path
        self.engine = Engine(self.model, path, options, self.model.dtype, self.eos_token_ids)
        # From here on TRL treats the rollouts as vLLM's: it calls sync_weights before each and corrects for the
        # difference between the sampling and the training log-probabilities.
        self.use_vllm, self.vllm_generation, self._last_loaded_step = True, self.engine, -1

    def _offload_reference(self) -> None:
        self.ref_model.to("cpu")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SyncRefModelCallback):
                callback.__class__ = _OffloadedSync

    def _get_per_token_logps_and_entropies(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """As TRL's; an offloaded reference is on the device for just this call."""
        if model is not self.ref_model or not self.offload_reference:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        model.to(self.accelerator.device)
        result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        model.to("cpu")
        return result

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As TRL's: every reward function counts as scoring."""
        with self.timer("score"):
            return super()._calculate_rewards(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's; the seconds of a training interval that an evaluation interrupts are put back."""
        interrupted = self.timer.take()
        metrics = super().evaluate(*args, **kwargs)
        for phase, value in interrupted.items():
            self.timer.seconds[phase] += value
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of each phase: per optimizer step while training, in total for an evaluation."""
        seconds = self.timer.take()
        if not self.model.training:
            logs |= {f"eval_seconds/{phase}": value for phase, value in seconds.items()}
        elif steps := self.state.global_step - self._logged_step:
            self._logged_step = self.state.global_step
            phases = {phase: seconds.get(phase, 0.0) for phase in ("generate", "score")}
            phases["update"] = seconds["step"] - sum(phases.values())
            logs |= {f"seconds/{phase}": value / steps for phase, value in phases.items()}
        # TRL names the file of completions by the step alone: an evaluation would overwrite the training step's.
        keep, self.log_completions = self.log_completions, self.log_completions and self.model.training
        super().log(logs, start_time)
        self.log_completions = keep


class _OffloadedSync(SyncRefModelCallback):
    """TRL's slow copy of the teacher into the reference, for a reference that rests in host memory."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        device = next(kwargs["model"].parameters()).device
        if state.global_step % args.ref_model_sync_steps == 0:
            self.ref_model.to(device)
            super().on_step_end(args, state, control, **kwargs)
            self.ref_model.to("cpu")
            if device.type == "cuda":
                torch.cuda.empty_cache()
