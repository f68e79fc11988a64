"""The student's scores against a plain forward pass. Run: ./run_tests.sh tests/test_student.py"""

import copy
import math

import pytest
import torch
from conftest import ROWS
from families import COMMON
from transformers import AutoConfig, AutoModelForCausalLM

from data.render import Encoded, Renderer
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.models import load_model
from trainers.options import options_class
from trainers.rollout.overlap import ScoreAhead
from trainers.scoring.explanation_scorer import ExplanationScorer
from trainers.scoring.kept_scores import TENSORS, ScoreKeeper, load_kept
from trainers.scoring.loading import load_frozen
from trainers.scoring.reward_funcs import StudentReward
from trainers.student import Student


def make_student(model_dir, renderer, tokens_per_pass=4096, temperature=0.7):
    options = options_class("score")(student_mode="resident", student_tokens_per_pass=tokens_per_pass)
    frozen = load_frozen(options, str(model_dir), "student_model", torch.device("cpu"), torch.float32, temperature)
    return Student(frozen, renderer, 512)


def texts(renderer):
    return [renderer.encode(renderer.student(r["question"], r["reasoning_trace"], r["solution"])) for r in ROWS]


def solved_text(model, renderer):
    """A text whose solution, and what ends it, are the model's own greedy continuation."""
    parts = renderer.student("What is 2+3?", "2+3=5", "")
    prefix = renderer.encode(parts[:5]).ids
    ids = torch.tensor([prefix])
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    greedy = ids[0, len(prefix) :].tolist()
    return renderer.encode(parts, {"solution": greedy[:2], "end": greedy[2:]})


@pytest.mark.parametrize("tokens_per_pass", [1, 100, 4096])
def test_scores_equal_a_plain_forward_of_each_text(model_dir, renderer, tokens_per_pass):
    plain = load_model(str(model_dir), torch.float32, "eager", "student_model", False)
    read = [*texts(renderer), solved_text(plain, renderer)]
    scores = make_student(model_dir, renderer, tokens_per_pass).score(read)
    assert [score.solves for score in scores] == [False, False, False, False, True]
    for text, score in zip(read, scores, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([text.ids])).logits[0]
        logprobs = (logits / 0.7).log_softmax(-1)
        explained = text.spans["padding"][0], text.spans["explanation"][1]
        for (start, end), got in (
            (explained, score.explanation_logprobs),
            (text.spans["solution"], score.solution_logprobs),
        ):
            expected = torch.stack([logprobs[t - 1, text.ids[t]] for t in range(start, end)])
            assert torch.allclose(got, expected, atol=1e-5)
        start = text.spans["solution"][0]
        closing = text.spans["end"][0]
        greedy = all(logits[t - 1].argmax() == text.ids[t] for t in range(start, closing + 1))
        assert score.solves == greedy


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_long_texts_change_no_other_s_scores(tmp_path, mode):
    """transformers takes LongRoPE's long factors for a whole batch where its longest row is long (Phi-3.5-mini)."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    lengths = {"max_position_embeddings": 128, "original_max_position_embeddings": 32}
    config = AutoConfig.for_model("phi3", **COMMON | lengths, rope_parameters=rope, initializer_range=0.2)
    plain = AutoModelForCausalLM.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    options = options_class("score")(student_mode=mode, student_tokens_per_pass=4096)
    frozen = load_frozen(options, str(tmp_path), "student_model", torch.device("cpu"), torch.float32, 1.0)
    texts = [Encoded(torch.randint(3, 470, (n,)).tolist(), {}, []) for n in (30, 34, 31, 33, 32)]
    scores = frozen.score(texts, [[(1, len(text.ids))] for text in texts])
    for text, (logprobs, _) in zip(texts, scores, strict=True):
        with torch.no_grad():
            logits = plain(torch.tensor([text.ids])).logits[0]
        expected = logits.log_softmax(-1)[range(len(text.ids) - 1), text.ids[1:]]
        assert torch.allclose(logprobs[1:], expected, atol=1e-5)


def test_a_token_that_the_student_has_no_row_for_is_told(model_dir, renderer):
    """As Qwen2.5-7B may sample 152000, which Qwen2.5-3B's embedding does not reach."""
    student = make_student(model_dir, renderer)
    text = texts(renderer)[0]
    assert student.why_not(text) is None
    start = text.spans["explanation"][0]
    ids = [*text.ids[:start], 512, *text.ids[start + 1 :]]
    told = student.why_not(Encoded(ids, text.spans, text.sampled))
    assert told == "token 512 was sampled, and the student's embedding has 512 rows"


def test_solves_is_what_greedy_decoding_writes(model_dir, renderer):
    """Force the student's own greedy continuation to be the solution: it must count as solved, a changed one not."""
    student = make_student(model_dir, renderer)
    solved = solved_text(student.frozen.backbone.model, renderer)
    missed = Encoded([*solved.ids[:-1], (solved.ids[-1] + 1) % 400], solved.spans, solved.sampled)
    assert [s.solves for s in student.score([solved, missed])] == [True, False]


def make_reward(student, teacher, padding_in_kl=True, **options):
    scorer = ExplanationScorer(student, TeacherLogprobKL(**options), teacher, padding_in_kl)
    return StudentReward(scorer)


def call(reward, completion_ids, logprobs, rows=ROWS[:1]):
    metrics = {}
    rewards = reward(
        completion_ids=completion_ids,
        question=[r["question"] for r in rows],
        solution=[r["solution"] for r in rows],
        teacher_logprobs=logprobs,
        log_metric=metrics.__setitem__,
        log_extra=lambda *_: None,
    )
    return rewards, metrics


def test_reward_of_a_completion_by_hand(model_dir, renderer):
    tokenizer = renderer.tokenizer
    student = make_student(model_dir, renderer)
    explanation = renderer.encode_text("2+3=5")
    completion = explanation + renderer.encode_text("<|end_of_explanation|>") + [tokenizer.eos_token_id]
    padding = len(renderer.padding_ids)
    assert padding
    teacher = [-0.1 * i for i in range(padding + len(completion))]
    (reward,), metrics = call(make_reward(student, renderer), [completion], [teacher])
    (score,) = student.score(texts(renderer)[:1])
    kl = torch.tensor(teacher[: padding + 5]) - score.explanation_logprobs
    expected = score.solution_logprobs.mean() + 0.01 * score.solution_logprobs.min() - 3 * kl.mean() - 0.03 * kl.max()
    assert reward == pytest.approx(expected.item(), abs=1e-5)
    assert metrics["explanation_length"] == 5
    assert metrics["match_reward"] == 0


def test_kept_scores_are_those_of_the_whole_rollout_scored_ahead_or_not(model_dir, renderer, tmp_path):
    student = make_student(model_dir, renderer)
    rows = [row for row in ROWS for _ in range(2)]
    completions = [renderer.encode_text(f"{i} {row['reasoning_trace']}") for i, row in enumerate(rows)]
    completions[5] = renderer.encode_text("too long" * 200)
    logprobs = [[-0.1 * i] * (len(renderer.padding_ids) + len(ids)) for i, ids in enumerate(completions)]
    for way in ("at once", "ahead"):
        reward = make_reward(student, renderer)
        reward.scorer.keeper = ScoreKeeper(tmp_path / way, by_batch=True, formula=TeacherLogprobKL())
        for _ in range(2):
            if way == "ahead":
                reward.ahead = reward.ahead or ScoreAhead(reward.score, torch.device("cpu"))
                for places in ([4, 5], [0, 1], [6, 7], [2, 3]):  # as the engine happens to finish them
                    reward.ahead.submit(
                        places,
                        completion_ids=[completions[i] for i in places],
                        question=[rows[i]["question"] for i in places],
                        solution=[rows[i]["solution"] for i in places],
                        teacher_logprobs=[logprobs[i] for i in places],
                    )
            rewards, _ = call(reward, [*completions], logprobs, rows)
            assert [i for i, value in enumerate(rewards) if value is None] == [5]
    at_once, ahead = (load_kept(tmp_path / way) for way in ("at once", "ahead"))
    assert [row.batch for row in at_once] == [1] * 7 + [2] * 7
    for ours, theirs in zip(at_once, ahead, strict=True):
        assert (ours.question, ours.explanation, ours.batch) == (theirs.question, theirs.explanation, theirs.batch)
        assert ours.reward == pytest.approx(theirs.reward, abs=1e-5)
        for name in TENSORS:
            assert torch.allclose(getattr(ours.tokens, name), getattr(theirs.tokens, name), atol=1e-5)
        tokens, text = ours.tokens, renderer.tags.padding + ours.explanation
        sides = (tokens.teacher_logprobs, tokens.teacher_ends), (tokens.student_logprobs, tokens.student_ends)
        for logprobs, ends in sides:
            assert len(logprobs) == len(ends) and ends == sorted(ends) and ends[-1] == len(text)
        assert len(tokens.solution_logprobs) == len(tokens.solution_ends)
        assert tokens.solution_ends[-1] == len(ours.solution)


def test_without_the_padding_the_kl_covers_what_was_sampled(model_dir, renderer):
    student = make_student(model_dir, renderer)
    explanation = renderer.encode_text("2+3=5")
    completion = explanation + renderer.encode_text("<|end_of_explanation|>") + [renderer.tokenizer.eos_token_id]
    teacher = [-0.1 * i for i in range(len(completion))]
    _, metrics = call(make_reward(student, renderer, padding_in_kl=False), [completion], [teacher])
    (score,) = student.score(texts(renderer)[:1])
    kl = torch.tensor(teacher[:5]) - score.explanation_logprobs[len(renderer.padding_ids) :]
    assert metrics["reasoning_kl_mean"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert metrics["reasoning_kl_sum"] == pytest.approx(kl.sum().item(), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_poison_that_clipping_or_a_median_would_hide_stops_too(model_dir, renderer, poison):
    student = make_student(model_dir, renderer)
    hiding = {"clip_kl": 2.0, "reduction_kl_fn": "median", "kl_penalty_reward_coeff": 1.0}
    reward = make_reward(student, renderer, padding_in_kl=False, **hiding)
    ids = renderer.encode_text("2+3")
    with pytest.raises(FloatingPointError, match=r"teacher's log-prob of the explanation"):
        call(reward, [ids], [[-1.0] * (len(ids) - 1) + [poison]])


def test_poisoned_score_stops_with_the_sample_named(model_dir, renderer):
    reward = make_reward(make_student(model_dir, renderer), renderer)
    with pytest.raises(FloatingPointError, match=r"What is 2\+3[\s\S]*precision"):
        call(reward, [renderer.encode_text("2+3")], [[math.nan] * 5])


def test_text_longer_than_the_student_reads_is_none_and_counted(model_dir, renderer):
    reward = make_reward(make_student(model_dir, renderer), renderer)
    reward.scorer.student.max_tokens = 10
    rewards, metrics = call(reward, [renderer.encode_text("2+3")], [[-1.0] * 5])
    assert rewards == [None]
    assert metrics["unscorable_fraction"] == 1.0


def test_teacher_with_another_tokenizer_is_compared_over_pieces_of_text(model_dir, renderer, tags, tmp_path):
    from trainers.models import make_tokenizer

    other = make_tokenizer(["2+3=5 " * 5], tags.every_tag, 300)
    other.add_tokens(["2+3", "\n\n"])  # one token where the student has three, and one where it has two
    student = make_student(model_dir, renderer)
    explanation = other("2+3=5", add_special_tokens=False)["input_ids"]
    assert len(explanation) == 3
    completion = explanation + other(tags.explanation[1], add_special_tokens=False)["input_ids"]
    teacher = Renderer(other, tags, None, "model_name_or_path")
    reward = make_reward(student, teacher)
    reward.scorer.keeper = ScoreKeeper(tmp_path, by_batch=True, formula=TeacherLogprobKL())
    assert not reward.scorer.same_tokenizer
    assert len(teacher.padding_ids) == 1  # one token
    assert len(renderer.padding_ids) == 2  # where the student has two
    (total,), metrics = call(reward, [completion], [[-2.0, -0.5, -0.25, -0.125, -1.0]])
    (score,) = student.score(texts(renderer)[:1])
    lp = score.explanation_logprobs  # of the padding, and 2 + 3 = 5
    kl = torch.stack([-2.0 - lp[:2].sum(), -0.5 - lp[2:5].sum(), -0.25 - lp[5], -0.125 - lp[6]])
    solution = score.solution_logprobs
    expected = solution.mean() + 0.01 * solution.min() - 3 * kl.mean() - 0.03 * kl.max()
    assert total == pytest.approx(expected.item(), abs=1e-5)
    (kept,) = load_kept(tmp_path)  # token by token, on both sides
    assert kept.tokens.teacher_logprobs.tolist() == [-2.0, -0.5, -0.25, -0.125]
    assert torch.equal(kept.tokens.student_logprobs, lp)
    start = len(tags.padding)
    assert kept.tokens.teacher_ends == [start, start + 3, start + 4, start + 5]
    assert kept.tokens.student_ends == [1, start, *range(start + 1, start + 6)]
    assert kept.tokens.solution_ends == [1] and kept.reward == total
    assert TeacherLogprobKL()(kept.scored)[0] == total


def test_student_is_frozen(model_dir, renderer):
    student = make_student(model_dir, renderer)
    before = copy.deepcopy(student.frozen.backbone.model.state_dict())
    student.score(texts(renderer))
    assert not any(p.requires_grad for p in student.frozen.backbone.model.parameters())
    assert all(torch.equal(before[name], value) for name, value in student.frozen.backbone.model.state_dict().items())
