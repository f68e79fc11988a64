"""What is kept of an evaluation while it goes on, and its means."""

from collections.abc import Set
from dataclasses import dataclass, field

from torch import Tensor

from trainers.scoring.probes import Evaluated

UNSCORABLE = "unscorable_fraction"


@dataclass
class Evaluation:
    """An evaluation's completions, and how many of each batch have a reward.

    Attributes:
        student_metrics: Names of what is a mean of the completions that the student could score.
        rows: The completions.
        batch_sizes: Completions of each batch.
        with_reward: Those that have any reward, and by function those that it gave one.
    """

    student_metrics: Set[str] = frozenset()
    rows: list[Evaluated] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    with_reward: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def add_batch(self, rewards: Tensor, names: list[str]) -> None:
        """Count a batch.

        Args:
            rewards: `[completions, functions]`, NaN where a function gave none.
            names: Of the functions.
        """
        given = ~rewards.isnan()
        self.batch_sizes.append(len(rewards))
        self.with_reward.append((int(given.any(1).sum()), dict(zip(names, given.sum(0).tolist(), strict=True))))

    def weigh_batches(self, metrics: dict[str, list[float]]) -> None:
        """TRL's mean of an evaluation is that of its batches, as if each had as many completions and rewards."""
        weights = {name: self._weights(name, metrics) for name in metrics}
        for name, values in metrics.items():
            counts = weights[name]
            if len(values) < len(counts):  # nothing is logged of a batch without a reward
                counts = [n for n in counts if n]
            known = [(value, n) for value, n in zip(values, counts, strict=False) if value == value and n]
            if len(values) == len(counts) and known:  # one for each batch; NaN where no row had a value
                metrics[name] = [sum(value * n for value, n in known) / sum(n for _, n in known)]

    def _weights(self, name: str, metrics: dict[str, list[float]]) -> list[float]:
        """What each batch counts in the mean of a metric."""
        if name in self.student_metrics:
            return [n * (1 - share) for n, share in zip(self.batch_sizes, metrics[UNSCORABLE], strict=True)]
        if name in ("reward", "reward_std"):
            return [n for n, _ in self.with_reward]
        kind, _, function = name.rpartition("/")[0].partition("/")
        if kind == "rewards":
            return [counts[function] for _, counts in self.with_reward]
        return self.batch_sizes
