"""From the teacher's completions to rewards: reads the explanations, asks the student, applies the reward."""

import logging
import math
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data.explanation import Explanation, read_explanation
from data.offsets import token_ends
from data.render import Encoded
from rewards.alignment import piece_sums
from rewards.teacher_logprob_kl import ScoredExplanation, TeacherLogprobKL
from trainers.phases import PhaseTimer
from trainers.student import Student, StudentScore

logger = logging.getLogger(__name__)


class StudentReward:
    """TRL reward function of the teacher's explanations.

    Args:
        student: The frozen student.
        reward: The formula.
        teacher_tokenizer: Tokenizer of the completions.
        eos_ids: Tokens that end a completion.
        max_student_tokens: Longest text the student can read; a longer one cannot be scored.
        timer: Seconds of the phase `score` are added here.
    """

    __name__ = "teacher_logprob_kl"

    def __init__(
        self,
        student: Student,
        reward: TeacherLogprobKL,
        teacher_tokenizer: PreTrainedTokenizerBase,
        eos_ids: list[int],
        max_student_tokens: int,
        timer: PhaseTimer,
    ) -> None:
        self.student, self.reward, self.timer = student, reward, timer
        self.teacher_tokenizer, self.eos_ids = teacher_tokenizer, set(eos_ids)
        self.max_student_tokens = max_student_tokens
        self.same_tokenizer = teacher_tokenizer.get_vocab() == student.renderer.tokenizer.get_vocab()
        if not self.same_tokenizer:
            logger.info("teacher and student have different tokenizers: the KL is taken over text both can cut out")

    def __call__(
        self,
        completion_ids: list[list[int]],
        question: list[str],
        solution: list[str],
        teacher_logprobs: list[list[float]],
        log_metric: Any,
        log_extra: Any,
        **_: Any,
    ) -> list[float | None]:
        """Return one reward per completion, None for one that cannot be scored.

        Args:
            completion_ids: Sampled tokens of each completion.
            question, solution: Of each completion.
            teacher_logprobs: Log-probability of each sampled token, at the sampling temperature.
            log_metric, log_extra: TRL's loggers.

        Raises:
            FloatingPointError: If a reward is not finite; the sample is named and the step stops.
        """
        with self.timer("score"):
            tag = self.student.renderer.tags.explanation[1]
            explanations = [read_explanation(self.teacher_tokenizer, ids, tag, self.eos_ids) for ids in completion_ids]
            texts = [self._encode(q, e, s) for q, e, s in zip(question, explanations, solution, strict=True)]
            unscorable = {i: reason for i, text in enumerate(texts) if (reason := self._why_not(text))}
            for reason, count in Counter(unscorable.values()).items():
                logger.warning("%d of %d explanations cannot be scored: %s", count, len(texts), reason)
            kept = [i for i in range(len(texts)) if i not in unscorable]
            scores = dict(zip(kept, self.student.score([texts[i] for i in kept]), strict=True))
            rewards: list[float | None] = [None] * len(texts)
            metrics: dict[str, list[float]] = {}
            for i, score in scores.items():
                scored = self._scored(explanations[i], teacher_logprobs[i], score)
                rewards[i], parts = self.reward(scored)
                if not math.isfinite(rewards[i]):
                    self._stop(i, rewards[i], parts, question[i], explanations[i])
                logger.debug("reward %.4f %s for %r", rewards[i], parts, explanations[i].text)
                seen = {
                    **parts,
                    "student_accuracy": float(score.solves),
                    "explanation_length": len(explanations[i].ids),
                }
                for name, value in seen.items():
                    metrics.setdefault(name, []).append(float(value))
            for name, values in metrics.items():
                log_metric(name, sum(values) / len(values))
            log_metric("unscorable_fraction", len(unscorable) / len(texts))
            log_extra("student_solves", [scores[i].solves if i in scores else None for i in range(len(texts))])
        return rewards

    def _encode(self, question: str, explanation: Explanation, solution: str) -> Encoded:
        """The student reads the sampled tokens themselves where it has the same tokenizer."""
        parts = self.student.renderer.student(question, explanation.text, solution)
        given = {"explanation": explanation.ids} if self.same_tokenizer else None
        return self.student.renderer.encode(parts, given)

    def _why_not(self, text: Encoded) -> str | None:
        if len(text.ids) > self.max_student_tokens:
            return f"longer than the {self.max_student_tokens} tokens that the student can read"
        start, end = text.spans["solution"]
        return "the solution has no tokens" if start == end else None

    def _scored(self, explanation: Explanation, logprobs: list[float], score: StudentScore) -> ScoredExplanation:
        teacher = torch.tensor(logprobs[: len(explanation.ids)])
        student = score.explanation_logprobs
        if not self.same_tokenizer:
            ids = self.student.renderer.encode_text(explanation.text)
            _, student_ends = token_ends(self.student.renderer.tokenizer, ids)
            teacher, student = piece_sums(teacher, explanation.ends, student, student_ends)
        return ScoredExplanation(score.solution_logprobs, teacher, student, explanation.closed)

    @staticmethod
    def _stop(i: int, reward: float, parts: dict[str, float], question: str, explanation: Explanation) -> None:
        bad = {name: value for name, value in parts.items() if not math.isfinite(value)}
        raise FloatingPointError(
            f"the reward of completion {i} is {reward}: {bad}\n  question: {question!r}\n"
            f"  explanation: {explanation.text!r}\n  -> a log-probability of teacher or student is not finite: "
            "look at their weights, and try precision=fp32"
        )
