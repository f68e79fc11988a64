"""Rows from files, folders and conversations. Run: ./run_tests.sh tests/test_data.py"""

import json

import pandas as pd
import pytest
from conftest import ROWS
from datasets import Dataset, Features, List, Value

from data.load import load_rows
from trainers.errors import ConfigError

COLUMNS = {"question": "question", "solution": "solution", "reasoning_trace": "reasoning_trace"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_csv_with_a_comma_at_the_end_of_its_lines_and_with_one_too_many(tmp_path, tags):
    file = tmp_path / "rows.csv"
    file.write_text('question,solution,explanation\nWhat is 2+3?,5,2+3=5,\n"a, b?",4,\n')
    rows = load_rows(str(file), "train", None, COLUMNS | {"explanation": "explanation"}, tags, "dataset_id_or_path")
    assert rows[0] == {"question": "What is 2+3?", "solution": "5", "explanation": "2+3=5"}
    assert rows[1]["question"] == "a, b?"
    file.write_text("question,solution,explanation\nWhat?,5,first this, then that\n")
    with pytest.raises(ConfigError, match="row 0 has 4 fields, the header 3"):
        load_rows(str(file), "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_numbers_in_data_are_the_text_that_was_written(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"question": "q", "solution": x} for x in (5, 0.1)])
    assert load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")["solution"] == ["5", "0.1"]
    lines = ["2024-05-01", 12345678901234567890, 9007199254740993, {"x": [1, "y"]}, True]
    path = write(tmp_path / "e.jsonl", [{"question": "2024-05-01T10:00:00Z", "solution": x} for x in lines])
    rows = load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")
    expected = ["2024-05-01", "12345678901234567890", "9007199254740993", '{"x": [1, "y"]}', "true"]
    assert (rows["solution"][:], set(rows["question"])) == (expected, {"2024-05-01T10:00:00Z"})
    (tmp_path / "f.json").write_text('[{"question": "q", "solution": 5.0}, {"question": "q", "solution": 1e3}]')
    rows = load_rows(str(tmp_path / "f.json"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows["solution"][:] == ["5.0", "1e3"]
    (tmp_path / "d.csv").write_text("question,solution\nq,007\nq,NA\n")
    rows = load_rows(str(tmp_path / "d.csv"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows["solution"] == ["007", "NA"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_list_of_one_text_is_that_text_and_another_is_refused(tmp_path, tags, suffix):
    def load(*solutions, questions=("2+3?", "4+5?")):
        path = tmp_path / f"rows{suffix}"
        rows = [{"question": q, "solution": s, "tags": []} for q, s in zip(questions, solutions, strict=True)]
        write(path, rows) if suffix == ".jsonl" else Dataset.from_list(rows).to_parquet(path)
        return load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path").to_list()

    read = [{"question": "2+3?", "solution": "5"}, {"question": "4+5?", "solution": "9"}]
    assert load(["5"], ["9"]) == load([5], [9]) == load("5", "9", questions=(["2+3?"], ["4+5?"])) == read
    for several, shown in ((["9", "nine"], r"\['9', 'nine'\]"), ([], r"\[\]"), (["9"] * 99, "\\['9', .* …")):
        with pytest.raises(
            ConfigError,
            match=f"row 1 has in the column 'solution' what is not one text: {shown}\n.*solution_column=<another",
        ):
            load(["5"], several)
    with pytest.raises(ConfigError, match="rows have no solution, the first is row 1"):
        load(["5"], None)
    if suffix == ".jsonl":  # where a column may hold both
        assert load("5", ["9"]) == read
    else:
        with pytest.raises(ConfigError, match="row 0 has in the column 'solution' what is not one text: {'x': 5}"):
            load({"x": 5}, {"x": 9})


def test_a_number_of_32_bits_is_written_as_it_was_there(tmp_path, tags):
    columns = {"question": ["a", "b", "c"], "solution": [0.1, 7.0, 2.5e-9]}
    for kind, solutions in (
        (Value("float32"), columns["solution"]),
        (List(Value("float32")), [[0.1], [7.0], [2.5e-9]]),
    ):
        features = Features({"question": Value("string"), "solution": kind})
        path = tmp_path / "rows.parquet"
        Dataset.from_dict(columns | {"solution": solutions}, features=features).to_parquet(path)
        rows = load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path")
        assert list(rows["solution"]) == ["0.1", "7", "2.5e-09"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_an_empty_cell_of_pandas_is_no_solution(tmp_path, tags, suffix):
    path, rows = tmp_path / f"rows{suffix}", [{"question": "q", "solution": x} for x in (1.5, float("nan"))]
    write(path, rows) if suffix == ".jsonl" else Dataset.from_list(rows).to_parquet(path)
    with pytest.raises(ConfigError, match="row 1"):
        load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_conversations_of_any_make_are_split_or_left_out(tmp_path, tags):
    answer = "<|begin_of_thought|>\n\nAdd.<|end_of_thought|>\n\n<|begin_of_solution|>5<|end_of_solution|>"
    turns = [{"role": "user", "content": "2+3?", "weight": 1}, {"role": "assistant", "content": answer, "weight": True}]
    for column in ("conversations", "messages"):
        path = write(tmp_path / "d.jsonl", [{column: each} for each in (turns, "none", None, [7])])
        rows = load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")
        assert rows.to_list() == [{"question": "2+3?", "solution": "5", "reasoning_trace": "Add."}]


def test_a_column_of_text_may_have_any_name(tmp_path, tags):
    path = write(tmp_path / "d.jsonl", [{"messages": "2+3?", "solution": "5"}])
    rows = load_rows(path, "train", None, COLUMNS | {"question": "messages"}, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "2+3?", "solution": "5"}]
    turns = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]
    path = write(tmp_path / "d.jsonl", [{"messages": turns, "problem": "2+3?", "answer": 5}])
    with pytest.raises(ConfigError, match="of its messages no assistant turn.*\n.*out of problem, answer"):
        load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_question_may_be_one_turn_of_the_user(tmp_path, tags, suffix):
    """As TRL's conversational prompts and completions are."""
    columns = {"question": "prompt", "solution": "completion"}

    def load(prompt, completion="5"):
        path = tmp_path / f"d.{suffix}"
        row = {"prompt": prompt, "completion": completion}
        table = Dataset.from_list([{"prompt": [USER], "completion": completion}, row])
        table.to_parquet(path) if suffix == "parquet" else table.to_json(path, lines=suffix == "jsonl")
        return load_rows(str(path), "train", None, columns, tags, "dataset_id_or_path").to_list()[1]

    assert load([USER], [ANSWER]) == {"question": "2+3?", "solution": "5"}
    for turns, told in (([SYSTEM, USER], "system, user"), ([ANSWER], "assistant"), ([USER, ANSWER], "user, assistant")):
        with pytest.raises(
            ConfigError, match=rf"row 1 has in the column 'prompt' turns of {told};.*\n.*system_prompt="
        ):
            load(turns)


USER, ANSWER = {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}
SYSTEM = {"role": "system", "content": "Add."}


def test_turns_beside_texts_and_turns_of_more_than_text(tmp_path, tags):
    load = lambda *prompts: load_rows(  # noqa: E731
        write(tmp_path / "d.jsonl", [{"question": each, "solution": 5} for each in prompts]),
        *("train", None, COLUMNS, tags, "dataset_id_or_path"),
    )
    assert load([USER], "3+4?", 7)["question"] == ["2+3?", "3+4?", "7"]
    assert load([USER | {"content": [{"type": "text", "text": "2+"}, "3?"]}])["question"] == ["2+3?"]
    with pytest.raises(ConfigError, match=r"row 1 has in the column 'question' a turn with what is no text \(image\)"):
        load("2+3?", [USER | {"content": [{"type": "image"}]}])


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_turns_in_parts_are_their_texts_and_an_empty_one_is_nothing(tmp_path, tags, suffix):
    def load(*answers, question=[{"type": "text", "text": "2+"}, {"type": "text", "text": "3?"}]):  # noqa: B006
        asked, path = {"role": "user", "content": question}, tmp_path / f"d.{suffix}"
        rows = [{"messages": [asked, {"role": "assistant", "content": each}]} for each in answers]
        table = Dataset.from_list(rows)
        table.to_parquet(path) if suffix == "parquet" else table.to_json(path, lines=suffix == "jsonl")
        return load_rows(str(path), "train", None, COLUMNS, tags, "dataset_id_or_path").to_list()

    answer = [{"type": "text", "text": "<|begin_of_thought|>\n\nAdd.<|end_of_thought|>\n\n<|begin_of_sol"}]
    answer += [{"type": "text", "text": "ution|>5<|end_of_solution|>"}, {"type": "text", "text": None}]
    assert load(answer, None) == [{"question": "2+3?", "solution": "5", "reasoning_trace": "Add."}]
    with pytest.raises(ConfigError, match="of its messages no assistant turn"):
        load(answer, question=None)
    with pytest.raises(ConfigError, match=r"row 1 has in the column 'messages' a turn with what is no text \(image\)"):
        load(answer, [*answer, {"type": "image", "text": None}])


def test_half_a_character_is_told_with_its_row(tmp_path, tags):
    for broken in ({"question": "c\ud83d", "solution": "1"}, {"question": "c", "solution": [1, "\ud83d"]}):
        path = write(tmp_path / "d.jsonl", [{"question": "a", "solution": "b"}, broken])
        with pytest.raises(ConfigError, match=r"row 1 has half a character"):
            load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")


@pytest.mark.parametrize(
    "header",
    [
        'question,solution,"tags (a;b;c;d)"',
        'question;solution;"note, of mine, yes, really"',
        "\nquestion\tsolution\tx, y",
    ],
)
def test_what_separates_columns_is_not_what_stands_in_their_names(tmp_path, tags, header):
    separator = next(each for each in ",;\t" if f"question{each}" in header)
    (tmp_path / "d.csv").write_text(f"{header}\n" + separator.join(["2+3?", "5", "none"]))
    rows = load_rows(str(tmp_path / "d.csv"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "2+3?", "solution": "5"}]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_quotes_hold_texts_of_several_lines_and_are_to_be_closed(tmp_path, tags, suffix):
    """As pandas writes them, whatever separates the columns."""
    file, separator = tmp_path / f"d.{suffix}", {"csv": ",", "tsv": "\t"}[suffix]
    rows = [{"question": 'Say "yes",\n\tthen\r\n"no"', "solution": 'a 5" disk'}, {"question": '2"?', "solution": "5"}]
    pd.DataFrame(rows).to_csv(file, sep=separator, index=False)
    load = lambda: load_rows(str(file), "train", None, COLUMNS, tags, "dataset_id_or_path").to_list()  # noqa: E731
    assert load() == rows
    head = f"question{separator}solution\n\n"
    file.write_text(f'{head}a 5" disk{separator}5\n"two\nlines"{separator}9\n')
    assert load() == [{"question": 'a 5" disk', "solution": "5"}, {"question": "two\nlines", "solution": "9"}]
    lost, left, last = (f"{text}{separator}9\n" for text in ('"2+3?', '"Yes" or no?', '"6+1?"'))
    for broken in (lost, lost + last, left, left + last):
        file.write_text(f'{head}"two\nlines"{separator}9\n{broken}')
        with pytest.raises(ConfigError, match=f"of d.{suffix} the row that begins in line 5 has .*\n.*quote twice"):
            load()


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_spreadsheets_are_read(tmp_path, tags, separator):
    lines = [["question", "solution", "note, of mine"], ["What is 2,5; or more?", "3,0", ""]]
    text = "\r\n".join(separator.join(f'"{cell}"' if ";" in cell else cell for cell in line) for line in lines)
    file = tmp_path / ("d.csv" if separator == ";" else "d.tsv")
    file.write_bytes(text.encode("utf-8-sig"))
    rows = load_rows(str(file), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "What is 2,5; or more?", "solution": "3,0"}]


def test_a_column_that_comes_late_or_changes_its_type_is_read_whatever_the_size(tmp_path, tags):
    rows = [{"question": "q" * 3000, "solution": 5}] * 4000 + [{"question": "q", "solution": "five", "closed": False}]
    path = write(tmp_path / "large.jsonl", rows)
    assert load_rows(path, "train", None, COLUMNS, tags, "dataset_id_or_path")["solution"][-2:] == ["5", "five"]
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "solution": "s"}\n7\n')
    with pytest.raises(ConfigError, match="row 1 is no object but '7'"):
        load_rows(str(tmp_path / "bad.jsonl"), "train", None, COLUMNS, tags, "dataset_id_or_path")


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
        return [json.loads(line) for line in (REPO / "data/distances" / name).read_text().splitlines()]

    train, test = rows("train.jsonl"), rows("test.jsonl")
    assert not {r["question"] for r in train} & {r["question"] for r in test}
    for row in train[:500] + test:
        left, *digits = map(int, row["question"].removeprefix("What is left of ").removesuffix("?").split("~"))
        for digit in digits:
            left = abs(left - digit)
        assert left == int(row["solution"])


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
    for part, tagged in enumerate(([], ["a", "b"])):
        row = {"question": "When?", "solution": "2024-05-01", "tags": tagged}
        write(tmp_path / f"three/train-{part}.jsonl", [row])

    def solutions(folder, split="train"):
        return list(load_rows(str(tmp_path / folder), split, None, COLUMNS, tags, "dataset_id_or_path")["solution"])

    assert solutions("one") == solutions("two") == ["007", "1e3", "NA"]
    assert solutions("one", "test")[0] == "008"
    assert solutions("three") == ["2024-05-01"] * 2


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


@pytest.mark.parametrize(
    ("name", "content", "cause", "remedy"),
    [
        ("d.csv", "question,solution\nWas heißt das?,so".encode("cp1252"), "not UTF-8", "iconv -f cp1252"),
        ("d.jsonl", '{"question": "q", "solution": "s"}'.encode("utf-16"), "not UTF-8", "iconv"),
        ("d.txt", b"question,solution\nq,s", "kind '.txt' are not read", "named so"),
    ],
)
def test_a_file_that_is_not_read_says_why(tmp_path, tags, name, content, cause, remedy):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{cause}[\\s\\S]*{remedy}"):
        load_rows(str(tmp_path / name), "train", None, COLUMNS, tags, "dataset_id_or_path")


def test_the_end_of_a_file_s_name_may_be_written_large(tmp_path, tags):
    (tmp_path / "D.CSV").write_text("question,solution\nq,s")
    rows = load_rows(str(tmp_path / "D.CSV"), "train", None, COLUMNS, tags, "dataset_id_or_path")
    assert rows.to_list() == [{"question": "q", "solution": "s"}]
