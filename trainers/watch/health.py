"""Says in plain words when a run learns nothing, and what would help: its metrics alone show that to who knows them."""

import logging
from collections import deque
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from trainers.options import RLOptions

logger = logging.getLogger(__name__)

STEPS = 5  # that a verdict is about, at least
MOST = 0.5  # of the completions or questions
NEEDED = (
    "completions/clipped_ratio",
    "match_reward",
    "frac_reward_zero_std",
    "update/visible_fraction",
    "sampling/importance_sampling_ratio/mean",
)


class HealthWatch(TrainerCallback):
    """Warns once of each reason for which the last steps taught the teacher little or nothing, and at the end of those
    that still hold.

    Args:
        options: RL options.
    """

    def __init__(self, options: RLOptions) -> None:
        self.options = options
        self._logs: deque[tuple[int, dict[str, float]]] = deque()  # with the step of the log before
        self._last = 0
        self._told: dict[str, int] = {}  # after which step
        self._found: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:  # an evaluation, or the end
            return
        self._logs.append((self._last, {name: logs[name] for name in NEEDED if name in logs}))
        self._last = state.global_step
        while len(self._logs) > 1 and self._last - self._logs[1][0] >= STEPS:
            self._logs.popleft()
        count = self._last - self._logs[0][0]
        if count < STEPS:
            return
        self._found = verdicts(_means(logs for _, logs in self._logs), self.options)
        for name, text in self._found.items():
            if name not in self._told:
                self._told[name] = self._last
                logger.warning("the last %d steps: %s", count, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, text in self._found.items():
            if self._told[name] < self._last:
                logger.warning("at the end still: %s", text)


def _means(logs: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each metric, over the logs that have it."""
    values: dict[str, list[float]] = {}
    for log in logs:
        for name, value in log.items():
            values.setdefault(name, []).append(value)
    return {name: sum(each) / len(each) for name, each in values.items()}


def verdicts(metrics: dict[str, float], options: RLOptions) -> dict[str, str]:
    """What keeps a run from learning, by a short name: cause, figure and what would help.

    Args:
        metrics: Means of TRL's and our metrics over some steps; what is missing is not judged.
    """
    found = {}
    cut = metrics.get("completions/clipped_ratio", 0.0)
    unmatched = metrics.get("match_reward", 0.0) / options.not_matched_penalty if options.not_matched_penalty else 0.0
    warm_up = (
        "a warmed-up teacher closes its explanations (stage=sft, as teacher_sft.yaml; then "
        "model_name_or_path=<its output_dir>)"
    )
    if cut > MOST:
        limit = options.max_completion_length
        found["cut"] = (
            f"{cut:.0%} of the completions are cut at max_completion_length={limit}, before the explanation is closed\n"
            f"  -> {warm_up}; if it only writes at length: max_completion_length={2 * limit}"
        )
    elif unmatched > MOST:
        found["open"] = f"{unmatched:.0%} of the explanations are not closed by their tag\n  -> {warm_up}"
    if (same := metrics.get("frac_reward_zero_std", 0.0)) > MOST:
        found["same"] = (
            f"for {same:.0%} of the questions all completions earn the same, so nothing is learned from them\n"
            f"  -> a higher temperature (now {options.temperature:g}), more completions of a question "
            f"(num_generations={options.num_generations}), or other questions"
        )
    if metrics.get("update/visible_fraction", 1.0) == 0:
        found["still"] = (
            "no weight has changed as the engine reads it\n"
            f"  -> a larger learning_rate (now {options.learning_rate:g}), or optim=auto"
        )
    if (ratio := metrics.get("sampling/importance_sampling_ratio/mean", 1.0)) < MOST:
        found["apart"] = (
            f"trainer and engine find different probabilities for what was sampled: it counts for {ratio:.0%} in the "
            "update\n  -> see sampling/sampling_logp_difference/mean; vllm_importance_sampling_mode=token_truncate "
            "does not add rounding up over a completion, precision=fp32 has next to none"
        )
    return found
