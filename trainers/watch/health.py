"""Says in plain words when a run learns nothing, and what would help: its metrics alone show that to who knows them."""

import logging
import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from trainers.options import RLOptions

logger = logging.getLogger(__name__)

STEPS = 5  # that a verdict is about, at least
MOST = 0.5  # of the completions
# Of the questions: half of them may earn the same in a run that learns (DAPO, arXiv 2503.14476), and all of them do
# in those that users report (trl#3857).
NEARLY_ALL = 0.9
CLIPPED, SAME, CHANGED = "completions/clipped_ratio", "frac_reward_zero_std", "update/visible_fraction"
RATIO = "sampling/importance_sampling_ratio/mean"
OVERFLOWS = "overflows"  # share of steps whose gradient is not finite: of fp16, whose scaler leaves them out
NEEDED = (CLIPPED, "match_reward", SAME, CHANGED, RATIO, "grad_norm", "unscorable_fraction")


class HealthWatch(TrainerCallback):
    """Warns once of each reason for which the last steps taught the teacher little or nothing, and at the end of those
    that still hold.

    Args:
        options: RL options.
    """

    def __init__(self, options: RLOptions) -> None:
        self.options = options
        self._logs: deque[tuple[int, int, dict[str, float]]] = deque()  # with the steps it begins and ends with
        self._last = 0
        self._told: dict[str, int] = {}  # after which step
        self._found: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:  # an evaluation's
            return
        known = {name: logs[name] for name in NEEDED if logs.get(name) is not None}
        known[OVERFLOWS] = float(not math.isfinite(known.get("grad_norm", 0.0)))
        if known[OVERFLOWS]:
            del known["grad_norm"]
        self._logs.append((self._last, state.global_step, known))
        self._last = state.global_step
        while len(self._logs) > 1 and self._last - self._logs[1][0] >= STEPS:
            self._logs.popleft()
        count = self._last - self._logs[0][0]
        if count < STEPS:
            return
        self._found = verdicts(_means(self._logs), self.options)
        for name, text in self._found.items():
            if name not in self._told:
                self._told[name] = self._last
                logger.warning("the last %d steps: %s", count, text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, text in self._found.items():
            if self._told[name] < self._last:
                logger.warning("at the end still: %s", text)


def _means(intervals: Iterable[tuple[int, int, dict[str, float]]]) -> dict[str, float]:
    """Of each metric, over the steps of the logs that have it."""
    sums: dict[str, float] = {}
    steps: dict[str, int] = {}
    for begin, end, log in intervals:
        for name, value in log.items():
            sums[name] = sums.get(name, 0.0) + value * (end - begin)
            steps[name] = steps.get(name, 0) + end - begin
    return {name: sums[name] / steps[name] for name in sums if steps[name]}


def verdicts(metrics: dict[str, float], options: RLOptions) -> dict[str, str]:
    """What keeps a run from learning, by a short name: cause, figure and what would help.

    Args:
        metrics: Means of TRL's and our metrics over some steps; what is missing is not judged.
    """
    unscorable, same = metrics.get("unscorable_fraction", 0.0), metrics.get(SAME, 0.0)
    found = _ends(metrics, options)
    if unscorable > MOST:
        found["unscored"] = (
            f"{unscorable:.0%} of the completions have no reward from the student, as told with each batch"
        )
    # In other modes TRL's metric is about the batch.
    by_question = options.scale_rewards in ("group", "none", True, False)
    if same > NEARLY_ALL and by_question and options.multi_objective_aggregation == "sum_then_normalize":
        found["same"] = (
            f"for {same:.0%} of the questions all completions earn the same, so nothing is learned from them\n"
            f"  -> a higher temperature (now {options.temperature:g}), more completions of a question "
            f"(num_generations={options.num_generations}), or other questions"
        )
    overflows, norm = metrics.get(OVERFLOWS, 0.0), metrics.get("grad_norm", 0.0)
    if overflows > MOST:
        found["skipped"] = (
            f"gradients overflow in {overflows:.0%} of the steps, which are left out (at the start of an fp16 run some "
            "do, until their scale is found)\n  -> if it lasts: precision=fp32, or bf16 where the card has it"
        )
    elif norm > 0 and metrics.get(CHANGED) == 0:
        auto = "" if options.optim == "auto" else ", or optim=auto"
        found["still"] = (
            "no weight has changed as the engine reads it\n"
            f"  -> a larger learning_rate (now {options.learning_rate:g}){auto}"
        )
    ratio, mode = metrics.get(RATIO, 1.0), options.vllm_importance_sampling_mode
    if ratio < MOST and not ("cut" in found and options.mask_truncated_completions):  # which TRL tells as 0
        remedies = [] if options.precision == "fp32" else ["precision=fp32 has next to no rounding"]
        if not mode.startswith("token"):
            remedies.append("vllm_importance_sampling_mode=token_truncate does not add it up over a completion")
        found["apart"] = (
            f"trainer and engine find different probabilities for what was sampled: it counts for {ratio:.0%} in the "
            f"update\n  -> {'; '.join(['see sampling/sampling_logp_difference/mean', *remedies])}"
        )
    return found


def _ends(metrics: dict[str, float], options: RLOptions) -> dict[str, str]:
    """Where most explanations are not closed, or most completions cut."""
    cut, penalty, limit = metrics.get(CLIPPED, 0.0), options.not_matched_penalty, options.max_completion_length
    unmatched = metrics.get("match_reward", 0.0) / penalty if penalty else 0.0
    longer = f"max_completion_length={2 * limit}"
    warm_up = (
        "a warmed-up teacher closes its explanations (stage=sft, as teacher_sft.yaml; then "
        "model_name_or_path=<its output_dir>)"
    )
    if cut > MOST and unmatched > MOST:
        cause = (
            f"{cut:.0%} of the completions are cut at max_completion_length={limit}, before the explanation is closed"
        )
        return {"cut": f"{cause}\n  -> {warm_up}; if it only writes at length: {longer}"}
    if cut > MOST:
        stop = "" if options.stop_at_closing_tag else "stop_at_closing_tag=true, or "
        return {"cut": f"{cut:.0%} of the completions are cut at max_completion_length={limit}\n  -> {stop}{longer}"}
    if unmatched > MOST:
        return {"open": f"{unmatched:.0%} of the explanations are not closed by their tag\n  -> {warm_up}"}
    return {}
