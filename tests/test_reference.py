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

from data.explanation import read_explanation, written_explanation
from data.formats import TAG_FORMATS
from data.render import Renderer
from rewards.reductions import REDUCTIONS
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.scoring.explanation_scorer import ExplanationScorer, teacher_logprobs
from trainers.scoring.frozen import FrozenModel, ResidentBackbone
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
    scorer = ExplanationScorer(Student(frozen, student, 2048), formula(options), teacher, True)
    questions, solutions = [row["question"] for row in rows], [row["solution"] for row in rows]
    explanations = [written_explanation(teacher, row["explanation"], row["closed"]) for row in rows]
    temperature = options["temperature"] if options["unbias_teacher_log_probs"] else 1.0
    model = FrozenModel(teacher_model, temperature, 8192)
    logprobs = teacher_logprobs(questions, solutions, explanations, teacher, model, True)
    scores = scorer.score(questions, explanations, solutions, logprobs)
    assert len(scores) == len(REFERENCE["numbers"][options["name"]]) == 200
    names = ["solution_log_prob_reward", "kl_reward", "match_reward"]
    names += [f"answer_log_prob_{r}" for r in REDUCTIONS] + [f"reasoning_kl_{r}" for r in REDUCTIONS]
    # Where e^x of a log-ratio enters, fp32's error of the logits becomes a relative one, of up to 5e-6.
    is_exponential = options["use_schulman_kl_estimation"] or "exp_norm" in (
        options["normalize_log_prob_fn"],
        options["normalize_kl_fn"],
    )
    relative = 1e-5 if is_exponential else 0
    for row, score, expected in zip(rows, scores, REFERENCE["numbers"][options["name"]], strict=True):
        found = [score.reward, *(score.parts.get(f"unprocessed_{name}", score.parts[name]) for name in names)]
        for name, ours, theirs in zip(["reward", *names], found, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4, rel=relative), (name, row)


def test_the_columns_are_in_the_order_compared():
    reductions = list(REDUCTIONS)
    assert [name.rpartition("/")[2] for name in REFERENCE["columns"][4:]] == reductions * 2


# Where the reference is wrong (its numbers for "What is 2+3?" and these models: an empty solution earns 3.4e36; an
# explanation equal to the question is scored at the question; one whose last sign merges with the tag loses it; a
# log-softmax in bf16 is off by up to 0.05).


def plain(backbone, encoded, temperature):
    """Log-probability of each token by a plain forward and an fp32 softmax; 0 for the first."""
    with torch.no_grad():
        logits = backbone.model(torch.tensor([encoded.ids])).logits[0].float()
    logprobs = (logits / temperature).log_softmax(-1)[:-1]
    return torch.cat([torch.zeros(1), logprobs.gather(1, torch.tensor(encoded.ids[1:])[:, None])[:, 0]])


def scored_by_student(models, question, explanation, solution):
    """Ours, and the same spans of a plain forward: explanation with its padding, solution."""
    _, renderer, _, model = models
    encoded = renderer.encode(renderer.student(question, explanation, solution))
    (score,) = Student(FrozenModel(model, 0.7, 8192), renderer, 2048).score([encoded])
    before = len("".join(part.text for part in renderer.student(question, explanation, solution)[:2]))
    return score, encoded, plain(model, encoded, 0.7), before


def test_an_empty_solution_has_no_score_and_a_reason(models):
    teacher, student, _, model = models
    scorer = ExplanationScorer(Student(FrozenModel(model, 0.7, 8192), student, 2048), TeacherLogprobKL(), teacher, True)
    explanation = written_explanation(teacher, "2+3=5", True)
    logprobs = torch.zeros(len(teacher.padding_ids) + len(explanation.ids))
    assert scorer.score(["What is 2+3?"], [explanation], [""], [logprobs]) == ["the solution has no tokens"]


@pytest.mark.parametrize(
    ("question", "explanation", "solution"),
    [
        ("What is 2+3?", "What is 2+3?", "5"),
        ("5", "5", "5"),
        ("Hint.\n\nWhat is it?", "What is it?", "\n\nWhat is it?"),
    ],
)
def test_an_explanation_equal_to_the_question_is_scored_where_it_stands(models, question, explanation, solution):
    score, encoded, expected, before = scored_by_student(models, question, explanation, solution)
    tokenizer = models[1].tokenizer
    start, end = encoded.spans["padding"][0], encoded.spans["explanation"][1]
    assert tokenizer.decode(encoded.ids[:start]).endswith("<|begin_of_thought|>")
    assert len(tokenizer.decode(encoded.ids[:start])) == before
    assert tokenizer.decode(encoded.ids[start:end]) == "\n\n" + explanation
    assert torch.allclose(score.explanation_logprobs, expected[start:end], atol=1e-5)
    assert torch.allclose(score.solution_logprobs, expected[slice(*encoded.spans["solution"])], atol=1e-5)


@pytest.mark.parametrize("explanation", [")))we add two)))", "so 7.", ".", "<|", "|>\n", "((( x )))<"])
def test_signs_that_could_merge_with_a_tag_are_kept(models, explanation):
    """A tokenizer for which tags are ordinary text, with merges across their borders."""
    from trainers.models import make_tokenizer

    tags = models[1].tags
    text = ".<|end_of_thought|> )<|end_of_explanation|> |>\n\n.<|end_of_solution|> so 7. What is it? system user\n"
    tokenizer = make_tokenizer([text] * 50, [], 400)
    together, apart = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (".<|end_of_thought|>", "."))
    assert together[: len(apart)] != apart  # they do merge
    renderer = Renderer(tokenizer, tags, None, "student_model")
    encoded = renderer.encode(renderer.student("What is it?", explanation, "7."))
    start, end = encoded.spans["padding"][0], encoded.spans["explanation"][1]
    assert tokenizer.decode(encoded.ids[start:end]) == "\n\n" + explanation
    assert tokenizer.decode(encoded.ids[slice(*encoded.spans["solution"])]) == "7."
    read = read_explanation(
        tokenizer, renderer.encode_text(explanation + tags.explanation[1]), tags.explanation[1], set()
    )
    assert (read.text, read.closed) == (explanation, True)
    # What the student reads of it is the whole explanation; what is compared are the tokens that are all the teacher's.
    model = make_model(tokenizer, 0)
    scorer = ExplanationScorer(
        Student(FrozenModel(model, 0.7, 8192), renderer, 2048), TeacherLogprobKL(), renderer, False
    )
    (score,) = scorer.score(["What is it?"], [read], ["7."], [torch.full((len(read.ids),), -1.0)])
    ids = {"explanation": read.ids + renderer.encode_text(read.tail)}
    assert tokenizer.decode(ids["explanation"]) == explanation
    encoded = renderer.encode(renderer.student("What is it?", explanation, "7."), ids)
    expected = plain(model, encoded, 0.7)
    start = encoded.spans["explanation"][0]
    solution = expected[slice(*encoded.spans["solution"])]
    assert score.parts["answer_log_prob_mean"] == pytest.approx(solution.mean().item(), abs=1e-4)
    kl = -1.0 - expected[start : start + len(read.ids)]
    assert score.parts["reasoning_kl_sum"] == pytest.approx(kl.sum().item(), abs=1e-3)


def test_softmax_of_a_bf16_model_is_in_fp32(models):
    tokenizer = models[0].tokenizer
    backbone = make_model(tokenizer, 1)
    backbone.model.to(torch.bfloat16)
    encoded = models[1].encode(models[1].student("What is 2+3?", "2 and 3 are 5", "5"))
    span = (1, len(encoded.ids))
    ((ours, _),) = FrozenModel(backbone, 0.7, 8192).score([encoded], [[span]])
    with torch.no_grad():
        hidden = backbone.model.model(torch.tensor([encoded.ids])).last_hidden_state[0, :-1]
    logits = hidden.float() @ backbone.model.lm_head.weight.float().T / 0.7
    targets = torch.tensor(encoded.ids[1:])[:, None]
    exact = logits.log_softmax(-1).gather(1, targets)[:, 0]
    coarse = logits.bfloat16().log_softmax(-1).gather(1, targets)[:, 0].float()
    assert (ours[1:] - exact).abs().max() < 1e-4
    assert (coarse - exact).abs().max() > 0.01  # what a softmax in bf16 would be off by
