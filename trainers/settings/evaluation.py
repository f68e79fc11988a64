"""Whether a run evaluates, and on what."""

from pathlib import Path

from trainers.errors import Fault
from trainers.options import RLOptions, TrainOptions
from trainers.settings.batch import batch_plan

OFF = {"report_before_after": False, "eval_strategy": "no", "eval_on_start": False}
HOLD_OUT = "eval_dataset_split=null eval_size=64"


def evaluates(options: TrainOptions) -> bool:
    """Whether held-out data is asked for at any time."""
    return any(getattr(options, key, off) != off for key, off in OFF.items())


def names_held_out(options: TrainOptions) -> bool:
    """Whether held-out data is named; where it is not, `eval_size` sets some of the training data apart."""
    return bool(options.eval_dataset_id_or_path or options.eval_dataset_split)


def scores_probes(options: RLOptions) -> bool:
    """Whether an evaluation scores what explains nothing, too."""
    return evaluates(options) and options.num_probes > 0 and "teacher_logprob_kl" in options.reward_funcs


def prompts_at_once(options: RLOptions) -> int:
    """Different prompts that are explained at once: of a rollout, or of an evaluation's batch if those are more."""
    rollout = -(-batch_plan(options).generation_batch // options.num_generations)
    if not evaluates(options):
        return rollout
    return max(rollout, options.per_device_eval_batch_size // (options.num_generations_eval or options.num_generations))


def completions_at_once(options: RLOptions) -> int:
    """Completions of a rollout, or of an evaluation's batch if those are more."""
    return max(batch_plan(options).generation_batch, options.per_device_eval_batch_size if evaluates(options) else 0)


def _is_higher_better(metric: str) -> bool:
    """Whether a metric of RL is a reward, or a part of one; how long explanations are, e.g., is neither."""
    name = metric.removeprefix("eval_")
    return name.endswith(("reward", "accuracy")) or (name.startswith("rewards/") and name.endswith("/mean"))


def held_out_faults(options: TrainOptions) -> list[Fault]:
    """Nothing to evaluate on, and nothing that the best checkpoint could be told by."""
    faults = []
    if options.save_strategy == "best" and options.eval_strategy == "no":
        cause = "nothing is evaluated while it trains, so no checkpoint would be saved"
        faults.append(Fault("save_strategy", "best", cause, "eval_strategy=steps, or save_strategy=steps"))
    if not evaluates(options):
        return faults
    if options.stage == "rl" and options.dataloader_drop_last:
        cause = "it would leave held-out questions out (of training's, only whole rollouts are taken anyway)"
        faults.append(Fault("dataloader_drop_last", True, cause, "leave it out"))
    if options.stage == "rl" and (options.load_best_model_at_end or options.save_strategy == "best"):
        metric = options.metric_for_best_model
        if metric is None or metric.removeprefix("eval_") == "loss":
            cause = "GRPO's loss is about 0 whatever the teacher is worth, and the best checkpoint is to be told by it"
            faults.append(Fault("metric_for_best_model", metric, cause, "metric_for_best_model=reward"))
        elif options.greater_is_better is None and not _is_higher_better(metric):
            cause = f"transformers would take the highest {metric} for the best"
            faults.append(Fault("greater_is_better", None, cause, "greater_is_better=false, or true if that is meant"))
    data, split = options.dataset_id_or_path, options.eval_dataset_split
    if not names_held_out(options):
        if options.eval_size is None:
            remedy = f"{HOLD_OUT}, or name held-out data (eval_dataset_id_or_path or eval_dataset_split), or "
            given = {key: str(off).lower() for key, off in OFF.items() if getattr(options, key, off) != off}
            remedy += " ".join(f"{key}={off}" for key, off in given.items())
            cause = "held-out data is to be evaluated, but none is named"
            faults.append(Fault("eval_dataset_id_or_path", None, cause, remedy))
    elif not options.eval_dataset_id_or_path and options.eval_size is None and _is_file(data):
        remedy = f"{HOLD_OUT}, or eval_dataset_id_or_path=<a file of held-out rows>"
        faults.append(Fault("eval_dataset_split", split, f"{data} is a file and has no splits", remedy))
    return faults


def eval_size_faults(options: TrainOptions) -> list[Fault]:
    """Questions to be set apart beside a split, which is what would be evaluated.

    A file that is named comes before the `eval_size` of a preset without a fault, as --help says.
    """
    split = options.eval_dataset_split
    if options.eval_size is None or not split or options.eval_dataset_id_or_path:
        return []
    cause = f"eval_dataset_split={split} is evaluated, and nothing would be set apart beside it"
    keeps_split = "" if _is_file(options.dataset_id_or_path) else ", or eval_size=null for that split"
    return [Fault("eval_size", options.eval_size, cause, f"eval_dataset_split=null{keeps_split}")]


def _is_file(data: str | None) -> bool:
    """Whether the data has no splits."""
    return Path(data or "").expanduser().is_file()
