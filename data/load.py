"""Rows of question, solution and perhaps a reasoning trace, from a file, a folder or a hub data set."""

import csv
import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from data.formats import TagFormat
from trainers.errors import ConfigError, Fault

logger = logging.getLogger(__name__)


def read_rows(path: str, split: str, max_samples: int | None, key: str) -> Dataset:
    """Read a data set as it is.

    Args:
        path: A .jsonl, .json, .parquet, .csv or .tsv file, a folder, or a hub id.
        split: Split to take from a folder or hub data set; a file is one, `train`.
        max_samples: Keep the first so many rows; None keeps all.
        key: The option that named the data, for messages.

    Raises:
        ConfigError: If the data cannot be read or has no rows.
    """
    rows = first(_read(path, split, key), max_samples)
    if len(rows) == 0:
        raise ConfigError(Fault(key, path, "the data set has no rows", "give a data set with at least one row"))
    return rows


def load_rows(
    path: str, split: str, max_samples: int | None, columns: dict[str, str], tags: TagFormat, key: str
) -> Dataset:
    """Return a data set with the columns question, solution and, where the source has one, reasoning_trace.

    Args:
        path, split, max_samples, key: As in `read_rows`.
        columns: The source's name for each column.
        tags: For data sets of whole conversations (`CHATS`), whose texts hold the tags.

    Raises:
        ConfigError: If the data cannot be read, or lacks a column.
    """
    rows = read_rows(path, split, max_samples, key)
    chat = next((name for name in CHATS if not isinstance(rows.features.get(name, NO_CHAT), Value)), None)
    if chat is not None and columns["question"] == "question" not in rows.column_names:
        return _from_conversations(rows, chat, tags, key, path)
    return select_texts(rows, columns, key, path)


def first(rows: Dataset, count: int | None) -> Dataset:
    """So many rows at most; None keeps all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def hold_out(rows: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Set so many questions apart.

    Which ones they are hangs on the texts of the questions alone, neither on a seed nor on the order of the rows: the
    warm-up and RL that hold out as many of the same data hold out the same.

    Returns:
        The rows of other questions, and of each that is held out its first row.

    Raises:
        ConfigError: If nothing would be left.
    """
    questions = sorted(set(rows["question"]), key=lambda text: hashlib.sha256(text.encode()).digest())
    if len(questions) <= count:
        cause = f"the training data has {len(questions)} questions in all, and some must be left to train on"
        remedy = f"eval_size={len(questions) // 10}" if len(questions) >= 10 else "more data, or eval_size=null"
        raise ConfigError(Fault("eval_size", count, cause, remedy))
    chosen, left, apart = set(questions[:count]), [], {}
    for i, question in enumerate(rows["question"]):
        if question in chosen:
            apart.setdefault(question, i)
        else:
            left.append(i)
    return rows.select(left), rows.select(apart.values())


def _read(path: str, split: str, key: str) -> Dataset:
    suffix, file = Path(path).suffix.lower(), Path(path).expanduser()
    if file.is_file() and file.stat().st_size == 0:
        raise ConfigError(Fault(key, path, "the file is empty", "give a data set with at least one row"))
    if file.is_file() and split != "train":
        option = key.replace("id_or_path", "split")
        cause, remedy = f"{path} is a file and has no splits", f"a file for each, and no {option}"
        raise ConfigError(Fault(option, split, cause, remedy))
    try:
        if suffix in READERS and file.is_file():
            return READERS[suffix](file, key, path)
        if suffix == ".parquet" and file.is_file():
            return load_dataset("parquet", data_files=str(file), split="train")
        if file.is_file():
            cause = f"files of the kind {suffix!r} are not read"
            raise ConfigError(Fault(key, path, cause, "a .jsonl, .json, .parquet, .csv or .tsv file, named so"))
        if file.is_dir() and (files := _text_files(file)):
            found = DatasetDict({name: _all_of(each, key, path) for name, each in files.items()})
        else:
            found = load_dataset(str(file) if file.exists() else path)
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        remedy = "save it as UTF-8, e.g. iconv -f cp1252 -t utf-8 (as Excel writes it elsewhere: CSV UTF-8)"
        raise ConfigError(Fault(key, path, f"it is not UTF-8: {error.reason} at byte {error.start}", remedy)) from error
    except (OSError, ValueError, RuntimeError, csv.Error, DatasetsError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        remedy = "a local .jsonl, .json, .parquet, .csv or .tsv file works without a network; is it a local path?"
        raise ConfigError(Fault(key, path, f"cannot be read: {reason}", remedy)) from error
    assert isinstance(found, DatasetDict)
    if split not in found:
        option, others = key.replace("id_or_path", "split"), f"one of: {', '.join(found)}"
        instead = "eval_dataset_id_or_path=null eval_dataset_split=null eval_size=64"
        remedy = others if option == "dataset_split" else f"{others}; or {instead}"
        raise ConfigError(Fault(option, split, f"{path} has no such split", remedy))
    return found[split]


def _text_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder, where all are .csv or JSON: those are read as they are by themselves."""
    found = load_dataset_builder(str(folder)).config.data_files or {}
    files = {str(split): [Path(file) for file in each] for split, each in found.items()}
    return files if all(file.suffix.lower() in READERS for each in files.values() for file in each) else {}


def _all_of(files: list[Path], key: str, path: str) -> Dataset:
    return concatenate_datasets([READERS[file.suffix.lower()](file, key, path) for file in files])


def _from_csv(file: Path, key: str, path: str) -> Dataset:
    """Rows of text, 007 and NA too; a comma at the end of lines, which names no column, is passed over.

    Semicolons or tabs may stand for the commas, as spreadsheets write them.
    """
    csv.field_size_limit(sys.maxsize)  # of its own accord 128 KiB
    with file.open(encoding="utf-8-sig", newline="") as lines:
        separator = _separator(next((line for line in lines if line.strip()), ""))
        lines.seek(0)
        names, *rows = [row for row in csv.reader(lines, delimiter=separator) if row] or [[]]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        cause = f"cannot be read: {len(twice)} columns are named twice, the first is {twice[0]!r}"
        raise ConfigError(Fault(key, path, cause, "give each column a name of its own"))
    for number, row in enumerate(rows):
        if any(row[len(names) :]):
            cause = f"cannot be read: row {number} has {len(row)} fields, the header {len(names)}"
            remedy = f'put texts with {SEPARATORS[separator]} or line breaks in quotes: "..."'
            raise ConfigError(Fault(key, path, cause, remedy))
    columns = {name: [row[i] if i < len(row) else None for row in rows] for i, name in enumerate(names) if name}
    return Dataset.from_dict(columns, features=Features({name: Value("string") for name in columns}))


def _separator(header: str) -> str:
    """What cuts a table's first line into most columns, and not within quotes."""
    columns = {each: next(csv.reader([header], delimiter=each), []) for each in SEPARATORS}
    return max(columns, key=lambda each: (not any('"' in name for name in columns[each]), len(columns[each])))


class _Number(str):
    """A number of JSON as it was written."""


def _constant(word: str) -> _Number | None:
    """NaN is how pandas writes an empty cell."""
    return None if word == "NaN" else _Number(word)


def _from_json(file: Path, key: str, path: str) -> Dataset:
    """Rows of JSON, one on each line or all in a list, whose numbers and dates stay the text that was written."""
    remedy = "a JSON object on each line, or a list of them"

    def parse(text: str, where: str) -> Any:
        try:
            return json.loads(text, parse_float=_Number, parse_int=_Number, parse_constant=_constant)
        except json.JSONDecodeError as error:
            raise ConfigError(Fault(key, path, f"cannot be read: {where} is no JSON ({error})", remedy)) from error

    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = parse(text, "it")
    else:
        rows = [parse(line, f"line {number}") for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(Fault(key, path, f"cannot be read: row {number} is no object but {row!r}", remedy))
    if len(rows) == 1 and rows[0] and all(isinstance(value, dict) for value in rows[0].values()):
        cause = f"cannot be read: it is one object of columns ({', '.join(rows[0])}), as pandas writes one by itself"
        raise ConfigError(Fault(key, path, cause, f"{remedy}: df.to_json(..., orient='records', lines=True)"))
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name) for row in rows] for name in names}
    chats = [name for name in CHATS if any(isinstance(value, list) for value in values.get(name, ()))]
    turns = [name for name in names if name not in chats and any(map(_is_turns, values[name]))]
    columns = {name: [_as_column(each, name in chats) for each in values[name]] for name in names if name not in turns}
    columns |= {name: [_as_turns(each) for each in values[name]] for name in turns}
    try:
        return Dataset.from_dict({name: columns[name] for name in names})
    except UnicodeEncodeError as error:
        at = next(i for i, row in enumerate(rows) if any(map(_is_broken, (*row, *row.values()))))
        cause = f"cannot be read: row {at} has half a character (a lone surrogate, as in \\ud83d)"
        raise ConfigError(Fault(key, path, cause, "write the whole character, or remove the row")) from error


SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
NO_CHAT = Value("string")
CHATS = ("conversations", "messages")  # columns of whole conversations
READERS = {".csv": _from_csv, ".tsv": _from_csv, ".json": _from_json, ".jsonl": _from_json}


def _as_column(value: Any, is_chat: bool) -> Any:
    """Text, or the turns of a conversation: a column holds values of one type."""
    if is_chat:
        turns = value if isinstance(value, list) else []
        return [{"from": _turn(t, "from", "role"), "value": _turn(t, "value", "content")} for t in turns]
    if value is None:
        return None
    return str(value) if isinstance(value, str) else json.dumps(_unwrapped(value), ensure_ascii=False)


def _is_turns(value: Any) -> bool:
    """Whether these are the turns of a conversation, as TRL's conversational prompts are."""
    keys = [set(turn) if isinstance(turn, dict) else set() for turn in value] if isinstance(value, list) else []
    return bool(keys) and all({"role", "content"} <= each or {"from", "value"} <= each for each in keys)


def _as_turns(value: Any) -> list[dict[str, str | None]] | None:
    """The turns of a conversation; beside others text is one of nobody's."""
    if not _is_turns(value):
        text = _as_column(value, is_chat=False)
        return None if text is None else [{"from": "", "value": text}]
    said = [turn.get("value", turn.get("content")) for turn in value]
    return [
        {"from": _turn(turn, "from", "role"), "value": text if isinstance(text, str) else None}
        for turn, text in zip(value, said, strict=True)
    ]


def _is_broken(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _turn(turn: Any, *names: str) -> str:
    """Who speaks in a turn of a conversation, or what is said."""
    return next((str(turn[name]) for name in names if name in turn), "") if isinstance(turn, dict) else ""


def _unwrapped(value: Any) -> Any:
    """A value within lists and objects, its numbers as numbers."""
    if isinstance(value, list):
        return [_unwrapped(each) for each in value]
    if isinstance(value, dict):
        return {name: _unwrapped(each) for name, each in value.items()}
    return json.loads(value) if isinstance(value, _Number) else value


def select_texts(rows: Dataset, columns: dict[str, str], key: str, path: str) -> Dataset:
    """Keep the named columns, under our names, as text.

    Raises:
        ConfigError: If question or solution is missing, as a column or in a row, or is a conversation of more than
            one turn.
    """
    present = rows.column_names
    missing = [name for name in ("question", "solution") if columns[name] not in present]
    if missing:
        needed = " and ".join(f"{name} (as {columns[name]!r})" for name in missing)
        cause = f"its columns are {', '.join(present)}; it needs {needed}"
        raise ConfigError(Fault(key, path, cause, " ".join(f"{name}_column=<your column>" for name in missing)))
    kept = {name: column for name, column in columns.items() if column in present}
    rows = rows.map(
        lambda row, i: {
            name: _said(row[column], name, column, i, key, path) if _is_turns(row[column]) else _text(row[column])
            for name, column in kept.items()
        },
        with_indices=True,
        features=Features({name: Value("string") for name in kept}),
        remove_columns=rows.column_names,
        desc="Reading rows",
    )
    for name in ("question", "solution"):
        empty = [i for i, text in enumerate(rows[name]) if not text.strip()]
        if empty:
            cause = f"{len(empty)} rows have no {name}, the first is row {empty[0]}"
            raise ConfigError(Fault(key, path, cause, f"remove the rows without a {name}"))
    return rows


def _said(turns: list[dict[str, Any]], name: str, column: str, row: int, key: str, path: str) -> str:
    """What is said in the one turn that a question (the user's) or an answer (the assistant's) may be.

    Raises:
        ConfigError: If there are others, or it is no text.
    """
    who, what = [_turn(turn, "from", "role") for turn in turns], turns[0].get("value", turns[0].get("content"))
    role, same = ("user", ASKS) if name == "question" else ("assistant", ANSWERS)
    if len(who) == 1 and who[0] in ("", *same) and isinstance(what, str):
        return what
    cause = (
        f"row {row} has in the column {column!r} turns of {', '.join(who)}; a {name} is text, or one {role} turn of it"
    )
    remedy = (
        f"a column of the {role}'s text; teacher_system_prompt= and student_system_prompt= take a system turn's place"
    )
    raise ConfigError(Fault(key, path, cause, remedy))


def _text(value: Any) -> str:
    """A value as text: a solution may be a number, and a column of whole numbers with gaps is one of floats."""
    if value is None or value != value:  # NaN: an empty cell of pandas
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _from_conversations(rows: Dataset, column: str, tags: TagFormat, key: str, path: str) -> Dataset:
    """Split rows such as Bespoke-Stratos's: turns of user (human) and assistant (gpt), thought and solution in tags."""

    def split(row: dict[str, Any]) -> dict[str, str]:
        question, answer = _first_exchange(row[column] or [])
        return {
            "question": question,
            "solution": _between(answer, tags.solution),
            # the layout writes the padding before a thought itself
            "reasoning_trace": _between(answer, tags.thought).removeprefix(tags.padding),
        }

    asked = ([_turn(turn, "from", "role") in ASKS for turn in turns or []] for turns in rows[column])
    if longer := sum(sum(each) > 1 for each in asked):
        logger.warning("%d of %d conversations go on after the first answer: the rest is left out", longer, len(rows))
    split_rows = rows.map(split, remove_columns=rows.column_names, desc="Splitting conversations")
    whole = split_rows.filter(
        lambda row: bool(row["question"].strip() and row["solution"].strip()), desc="Checking tags"
    )
    if len(whole) == 0:
        cause = f"of its {column} no assistant turn has its solution between {tags.solution[0]} and {tags.solution[1]}"
        remedy = "tag_format=stratos or tag_format=r1, whichever the data uses"
        if others := [name for name in rows.column_names if name != column]:
            remedy += f"; or question_column= and solution_column= out of {', '.join(others)}"
        raise ConfigError(Fault(key, path, cause, remedy))
    if len(whole) < len(split_rows):
        count = len(split_rows) - len(whole)
        logger.warning("%d of %d conversations have no tagged solution: left out", count, len(split_rows))
    return whole


ASKS, ANSWERS = ("user", "human"), ("assistant", "gpt")


def _first_exchange(turns: list[Any]) -> tuple[str, str]:
    """What is asked first, and what is answered to it."""
    question = answer = ""
    for turn in turns:
        who, said = _turn(turn, "from", "role"), _turn(turn, "value", "content")
        if who in ASKS and not question:
            question = said
        elif who in ANSWERS and question:
            answer = said
            break
    return question, answer


def _between(text: str, pair: tuple[str, str]) -> str:
    found = re.search(f"{re.escape(pair[0])}(.*?){re.escape(pair[1])}", text, flags=re.DOTALL)
    return found.group(1) if found else ""
