"""Properties of spans and pieces for any text. Run: ./run_tests.sh tests/test_properties.py"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.explanation import read_explanation
from data.offsets import encode_with_ends, token_ends
from rewards.alignment import piece_sums

FIXTURE = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Any text but lone surrogates, with the tags themselves and byte sequences of several tokens mixed in.
PIECES = st.sampled_from(
    ["<|end_of_explanation|>", "<|begin_of_thought|>", "<|im_end|>", "☕", "𝒳", "e\u0301", "\n\n", " 12"]
)
TEXT = st.lists(st.one_of(st.text(max_size=12), PIECES), max_size=8).map("".join)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@FIXTURE
@given(text=TEXT)
def test_token_ends_cover_the_text_in_order(tokenizer, text):
    decoded, ends = token_ends(tokenizer, encode(tokenizer, text))
    assert decoded == text
    assert ends == sorted(ends)
    assert (ends[-1] if ends else 0) == len(text)
    assert encode_with_ends(tokenizer, text) == (encode(tokenizer, text), ends)


@FIXTURE
@given(question=TEXT, explanation=TEXT, solution=TEXT)
def test_every_part_of_a_student_text_is_cut_out_exactly(renderer, question, explanation, solution):
    parts = renderer.student(question, explanation, solution)
    encoded = renderer.encode(parts)
    cursor = 0
    for part in parts:
        start, end = encoded.spans[part.name]
        assert start == cursor  # parts follow each other without gap or overlap
        assert renderer.tokenizer.decode(encoded.ids[start:end]) == part.text
        cursor = end
    assert cursor == len(encoded.ids)


def test_a_very_long_explanation_is_cut_out_exactly(renderer, tokenizer, tags):
    explanation = "café ☕ 12 + 3\n<|begin_of_thought|> 𝒳 " * 3000
    parts = renderer.student("q", explanation, "s")
    encoded = renderer.encode(parts)
    assert len(encoded.ids) > 30_000
    assert tokenizer.decode(encoded.ids[slice(*encoded.spans["explanation"])]) == explanation
    read = read_explanation(tokenizer, encode(tokenizer, explanation + tags.explanation[1]), tags.explanation[1], set())
    assert (read.text, read.closed, len(read.ends)) == (explanation, True, len(read.ids))
    assert read.ends[-1] == len(explanation)


@FIXTURE
@given(explanation=TEXT, rest=TEXT)
def test_an_explanation_is_what_stands_before_the_first_closing_tag(tokenizer, tags, explanation, rest):
    tag, eos = tags.explanation[1], tokenizer.eos_token_id
    ids = encode(tokenizer, explanation) + encode(tokenizer, tag) + encode(tokenizer, rest)
    whole = (explanation + tag + rest).partition("<|im_end|>")[0]  # the end of turn ends it, whatever follows
    read = read_explanation(tokenizer, ids, tag, {eos})
    assert read.closed == (tag in whole)
    assert read.text == whole.partition(tag)[0]
    assert tokenizer.decode(read.ids) == read.text
    assert len(read.ends) == len(read.ids)


CUTS = st.lists(st.integers(1, 30), min_size=1, max_size=12).map(
    lambda sizes: [sum(sizes[: i + 1]) for i in range(len(sizes))]
)


@FIXTURE
@given(teacher=CUTS, student=CUTS)
def test_pieces_lose_nothing_of_either_side(teacher, student):
    end = max(teacher[-1], student[-1])
    teacher, student = sorted({*teacher, end}), sorted({*student, end})  # both cover the same text
    left = torch.arange(1.0, len(teacher) + 1)
    right = -torch.arange(1.0, len(student) + 1)
    pieces = piece_sums(left, teacher, right, student)
    assert len(pieces[0]) == len(pieces[1]) == len(set(teacher) & set(student))
    assert pieces[0].sum().item() == pytest.approx(left.sum().item())
    assert pieces[1].sum().item() == pytest.approx(right.sum().item())
