"""Rewards that add up: built-in ones and the user's own. Run: ./run_tests.sh tests/test_reward_funcs.py"""

import asyncio
import copy
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import REPO, ROWS

from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.scoring.explanation_scorer import ExplanationScorer
from trainers.scoring.loading import load_frozen
from trainers.scoring.reward_funcs import StudentReward, guarded, make_reward_funcs, own_functions
from trainers.student import Student

CLOSE = "<|end_of_explanation|>"


def options(*overrides):
    return load_options(compose_run("teacher_rlt_tiny", ["device=cpu", *overrides]), repo=REPO)


def make(renderer, *overrides, scorer=None):
    chosen = options(*overrides)
    return make_reward_funcs(chosen, renderer, scorer and StudentReward(scorer), own_functions(chosen))


def batch(renderer, texts, rows=None, **columns):
    """What TRL hands to a reward function for these completions; `extra` and `metrics` collect what is logged."""
    rows = rows or ROWS[:1] * len(texts)
    ids = [renderer.encode_text(text) for text in texts]
    metrics, extra = [], {}
    given = {
        "prompts": ["prompt"] * len(texts),
        "completions": renderer.tokenizer.batch_decode(ids, skip_special_tokens=True),
        "completion_ids": ids,
        "question": [row["question"] for row in rows],
        "solution": [row["solution"] for row in rows],
        "teacher_logprobs": [[-0.5] * (len(renderer.padding_ids) + len(i)) for i in ids],
        "trainer_state": None,
        "log_metric": lambda name, value: metrics.append((name, value)),
        "log_extra": extra.__setitem__,
    }
    return given | columns, metrics, extra


class CountingScorer(ExplanationScorer):
    """Counts the batches the student is asked about."""

    asked = 0

    def score(self, *args, **named):
        self.asked += 1
        return super().score(*args, **named)


def make_scorer(model_dir, renderer):
    planned = options("student_mode=resident", "student_tokens_per_pass=4096")
    frozen = load_frozen(planned, str(model_dir), "student_model", torch.device("cpu"), torch.float32, 0.7)
    return CountingScorer(Student(frozen, renderer, 512), TeacherLogprobKL(), renderer, padding_in_kl=True)


def test_format_reads_tokens_up_to_the_end_of_turn(renderer):
    (reward,) = make(renderer, "reward_funcs=[format]")
    end = renderer.tokenizer.eos_token
    texts = [
        f"2+3=5{CLOSE}{end}",
        f"2+3=5{CLOSE}",
        f"2+3=5{end}",
        f"2+3=5{CLOSE}{end}5",
        f"<|begin_of_solution|>5{CLOSE}{end}",
        "",
    ]
    assert reward(**batch(renderer, texts)[0]) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert reward.__name__ == "format"


def test_accuracy_compares_the_explanation_s_final_answer_with_the_solution(renderer):
    (reward,) = make(renderer, "reward_funcs=[accuracy]")
    end = renderer.tokenizer.eos_token
    half = {**ROWS[0], "solution": "0.5"}
    silent = {**ROWS[0], "solution": "no number"}
    cases = [
        (rf"2+3=5, so \boxed{{5}}{CLOSE}{end}", ROWS[0], 1.0),
        (rf"2+3=6, so \boxed{{6}}{CLOSE}{end}", ROWS[0], 0.0),
        (rf"\boxed{{\frac{{1}}{{2}}}}{CLOSE}{end}", half, 1.0),
        (rf"2+3=5{CLOSE}{end}", ROWS[0], 0.0),  # no LaTeX answer to be found
        (rf"2+3=5{CLOSE}\boxed{{5}}{end}", ROWS[0], 0.0),  # after the explanation
        (rf"\boxed{{5}}{CLOSE}{end}", silent, None),  # no solution to compare with
    ]
    texts, rows, expected = zip(*cases, strict=True)
    given, _, extra = batch(renderer, texts, rows)
    assert reward(**given) == list(expected)
    assert extra["gold_parsed"][-1] == "[unparseable]"


def test_tags_that_are_special_tokens_are_read_as_well(renderer):
    """TRL's own text of such a completion has lost its tags."""
    special = copy.copy(renderer)
    special.tokenizer = copy.deepcopy(renderer.tokenizer)
    special.tokenizer.add_special_tokens({"additional_special_tokens": [CLOSE]})
    text = rf"2+3=5{CLOSE}\boxed{{5}}{renderer.tokenizer.eos_token}"
    given, _, _ = batch(special, [text, text.replace(r"\boxed{5}", "")])
    assert CLOSE not in given["completions"][0]
    form, accuracy = make(special, "reward_funcs=[format,accuracy]")
    assert form(**given) == [0.0, 1.0]
    assert accuracy(**given) == [0.0, 0.0]


def test_length_is_dapo_s_soft_punishment(renderer):
    # 20 tokens at most, the last 5 punished: 15 -> 0, 17 -> (15-17)/5, 20 -> -1
    given, _, _ = batch(renderer, ["", "", ""], completion_ids=[[1] * 15, [1] * 17, [1] * 20])
    common = ["reward_funcs=[length]", "max_completion_length=20"]
    (reward,) = make(renderer, *common, "length_soft_cache=5")
    assert reward(**given) == pytest.approx([0.0, -0.4, -1.0])
    (default,) = make(renderer, *common)  # a fifth: 4 tokens, (16-17)/4
    assert default(**given) == pytest.approx([0.0, -0.25, -1.0])


def test_the_student_is_asked_once_for_both_of_its_rewards(model_dir, renderer):
    scorer = make_scorer(model_dir, renderer)
    kl, answer = make(renderer, "reward_funcs=[teacher_logprob_kl,student_answer]", scorer=scorer)
    given, metrics, extra = batch(renderer, [f"2+3=5{CLOSE}", f"4+5=9{CLOSE}"], ROWS[:2])
    rewards, answers = kl(**given), answer(**given)
    assert scorer.asked == 1
    assert all(math.isfinite(reward) for reward in rewards)
    assert answers == [float(solves) for solves in extra["student_solves"]]
    names = [name for name, _ in metrics]
    assert len(names) == len(set(names))
    assert dict(metrics)["student_accuracy"] == pytest.approx(sum(answers) / 2)
    # An equal batch that comes anew is a new one: its metrics are logged too.
    again, metrics, _ = batch(renderer, [f"2+3=5{CLOSE}", f"4+5=9{CLOSE}"], ROWS[:2])
    assert kl(**again) == rewards
    assert scorer.asked == 2
    assert dict(metrics)["explanation_length"] == 5


def test_the_student_knows_which_metrics_are_means_of_what_it_scored(model_dir, renderer):
    student = StudentReward(make_scorer(model_dir, renderer))
    given, metrics, _ = batch(renderer, [f"2+3=5{CLOSE}"])
    student(**given)
    assert student.metrics == {name for name, _ in metrics} - {"unscorable_fraction"} != set()


def test_student_answer_alone_is_one_where_greedy_decoding_writes_the_solution(model_dir, renderer):
    """The greedy continuation counts, another does not, nor a longer one; without a solution it is None."""
    scorer = make_scorer(model_dir, renderer)
    (answer,) = make(renderer, "reward_funcs=[student_answer]", scorer=scorer)
    seven, close = (renderer.encode_text(text)[0] for text in ("7", "<|end_of_solution|>"))
    known = scorer.student.frozen.backbone
    scorer.student.frozen = SimpleNamespace(
        backbone=known, score=lambda texts, *_: [forced(text.ids, seven, close) for text in texts]
    )
    rows = [{**ROWS[0], "solution": solution} for solution in ("7", "8", "77", "")]
    given, metrics, _ = batch(renderer, [f"2+3=5{CLOSE}"] * 4, rows)
    assert answer(**given) == [1.0, 0.0, 0.0, None]
    assert dict(metrics)["unscorable_fraction"] == 0.25


def forced(ids, seven, close):
    """Scores of a text by a model that goes on with a seven whatever it reads, and after a seven closes."""
    likeliest = [False] + [
        now == (close if before == seven else seven) for before, now in zip(ids, ids[1:], strict=False)
    ]
    return torch.full((len(ids),), -1.0), torch.tensor(likeliest)


def write_module(tmp_path, monkeypatch, name, text):
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


OWN = """
def words(completions, per_word=1.0, **kwargs):
    return [per_word * len(text.split()) for text in completions]

def maker(base):
    def made(completion_ids, **kwargs):
        return [base + len(ids) for ids in completion_ids]
    return made

class Kept:
    def __init__(self, value):
        self.value = value
    def __call__(self, completions, **kwargs):
        return [self.value] * len(completions)

async def waits(completions, **kwargs):
    return [None] * len(completions)

def narrow(completions):
    return [0.0] * len(completions)

def needs(completions, difficulty, **kwargs):
    return [0.0] * len(completions)

number = 3
"""


def test_own_functions_are_called_with_their_arguments(tmp_path, monkeypatch, renderer):
    write_module(tmp_path, monkeypatch, "own_called", OWN)
    entries = [
        "{_target_: own_called.words, per_word: 0.5}",
        "{_target_: own_called.maker, base: 10}",
        "{_target_: own_called.Kept, value: 7}",
        "{_target_: own_called.waits}",
    ]
    words, maker, kept, waits = make(renderer, f"reward_funcs=[{','.join(entries)}]")
    given, _, _ = batch(renderer, ["5 5 5", "5"])
    assert words(**given) == [1.5, 0.5]
    assert maker(**given) == [10 + len(ids) for ids in given["completion_ids"]]
    assert kept(**given) == [7.0, 7.0]
    assert asyncio.run(waits(**given)) == [None, None]
    assert [f.__name__ for f in (words, maker, kept, waits)] == ["words", "maker", "Kept", "waits"]


def test_a_function_of_the_user_may_have_the_name_of_a_built_in_one(tmp_path, monkeypatch, renderer):
    write_module(tmp_path, monkeypatch, "own_named", "def length(completions, **kwargs):\n    return [4.0]\n")
    (reward,) = make(renderer, "reward_funcs=[{_target_: own_named.length}]")
    assert reward(**batch(renderer, ["5"])[0]) == [4.0]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{_target_: own_faults.wrods}", "cannot be imported[\\s\\S]*wrods"),
        ("{_target_: own_faults.number}", "is a int, no function"),
        ("{_target_: own_faults.narrow}", r"add \*\*kwargs"),
        ("{_target_: own_faults.needs}", "needs difficulty"),
        ("{_target_: own_faults.words, per_wrod: 2}", "no argument per_wrod"),
        ("{_target_: own_faults.maker}", "cannot be made"),
        ("{_target_: builtins.dict}", "makes a dict"),
    ],
)
def test_own_functions_that_cannot_be_called_are_told_before_anything_loads(tmp_path, monkeypatch, entry, message):
    write_module(tmp_path, monkeypatch, "own_faults", OWN)
    with pytest.raises(ConfigError, match=message):
        own_functions(options(f"reward_funcs=[{entry}]"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_a_reward_that_is_not_finite_stops_with_the_sample_named(bad, renderer):
    given, _, _ = batch(renderer, ["2+3=5", "4+5=9"], ROWS[:2])
    message = r"poisoned gives (nan|inf|1e\+39) for sample 1[\s\S]*What is 4\+5\?[\s\S]*4\+5=9"
    with pytest.raises(FloatingPointError, match=message):
        guarded(lambda **_: [1.0, bad], "poisoned")(**given)

    async def later(**_):
        return [None, bad]

    with pytest.raises(FloatingPointError, match="poisoned"):
        asyncio.run(guarded(later, "poisoned")(**given))
    assert guarded(lambda **_: [None, 1], "sound")(**given) == [None, 1.0]


def test_a_function_that_fails_is_named_with_its_own_error_behind(renderer):
    """TRL's functions that read messages fail at text."""
    given, _, _ = batch(renderer, ["2+3=5"])
    for function in ("think_format_reward", "accuracy_reward"):
        (own,) = make(renderer, f"reward_funcs=[{{_target_: trl.rewards.{function}}}]")
        with pytest.raises(RuntimeError, match=f"{function} fails with TypeError[\\s\\S]*as text") as failed:
            own(**given)
        assert isinstance(failed.value.__cause__, TypeError)

    async def late(**_):
        raise KeyError("difficulty")

    with pytest.raises(RuntimeError, match="slow fails with KeyError: 'difficulty'"):
        asyncio.run(guarded(late, "slow")(**given))


def test_a_reward_that_is_no_number_is_told_with_the_function(renderer):
    for wrong in (None, ["good"], {"good": 1.0, 2: 3}, {0.5: "its keys are numbers"}):
        with pytest.raises(TypeError, match="chatty must return a list"):
            guarded(lambda wrong=wrong, **_: wrong, "chatty")(**batch(renderer, ["5"])[0])


def run(model_dir, rows_file, out, *overrides, path=""):
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "device=cpu",
        f"model_name_or_path={model_dir}",
        f"dataset_id_or_path={rows_file}",
        "teacher_system_prompt=Explain.",
        "student_system_prompt=Solve.",
        f"output_dir={out}",
        "max_steps=1",
        "logging_steps=1",
        "train_batch_size=4",
        "per_device_train_batch_size=4",
        "num_generations=2",
        "per_device_eval_batch_size=4",
        "max_completion_length=16",
        "save_strategy=no",
        *overrides,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(path)}
    )
    lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    return done, next((line for line in map(json.loads, lines) if "reward" in line), None)


def test_weights_add_up_every_reward_and_a_function_of_the_user_in_a_run(model_dir, rows_file, tmp_path):
    (tmp_path / "own_run.py").write_text(OWN)
    weights = {"teacher_logprob_kl": 0.5, "student_answer": 2, "accuracy": 3, "format": 4, "length": 8, "maker": 0.25}
    out = tmp_path / "out"
    done, line = run(
        model_dir,
        rows_file,
        out,
        f"student_model={model_dir}",
        "reward_funcs=[teacher_logprob_kl,student_answer,accuracy,format,length,{_target_: own_run.maker, base: 100}]",
        f"reward_weights={list(weights.values())}",
        f"eval_dataset_id_or_path={rows_file}",
        "max_eval_samples=4",
        path=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    means = {name: line[f"rewards/{name}/mean"] for name in weights}
    total = sum(weight * means[name] for name, weight in weights.items())
    assert line["reward"] == pytest.approx(total, abs=1e-4)
    table = pd.read_parquet(out / "completions" / "completions_00001.parquet")
    assert means["maker"] == pytest.approx(100 + line["completions/mean_length"])
    assert means["teacher_logprob_kl"] == pytest.approx(
        line["solution_log_prob_reward"] + line["kl_reward"] + line["match_reward"], abs=1e-4
    )
    assert means["student_answer"] == line["student_accuracy"]
    weighted = sum(weight * table[name] for name, weight in weights.items())
    pair = weighted.to_numpy().reshape(-1, 2)  # GRPO's advantage: distance to the group's mean, in its deviations
    expected = (pair - pair.mean(1, keepdims=True)) / (pair.std(1, ddof=1, keepdims=True) + 1e-4)
    assert table["advantage"].tolist() == pytest.approx(expected.reshape(-1).tolist(), abs=1e-3)
    assert 0 < line["seconds/score"]
    result = json.loads((out / "result.json").read_text())["after"]
    assert {f"rewards/{name}" for name in weights} <= set(result)


def test_without_the_student_s_rewards_no_student_is_needed_and_a_nan_stops_the_run(model_dir, rows_file, tmp_path):
    """The function's first batch is sound, the next is not: the evaluation before training passes, the step stops."""
    (tmp_path / "own_nan.py").write_text(
        "calls = 0\n"
        "def poisoned(completions, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return [1.0 if calls == 1 else float('nan')] * len(completions)\n"
    )
    done, _ = run(
        model_dir,
        rows_file,
        tmp_path / "out",
        "student_model=null",
        "reward_funcs=[format,{_target_: own_nan.poisoned}]",
        f"eval_dataset_id_or_path={rows_file}",
        "max_eval_samples=4",
        path=tmp_path,
    )
    assert done.returncode != 0
    assert "no reward function asks the student: none is loaded" in done.stdout
    assert "eval_rewards/poisoned/mean" in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert "the reward function poisoned gives nan for sample 0" in done.stderr
    assert "What is" in done.stderr.split("poisoned gives nan")[1]
