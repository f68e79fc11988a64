"""What is kept of an evaluation while it goes on: its means, and what the teacher wrote."""

import json
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.explanation import Explanation
from trainers.scoring.explanation_scorer import Scored
from trainers.scoring.probes import Evaluated

UNSCORABLE = "unscorable_fraction"
HELD_OUT = "held_out"  # folder of what is written at evaluations


@dataclass
class Evaluation:
    """An evaluation's completions, and how many of each batch have a reward.

    Attributes:
        rows: The completions.
        rewards: Of each completion, by function; None where it gave none.
        scores: Of each completion, what the student's look at it found, or why there is none; empty without a student.
        batch_sizes: Completions of each batch.
        with_reward: Those that have any reward, and by function those that it gave one.
    """

    rows: list[Evaluated] = field(default_factory=list)
    rewards: list[dict[str, float | None]] = field(default_factory=list)
    scores: list[Scored | str] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    with_reward: list[tuple[int, dict[str, int]]] = field(default_factory=list)

    def add_batch(
        self, rows: list[Evaluated], rewards: Tensor, names: list[str], scores: list[Scored | str] | None = None
    ) -> None:
        """Keep and count a batch.

        Args:
            rewards: `[completions, functions]`, NaN where a function gave none.
            names: Of the functions.
            scores: Of each completion, where a student is asked.
        """
        given = ~rewards.isnan()
        self.rows += rows
        self.scores += scores or []
        values = ([value if value == value else None for value in row] for row in rewards.tolist())  # NaN is not itself
        self.rewards += [dict(zip(names, row, strict=True)) for row in values]
        self.batch_sizes.append(len(rewards))
        self.with_reward.append((int(given.any(1).sum()), dict(zip(names, given.sum(0).tolist(), strict=True))))

    def weigh_batches(self, metrics: dict[str, list[float]], of_student: Set[str]) -> None:
        """TRL's mean of an evaluation is that of its batches, as if each had as many completions and rewards.

        Args:
            metrics: A value of each batch, by name; one mean when this returns.
            of_student: Names of those that are means of the completions that the student could score.
        """
        weights = {name: self._weights(name, metrics, name in of_student) for name in metrics}
        for name, values in metrics.items():
            counts = weights[name]
            if len(values) < len(counts):  # nothing is logged of a batch without a reward
                counts = [n for n in counts if n]
            known = [(value, n) for value, n in zip(values, counts, strict=False) if value == value and n]
            if len(values) == len(counts) and known:  # one for each batch; NaN where no row had a value
                metrics[name] = [sum(value * n for value, n in known) / sum(n for _, n in known)]

    def _weights(self, name: str, metrics: dict[str, list[float]], is_of_student: bool) -> list[float]:
        """What each batch counts in the mean of a metric."""
        if is_of_student:
            return [n * (1 - share) for n, share in zip(self.batch_sizes, metrics[UNSCORABLE], strict=True)]
        if name in ("reward", "reward_std"):
            return [n for n, _ in self.with_reward]
        kind, _, function = name.rpartition("/")[0].partition("/")
        if kind == "rewards":
            return [counts[function] for _, counts in self.with_reward]
        return self.batch_sizes


class HeldOutFiles:
    """A file for each evaluation of a run, a line of JSON for each completion: texts, rewards, the student's parts.

    Args:
        folder: What an earlier run has left in it is kept beside it.
        read: Finds the explanation in sampled tokens.
    """

    def __init__(self, folder: Path, read: Callable[[list[int]], Explanation]) -> None:
        self.folder, self.read, self._count = folder, read, 0

    def write(self, evaluation: Evaluation, step: int) -> None:
        """Write an evaluation after `step` optimizer steps; there may be several."""
        if not self._count and self.folder.exists():
            self.folder.rename(self.folder.with_name(f"{self.folder.name}-{int(self.folder.stat().st_mtime)}"))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._count += 1
        scores = evaluation.scores or [None] * len(evaluation.rows)
        path = self.folder / f"{self._count:03d}_after_step_{step:05d}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row, rewards, score in zip(evaluation.rows, evaluation.rewards, scores, strict=True):
                explanation = self.read(row.completion_ids)
                line: dict[str, Any] = {"question": row.question, "solution": row.solution}
                line |= {"explanation": explanation.text, "closed": explanation.closed}
                line |= {f"rewards/{name}": value for name, value in rewards.items()}
                if isinstance(score, Scored):
                    line |= score.parts | {"student_solves": score.solves}
                elif score is not None:
                    line["reason"] = score
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
