"""From explanations to rewards: asks the student, applies the formula."""

import json
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from data.explanation import Explanation
from data.offsets import encode_with_ends
from data.render import Encoded, Renderer
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.plan.model_shapes import max_positions
from trainers.scoring.frozen import FrozenModel
from trainers.scoring.kept_scores import KeptRow, ScoreKeeper, TokenScores
from trainers.student import Student, StudentScore, explained_span
from trainers.texts import show_sample

logger = logging.getLogger(__name__)

NOT_FINITE = "not finite"  # what the reason of an explanation whose score is not begins with


@dataclass(frozen=True)
class Scored:
    """The reward of one explanation, its named parts, and whether the student solves the question with it.

    Attributes:
        row: What `keep` writes, where scores are kept.
    """

    reward: float
    parts: dict[str, float]
    solves: bool
    row: KeptRow | None = field(default=None, repr=False, compare=False)


class ExplanationScorer:
    """Rewards of explanations, from teacher's log-probabilities and a student.

    Args:
        student: The frozen student.
        reward: The formula.
        teacher: Template and tokenizer of the explanations.
        padding_in_kl: Whether the KL covers the padding after the opening tag, too.
        keeper: Where the raw scores of each batch are kept, if anywhere.
    """

    def __init__(
        self,
        student: Student,
        reward: TeacherLogprobKL,
        teacher: Renderer,
        padding_in_kl: bool,
        keeper: ScoreKeeper | None = None,
    ) -> None:
        self.student, self.reward, self.teacher, self.keeper = student, reward, teacher, keeper
        self.padding_in_kl = padding_in_kl
        self._shown = False
        self.same_tokenizer = is_same_tokenizer(teacher.tokenizer, student.renderer.tokenizer)
        if not self.same_tokenizer:
            logger.info("teacher and student have different tokenizers: the KL is taken over text both can cut out")

    def score(
        self,
        questions: list[str],
        explanations: list[Explanation],
        solutions: list[str],
        teacher_logprobs: list[Tensor | str],
        keep: bool = True,
        stop: bool = True,
    ) -> list[Scored | str]:
        """Score a batch.

        Args:
            teacher_logprobs: Of each explanation, with `padding_in_kl` after that of the padding, `[tokens]`; or why
                there are none.
            keep: Whether to `keep` these scores.
            stop: Whether to stop where a number is not finite; else it is why that explanation cannot be scored.

        Returns:
            For each explanation its score, or why it cannot be scored.

        Raises:
            FloatingPointError: With `stop`, if a log-probability or a reward is not finite; the sample is named.
        """
        if not self._shown:
            self._shown = True
            shown = self.student.renderer.student(questions[0], explanations[0].text, solutions[0])
            show_sample("first student text, with the teacher's explanation as its thought", shown)
        texts = [self._encode(*row) for row in zip(questions, explanations, solutions, strict=True)]
        results: list[Scored | str | None] = [
            lp if isinstance(lp, str) else self.student.why_not(text)
            for lp, text in zip(teacher_logprobs, texts, strict=True)
        ]
        read = [i for i, reason in enumerate(results) if reason is None]
        for i, score in zip(read, self.student.score([texts[i] for i in read]), strict=True):
            tokens = self._tokens(explanations[i], solutions[i], teacher_logprobs[i], score)
            reward, parts = self.reward(tokens.compared(explanations[i].closed))
            if bad := _not_finite(score, teacher_logprobs[i], parts | {"reward": reward}):
                if stop:
                    _stop(bad, questions[i], explanations[i])
                results[i] = f"{NOT_FINITE}: {', '.join(f'{name} {value}' for name, value in bad.items())}"
                continue
            logger.debug("reward %.4f %s for %r", reward, parts, explanations[i].text)
            texts_of = questions[i], solutions[i], explanations[i].text
            row = KeptRow(*texts_of, reward, tokens, explanations[i].closed) if self.keeper is not None else None
            results[i] = Scored(reward, parts, score.solves, row)
        if keep:
            self.keep(results)
        reasons = Counter(result for result in results if isinstance(result, str))
        for reason, count in reasons.items():
            logger.warning("%d of %d explanations cannot be scored: %s", count, len(texts), reason)
        return results

    def keep(self, results: list[Scored | str]) -> None:
        """Keep the raw scores of a batch, where scores are kept."""
        if self.keeper is not None:
            self.keeper.keep([result.row for result in results if isinstance(result, Scored)])

    def _encode(self, question: str, explanation: Explanation, solution: str) -> Encoded:
        """The student reads the teacher's tokens themselves where it has the same tokenizer."""
        parts = self.student.renderer.student(question, explanation.text, solution)
        tail = self.student.renderer.encode_text(explanation.tail)
        given = {"explanation": explanation.ids + tail} if self.same_tokenizer else None
        return self.student.renderer.encode(parts, given)

    def _tokens(self, explanation: Explanation, solution: str, teacher: Tensor, score: StudentScore) -> TokenScores:
        """Where tokens end is found where it is needed: to compare two tokenizers, and for what is kept."""
        reader = self.student.renderer
        student = score.explanation_logprobs[0 if self.padding_in_kl else len(reader.padding_ids) :]
        if self.same_tokenizer and explanation.tail:
            student = student[: len(teacher)]  # the teacher wrote it in one token with its closing tag: without its own
        logprobs = score.solution_logprobs, teacher, student
        if self.same_tokenizer and self.keeper is None:
            return TokenScores(*logprobs, [], [], [])
        ends = reader_ends = explanation.ends
        if not self.same_tokenizer:
            _, reader_ends = encode_with_ends(reader.tokenizer, explanation.text)
        if self.padding_in_kl:
            ends, reader_ends = self.teacher.padded(ends), reader.padded(reader_ends)
        solution_ends = [] if self.keeper is None else encode_with_ends(reader.tokenizer, solution)[1]
        return TokenScores(*logprobs, solution_ends, ends, reader_ends)


def teacher_logprobs(
    questions: list[str],
    solutions: list[str],
    explanations: list[Explanation],
    renderer: Renderer,
    model: FrozenModel,
    padding_in_kl: bool,
    max_prompt_length: int | None = None,
) -> list[Tensor | str]:
    """How likely a teacher was to write explanations it did not sample, by a forward pass.

    Args:
        max_prompt_length: Prompts lose their start beyond so many tokens, as those it samples from do.

    Returns:
        For each explanation `[tokens]`, with `padding_in_kl` the padding's first, or why the teacher cannot read it.
    """
    limit = max_positions(model.backbone.config)
    texts = [
        renderer.encode(renderer.teacher(question, solution, e.text), {"explanation": e.ids})
        for question, solution, e in zip(questions, solutions, explanations, strict=True)
    ]
    if max_prompt_length is not None:
        texts = [text.cut(text.spans["explanation"][0] - max_prompt_length) for text in texts]
    results: list[Tensor | str] = [f"longer than the {limit} tokens that the teacher can read"] * len(texts)
    read = [i for i, text in enumerate(texts) if len(text.ids) <= limit]
    spans = [explained_span(texts[i]) if padding_in_kl else texts[i].spans["explanation"] for i in read]
    scores = model.score([texts[i] for i in read], [[span] for span in spans])
    for i, (logprobs, _), span in zip(read, scores, spans, strict=True):
        results[i] = logprobs[slice(*span)]
    return results


def is_same_tokenizer(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same ids of every text: by their vocabulary and how they cut a text up."""
    if one.get_vocab() != other.get_vocab() or one.is_fast != other.is_fast:
        return False
    if not one.is_fast:
        return type(one) is type(other)
    first, second = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    return all(first[part] == second[part] for part in ("normalizer", "pre_tokenizer", "model"))


def _not_finite(score: StudentScore, teacher: Tensor, numbers: dict[str, float]) -> dict[str, float]:
    """What is not finite of one sample; clipping or a median may hide it from the reward itself."""
    read = {
        "student's log-prob of the solution": score.solution_logprobs,
        "student's log-prob of the explanation": score.explanation_logprobs,
        "teacher's log-prob of the explanation": teacher,
    }
    poisoned = {name: values[~values.isfinite()] for name, values in read.items()}
    bad = {name: values[0].item() for name, values in poisoned.items() if len(values)}
    return bad | {name: value for name, value in numbers.items() if not math.isfinite(value)}


def _stop(bad: dict[str, float], question: str, explanation: Explanation) -> None:
    raise FloatingPointError(
        f"an explanation cannot be rewarded, these are not finite: {bad}\n  question: {question!r}\n"
        f"  explanation: {explanation.text!r}\n  -> look at the weights of teacher and student, and try precision=fp32"
    )
