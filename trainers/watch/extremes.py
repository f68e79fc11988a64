"""Metrics that are the largest or the smallest of something.

TRL logs the mean of a metric's values since its last log (of steps, micro-batches, an evaluation's batches), of these
too. What reward functions log is such a mean whatever its name: TRL promises them that, and the student's `_min` and
`_max` are of each completion, told as a mean of the completions.
"""

import math

# 0 where no completion has ended by itself.
SHORTEST_ENDED = "completions/min_terminated_length"
SMALLEST = {
    "completions/min_length",
    SHORTEST_ENDED,
    "sampling/importance_sampling_ratio/min",
    "clip_ratio/low_min",
}
LARGEST = {
    "completions/max_length",
    "completions/max_terminated_length",
    "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/max",
    "clip_ratio/high_max",
    "sentinel/mismatch_max",
}


def keep_extremes(metrics: dict[str, list[float]]) -> None:
    """Leave of each such metric one value, of which TRL's mean is that value.

    Args:
        metrics: The values of each metric since the last log, by name.
    """
    for names, extreme in ((SMALLEST, min), (LARGEST, max)):
        for name in names & metrics.keys():
            known = [value for value in metrics[name] if not math.isnan(value)]
            if name == SHORTEST_ENDED:
                known = [value for value in known if value] or known
            if known:
                metrics[name] = [extreme(known)]
