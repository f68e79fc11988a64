"""Students in 8 and 4 bits. Run: ./run_tests.sh tests/test_quantized.py"""

import logging
from dataclasses import replace

import pytest
import torch
from conftest import ROWS
from transformers import AutoModelForCausalLM

from data.explanation import written_explanation
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.options import options_class
from trainers.plan.model_shapes import model_shape, read_config
from trainers.scoring import loading
from trainers.scoring.loading import load_frozen, make_scorer
from trainers.scoring.quantized import Sample, quantization_config, reward_changes, samples_of
from trainers.student import StudentScore

CPU = torch.device("cpu")


def options(**values):
    planned = {"student_mode": "resident", "student_tokens_per_pass": 4096}
    prompts = {"student_system_prompt": "Solve.", "teacher_system_prompt": "Explain."}
    return options_class("score")(**planned, **prompts, **values)


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_quantized_student_scores_near_the_full_one_and_says_how_near(kind, model_dir, renderer, tmp_path, caplog):
    samples = samples_of(ROWS)
    arguments = (tmp_path, str(model_dir), renderer, renderer, CPU, torch.float32, samples)
    full = make_scorer(options(), *arguments)
    with caplog.at_level(logging.INFO):
        quantized = make_scorer(options(student_quantization=kind), *arguments)
    assert f"student in {kind}: on 4 samples the mean reward goes from" in caplog.text
    assert "with the full student in the teacher's place in the KL" in caplog.text
    weight = quantized.student.frozen.backbone.model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype in (torch.int8, torch.uint8)
    explanations = [written_explanation(renderer, row["reasoning_trace"], True) for row in ROWS]
    teacher = [torch.full((len(renderer.padding_ids) + len(e.ids),), -1.0) for e in explanations]
    texts = [row["question"] for row in ROWS], explanations, [row["solution"] for row in ROWS], teacher
    pairs = [(a.reward, b.reward) for a, b in zip(full.score(*texts), quantized.score(*texts), strict=True)]
    assert all(a != b for a, b in pairs)
    assert all(abs(a - b) < 1.0 for a, b in pairs), pairs


@pytest.mark.parametrize(
    ("can_stream", "fits", "modes"),
    [(True, False, ["streamed", None]), (False, True, ["cpu", None]), (False, False, [None])],
)
def test_the_full_student_is_read_off_the_device(can_stream, fits, modes, model_dir, renderer, tmp_path, monkeypatch):
    """The plan counts only the quantized one, which is loaded in the mode of the options."""
    loaded, load, shape_of = [], loading.load_frozen, loading.model_shape
    monkeypatch.setattr(loading, "load_frozen", lambda *a, mode, **k: loaded.append(mode) or load(*a, mode=mode, **k))
    monkeypatch.setattr(loading, "model_shape", lambda *a: replace(shape_of(*a), can_stream=can_stream))
    monkeypatch.setattr(loading, "fits_in_memory", lambda size: fits)
    told = []
    monkeypatch.setattr(loading.logger, "warning", lambda text, *given: told.append(text % given))
    chosen = options(student_quantization="8bit")
    make_scorer(chosen, tmp_path, str(model_dir), renderer, renderer, CPU, torch.float32, samples_of(ROWS))
    assert loaded == modes
    no_room = ["student in 8bit: host memory has no room to read the full one: its change is not known"]
    assert told == ([] if len(modes) == 2 else no_room)


def test_change_of_the_reward_by_hand():
    # Full student: solution (-1, -3), explanation (-2,); quantized: solution (-2, -4), explanation (-2.5,).
    before = StudentScore(torch.tensor([-2.0]), torch.tensor([-1.0, -3.0]), False)
    after = StudentScore(torch.tensor([-2.5]), torch.tensor([-2.0, -4.0]), False)
    # old: -2 - 0.03 = -2.03, no KL; new: -3 - 0.04 - 3 * 0.5 - 0.03 * 0.5 = -4.555
    ((old, new),) = reward_changes([before, None], [after, None], TeacherLogprobKL(), padding=0)
    assert (old, new) == (pytest.approx(-2.03), pytest.approx(-4.555))


def test_a_change_of_padding_alone_counts_where_the_kl_covers_it():
    before, after = (StudentScore(torch.tensor([p, -2.0]), torch.tensor([-1.0]), False) for p in (-1.0, -9.0))
    for padding, is_same in ((0, False), (1, True)):
        ((old, new),) = reward_changes([before], [after], TeacherLogprobKL(), padding)
        assert (old == new) is is_same


def test_the_change_that_is_told_is_of_the_run_s_own_reward(model_dir, renderer, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("trainers.scoring.loading.reward_changes", lambda *args: told.append(args[-1]) or [])
    for counts in (True, False):
        chosen = options(student_quantization="8bit", padding_in_kl=counts)
        make_scorer(chosen, tmp_path, str(model_dir), renderer, renderer, CPU, torch.float32, samples_of(ROWS))
    assert told == [0, len(renderer.padding_ids)] and told[1] > 0


def test_samples_take_the_explanation_that_is_there():
    rows = [
        {"question": "q", "solution": "s", "explanation": "e", "reasoning_trace": "t"},
        {"question": "q", "solution": "s", "reasoning_trace": "t"},
        {"question": "q", "solution": "s", "reasoning_trace": None},
    ]
    assert samples_of(rows) == [Sample("q", "e", "s"), Sample("q", "t", "s"), Sample("q", "s", "s")]


def test_a_frozen_model_is_quantized_only_on_request(model_dir):
    frozen = load_frozen(options(), str(model_dir), "student_model", CPU, torch.float32, 1.0)
    assert {p.dtype for p in frozen.backbone.model.parameters()} == {torch.float32}


def test_student_that_is_stored_quantized_scores_as_one_that_is_quantized_on_loading(
    model_dir, tokenizer, renderer, tmp_path
):
    stored, kind = tmp_path / "stored", quantization_config("4bit", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=kind, dtype=torch.float32)
    model.save_pretrained(stored)
    tokenizer.save_pretrained(stored)
    shape = model_shape(read_config(str(stored), "student_model"))
    assert shape.quantized == "4bit" and not shape.can_stream
    explanations = [written_explanation(renderer, row["reasoning_trace"], True) for row in ROWS]
    teacher = [torch.full((len(renderer.padding_ids) + len(e.ids),), -1.0) for e in explanations]
    texts = [row["question"] for row in ROWS], explanations, [row["solution"] for row in ROWS], teacher
    rewards = []
    for path, chosen in ((stored, options()), (model_dir, options(student_quantization="4bit"))):
        scorer = make_scorer(chosen, tmp_path, str(path), renderer, renderer, CPU, torch.float32, [])
        rewards.append([scored.reward for scored in scorer.score(*texts)])
    assert rewards[0] == rewards[1]
