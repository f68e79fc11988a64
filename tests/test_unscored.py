"""Explanations that the student cannot score. Run: ./run_tests.sh tests/test_unscored.py"""

import json
import shutil

import pytest
import torch
from conftest import REPO
from small_run import make_trainer

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.planning import planned
from trainers.scoring.reward_funcs import without_unscored

STUDENT = ["teacher_logprob_kl", "format"]


def teacher_logprob_kl(completion_ids, **_):
    """As the student's: below 0, the longest completion of each group of four cannot be scored."""
    return [None if i % 4 == 1 else -2.0 - i % 4 for i in range(len(completion_ids))]


def format(completion_ids, **_):  # noqa: A001 - TRL takes a function's name for its reward's
    return [0.0, 1.0, 0.0, 1.0] * (len(completion_ids) // 4)


def make(renderer, model_dir, folder, entries, **chosen):
    functions = [teacher_logprob_kl, format]
    chosen = {"use_vllm": False, "reward_funcs": functions, "max_steps": 1, "scale_rewards": "none"} | chosen
    trainer = make_trainer(renderer, model_dir, folder, **chosen)
    trainer.options = trainer.options.model_copy(update={"reward_funcs": entries})
    return trainer


def test_what_the_student_cannot_score_gets_no_advantage_from_the_other_rewards(renderer, model_dir, tmp_path):
    """By hand: the rewards of a group are -2, none, -4 and -5 + 1; the mean of the three is -10/3."""
    trainer = make(renderer, model_dir, tmp_path, STUDENT)
    trainer.train()
    expected = [4 / 3, 0.0, -2 / 3, -2 / 3] * 2
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-5)
    assert trainer.state.log_history[0]["reward"] == pytest.approx(-10 / 3)


def test_what_a_function_of_the_user_skips_among_others_gets_no_advantage(renderer, model_dir, tmp_path):
    """Counted as 0, next to what is below it, the completion that was skipped would be the best of its group."""
    trainer = make(renderer, model_dir, tmp_path, [{"_target_": "own.teacher_logprob_kl"}, "format"])
    trainer.train()
    assert list(trainer._logs["advantages"]) == pytest.approx([4 / 3, 0.0, -2 / 3, -2 / 3] * 2, abs=1e-5)


def test_a_question_that_a_function_skips_is_left_to_the_others():
    nan = torch.nan
    rewards = torch.tensor([[nan, 1.0], [nan, 0.0], [-2.0, 1.0], [nan, 1.0]])
    entries = [{"_target_": "own.of_some_questions"}, "format"]
    left = without_unscored(rewards, entries, torch.ones(2), num_generations=2)
    expected = torch.tensor([[nan, 1.0], [nan, 0.0], [-2.0, 1.0], [nan, nan]])
    assert torch.equal(left.nan_to_num(9), expected.nan_to_num(9))
    # Nor does the row that the student could not score make it one that concerns the question.
    rewards = torch.tensor([[nan, 5.0], [-1.0, nan], [-2.0, nan]])
    left = without_unscored(rewards, ["teacher_logprob_kl", *entries[:1]], torch.ones(2), num_generations=3)
    assert torch.equal(left.nan_to_num(9), torch.tensor([[nan, nan], [-1.0, nan], [-2.0, nan]]).nan_to_num(9))


def test_the_student_s_reward_that_counts_nothing_takes_no_row_away(renderer, model_dir, tmp_path):
    trainer = make(renderer, model_dir, tmp_path, STUDENT, reward_weights=[0.0, 1.0])
    trainer.train()
    assert list(trainer._logs["advantages"]) == pytest.approx([-0.5, 0.5, -0.5, 0.5] * 2, abs=1e-5)


def test_an_evaluation_s_means_are_over_what_was_scored(renderer, model_dir, tmp_path):
    """Of 12 rows in batches of 8 and 4 the student scores 9: of each four -2, -4 and -5, of format 0, 0 and 1."""
    trainer = make(renderer, model_dir, tmp_path, STUDENT, per_device_eval_batch_size=8)
    metrics = trainer.evaluate(trainer.train_dataset.select(range(12 // 4)))
    assert metrics["eval_rewards/teacher_logprob_kl/mean"] == pytest.approx(-11 / 3)
    assert metrics["eval_rewards/format/mean"] == pytest.approx(1 / 3)
    assert metrics["eval_reward"] == pytest.approx(-10 / 3)


@pytest.mark.parametrize(("positions", "told"), [(100, "shorter lengths, or"), (143, "max_completion_length=15, or")])
def test_a_student_that_reads_less_than_the_teacher_may_write_is_told_at_the_start(
    model_dir, rows_file, tmp_path, caplog, positions, told
):
    student = tmp_path / "student"
    shutil.copytree(model_dir, student)
    config = json.loads((student / "config.json").read_text())
    words = [f"model_name_or_path={model_dir}", f"dataset_id_or_path={rows_file}", f"student_model={student}"]
    words += ["device=cpu", "report_before_after=false", "max_prompt_length=128", "max_completion_length=16"]
    options = load_options(compose_run("teacher_rlt_tiny", [*words, f"output_dir={tmp_path}"]), repo=REPO)
    for given in (positions, 144):
        caplog.clear()
        (student / "config.json").write_text(json.dumps(config | {"max_position_embeddings": given}))
        planned(options.model_copy(update={"ignore_memory_plan": True}))
        assert (f"the student has {given} positions" in caplog.text) == (told in caplog.text) == (given == positions)
