"""Texts, tokens and spans. Run: ./run_tests.sh tests/test_texts.py"""

import shutil
import unicodedata
from copy import copy
from functools import cache
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.explanation import read_explanation, written_explanation
from data.formats import TAG_FORMATS
from data.offsets import encode_with_ends, token_ends
from data.render import Renderer
from trainers.errors import ConfigError
from trainers.models import choose_pad_token, load_tokenizer, make_tokenizer

GOLDEN_TEACHER = """<|im_start|>system
Explain.<|im_end|>
<|im_start|>user
What is 2+3?<|im_end|>
<|im_start|>assistant
<|begin_of_solution|>5<|end_of_solution|>

<|begin_of_explanation|>

2+3=5<|end_of_explanation|><|im_end|>"""

GOLDEN_STUDENT = """<|im_start|>system
Solve.<|im_end|>
<|im_start|>user
What is 2+3?<|im_end|>
<|im_start|>assistant
<|begin_of_thought|>

2+3=5<|end_of_thought|>

<|begin_of_solution|>5<|end_of_solution|><|im_end|>"""

GOLDEN_R1_TEACHER = """<|im_start|>system
{system}<|im_end|>
<|im_start|>user
What is 2+3?<|im_end|>
<|im_start|>assistant
<answer>5</answer>

<explanation>

2+3=5</explanation><|im_end|>"""


def text_of(parts):
    return "".join(part.text for part in parts)


def test_teacher_text_is_laid_out_as_designed(renderer):
    parts = renderer.teacher("What is 2+3?", "5", "2+3=5")
    assert text_of(parts) == GOLDEN_TEACHER
    assert "".join(p.text for p in parts if p.sampled) == "2+3=5<|end_of_explanation|><|im_end|>"


def test_student_text_is_laid_out_as_designed(renderer):
    parts = renderer.student("What is 2+3?", "2+3=5", "5")
    assert text_of(parts) == GOLDEN_STUDENT
    assert text_of([p for p in parts if not p.sampled]).endswith("assistant\n")


def test_r1_tags_and_their_own_system_prompt(tokenizer):
    tags = TAG_FORMATS["r1"]
    renderer = Renderer(tokenizer, tags, None, "model_name_or_path")
    expected = GOLDEN_R1_TEACHER.format(system=tags.teacher_system_prompt)
    assert text_of(renderer.teacher("What is 2+3?", "5", "2+3=5")) == expected


@pytest.mark.parametrize("tag_format", ["r1", "stratos"])
@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n"])
def test_a_thought_that_the_template_opens_is_opened_once_and_in_the_format_s_tags(tokenizer, opening, tag_format):
    """As R1-Distill's and QwQ's do."""
    reasoning = copy(tokenizer)
    reasoning.chat_template += "{% if add_generation_prompt %}{{ '" + opening.replace("\n", "\\n") + "' }}{% endif %}"
    plain, opened = (Renderer(each, TAG_FORMATS[tag_format], None, "student_model") for each in (tokenizer, reasoning))
    assert text_of(opened.student("q", "e", "s")) == text_of(plain.student("q", "e", "s"))
    assert text_of(opened.teacher("q", "s", "e")) == text_of(plain.teacher("q", "s", "e"))
    assert opening in opened._apply(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}], add_generation_prompt=True
    )


def test_a_thought_that_the_template_has_closed_stays(tokenizer, tags):
    """As Qwen3's with enable_thinking=false does."""
    closing = copy(tokenizer)
    closing.chat_template += "{% if add_generation_prompt %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    student = text_of(Renderer(closing, tags, None, "student_model").student("q", "e", "s"))
    assert "assistant\n<think>\n\n</think>\n\n<|begin_of_thought|>" in student


def test_texts_do_not_depend_on_the_day(tokenizer, tags):
    dated = copy(tokenizer)
    dated.chat_template = "Today Date: {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    heads = [
        Renderer(dated, tags, kwargs, "student_model").student("q", "e", "s")[0].text.partition("\n")[0]
        for kwargs in (None, {"strftime_now": lambda form: "my day"})
    ]
    assert heads == ["Today Date: 26 Jul 2024", "Today Date: my day"]
    dated.chat_template = "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    dated.chat_template += "{{ date_string }}\n" + tokenizer.chat_template
    own = Renderer(dated, tags, {"date_string": "30 Nov 2026"}, "student_model")
    assert own.student("q", "e", "s")[0].text.startswith("30 Nov 2026\n")


def test_spans_cut_out_exactly_the_parts(renderer):
    parts = renderer.student("What is 2+3?", "What is 2+3?", "5")  # an explanation equal to the question
    encoded = renderer.encode(parts)
    for part in parts:
        start, end = encoded.spans[part.name]
        assert renderer.tokenizer.decode(encoded.ids[start:end]) == part.text
    assert len(encoded.sampled) == len(encoded.ids)


def test_given_ids_replace_the_encoding_of_a_part(renderer):
    ids = renderer.encode_text("2") + renderer.encode_text("+") + renderer.encode_text("3=5")
    encoded = renderer.encode(renderer.student("q", "2+3=5", "5"), {"explanation": ids})
    start, end = encoded.spans["explanation"]
    assert encoded.ids[start:end] == ids


def test_template_without_system_role_gets_it_with_the_question(tokenizer, tags):
    import copy

    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    renderer = Renderer(refusing, tags, None, "model_name_or_path")
    assert "<|im_start|>user\nExplain.\n\nWhat is 2+3?<|im_end|>" in text_of(renderer.teacher("What is 2+3?", "5", ""))


def test_model_without_template_is_refused_with_a_remedy(tokenizer, tags):
    import copy

    base = copy.deepcopy(tokenizer)
    base.chat_template = None
    with pytest.raises(ConfigError, match=r"no chat template[\s\S]*student_chat_template="):
        Renderer(base, tags, None, "student_model")


def test_eos_that_is_not_the_turn_end_is_refused(tokenizer, tags):
    import copy

    wrong = copy.deepcopy(tokenizer)
    wrong.eos_token = "<|endoftext|>"
    with pytest.raises(ConfigError, match=r"never end[\s\S]*eos_token='<\|im_end\|>'"):
        Renderer(wrong, tags, None, "model_name_or_path")


def test_pad_token_is_never_the_eos(tokenizer):
    import copy

    padless = copy.deepcopy(tokenizer)
    padless.pad_token = padless.eos_token
    choose_pad_token(padless, 512, "model_name_or_path")
    assert padless.pad_token == "<|endoftext|>"

    full = copy.deepcopy(tokenizer)
    full.pad_token = full.eos_token = "<|endoftext|>"
    choose_pad_token(full, len(full) + 1, "model_name_or_path")  # nothing reserved: a new token in a free row
    assert full.pad_token_id == len(tokenizer)

    no_room = copy.deepcopy(tokenizer)  # as GPT-2 and DialoGPT are
    no_room.pad_token = no_room.eos_token = "<|endoftext|>"
    choose_pad_token(no_room, len(no_room), "model_name_or_path")
    assert no_room.decode([no_room.pad_token_id]) == "\x00"


def test_tokenizer_without_any_spare_token_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "word": 1}, unk_token="</s>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    with pytest.raises(ConfigError, match="no free row"):
        choose_pad_token(bare, 2, "model_name_or_path")


@pytest.mark.parametrize("text", ["2+3=5", "naïve café ☕ 𝒳²", "tab\there\n\nlines", "日本語のテキスト"])
def test_token_ends_follow_the_text_character_by_character(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoded, ends = token_ends(tokenizer, ids)
    assert decoded == text
    assert ends[-1] == len(text)
    assert ends == sorted(ends)
    for count, end in enumerate(ends, 1):
        prefix = tokenizer.decode(ids[:count])
        if not prefix.endswith("\ufffd"):
            assert prefix == text[:end]


def composing():
    """Of Qwen's kind: the text is brought into its composed form first."""
    made = make_tokenizer(["café ☕ 12"] * 9, [], 400)
    made.backend_tokenizer.normalizer = normalizers.NFC()
    return made


def with_bytes():
    """Of Llama 2's kind: words begin with a sign for the space, what is not in the vocabulary is bytes."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "▁b", "▁c", "2", "3", "a", "b", "c"]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", x) for x in "abc"], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


@pytest.mark.parametrize("make", [composing, with_bytes])
@pytest.mark.parametrize("text", ["a 😀 b c", "2 × 3", "cafe\u0301 b", "☕", "a"])
def test_ends_of_written_and_of_read_tokens_agree_whatever_the_tokenizer_does(make, text):
    tokenizer = make()
    ids, ends = encode_with_ends(tokenizer, text)
    alone, after = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("2", f"2{text}"))
    assert alone + ids == after  # no space is put between
    assert len(ids) == len(ends) and ends == sorted(ends) and ends[-1] == len(text)
    composed = unicodedata.normalize("NFC", text)
    read, read_ends = token_ends(tokenizer, ids)
    assert read == (composed if make is composing else text)
    if text == composed:
        assert ends == read_ends


def straddling():
    """A vocabulary with a token of a space and the first byte of what follows it."""
    bytes_of_text = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*bytes_of_text, "Ġâ"])}, [("Ġ", "â")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_token_that_begins_before_a_character_and_ends_in_it_ends_before_it():
    ids, ends = encode_with_ends(straddling(), "a ☕ b")
    assert len(ids) == 6 and ends == [1, 1, 1, 3, 4, 5]  # a, space and a byte, two bytes, space, b
    assert token_ends(straddling(), ids) == ("a ☕ b", ends)


def test_a_text_of_which_no_token_is_made():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert encode_with_ends(PreTrainedTokenizerFast(tokenizer_object=backend), "   ") == ([], [])


@pytest.mark.parametrize("explanation", ["a b", " a", "2 × 3 ☕", "\n\nb", ""])
def test_parts_hold_no_space_that_nobody_wrote(tags, explanation):
    """Llama 2's tokenizer puts one before whatever it is given; the student would look for ' 2' where 2 is written."""
    tokenizer = with_bytes()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    reader = Renderer(tokenizer, tags, None, "student_model")
    parts = reader.student("a b", explanation, "2")
    encoded = reader.encode(parts)
    assert [tokenizer.convert_ids_to_tokens(encoded.ids[slice(*encoded.spans["solution"])])] == [["2"]]
    for part in parts[1:]:
        assert token_ends(tokenizer, encoded.ids[slice(*encoded.spans[part.name])])[0] == part.text
    written = encoded.ids[encoded.spans["open"][0] :]
    assert token_ends(tokenizer, written)[0] == "".join(part.text for part in parts[1:])


def test_bytes_that_never_become_a_character_take_no_longer_the_more_there_are(monkeypatch):
    tokenizer, decoded = with_bytes(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: (decoded.append(len(ids)), decode(ids, **kwargs))[1])
    byte, letter = tokenizer.convert_tokens_to_ids(["<0xE2>", "a"])
    text, ends = token_ends(tokenizer, [byte] * 300 + [letter])
    assert (text, ends[-1]) == ("\ufffd" * 300 + "a", 301) and ends == sorted(ends)
    assert max(decoded) < 10


def test_a_written_explanation_is_read_as_it_stands(renderer):
    """No sign of it comes twice, though the tokenizer joins an accent with its letter."""
    reader = copy(renderer)
    reader.tokenizer = composing()
    explanation = written_explanation(reader, "cafe\u0301 ok", closed=True)
    assert (explanation.text, explanation.tail) == ("cafe\u0301 ok", "")


def test_mistral_s_own_tokenizer_beside_another_is_not_taken(tokenizer, tmp_path):
    """That of mistral-common has no chat template."""
    data = Path(mistral_common.__file__).parent / "data"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    shutil.copy(data / "tekken_240911.json", tmp_path / "tekken.json")
    loaded = load_tokenizer(str(tmp_path), None, None, "model_name_or_path", False)
    assert loaded.chat_template == tokenizer.chat_template and loaded.get_vocab() == tokenizer.get_vocab()


def test_explanation_ends_at_the_first_closing_tag(tokenizer, tags):
    tag = tags.explanation[1]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    ids = encode("2+3=5") + encode(tag) + encode("more" + tag) + [tokenizer.eos_token_id]
    read = read_explanation(tokenizer, ids, tag, {tokenizer.eos_token_id})
    assert (read.text, read.closed, read.ids) == ("2+3=5", True, encode("2+3=5"))
    assert read.ends == [1, 2, 3, 4, 5]


def test_missing_closing_tag_and_empty_explanation(tokenizer, tags):
    tag = tags.explanation[1]
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    cut = read_explanation(tokenizer, encode("2+3"), tag, {tokenizer.eos_token_id})
    assert (cut.text, cut.closed) == ("2+3", False)
    empty = read_explanation(tokenizer, encode(tag), tag, {tokenizer.eos_token_id})
    assert (empty.text, empty.ids, empty.closed) == ("", [], True)


def test_closing_tag_split_over_plain_tokens_is_found(tags):
    """With a tokenizer that has no token for the tag, its first token may hold the end of the explanation."""
    plain = make_tokenizer(["a.<|end_of_explanation|> b.<|end"] * 50, [], 512)
    tag = tags.explanation[1]
    ids = plain("a b." + tag, add_special_tokens=False)["input_ids"]
    read = read_explanation(plain, ids, tag, {plain.eos_token_id})
    assert (read.text, read.closed) == ("a b.", True)
    assert plain.decode(read.ids) == "a b."[: len(plain.decode(read.ids))]


def token_by_token(tokenizer, ids, tag):
    """What is read of a completion whose every token is decoded by itself."""
    text, ends = token_ends(tokenizer, ids)
    cut = text.find(tag)
    count = len(ids) if cut < 0 else sum(end <= cut for end in ends)
    text = text if cut < 0 else text[:cut]
    return text, ids[:count], cut >= 0, ends[:count], text[ends[count - 1] if count else 0 :]


@cache
def made_once(make):
    return make()


SIGNS = ["a", " b", "a.", "<", "|end", "☕", "😀", " ☕", "e\u0301", "12", "\n\n", "\ufffd", "<|end_of_explanation|>"]


@pytest.mark.parametrize("make", [composing, with_bytes, straddling, lambda: make_tokenizer(["a"], SIGNS[-1:], 300)])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_completions_are_read_as_token_by_token(make, data):
    """Texts, and any tokens: with bytes that become no character, and tags of many tokens or of one."""
    tokenizer, tag = made_once(make), SIGNS[-1]
    texts = st.lists(st.sampled_from(SIGNS), max_size=30).map(
        lambda signs: tokenizer("".join(signs), add_special_tokens=False)["input_ids"]
    )
    tokens = st.lists(st.integers(0, len(tokenizer) - 1), max_size=40)
    ids = data.draw(texts) + data.draw(st.one_of(texts, tokens))
    read = read_explanation(tokenizer, ids, tag, set())
    assert (read.text, read.ids, read.closed, read.ends, read.tail) == token_by_token(tokenizer, ids, tag)


@pytest.mark.parametrize("make", [composing, with_bytes])
def test_reading_a_long_completion_decodes_few_of_its_tokens_by_themselves(make, monkeypatch):
    """Each costs 10 microseconds of a GPU's time; where they end is found when it is asked for."""
    tokenizer, tag, calls = make(), SIGNS[-1], []
    ids = tokenizer("2 a 3 b " * 2000 + tag + " a" * 2000, add_special_tokens=False)["input_ids"]
    expected = token_by_token(tokenizer, ids, tag)
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: (calls.append(1), decode(ids, **kwargs))[1])
    read = read_explanation(tokenizer, ids, tag, set())
    assert len(ids) > 10_000 and len(calls) < 150
    assert (read.text, read.ids, read.closed, read.ends, read.tail) == expected


def test_a_template_that_passes_over_the_system_role_gets_it_with_the_question(tokenizer, tags):
    silent = copy(tokenizer)
    silent.chat_template = "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n"
    silent.chat_template += "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    silent.chat_template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    renderer = Renderer(silent, tags, None, "model_name_or_path")
    assert "<|im_start|>user\nExplain.\n\nWhat is 2+3?<|im_end|>" in text_of(renderer.teacher("What is 2+3?", "5", ""))


@pytest.mark.parametrize(("template", "kwargs"), [("{% if %}", None), (None, {"tokenize": True})])
def test_a_template_that_cannot_be_rendered_is_told(tokenizer, tags, template, kwargs):
    broken = copy(tokenizer)
    broken.chat_template = template or tokenizer.chat_template
    with pytest.raises(ConfigError, match="cannot be rendered"):
        Renderer(broken, tags, kwargs, "model_name_or_path")
