"""Texts, tokens and spans. Run: ./run_tests.sh tests/test_texts.py"""

import json
import shutil
import unicodedata
from copy import copy
from pathlib import Path

import mistral_common
import pytest
from conftest import ROWS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.explanation import read_explanation, written_explanation
from data.formats import TAG_FORMATS
from data.load import load_rows
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


COLUMNS = {"question": "question", "solution": "solution", "reasoning_trace": "reasoning_trace"}


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


def test_csv_with_a_comma_at_the_end_of_its_lines_and_with_one_too_many(tmp_path, tags):
    file = tmp_path / "rows.csv"
    file.write_text('question,solution,explanation\nWhat is 2+3?,5,2+3=5,\n"a, b?",4,\n')
    rows = load_rows(str(file), "train", None, COLUMNS | {"explanation": "explanation"}, tags, "dataset_id_or_path")
    assert rows[0] == {"question": "What is 2+3?", "solution": "5", "explanation": "2+3=5"}
    assert rows[1]["question"] == "a, b?"
    file.write_text("question,solution,explanation\nWhat?,5,first this, then that\n")
    with pytest.raises(ConfigError, match="row 0 has 4 fields, the header 3"):
        load_rows(str(file), "train", None, COLUMNS, tags, "dataset_id_or_path")


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


def test_numbers_in_data_are_the_text_that_was_written(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"question": "q", "solution": x} for x in (5, 0.1)])
    assert load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")["solution"] == ["5", "0.1"]
    lines = ["2024-05-01", 12345678901234567890, 9007199254740993, [1, "x"], True]
    path = write(tmp_path / "e.jsonl", [{"question": "2024-05-01T10:00:00Z", "solution": x} for x in lines])
    rows = load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")
    expected = ["2024-05-01", "12345678901234567890", "9007199254740993", '[1, "x"]', "true"]
    assert (rows["solution"][:], set(rows["question"])) == (expected, {"2024-05-01T10:00:00Z"})
    (tmp_path / "f.json").write_text('[{"question": "q", "solution": 5.0}, {"question": "q", "solution": 1e3}]')
    rows = load_rows(str(tmp_path / "f.json"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows["solution"][:] == ["5.0", "1e3"]
    (tmp_path / "d.csv").write_text("question,solution\nq,007\nq,NA\n")
    rows = load_rows(str(tmp_path / "d.csv"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows["solution"] == ["007", "NA"]


def test_conversations_of_any_make_are_split_or_left_out(tmp_path, tags):
    answer = "<|begin_of_thought|>\n\nAdd.<|end_of_thought|>\n\n<|begin_of_solution|>5<|end_of_solution|>"
    turns = [{"role": "user", "content": "2+3?", "weight": 1}, {"role": "assistant", "content": answer, "weight": True}]
    path = write(tmp_path / "d.jsonl", [{"conversations": each} for each in (turns, "none", None, [7])])
    rows = load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "2+3?", "solution": "5", "reasoning_trace": "Add."}]


def test_mistral_s_own_tokenizer_beside_another_is_not_taken(tokenizer, tmp_path):
    """That of mistral-common has no chat template."""
    data = Path(mistral_common.__file__).parent / "data"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    shutil.copy(data / "tekken_240911.json", tmp_path / "tekken.json")
    loaded = load_tokenizer(str(tmp_path), None, None, "model_name_or_path", False)
    assert loaded.chat_template == tokenizer.chat_template and loaded.get_vocab() == tokenizer.get_vocab()


def test_a_column_that_comes_late_or_changes_its_type_is_read_whatever_the_size(tmp_path, tags):
    rows = [{"question": "q" * 3000, "solution": 5}] * 4000 + [{"question": "q", "solution": "five", "closed": False}]
    path = write(tmp_path / "large.jsonl", rows)
    assert load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")["solution"][-2:] == ["5", "five"]
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "solution": "s"}\n7\n')
    with pytest.raises(ConfigError, match="row 1 is no object but '7'"):
        load_rows(str(tmp_path / "bad.jsonl"), "train", None, COLUMNS, tags, "dataset_id_or_path")


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


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_columns_are_mapped(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"problem": "1+1?", "answer": 2}])
    columns = {"question": "problem", "solution": "answer"}
    rows = load_rows(path, "train", None, columns, tags, "dataset_id_or_path")
    assert rows[0] == {"question": "1+1?", "solution": "2"}


def test_missing_columns_are_named_with_those_that_exist(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"problem": "1+1?", "answer": 2}])
    with pytest.raises(ConfigError, match=r"columns are problem, answer[\s\S]*question_column=<your column>"):
        load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, tags, suffix):
    from datasets import Dataset

    path = tmp_path / f"d.{suffix}"
    getattr(Dataset.from_list(ROWS), f"to_{suffix}")(str(path))
    rows = load_rows(str(path), "train", 3, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == ROWS[:3]


def test_bespoke_stratos_conversations_are_split(tmp_path, tags):
    answer = (
        "<|begin_of_thought|>\n\nAdd them.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n5\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": "2+3?"}, {"from": "assistant", "value": answer}]
    untagged = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "no tags"}]
    path = write(tmp_path / "d.jsonl", [{"system": "s", "conversations": c} for c in (turns, untagged)])
    rows = load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "2+3?", "solution": "\n\n5\n\n", "reasoning_trace": "Add them.\n\n"}]


@pytest.mark.parametrize(("content", "cause"), [("", "file is empty"), ('{"question": "a", "sol', "cannot be read")])
def test_broken_files_are_told_without_a_traceback(tmp_path, tags, content, cause):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=cause):
        load_rows(str(tmp_path / "d.jsonl"), "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_empty_solutions_are_refused_by_row(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"question": "a", "solution": "1"}, {"question": "b", "solution": " "}])
    with pytest.raises(ConfigError, match="1 rows have no solution, the first is row 1"):
        load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_shipped_data_is_right_and_apart():
    from conftest import REPO

    def rows(name):
        return [json.loads(line) for line in (REPO / "data" / name).read_text().splitlines()]

    train, test = rows("distances_train.jsonl"), rows("distances_test.jsonl")
    assert not {r["question"] for r in train} & {r["question"] for r in test}
    for row in train[:500] + test:
        left, *digits = map(int, row["question"].removeprefix("What is left of ").removesuffix("?").split("~"))
        for digit in digits:
            left = abs(left - digit)
        assert left == int(row["solution"])


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


def test_a_file_has_no_splits(tmp_path, tags):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(ConfigError, match="eval_dataset_split='test'[\\s\\S]*is a file and has no splits"):
        load_rows(str(path), "test", None, COLUMNS, tags, "eval_dataset_id_or_path")


def test_files_of_a_folder_are_read_as_they_are_by_themselves(tmp_path, tags):
    text = "question,solution\nWhat?,007\nAnd?,1e3\nSo?,NA\n"
    for folder, file in (("one", "train.csv"), ("one", "test.csv"), ("two", "data.csv")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / file).write_text(text if file != "test.csv" else text.replace("007", "008"))
    (tmp_path / "three").mkdir()
    (tmp_path / "three/train.jsonl").write_text('{"question": "When?", "solution": "2024-05-01"}\n')

    def solutions(folder, split="train"):
        return list(load_rows(str(tmp_path / folder), split, None, COLUMNS, tags, "dataset_id_or_path")["solution"])

    assert solutions("one") == solutions("two") == ["007", "1e3", "NA"]
    assert solutions("one", "test")[0] == "008"
    assert solutions("three") == ["2024-05-01"]


def test_one_object_of_columns_is_no_row(tmp_path, tags):
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"question": {"0": "What?"}, "solution": {"0": "5"}}))
    with pytest.raises(ConfigError, match="one object of columns[\\s\\S]*orient='records'"):
        load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_a_longer_conversation_gives_its_first_exchange(tmp_path, tags, caplog):
    first, second = (f"{tags.thought[0]}t{tags.thought[1]}{tags.solution[0]}{n}{tags.solution[1]}" for n in (1, 2))
    turns = [("user", "Q1"), ("assistant", first), ("user", "Q2"), ("assistant", second)]
    rows = [{"conversations": [{"from": who, "value": said} for who, said in turns[:n]]} for n in (2, 3, 4)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert {(row["question"], row["solution"]) for row in read} == {("Q1", "1")}
    assert "2 of 3 conversations go on after the first answer" in caplog.text
