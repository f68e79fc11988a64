"""Explanations that explain nothing, scored at every evaluation: what a teacher could earn without teaching."""

import logging
import random
import re
from typing import NamedTuple

from torch import nn

from data.explanation import Explanation, sampled_explanation, written_explanation
from trainers.models import evaluating
from trainers.scoring.explanation_scorer import ExplanationScorer, Scored, teacher_logprobs
from trainers.scoring.frozen import FrozenModel, ResidentBackbone

logger = logging.getLogger(__name__)

MEANING = {
    "empty": "nothing at all",
    "shuffled": "the teacher's own words in random order",
    "solution": "the bare solution",
    "other": "the explanation of another question",
}


class Evaluated(NamedTuple):
    """One held-out question, and the tokens that the teacher sampled for it."""

    question: str
    solution: str
    completion_ids: list[int]


class Probes:
    """Scores probes on the questions of an evaluation, beside the teacher's own explanations.

    Args:
        scorer: The scorer.
        limit: Most questions to probe.
        tokens_per_pass: See `FrozenModel`.
        max_prompt_length: Of the teacher.
    """

    def __init__(self, scorer: ExplanationScorer, limit: int, tokens_per_pass: int, max_prompt_length: int) -> None:
        self.scorer, self.limit, self.tokens_per_pass = scorer, limit, tokens_per_pass
        self.max_prompt_length = max_prompt_length

    def __call__(self, rows: list[Evaluated], teacher: nn.Module, temperature: float) -> dict[str, float]:
        """Return the mean reward of each probe as `probe/NAME`, and as `probe/teacher` that of the teacher.

        Each probe counts on the questions whose teacher's explanation was scored too, and it is compared with the
        teacher's mean over those where it was scored itself. Of several completions of a question the first counts.

        Warns where a probe beats the teacher: the reward can then be had without explaining.

        Args:
            teacher: The model that is trained; what it never sampled has its log-probabilities from a forward pass.
            temperature: Of the teacher's log-probabilities.
        """
        rows = list({(row.question, row.solution): row for row in reversed(rows)}.values())[::-1][: self.limit]
        renderer = self.scorer.teacher
        own = [sampled_explanation(renderer, row.completion_ids) for row in rows]
        texts = probe_texts(rows, [explanation.text for explanation in own])
        kinds = {"teacher": own} | {
            name: [written_explanation(renderer, text, closed=True) for text in values]
            for name, values in texts.items()
        }
        questions = [row.question for row in rows] * len(kinds)
        solutions = [row.solution for row in rows] * len(kinds)
        explanations: list[Explanation] = [e for values in kinds.values() for e in values]
        with evaluating(teacher):
            model = FrozenModel(
                ResidentBackbone(teacher, next(teacher.parameters()).device), temperature, self.tokens_per_pass
            )
            whether = self.scorer.padding_in_kl, self.max_prompt_length
            logprobs = teacher_logprobs(questions, solutions, explanations, renderer, model, *whether)
        scores = self.scorer.score(questions, explanations, solutions, logprobs, keep=False)
        rewards = {
            name: [s.reward if isinstance(s, Scored) else None for s in scores[i * len(rows) : (i + 1) * len(rows)]]
            for i, name in enumerate(kinds)
        }
        pairs = {name: of_both(values, rewards["teacher"]) for name, values in rewards.items()}
        means = {name: (_mean(own), _mean(teachers)) for name, (own, teachers) in pairs.items() if own}
        warn_of_probes(means)
        return {f"probe/{name}": mean for name, (mean, _) in means.items()}


def of_both(values: list[float | None], teachers: list[float | None]) -> tuple[list[float], list[float]]:
    """The rewards of the questions where both a probe and the teacher were scored."""
    both = [(v, t) for v, t in zip(values, teachers, strict=True) if v is not None and t is not None]
    return [v for v, _ in both], [t for _, t in both]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def warn_of_probes(means: dict[str, tuple[float, float]]) -> list[str]:
    """Warn of each probe whose mean reward is above the teacher's; return their names.

    Args:
        means: Of each probe, and of the teacher on the same questions.
    """
    better = [name for name in MEANING if name in means and means[name][0] > means[name][1]]
    for name in better:
        logger.warning(
            "probe %r (%s) earns %.3f, more than the teacher's explanations (%.3f): the reward does not need an "
            "explanation. If it lasts: a student that depends more on explanations, or another balance of "
            "answer_log_prob_coeff and kl_penalty_reward_coeff",
            name,
            MEANING[name],
            *means[name],
        )
    return better


def probe_texts(rows: list[Evaluated], explanations: list[str], seed: int = 0) -> dict[str, list[str]]:
    """For each probe its text for each row. `other` needs two questions that differ, and is left out without."""
    generator = random.Random(seed)  # noqa: S311 - no secret
    probes = {
        "empty": [""] * len(rows),
        "shuffled": [shuffled(text, generator) for text in explanations],
        "solution": [row.solution for row in rows],
    }
    if len({row.question for row in rows}) > 1:
        probes["other"] = [_of_another(i, rows, explanations) for i in range(len(rows))]
    return probes


def shuffled(text: str, generator: random.Random) -> str:
    """Words and single signs in random order."""
    pieces = re.findall(r"\w+|\W", text)
    generator.shuffle(pieces)
    return "".join(pieces)


def _of_another(i: int, rows: list[Evaluated], explanations: list[str]) -> str:
    others = (j % len(rows) for j in range(i + 1, i + len(rows)))
    return next(explanations[j] for j in others if rows[j].question != rows[i].question)
