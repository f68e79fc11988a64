"""Kept scores and rewards under another formula. Run: ./run_tests.sh tests/test_rescore.py"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.rescore import ranking_changes, run_rescore
from trainers.scoring.kept_scores import ENDS, TENSORS, KeptRow, ScoreKeeper, TokenScores, load_kept


def row(question, solution_logprobs, teacher, student, closed=True):
    values = [torch.tensor(logprobs) for logprobs in (solution_logprobs, teacher, student)]
    tokens = TokenScores(*values, *(list(range(1, len(v) + 1)) for v in values))
    return KeptRow(question, "s", f"e{len(teacher)}", TeacherLogprobKL()(tokens.compared(closed))[0], tokens, closed)


ROWS = [
    row("q1", [-1.0, -3.0], [-0.5, -0.1], [-1.5, -2.1]),
    row("q1", [-2.0], [], [], closed=False),
    row("q2", [-0.5], [-0.25], [-0.25]),
]


def rescore(folder, out, *overrides):
    out.mkdir()
    options = load_options(compose_run("rescore", [f"scores={folder}", *overrides]))
    run_rescore(options, out)
    lines = [json.loads(line) for line in (out / "rescored.jsonl").read_text().splitlines()]
    return lines, json.loads((out / "rescore.json").read_text())


def test_what_is_kept_comes_back_exactly_over_several_batches(tmp_path):
    keeper = ScoreKeeper(tmp_path, by_batch=False, formula=TeacherLogprobKL())
    keeper.keep(ROWS[:2])
    keeper.keep([])
    ScoreKeeper(tmp_path, by_batch=False, formula=TeacherLogprobKL()).keep(ROWS[2:])  # a later keeper goes on counting
    back = load_kept(tmp_path)
    assert [(r.question, r.explanation, r.reward, r.closed) for r in back] == [
        (r.question, r.explanation, r.reward, r.closed) for r in ROWS
    ]
    for ours, theirs in zip(ROWS, back, strict=True):
        assert all(torch.equal(getattr(ours.tokens, name), getattr(theirs.tokens, name)) for name in TENSORS)
        assert all(getattr(ours.tokens, name) == getattr(theirs.tokens, name) for name in ENDS)


def test_two_tokenizers_are_kept_token_by_token_and_compared_by_pieces():
    """12|34 and 1|2|3|4 of one text: the pieces are 12 and 34."""
    teacher, student = torch.tensor([-1.0, -2.0]), torch.tensor([-0.1, -0.2, -0.3, -0.4])
    tokens = TokenScores(torch.tensor([-1.0]), teacher, student, [1], [2, 4], [1, 2, 3, 4])
    scored = tokens.compared(closed=True)
    assert torch.equal(scored.teacher_logprobs, teacher)
    assert torch.allclose(scored.student_logprobs, torch.tensor([-0.3, -0.7]))


def test_same_formula_gives_the_same_rewards_and_no_change(tmp_path):
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=TeacherLogprobKL()).keep(ROWS)
    lines, changes = rescore(tmp_path / "scores", tmp_path / "out")
    assert [line["reward"] for line in lines] == [r.reward for r in ROWS]
    assert [(line["question"], line["explanation"]) for line in lines] == [(r.question, r.explanation) for r in ROWS]
    assert changes == {"groups": 1, "pairs": 1, "pairs_reversed": 0, "best_changed": 0}


def test_a_reward_that_is_not_finite_stops_it_and_leaves_no_file(tmp_path):
    kept = [row("q", [-1.0], [-2000.0], [-0.1])]
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=TeacherLogprobKL()).keep(kept)
    with pytest.raises(FloatingPointError, match="not finite under this formula.*question 'q'"):
        rescore(tmp_path / "scores", tmp_path / "out", "use_schulman_kl_estimation=true")
    assert not list((tmp_path / "out").iterdir())


def test_another_formula_turns_the_ranking_as_worked_out_by_hand(tmp_path):
    # q1 first: r_SS -2.03, KL 4.56, so -6.59; second: -2.02 and -1 for the missing tag, so -3.02: the second is best.
    # Without the KL and the penalty: -2.03 against -2.02, still the second.
    # With the maximum over the solution: -1 against -2: the first is best.
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=TeacherLogprobKL()).keep(ROWS)
    off = ["kl_penalty_reward_coeff=[0,0]", "not_matched_penalty=0"]
    lines, changes = rescore(tmp_path / "scores", tmp_path / "a", *off)
    assert [line["reward"] for line in lines[:2]] == pytest.approx([-2.03, -2.02])
    assert changes["best_changed"] == 0
    lines, changes = rescore(
        tmp_path / "scores", tmp_path / "b", *off, "reduction_log_prob_fn=max", "answer_log_prob_coeff=1"
    )
    assert [line["reward"] for line in lines[:2]] == pytest.approx([-1.0, -2.0])
    assert changes == {"groups": 1, "pairs": 1, "pairs_reversed": 1, "best_changed": 1}


def test_what_is_not_set_is_as_it_was_scored(tmp_path):
    """Without the KL: -2 * 5 - 3 * 0.05 = -10.15; -2 * 5.05 and 2 for the tag; -0.5 * 5.05."""
    formula = TeacherLogprobKL(answer_log_prob_coeff=[5.0, 0.05], not_matched_penalty=-2.0)
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=formula).keep(ROWS)
    lines, _ = rescore(tmp_path / "scores", tmp_path / "same")
    assert [line["reward"] for line in lines] == [formula(row.scored)[0] for row in ROWS]
    lines, _ = rescore(tmp_path / "scores", tmp_path / "out", "kl_penalty_reward_coeff=0")
    assert [line["reward"] for line in lines] == pytest.approx([-10.15, -12.1, -2.525])
    with pytest.raises(ConfigError, match="3 coefficients for 2 reductions"):
        rescore(tmp_path / "scores", tmp_path / "wrong", "answer_log_prob_coeff=[1,2,3]")


def test_what_another_policy_wrote_is_ranked_apart(tmp_path):
    keeper = ScoreKeeper(tmp_path / "scores", by_batch=True, formula=TeacherLogprobKL())
    for _ in range(2):
        keeper.keep(ROWS)
    _, changes = rescore(tmp_path / "scores", tmp_path / "out")
    assert (changes["groups"], changes["pairs"]) == (2, 2)


def test_a_tie_after_all_is_no_other_best():
    assert ranking_changes([[(1, 0), (2, 0)]])["best_changed"] == 0
    assert ranking_changes([[(1, 0), (2, -1)]])["best_changed"] == 1


def test_ranking_changes_by_hand():
    # one group of three: old order a > b > c, new order b > a > c: one pair of three is reversed, the best changes
    assert ranking_changes([[(3, 2), (2, 3), (1, 1)], [(1, 5)]]) == {
        "groups": 1,
        "pairs": 3,
        "pairs_reversed": 1,
        "best_changed": 1,
    }
    # a tie is no reversal
    assert ranking_changes([[(1, 1), (1, 2)]])["pairs_reversed"] == 0


def test_folder_without_scores_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no kept scores"):
        load_options(compose_run("rescore", [f"scores={tmp_path}"]))


def test_scores_that_were_kept_otherwise_are_told(tmp_path):
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=TeacherLogprobKL()).keep(ROWS)
    (file,) = (tmp_path / "scores").glob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if name in TENSORS}, file)
    with pytest.raises(ConfigError, match=r"batch_00001.* has no solution_ends.*\n.*keep_scores=true"):
        rescore(tmp_path / "scores", tmp_path / "out")


def test_scores_that_tell_no_formula_are_refused(tmp_path):
    ScoreKeeper(tmp_path, by_batch=False, formula=TeacherLogprobKL()).keep(ROWS)
    (tmp_path / "formula.json").unlink()
    with pytest.raises(ConfigError, match=r"no formula\.json[\s\S]*keep_scores=true"):
        load_options(compose_run("rescore", [f"scores={tmp_path}"]))


def test_options_of_models_are_not_taken():
    with pytest.raises(ConfigError, match=r"student_temperature=0\.5: used by stage=rl and stage=score only, this run"):
        load_options(compose_run("rescore", ["scores=x", "student_temperature=0.5"]))


@pytest.mark.parametrize("run", ["score", "teacher_rlt_tiny"])
def test_scores_of_an_earlier_run_are_not_added_to(run, tmp_path):
    words = [f"output_dir={tmp_path}", "student_model=a/b", "model_name_or_path=a/b"]
    words += ["dataset_id_or_path=a/b"] if run == "score" else []
    load_options(compose_run(run, [*words, "keep_scores=true"]))  # nothing there yet
    ScoreKeeper(tmp_path / "scores", by_batch=False, formula=TeacherLogprobKL()).keep(ROWS)
    with pytest.raises(ConfigError, match=r"holds scores of an earlier run\s+-> name another output_dir"):
        load_options(compose_run(run, [*words, "keep_scores=true"]))
    load_options(compose_run(run, words))  # none are kept this time
