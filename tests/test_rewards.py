"""The reward formula, with numbers worked out by hand. Run: ./run_tests.sh tests/test_rewards.py"""

import math

import pytest
import torch

from rewards.alignment import piece_sums
from rewards.explanation_format import explanation_format
from rewards.reductions import REDUCTIONS, normalize
from rewards.teacher_logprob_kl import ScoredExplanation, TeacherLogprobKL


def scored(solution=(-1.0, -3.0), teacher=(-0.5, -0.1), student=(-1.5, -2.1), closed=True):
    return ScoredExplanation(torch.tensor(solution), torch.tensor(teacher), torch.tensor(student), closed)


def test_defaults_by_hand():
    # r_SS = 1 * mean(-1, -3) + 0.01 * min = -2 - 0.03 = -2.03
    # KL per token = (-0.5 + 1.5, -0.1 + 2.1) = (1, 2); r_KL = 3 * 1.5 + 0.03 * 2 = 4.56
    total, parts = TeacherLogprobKL()(scored())
    assert parts["solution_log_prob_reward"] == pytest.approx(-2.03)
    assert parts["kl_reward"] == pytest.approx(-4.56)
    assert parts["match_reward"] == 0.0
    assert total == pytest.approx(-2.03 - 4.56)
    assert parts["answer_log_prob_min"] == -3.0
    assert parts["reasoning_kl_max"] == pytest.approx(2.0)


def test_missing_closing_tag_costs_the_penalty():
    closed, _ = TeacherLogprobKL()(scored())
    open_, parts = TeacherLogprobKL(not_matched_penalty=-2.5)(scored(closed=False))
    assert open_ - closed == pytest.approx(-2.5)
    assert parts["match_reward"] == -2.5


def test_default_penalty_of_a_missing_tag_is_one():
    assert TeacherLogprobKL()(scored(closed=False))[1]["match_reward"] == -1.0


def test_every_reduction_is_reported():
    # solution (-1, -3), KL (1, 2)
    _, parts = TeacherLogprobKL()(scored())
    answer, kl = [-2, -4, -3, -1, -3, -2.5, -1.5], [1.5, 3, 1, 2, 1, 1.25, 1.75]
    assert [parts[f"answer_log_prob_{name}"] for name in REDUCTIONS] == answer
    assert [parts[f"reasoning_kl_{name}"] for name in REDUCTIONS] == pytest.approx(kl)
    assert len(parts) == 3 + 2 * 7
    # where the values are changed before they are reduced, both are reported
    _, parts = TeacherLogprobKL(normalize_log_prob_fn="exp", clip_kl=0.5)(scored())
    assert [parts[f"unprocessed_answer_log_prob_{name}"] for name in REDUCTIONS] == answer
    assert [parts[f"unprocessed_reasoning_kl_{name}"] for name in REDUCTIONS] == pytest.approx(kl)
    assert [parts[f"reasoning_kl_{name}"] for name in REDUCTIONS] == [0.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert parts["answer_log_prob_min"] == pytest.approx(math.exp(-3))
    assert parts["solution_log_prob_reward"] == pytest.approx((math.exp(-1) + math.exp(-3)) / 2 + 0.01 * math.exp(-3))
    assert parts["kl_reward"] == pytest.approx(-(3 * 0.5 + 0.03 * 0.5))


def test_a_coefficient_without_a_reduction_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        TeacherLogprobKL(answer_log_prob_coeff=[1, 2], reduction_log_prob_fn=["mean"])(scored())


def test_empty_explanation_has_no_kl():
    total, parts = TeacherLogprobKL()(scored(teacher=(), student=()))
    assert parts["kl_reward"] == 0.0
    assert total == pytest.approx(-2.03)


def test_empty_solution_is_an_error_and_not_a_huge_reward():
    with pytest.raises(ValueError, match="without tokens"):
        TeacherLogprobKL()(scored(solution=()))


def test_sides_of_the_kl_that_differ_in_length_are_an_error():
    for teacher, student in (([-1.0], [-1.0, -2.0]), ([-1.0, -2.0, -3.0], [-1.0, -2.0])):
        with pytest.raises(ValueError, match="differ in shape"):
            TeacherLogprobKL()(scored([-1.0], teacher, student))


def test_sums_are_taken_in_double_precision():
    """2**24 + 1 is no fp32."""
    formula = TeacherLogprobKL(answer_log_prob_coeff=1.0, reduction_log_prob_fn="sum", kl_penalty_reward_coeff=0)
    assert formula(scored([-16777216.0, -1.0], [], []))[0] == -16777217.0
    formula = TeacherLogprobKL(answer_log_prob_coeff=0, kl_penalty_reward_coeff=1.0, reduction_kl_fn="sum")
    assert formula(scored([-1.0], [0.0, 0.0], [-16777216.0, -1.0]))[0] == -16777217.0


@pytest.mark.parametrize("coefficient", [0, [0, 0]])
def test_zero_coefficients_switch_a_term_off(coefficient):
    reduction = "mean" if coefficient == 0 else ["mean", "max"]
    total, parts = TeacherLogprobKL(kl_penalty_reward_coeff=coefficient, reduction_kl_fn=reduction)(scored())
    assert parts["kl_reward"] == 0.0
    assert total == pytest.approx(-2.03)


def test_schulman_estimate_by_hand():
    # k = (1, 2): k - 1 + e^-k = (e^-1, 1 + e^-2); mean = (0.36788 + 1.13534) / 2 = 0.75161
    _, parts = TeacherLogprobKL(use_schulman_kl_estimation=True)(scored())
    assert parts["reasoning_kl_mean"] == pytest.approx((math.exp(-1) + 1 + math.exp(-2)) / 2)


def test_without_the_teacher_s_entropy_the_student_s_surprise_is_charged():
    # -log p_student = (1.5, 2.1): mean 1.8, max 2.1, whatever the teacher thought and whatever the estimator
    for schulman in (False, True):
        reward = TeacherLogprobKL(include_teacher_think_entropy=False, use_schulman_kl_estimation=schulman)
        _, parts = reward(scored())
        assert parts["kl_reward"] == pytest.approx(-(3 * 1.8 + 0.03 * 2.1))


def test_clips_bound_single_tokens():
    # solution clipped at -2: (-1, -2), mean -1.5, min -2; KL clipped at 1.5: (1, 1.5), mean 1.25, max 1.5
    _, parts = TeacherLogprobKL(clip_log_prob=2.0, clip_kl=1.5)(scored())
    assert parts["solution_log_prob_reward"] == pytest.approx(-1.5 + 0.01 * -2)
    assert parts["kl_reward"] == pytest.approx(-(3 * 1.25 + 0.03 * 1.5))


def test_normalizations_by_hand():
    x = torch.tensor([0.0, -1.0])
    assert normalize(x, "exp").tolist() == pytest.approx([1.0, math.exp(-1)])
    assert normalize(x, "exp_norm").tolist() == pytest.approx([0.0, 1 - math.e])
    assert normalize(x, None, clip_min=-0.5).tolist() == [0.0, -0.5]
    with pytest.raises(ValueError, match="one of exp"):
        normalize(x, "softmax")


def test_reductions_by_hand():
    x = torch.tensor([4.0, 1.0, 3.0, 2.0])
    expected = {
        "mean": 2.5,
        "sum": 10,
        "min": 1,
        "max": 4,
        "median": 2.0,
        "first_quartile": 1.75,
        "last_quartile": 3.25,
    }
    assert {name: reduce(x).item() for name, reduce in REDUCTIONS.items()} == expected


def test_pieces_of_two_tokenisations():
    # text "abcdef": teacher ab|c|def, student a|bc|de|f. Common ends: 3 and 6.
    teacher, student = piece_sums(
        torch.tensor([-1.0, -2.0, -4.0]), [2, 3, 6], torch.tensor([-0.5, -0.25, -3.0, -5.0]), [1, 3, 5, 6]
    )
    assert teacher.tolist() == [-3.0, -4.0]
    assert student.tolist() == [-0.75, -8.0]


def test_the_bytes_of_a_character_belong_to_its_piece():
    # "a☕": the teacher has a token for each of the three bytes of ☕, the student one for all.
    teacher, student = piece_sums(
        torch.tensor([-1.0, -2.0, -3.0, -0.5]), [1, 1, 1, 2], torch.tensor([-1.0, -5.5]), [1, 2]
    )
    assert teacher.tolist() == student.tolist() == [-1.0, -5.5]
    # "☕" alone: nothing is common before it.
    teacher, student = piece_sums(torch.tensor([-2.0, -3.0, -0.5]), [0, 0, 1], torch.tensor([-4.0, -1.5]), [0, 1])
    assert teacher.tolist() == student.tolist() == [-5.5]


def test_a_token_without_text_at_the_end_belongs_to_the_last_piece():
    teacher, student = piece_sums(torch.tensor([-1.0, -2.0, -4.0]), [1, 2, 2], torch.tensor([-1.5, -2.5]), [1, 2])
    assert (teacher.tolist(), student.tolist()) == ([-1.0, -6.0], [-1.5, -2.5])


def test_one_zero_for_all_reductions():
    scored = ScoredExplanation(torch.tensor([-1.0]), torch.tensor([-1.0]), torch.tensor([-3.0]), True)
    reward, parts = TeacherLogprobKL(kl_penalty_reward_coeff=0)(scored)
    assert reward == parts["solution_log_prob_reward"] and parts["kl_reward"] == 0


def test_what_ends_after_the_last_common_place_is_left_out():
    teacher, student = piece_sums(torch.tensor([-1.0, -2.0]), [2, 5], torch.tensor([-3.0, -4.0]), [2, 4])
    assert (teacher.tolist(), student.tolist()) == ([-1.0], [-3.0])


def test_an_end_for_each_token_is_demanded():
    with pytest.raises(ValueError, match="zip"):
        piece_sums(torch.tensor([-1.0, -2.0]), [3], torch.tensor([-1.0, -3.0]), [1, 3])


def test_identical_tokenisations_give_the_token_values_back():
    logprobs = torch.tensor([-1.0, -2.0, -3.0])
    teacher, student = piece_sums(logprobs, [1, 2, 2], logprobs * 2, [1, 2, 2])
    assert teacher.tolist() == [-1, -2, -3]
    assert student.tolist() == [-2, -4, -6]


def test_nothing_common_is_no_piece():
    teacher, student = piece_sums(torch.tensor([-1.0]), [2], torch.tensor([-1.0]), [3])
    assert teacher.numel() == student.numel() == 0


def test_format_wants_an_explanation_its_tag_and_the_end():
    tags = ("<e>", "</e>", "<t>", "</t>")
    cases = {
        ("2+3=5</e>", True): 1.0,
        ("2+3=5\n</e>", True): 1.0,
        ("2+3=5</e>", False): 0.0,  # cut at the length limit
        ("2+3=5", True): 0.0,  # not closed
        ("</e>", True): 0.0,
        (" \n</e>", True): 0.0,
        ("2+3=5</e>.", True): 0.0,
        ("2+3=5</e></e>", True): 0.0,
        ("<e>2+3=5</e>", True): 0.0,
        ("2+3<t>=5</e>", True): 0.0,
        ("2+3=5</t></e>", True): 0.0,
    }
    for (text, ended), expected in cases.items():
        assert explanation_format(text, ended, "</e>", tags) == expected, (text, ended)
