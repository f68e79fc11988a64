"""What explains nothing, scored beside the teacher. Run: ./run_tests.sh tests/test_probes.py"""

import logging
import random

import pytest
import torch
from conftest import ROWS

from data.explanation import written_explanation
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.models import load_model
from trainers.scoring.explanation_scorer import ExplanationScorer, teacher_logprobs
from trainers.scoring.frozen import FrozenModel, ResidentBackbone
from trainers.scoring.probes import Evaluated, Probes, of_both, probe_texts, shuffled, warn_of_probes
from trainers.student import Student

ROW = [Evaluated(r["question"], r["solution"], []) for r in ROWS]


def test_texts_of_the_probes():
    probes = probe_texts(ROW[:3], ["one two", "three", "four"])
    assert probes["empty"] == ["", "", ""]
    assert probes["solution"] == ["5", "9", "18"]
    assert probes["other"] == ["three", "four", "one two"]
    assert [sorted(text) for text in probes["shuffled"]] == [sorted("one two"), sorted("three"), sorted("four")]


def test_another_question_s_explanation_is_never_one_s_own():
    rows = [ROW[0], ROW[0], ROW[1]]
    assert probe_texts(rows, ["a", "b", "c"])["other"] == ["c", "c", "a"]
    assert "other" not in probe_texts([ROW[0], ROW[0]], ["a", "b"])


def test_shuffling_keeps_words_whole_and_moves_them():
    text = "7~3=4\nthen twelve"
    seen = {shuffled(text, random.Random(seed)) for seed in range(20)}
    assert len(seen) > 10
    assert all("twelve" in s and sorted(s) == sorted(text) for s in seen)


@pytest.fixture(scope="module")
def parts(model_dir, renderer):
    student_model = load_model(str(model_dir), torch.float32, None, "student_model", False).eval()
    teacher = load_model(str(model_dir), torch.float32, None, "model_name_or_path", False).train()
    student = Student(FrozenModel(ResidentBackbone(student_model, torch.device("cpu")), 0.7, 4096), renderer, 512)
    return ExplanationScorer(student, TeacherLogprobKL(), renderer, True), teacher


def completion(renderer, row):
    return renderer.encode_text(row["reasoning_trace"] + "<|end_of_explanation|>") + [renderer.tokenizer.eos_token_id]


def test_means_are_those_of_scoring_each_text(parts, renderer):
    scorer, teacher = parts
    rows = [Evaluated(r["question"], r["solution"], completion(renderer, r)) for r in ROWS]
    means = Probes(scorer, 3, 4096, 128)(rows, teacher, 0.9)
    assert teacher.training  # as it was found
    model = FrozenModel(ResidentBackbone(teacher.eval(), torch.device("cpu")), 0.9, 4096)
    teacher.train()
    for name, texts in {
        "teacher": [r["reasoning_trace"] for r in ROWS[:3]],
        "solution": [r["solution"] for r in ROWS[:3]],
        "other": [ROWS[i]["reasoning_trace"] for i in (1, 2, 0)],
        "empty": [""] * 3,
    }.items():
        questions, solutions = [r.question for r in rows[:3]], [r.solution for r in rows[:3]]
        written = [written_explanation(renderer, text, True) for text in texts]
        logprobs = teacher_logprobs(questions, solutions, written, renderer, model, True)
        rewards = [s.reward for s in scorer.score(questions, written, solutions, logprobs)]
        assert means[f"probe/{name}"] == pytest.approx(sum(rewards) / 3, abs=1e-5), name
    assert set(means) == {f"probe/{name}" for name in ("teacher", "empty", "shuffled", "solution", "other")}


def test_a_prompt_that_lost_its_start_is_read_without_it(parts, renderer):
    scorer, teacher = parts
    row = ROWS[0]
    (written,) = [written_explanation(renderer, row["reasoning_trace"], True)]
    prompt = renderer.encode_prompt(renderer.teacher_prompt(row["question"], row["solution"]))
    limit = len(prompt) - 20
    model = FrozenModel(ResidentBackbone(teacher.eval(), torch.device("cpu")), 1.0, 4096)
    asked = [row["question"]], [row["solution"]], [written], renderer, model, False
    (found,) = teacher_logprobs(*asked, max_prompt_length=limit)
    with torch.no_grad():
        logits = teacher(torch.tensor([prompt[-limit:] + written.ids])).logits[0, limit - 1 : -1]
    teacher.train()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(written.ids)[:, None])[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, teacher_logprobs(*asked)[0], atol=1e-3)


def test_of_several_completions_of_a_question_the_first_counts(parts, renderer):
    scorer, teacher = parts
    one = Evaluated(ROWS[0]["question"], ROWS[0]["solution"], completion(renderer, ROWS[0]))
    again = one._replace(completion_ids=completion(renderer, ROWS[1]))
    other = Evaluated(ROWS[1]["question"], ROWS[1]["solution"], completion(renderer, ROWS[1]))
    probes = Probes(scorer, 2, 4096, 128)
    assert probes([one, again, other], teacher, 1.0) == probes([one, other], teacher, 1.0)


def test_a_probe_counts_on_the_questions_whose_explanation_was_scored(parts, renderer):
    """Of the first question's explanation alone, where the other three are too long for the student."""
    scorer, teacher = parts
    texts = [ROWS[0]["reasoning_trace"], *("4+5=9 " * 100, "17+1=18 " * 90, "6+6=12 " * 80)]
    rows = [
        Evaluated(row["question"], row["solution"], completion(renderer, row | {"reasoning_trace": text}))
        for row, text in zip(ROWS, texts, strict=True)
    ]
    probes = Probes(scorer, 4, 4096, 128)
    means, of_one = probes(rows, teacher, 1.0), probes(rows[:1], teacher, 1.0)
    for name in ("teacher", "empty", "solution"):
        assert means[f"probe/{name}"] == pytest.approx(of_one[f"probe/{name}"], abs=1e-5)
    assert "probe/other" not in means  # the first question's is the second's explanation, which is too long


def test_a_probe_and_the_teacher_are_compared_where_both_were_scored():
    assert of_both([-1.0, None, -3.0, -4.0], [-5.0, -6.0, None, -8.0]) == ([-1.0, -4.0], [-5.0, -8.0])


def test_a_probe_that_beats_the_teacher_is_warned_of(caplog):
    means = {"teacher": (-0.5, -0.5), "empty": (-2.0, -0.5), "solution": (-0.25, -0.3), "shuffled": (-0.4, -0.3)}
    with caplog.at_level(logging.WARNING):
        assert warn_of_probes(means) == ["solution"]
    assert "'solution' (the bare solution) earns -0.250, more than the teacher's explanations (-0.300)" in caplog.text
    caplog.clear()
    assert warn_of_probes({"teacher": (0.0, 0.0), "empty": (-1.0, 0.0)}) == []
    assert not caplog.text
