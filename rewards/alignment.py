"""Comparing log-probabilities of one text under two tokenizers.

Both tokenisations cut the text at some common places. Between two common places lies a piece of text that both cover
with whole tokens, and its log-probability is the sum over its tokens on either side.
"""

from bisect import bisect_right

from torch import Tensor


def piece_sums(
    teacher_logprobs: Tensor, teacher_ends: list[int], student_logprobs: Tensor, student_ends: list[int]
) -> tuple[Tensor, Tensor]:
    """Sum log-probabilities over the smallest pieces of text that both tokenisations share.

    Args:
        teacher_logprobs: `[teacher tokens]`.
        teacher_ends: Where each teacher token ends in the text, in characters, never falling.
        student_logprobs: `[student tokens]`.
        student_ends: The same for the student. Both end at the end of the text.

    Returns:
        Teacher's and student's sums, `[pieces]` each. Identical tokenisations give the log-probabilities back.
    """
    if teacher_ends == student_ends:
        return teacher_logprobs, student_logprobs
    common = sorted(set(teacher_ends) & set(student_ends) - {0})
    return _sums(teacher_logprobs, teacher_ends, common), _sums(student_logprobs, student_ends, common)


def _sums(logprobs: Tensor, ends: list[int], common: list[int]) -> Tensor:
    """Tokens belong to the piece that they begin in: one that holds the first bytes of a character to that one's."""
    sums = logprobs.new_zeros(len(common))
    if not common:
        return sums
    for logprob, start, end in zip(logprobs, [0, *ends[:-1]], ends, strict=True):
        if end <= common[-1]:
            sums[min(bisect_right(common, start), len(common) - 1)] += logprob
    return sums
