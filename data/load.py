"""Rows of question, solution and perhaps a reasoning trace, from a file, a folder or a hub data set."""

import hashlib
import logging
import re
import textwrap
from typing import Any

import numpy as np
from datasets import Dataset, Features, LargeList, List, Value

from data.files import read
from data.formats import TagFormat
from data.turns import ANSWERS, ASKS, CHATS, first_exchange, is_turns, said, speaker
from trainers.errors import ConfigError, Fault

logger = logging.getLogger(__name__)

NO_CHAT = Value("string")


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
    rows = first(read(path, split, key), max_samples)
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


def select_texts(rows: Dataset, columns: dict[str, str], key: str, path: str) -> Dataset:
    """Keep the named columns, under our names, as text.

    Raises:
        ConfigError: If question or solution is missing, as a column or in a row, or a value is a conversation of more
            than one turn or a list of more than one text.
    """
    present = rows.column_names
    missing = [name for name in ("question", "solution") if columns[name] not in present]
    if missing:
        needed = " and ".join(f"{name} (as {columns[name]!r})" for name in missing)
        cause = f"its columns are {', '.join(present)}; it needs {needed}"
        raise ConfigError(Fault(key, path, cause, " ".join(f"{name}_column=<your column>" for name in missing)))
    kept = {name: column for name, column in columns.items() if column in present}
    types = {column: rows.features[column] for column in kept.values()}
    rows = rows.map(
        lambda row, i: {
            name: _text(row[column], types[column], name, column, i, key, path) for name, column in kept.items()
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


def _only_turn(turns: list[dict[str, Any]], name: str, column: str, row: int, key: str, path: str) -> str:
    """What is said in the one turn that a question (the user's) or an answer (the assistant's) may be.

    Raises:
        ConfigError: If there are others, or it is no text.
    """
    who = [speaker(turn) for turn in turns]
    role, same = ("user", ASKS) if name == "question" else ("assistant", ANSWERS)
    if len(who) == 1 and who[0] in ("", *same):
        return said(turns[0], column, row, key, path)
    cause = (
        f"row {row} has in the column {column!r} turns of {', '.join(who)}; a {name} is text, or one {role} turn of it"
    )
    remedy = (
        f"a column of the {role}'s text; teacher_system_prompt= and student_system_prompt= take a system turn's place"
    )
    raise ConfigError(Fault(key, path, cause, remedy))


def _text(value: Any, kind: Any, name: str, column: str, row: int, key: str, path: str) -> str:
    """A value as text: that of a list which holds it alone, or of one turn of a conversation.

    Args:
        kind: The type of the column, as its data set tells it.

    Raises:
        ConfigError: If it is none.
    """
    if is_turns(value):
        return _only_turn(value, name, column, row, key, path)
    only, kind = (value[0], kind.feature) if _is_one_of(value, kind) else (value, kind)
    if isinstance(only, list | dict | bytes):
        shown = textwrap.shorten(repr(value), 80, placeholder=" …")
        cause = f"row {row} has in the column {column!r} what is not one text: {shown}"
        remedy = f"one text in each row, joined or chosen of several; or {name}_column=<another column>"
        raise ConfigError(Fault(key, path, cause, remedy))
    return _written(only, kind)


def _is_one_of(value: Any, kind: Any) -> bool:
    """Whether it is a list of one value."""
    return isinstance(kind, List | LargeList) and value is not None and len(value) == 1 and value[0] is not None


def _written(value: Any, kind: Any) -> str:
    """A number as it was written: a solution may be one, and a column of whole numbers with gaps is one of floats."""
    if value is None or value != value:  # NaN: an empty cell of pandas
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    # 0.1 in 32 bits is 0.10000000149011612 in 64
    return str(np.dtype(kind.dtype).type(value)) if kind.dtype in ("float32", "float16") else str(value)


def _from_conversations(rows: Dataset, column: str, tags: TagFormat, key: str, path: str) -> Dataset:
    """Split rows such as Bespoke-Stratos's: turns of user (human) and assistant (gpt), thought and solution in tags."""

    def split(row: dict[str, Any], i: int) -> dict[str, str]:
        question, answer = first_exchange(row[column] or [], column, i, key, path)
        return {
            "question": question,
            "solution": _between(answer, tags.solution),
            # the layout writes the padding before a thought itself
            "reasoning_trace": _between(answer, tags.thought).removeprefix(tags.padding),
        }

    asked = ([speaker(turn) in ASKS for turn in turns or []] for turns in rows[column])
    if longer := sum(sum(each) > 1 for each in asked):
        logger.warning("%d of %d conversations go on after the first answer: the rest is left out", longer, len(rows))
    split_rows = rows.map(split, with_indices=True, remove_columns=rows.column_names, desc="Splitting conversations")
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


def _between(text: str, pair: tuple[str, str]) -> str:
    found = re.search(f"{re.escape(pair[0])}(.*?){re.escape(pair[1])}", text, flags=re.DOTALL)
    return found.group(1) if found else ""
