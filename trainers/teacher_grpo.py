"""GRPO for a teacher: TRL's GRPOTrainer with our engine, our rollout and a reference that need not live on the GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models import get_act_offloading_ctx_manager
from trl.trainer.callbacks import SyncRefModelCallback

from data.explanation import sampled_explanation
from data.render import Encoded
from trainers.models import evaluating
from trainers.optimizers import OwnOptimizer
from trainers.options import RLOptions
from trainers.rollout.importance_sampling import Mismatch, importance_sampling_ratio
from trainers.rollout.sampler import RolloutSampler
from trainers.rollout.sentinel import LEAST_TOKENS
from trainers.rollout.shared_prompts import can_share, lay_out, let_share, prompts_together, shared_prompt_outputs
from trainers.rollout.whole_rows import can_align, whole_row_outputs
from trainers.scoring.evaluation import HELD_OUT, Evaluation, HeldOutFiles
from trainers.scoring.frozen import FrozenModel
from trainers.scoring.probes import Evaluated, Probes
from trainers.scoring.reward_funcs import StudentReward, without_unscored
from trainers.settings.batch import keeps_groups_together
from trainers.settings.engine_specs import reshaping
from trainers.watch.extremes import keep_extremes
from trainers.watch.phases import PhaseTimer
from trainers.weights.adapters import base_model
from trainers.weights.saving import OwnSaving

PHASES = ("kv_cache", "sync", "sentinel", "generate", "score")  # of a step; the rest of it is the update


class TeacherGRPOTrainer(OwnOptimizer, OwnSaving, GRPOTrainer):
    """TRL's trainer, generating with an engine in this process.

    TRL's `rollout_func` is the seam: it hands over prompts and takes back token ids and log-probabilities; TRL's
    importance-sampling correction, losses and metrics work on them as they do on its own vLLM.

    Args:
        options: RL options.
        sampler: What completions come from.
        timer: Seconds of `PHASES` are added here, the sampler's too; of whole steps by `MetricsWriter`.
        args: TRL's arguments; `use_vllm` must be false.
        reference: The teacher as it was, where `args.beta` is not 0; with adapters none: TRL then takes the adapter
            `ref` if there is one (see adapters.py), else the model without its adapters.
        probes: What is scored beside the teacher's explanations at every evaluation, if anything.
        student_reward: What asks the student, if anything does.
        kwargs: Further arguments of `trl.GRPOTrainer`.
    """

    def __init__(
        self,
        options: RLOptions,
        sampler: RolloutSampler,
        timer: PhaseTimer,
        args: GRPOConfig,
        reference: FrozenModel | None,
        probes: Probes | None,
        student_reward: StudentReward | None,
        **kwargs: Any,
    ) -> None:
        self.options, self.sampler, self.timer = options, sampler, timer
        sampler.trainer = self
        self.probes, self.student_reward = probes, student_reward
        self._evaluation = Evaluation()
        read = partial(sampled_explanation, sampler.renderer)
        self._held_out = HeldOutFiles(Path(args.output_dir) / HELD_OUT, read)
        # What the engine tells of a reshaped distribution is not the teacher's.
        self._to_compare = sampler.sentinel is not None and not any(reshaping(options))
        self._logged_step = 0
        self._uncorrected: dict[str, Tensor] | None = None  # the batch whose ratio is to be computed
        self._mismatch = {"train": Mismatch(), "eval": Mismatch()}
        with _no_reference_of_trl(args):
            super().__init__(args=args, rollout_func=sampler, **kwargs)
        self.beta, self.ref_model = args.beta, reference
        if options.share_prompts:
            let_share(self.model)
        self.watch_updates()
        # As in TRL's SFTTrainer, whose option this is; after the engine, so that shared weights are known as weights.
        self._offloading = get_act_offloading_ctx_manager(self.model) if options.activation_offloading else None
        if args.sync_ref_model:
            self.add_callback(ReferenceSync(reference, self.accelerator))
        if options.use_vllm:
            # From here on TRL treats the rollouts as vLLM's: it calls sync_weights before each and corrects for the
            # difference between the sampling and the training log-probabilities.
            self.use_vllm, self.vllm_generation = True, sampler
            self.weights_changed()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As TRL's; what the backward pass needs rests in host memory meanwhile, where that is asked for."""
        with self._offloading or nullcontext():
            return super().training_step(*args, **kwargs)

    @property
    def mode(self) -> str:
        """Whether this trains or evaluates, in TRL's words."""
        return "train" if self.model.training else "eval"

    def weights_changed(self) -> None:
        """Let the engine fetch the weights ahead of the next rollout, whatever step it is."""
        self._last_loaded_step = -1

    def note_metrics(self, values: dict[str, float]) -> None:
        """Count values into TRL's metrics, of which a mean is logged (see extremes.py)."""
        for name, value in values.items():
            self._metrics[self.mode][name].append(value)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """As TRL's; the rows are at hand while their completions are written. Where a rollout serves one optimizer
        step, no forward pass is spent on log-probabilities that the update will compute."""
        self._note_mismatch()
        self.sampler.rows = inputs
        correction = self.vllm_importance_sampling_correction
        one_step = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0
        self.vllm_importance_sampling_correction = correction and not one_step
        try:
            batch = super()._generate_and_score_completions(inputs)
        except BaseException:
            self.sampler.cancel()
            raise
        finally:
            self.vllm_importance_sampling_correction = correction
        if self._to_compare:
            self._compare_longest(batch)
        return batch

    @torch.no_grad()
    def _compare_longest(self, batch: dict[str, Tensor]) -> None:
        """Let the sentinel compare the longest completion of the first rollout, which is read as an update reads it."""
        sampled = (batch["completion_mask"] * batch["tool_mask"] * ~batch["sampling_per_token_logps"].isnan()).bool()
        longest = int(sampled.sum(1).argmax())
        if sampled[longest].sum() < LEAST_TOKENS:  # as where mask_truncated_completions leaves none
            return
        self._to_compare = False
        ids, mask = (torch.cat((batch[f"prompt_{kind}"], batch[f"completion_{kind}"]), 1) for kind in ("ids", "mask"))
        row = slice(longest, longest + 1)
        with evaluating(self.model):
            logps = self._logps_of(self.model, ids[row], mask[row], sampled.size(1))[0]
        self.sampler.sentinel.check_text(logps[sampled[row]], batch["sampling_per_token_logps"][row][sampled[row]])

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        """As TRL's; the reference scores the whole batch in one pass over its weights, and what an update computes
        serves to correct it."""
        if model is self.ref_model is not None:
            with self.timer("score"):
                logps = completion_logps(model, input_ids, attention_mask, logits_to_keep)
            return logps.to(self.accelerator.device), None, None
        rows = len(input_ids)
        size = kwargs.pop("batch_size", None) or rows
        if not self.model.training:
            # An evaluation's batch is larger than a micro-batch, and memory is planned for the latter.
            size = min(size, self.args.per_device_train_batch_size)
        parts = [
            self._logps_of(model, input_ids[at : at + size], attention_mask[at : at + size], logits_to_keep, **kwargs)
            for at in range(0, rows, size)
        ]
        logps, entropies, aux_losses = zip(*parts, strict=True)
        result = (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if aux_losses[0] is None else torch.stack(aux_losses).mean(),
        )
        if self._uncorrected is not None:
            self._correct(result[0].detach(), self._uncorrected)
        return result

    def _logps_of(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities, entropies and auxiliary loss of one forward pass."""
        batch = input_ids, attention_mask, logits_to_keep
        if compute_aux_loss or not can_align(model):
            kwargs = images | {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
            return super()._get_per_token_logps_and_entropies(model, *batch, **kwargs)
        layout = lay_out(*batch) if can_share(model) else None
        with self.accelerator.autocast():
            if layout is not None and layout.is_worthwhile:
                logps, entropies = shared_prompt_outputs(model, layout, logits_to_keep)
            else:
                logps, entropies = whole_row_outputs(model, *batch)
        return logps, entropies if compute_entropy else None, None

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """As TRL's, which shuffles what was sampled; completions of one prompt meet in a micro-batch again."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        is_new = self.model.training and self._buffered_inputs is not before
        if not is_new or not can_share(self.model) or not keeps_groups_together(self.options):
            return inputs
        self._buffered_inputs = prompts_together(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """As TRL's; the importance-sampling ratio is computed on the way where it was put off until here."""
        put_off = self.use_vllm and self.vllm_importance_sampling_correction
        self._uncorrected = inputs if put_off and "importance_sampling_ratio" not in inputs else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._uncorrected = None

    def _correct(self, logps: Tensor, inputs: dict[str, Tensor]) -> None:
        mask = inputs["completion_mask"] * inputs["tool_mask"]
        sampling = inputs["sampling_per_token_logps"]
        limits = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        ratio = importance_sampling_ratio(logps, sampling, mask, self.vllm_importance_sampling_mode, *limits)
        inputs["importance_sampling_ratio"] = ratio
        self._mismatch[self.mode].add(logps, sampling, mask, ratio)

    def _note_mismatch(self) -> None:
        """One value for each rollout, as TRL's (see extremes.py)."""
        for mode, mismatch in self._mismatch.items():
            for name, value in mismatch.take().items():
                self._metrics[mode][name].append(value)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's; seconds, memory and completions of a training interval that an evaluation interrupts are put
        back, and the model's mode: what is logged at the end of an epoch that ends with one is of training."""
        was_training = self.model.training
        interrupted, memory = self.timer.take(), self.timer.memory
        completions, self._evaluation = deepcopy(self._logs), Evaluation()
        with memory.interrupted() if memory is not None else nullcontext(), self.timer.during("evaluation", "loss"):
            metrics = super().evaluate(*args, **kwargs)
        self._logs = completions
        self.model.train(was_training)
        for phase, value in interrupted.items():
            self.timer.seconds[phase] += value
        return metrics

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, ids: list[list[int]]) -> Tensor:
        """As TRL's, every reward function timed as scoring; what the student could not score has no reward from the
        others either. An evaluation's completions are kept."""
        self._log_completion_extra("ended", [row["ended"] for row in inputs])
        with self.timer("score"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
        group = self.num_generations if self.model.training else self.num_generations_eval
        rewards = without_unscored(rewards, self.options.reward_funcs, self.reward_weights, group)
        if not self.model.training:
            pairs = zip(inputs, ids, strict=True)
            rows = [Evaluated(row["question"], row["solution"], own) for row, own in pairs]
            scores = None if self.student_reward is None else self.student_reward.results
            self._evaluation.add_batch(rows, rewards, self.reward_func_names, scores)
        return rewards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds of each phase (per optimizer step while training, in total for an evaluation) and the
        memory in use after it."""
        self._note_mismatch()
        keep_extremes(self._metrics[self.mode])
        if "train_runtime" in logs:  # at the end: no step's
            return super().log(logs, start_time)
        logs |= self._step_logs() if self.model.training else self._evaluation_logs()
        # TRL names the file of completions by the step alone: an evaluation would overwrite the training step's.
        keep, self.log_completions = self.log_completions, self.log_completions and self.model.training
        try:
            super().log(logs, start_time)
        finally:
            self.log_completions = keep

    def _step_logs(self) -> dict[str, float]:
        """Of the steps since the last log."""
        seconds, steps = self.timer.take(), self.state.global_step - self._logged_step
        logs = {} if self.timer.memory is None else self.timer.memory.take()
        if steps and "step" in seconds:
            self._logged_step = self.state.global_step
            phases = {phase: seconds.get(phase, 0.0) for phase in PHASES}
            phases["update"] = seconds["step"] - sum(phases.values())
            logs |= {f"seconds/{phase}": value / steps for phase, value in phases.items()}
        return logs

    def _evaluation_logs(self) -> dict[str, float]:
        """Of an evaluation, that of the probes included."""
        evaluation, self._evaluation = self._evaluation, Evaluation()
        evaluation.weigh_batches(self._metrics["eval"], self.student_reward.metrics if self.student_reward else ())
        if self.args.log_completions:
            self._held_out.write(evaluation, self.state.global_step)
        logs: dict[str, float] = {}
        if self.probes is not None and evaluation.rows:
            teacher = base_model(self.accelerator.unwrap_model(self.model))
            with self.timer("probe"):
                logs |= self.probes(evaluation.rows, teacher, self.temperature)
        logs |= {f"seconds/{phase}": value for phase, value in self.timer.take().items()}
        if self.timer.memory is not None:
            logs |= self.timer.memory.take()
        return {f"eval_{name}": value for name, value in logs.items()}


def completion_logps(model: FrozenModel, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int) -> Tensor:
    """Log-probabilities of the completions in a padded batch.

    Args:
        input_ids, attention_mask: `[rows, tokens]`, prompts padded on the left, completions on the right.
        logits_to_keep: The last so many columns are the completions.

    Returns:
        `[rows, logits_to_keep]`, fp32 on the CPU, 0 at the padding.
    """
    mask = attention_mask.bool().cpu()
    counts = mask[:, -logits_to_keep:].sum(1).tolist()
    texts = [Encoded(ids[real].tolist(), {}, []) for ids, real in zip(input_ids.cpu(), mask, strict=True)]
    spans = [[(len(text.ids) - count, len(text.ids))] for text, count in zip(texts, counts, strict=True)]
    logps = torch.zeros(len(texts), logits_to_keep)
    for row, (scores, _) in enumerate(model.score(texts, spans)):
        logps[row, mask[row, -logits_to_keep:]] = scores[len(scores) - counts[row] :]
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
