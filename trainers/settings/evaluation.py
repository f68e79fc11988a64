"""Whether a run evaluates, and on what."""

from pathlib import Path

from trainers.errors import Fault
from trainers.options import TrainOptions


def evaluates(options: TrainOptions) -> bool:
    """Whether held-out data is asked for at any time."""
    reports = getattr(options, "report_before_after", False)
    return reports or options.eval_strategy != "no" or options.eval_on_start


def names_held_out(options: TrainOptions) -> bool:
    """Whether held-out data is named; where it is not, `eval_size` sets some of the training data apart."""
    return options.eval_dataset_id_or_path is not None or options.eval_dataset_split is not None


def held_out_faults(options: TrainOptions) -> list[Fault]:
    """A fault where there is nothing to evaluate on."""
    if not evaluates(options):
        return []
    data, split = options.dataset_id_or_path, options.eval_dataset_split
    if split is not None and options.eval_dataset_id_or_path is None and Path(data or "").expanduser().is_file():
        remedy = "eval_dataset_split=null eval_size=64, or eval_dataset_id_or_path=<a file of held-out rows>"
        return [Fault("eval_dataset_split", split, f"{data} is a file and has no splits", remedy)]
    if names_held_out(options) or options.eval_size is not None:
        return []
    remedy = "eval_size=64, or name held-out data (eval_dataset_id_or_path or eval_dataset_split), or "
    off = {"report_before_after": "false", "eval_strategy": "no", "eval_on_start": "false"}
    neutral = (False, "no")
    remedy += " ".join(f"{k}={v}" for k, v in off.items() if getattr(options, k, False) not in neutral)
    return [Fault("eval_dataset_id_or_path", None, "held-out data is to be evaluated, but none is named", remedy)]
