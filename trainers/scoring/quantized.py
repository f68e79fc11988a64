"""Students in 8 or 4 bits (bitsandbytes): a quarter to half of the memory, and how much that changes the reward."""

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig

from data.explanation import written_explanation
from rewards.teacher_logprob_kl import ScoredExplanation, TeacherLogprobKL
from trainers.student import Student, StudentScore

logger = logging.getLogger(__name__)

# It says of every product of bf16 that its input is cast to fp16.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

SAMPLES = 16  # texts on which the change is measured


class Sample(NamedTuple):
    """A text that the student reads."""

    question: str
    explanation: str
    solution: str


def quantization_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The configuration of `8bit` (LLM.int8, arXiv 2208.07339) or `4bit` (NF4, arXiv 2305.14314)."""
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def samples_of(rows: Iterable[dict[str, Any]]) -> list[Sample]:
    """Texts to measure on: the rows' own explanations, or the solution where there is none."""
    found = ("explanation", "reasoning_trace", "solution")
    return [
        Sample(row["question"], next(row[key] for key in found if row.get(key)), row["solution"])
        for row in islice(rows, SAMPLES)
    ]


def read_samples(student: Student, samples: list[Sample]) -> list[StudentScore | None]:
    """What a student makes of each sample; None where it cannot read it."""
    renderer = student.renderer
    texts = []
    for sample in samples:
        ids = written_explanation(renderer, sample.explanation, closed=True).ids
        parts = renderer.student(sample.question, sample.explanation, sample.solution)
        texts.append(renderer.encode(parts, {"explanation": ids}))
    readable = [text for text in texts if student.why_not(text) is None]
    scores = iter(student.score(readable))
    return [next(scores) if student.why_not(text) is None else None for text in texts]


def reward_changes(
    before: list[StudentScore | None], after: list[StudentScore | None], reward: TeacherLogprobKL, padding: int
) -> list[tuple[float, float]]:
    """The reward of each sample with the full student and with the quantized one.

    The teacher is taken to find each explanation as natural as the full student does, so that the first has no KL and
    the second that to the full student.

    Args:
        padding: Tokens ahead of each explanation that the KL leaves out (`padding_in_kl`).
    """
    changes = []
    for old, new in zip(before, after, strict=True):
        if old is not None and new is not None:
            teacher = old.explanation_logprobs[padding:]
            scored = (
                ScoredExplanation(s.solution_logprobs, teacher, s.explanation_logprobs[padding:], True)
                for s in (old, new)
            )
            first, second = (reward(explanation)[0] for explanation in scored)
            changes.append((first, second))
    return changes


def report_change(kind: str, changes: list[tuple[float, float]]) -> None:
    """Print once what the quantization does to the reward."""
    if not changes:
        logger.warning("student in %s: the student can read none of the samples, so its change is not known", kind)
        return
    differences = [new - old for old, new in changes]
    logger.info(
        "student in %s: on %d samples the mean reward goes from %.4f to %.4f; a single one changes by %.4f on average, "
        "at most by %.4f (with the full student in the teacher's place in the KL)",
        kind,
        len(changes),
        sum(old for old, _ in changes) / len(changes),
        sum(new for _, new in changes) / len(changes),
        sum(abs(d) for d in differences) / len(differences),
        max(abs(d) for d in differences),
    )
