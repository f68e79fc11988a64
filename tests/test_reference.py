"""The reference implementation's numbers. Run: ./run_tests.sh tests/test_reference.py

`reference/scores.json` holds what the reward code of "Reinforcement Learning Teachers" gave, unmodified, in fp32, for
200 random texts with ten sets of options and two random models, on texts where its search finds the true spans.
Here are the same texts, the same models (made again from their seeds) and this project's reward.
"""

import json

import pytest
import torch
from conftest import REPO
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from data.explanation import written_explanation
from data.formats import TAG_FORMATS
from data.render import Renderer
from rewards.reductions import REDUCTIONS
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.frozen import FrozenModel, ResidentBackbone
from trainers.scoring import ExplanationScorer, teacher_logprobs
from trainers.student import Student

FOLDER = REPO / "tests" / "reference"
REFERENCE = json.loads((FOLDER / "scores.json").read_text(encoding="utf-8"))
NOT_FORMULA = {"name", "temperature", "unbias_teacher_log_probs", "unbias_student_log_probs_temp"}


def make_model(tokenizer, seed):
    config = Qwen2Config(
        vocab_size=416,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return ResidentBackbone(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval(), torch.device("cpu"))


@pytest.fixture(scope="module")
def models():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "tokenizer", padding_side="left")
    prompts = REFERENCE["system_prompts"]
    tags = TAG_FORMATS["stratos"].with_prompts(prompts["teacher"], prompts["student"])
    renderers = [Renderer(tokenizer, tags, None, key) for key in ("model_name_or_path", "student_model")]
    return *renderers, make_model(tokenizer, 0), make_model(tokenizer, 1)


def formula(options):
    """The reference's options; what it leaves unset is what it does without."""
    values = {name: value for name, value in options.items() if name not in NOT_FORMULA}
    values["include_teacher_think_entropy"] = values["include_teacher_think_entropy"] is not False
    return TeacherLogprobKL(**values)


@pytest.mark.parametrize("options", REFERENCE["options"], ids=lambda options: options["name"])
def test_totals_parts_and_reductions_are_the_reference_s(models, options):
    teacher, student, teacher_model, student_model = models
    rows = REFERENCE["rows"]
    frozen = FrozenModel(student_model, options["unbias_student_log_probs_temp"] or 1.0, 8192)
    scorer = ExplanationScorer(Student(frozen, student, 2048), formula(options), teacher)
    questions, solutions = [row["question"] for row in rows], [row["solution"] for row in rows]
    explanations = [written_explanation(teacher, row["explanation"], row["closed"]) for row in rows]
    temperature = options["temperature"] if options["unbias_teacher_log_probs"] else 1.0
    model = FrozenModel(teacher_model, temperature, 8192)
    logprobs = teacher_logprobs(questions, solutions, explanations, teacher, model)
    scores = scorer.score(questions, explanations, solutions, logprobs)
    assert len(scores) == len(REFERENCE["numbers"][options["name"]]) == 200
    names = ["solution_log_prob_reward", "kl_reward", "match_reward"]
    names += [f"answer_log_prob_{r}" for r in REDUCTIONS] + [f"reasoning_kl_{r}" for r in REDUCTIONS]
    for row, score, expected in zip(rows, scores, REFERENCE["numbers"][options["name"]], strict=True):
        found = [score.reward, *(score.parts.get(f"unprocessed_{name}", score.parts[name]) for name in names)]
        for name, ours, theirs in zip(["reward", *names], found, expected, strict=True):
            # Seven digits of theirs are kept, and where e^x of a log-ratio enters (Schulman, exp_norm), values of
            # thousands carry fp32's error of the logits as a relative one.
            assert ours == pytest.approx(theirs, abs=1e-4, rel=1e-5), (name, row)


def test_the_columns_are_in_the_order_compared():
    reductions = list(REDUCTIONS)
    assert [name.rpartition("/")[2] for name in REFERENCE["columns"][4:]] == reductions * 2
