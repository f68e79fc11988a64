"""The teacher's reward of "Reinforcement Learning Teachers" (arXiv 2506.08388), from log-probabilities alone.

    reward = r_SS - r_KL + match
    r_SS   = sum_i c_i      reduce_i( log p_student(solution token | question, explanation) )
    r_KL   = sum_i lambda_i reduce_i( log p_teacher(explanation token) - log p_student(explanation token) )

Nothing here knows a model or a trainer: log-probabilities in, the total and its named parts out.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rewards.reductions import REDUCTIONS, as_list, normalize


@dataclass(frozen=True)
class ScoredExplanation:
    """What the reward of one explanation is computed from.

    Attributes:
        solution_logprobs: Student's log-probability of each solution token, `[solution tokens]`, at least one.
        teacher_logprobs: Teacher's log-probability of each piece of the explanation, `[pieces]`; may be empty.
        student_logprobs: Student's log-probability of the same pieces, `[pieces]`.
        closed: Whether the teacher wrote the closing explanation tag.
    """

    solution_logprobs: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    closed: bool


@dataclass(frozen=True)
class TeacherLogprobKL:
    """The reward and its options; names and defaults are the reference implementation's."""

    answer_log_prob_coeff: float | list[float] = field(default_factory=lambda: [1.0, 0.01])
    reduction_log_prob_fn: str | list[str] = field(default_factory=lambda: ["mean", "min"])
    normalize_log_prob_fn: str | None = None
    clip_log_prob: float | None = None
    kl_penalty_reward_coeff: float | list[float] = field(default_factory=lambda: [3.0, 0.03])
    reduction_kl_fn: str | list[str] = field(default_factory=lambda: ["mean", "max"])
    normalize_kl_fn: str | None = None
    clip_kl: float | None = None
    use_schulman_kl_estimation: bool = False
    not_matched_penalty: float = -1.0
    include_teacher_think_entropy: bool = True

    def __call__(self, scored: ScoredExplanation) -> tuple[float, dict[str, float]]:
        """Return the reward and its parts: solution_log_prob_reward + kl_reward + match_reward is the reward.

        Every reduction of the solution's values (`answer_log_prob_mean`, ...) and of the KL's (`reasoning_kl_mean`,
        ...) is among the parts, whether it has a coefficient or not; where the values are normalized or clipped, that
        of the values before is there too (`unprocessed_answer_log_prob_mean`, ...).

        Raises:
            ValueError: If there is no solution token, or the two sides of the KL differ in length.
        """
        if scored.solution_logprobs.numel() == 0:
            raise ValueError("a solution without tokens has no log-probability")
        if scored.teacher_logprobs.shape != scored.student_logprobs.shape:
            shapes = f"{list(scored.teacher_logprobs.shape)} and {list(scored.student_logprobs.shape)}"
            raise ValueError(f"teacher and student log-probs of the explanation differ in shape: {shapes}")
        logprobs = scored.solution_logprobs.double()
        kl = self._kl(scored.teacher_logprobs, scored.student_logprobs.double())
        lowest = None if self.clip_log_prob is None else -self.clip_log_prob
        answer_values = normalize(logprobs, self.normalize_log_prob_fn, clip_min=lowest)
        kl_values = normalize(kl, self.normalize_kl_fn, clip_max=self.clip_kl)
        solution_reward = _weighted(answer_values, self.answer_log_prob_coeff, self.reduction_log_prob_fn)
        kl_reward = -_weighted(kl_values, self.kl_penalty_reward_coeff, self.reduction_kl_fn)
        match = 0.0 if scored.closed else self.not_matched_penalty
        named = {"solution_log_prob_reward": solution_reward, "kl_reward": kl_reward, "match_reward": match}
        named |= _reductions("answer_log_prob", answer_values, logprobs) | _reductions("reasoning_kl", kl_values, kl)
        return solution_reward + kl_reward + match, named

    def _kl(self, teacher: Tensor, student: Tensor) -> Tensor:
        log_ratio = teacher - student if self.include_teacher_think_entropy else -student
        if (
            self.use_schulman_kl_estimation and self.include_teacher_think_entropy
        ):  # http://joschu.net/blog/kl-approx.html, k3
            log_ratio = log_ratio - 1 + torch.exp(-log_ratio)
        return log_ratio


def _weighted(values: Tensor, coefficients: object, reductions: object) -> float:
    if as_list(coefficients) == [0]:
        return 0.0
    pairs = zip(as_list(coefficients), as_list(reductions), strict=True)
    return sum(coefficient * _reduce(values, reduction) for coefficient, reduction in pairs)


def _reductions(name: str, values: Tensor, unprocessed: Tensor) -> dict[str, float]:
    reduced = {f"{name}_{reduction}": _reduce(values, reduction) for reduction in REDUCTIONS}
    if values is not unprocessed:
        reduced |= {f"unprocessed_{name}_{reduction}": _reduce(unprocessed, reduction) for reduction in REDUCTIONS}
    return reduced


def _reduce(values: Tensor, reduction: str) -> float:
    """Of an empty explanation without padding no token could be unnatural: 0."""
    return REDUCTIONS[reduction](values).item() if values.numel() else 0.0
