"""Rows as they stand in a file, a folder or a hub data set."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError

from data.turns import CHATS, is_turns, plain
from trainers.errors import ConfigError, Fault


def read(path: str, split: str, key: str) -> Dataset:
    """All rows of a split; what is asked for and raised is told in `load.read_rows`."""
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
        names, *rows = _table(lines, separator, file.name, key, path) or [[]]
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


def _table(lines: TextIO, separator: str, file: str, key: str, path: str) -> list[list[str]]:
    """The rows of a table that are not empty.

    Quotes hold a text together in tables of tabs too, as pandas and spreadsheets write them. Where they are plain signs
    there (grep, cut, a shell), a text that begins with one can mostly be told from it, and is refused: read loosely, it
    would lose its quotes, and one that is not closed would take the rows below it into its text.
    """
    reader, rows, line = csv.reader(lines, delimiter=separator, strict=True), [], 1
    try:
        for row in reader:
            rows += [row] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        cause = f"cannot be read: of {file} the row that begins in line {line} has a quote that is not closed, or text "
        remedy = 'in a text within quotes write each quote twice: "say ""yes"" to it"; or write the rows as .jsonl'
        raise ConfigError(Fault(key, path, f"{cause}behind one that is ({error})", remedy)) from error
    return rows


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
    forms = {name: _form(name, values[name]) for name in names}
    columns = {name: [brought(value) for value in values[name]] for name, (brought, _) in forms.items()}
    try:
        return Dataset.from_dict(columns, features=Features({name: kind for name, (_, kind) in forms.items()}))
    except UnicodeEncodeError as error:
        at = next(i for i, row in enumerate(rows) if any(map(_is_broken, (*row, *row.values()))))
        cause = f"cannot be read: row {at} has half a character (a lone surrogate, as in \\ud83d)"
        raise ConfigError(Fault(key, path, cause, "write the whole character, or remove the row")) from error


TURNS = List({name: Value("string") for name in ("from", "value", "no_text")})
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
READERS = {".csv": _from_csv, ".tsv": _from_csv, ".json": _from_json, ".jsonl": _from_json}


def _form(name: str, values: list[Any]) -> tuple[Callable[[Any], Any], Value | List]:
    """What brings the values of a column of JSON into one type, and that type."""
    has_lists = any(isinstance(value, list) for value in values)
    if has_lists and name in CHATS:
        return _as_chat, TURNS
    if any(map(is_turns, values)):
        return _as_turns, TURNS
    return (_as_texts, List(Value("string"))) if has_lists else (_as_text, Value("string"))


def _as_chat(value: Any) -> list[dict[str, str]]:
    return [plain(turn) for turn in value] if isinstance(value, list) else []


def _as_texts(value: Any) -> list[str | None] | None:
    """A list, as beside it in its column every value is one."""
    if value is None:
        return None
    return [_as_text(each) for each in value] if isinstance(value, list) else [_as_text(value)]


def _as_text(value: Any) -> str | None:
    if value is None:
        return None
    return str(value) if isinstance(value, str) else json.dumps(_unwrapped(value), ensure_ascii=False)


def _as_turns(value: Any) -> list[dict[str, str]] | None:
    """The turns of a conversation; beside others text is one of nobody's."""
    if not is_turns(value):
        text = _as_text(value)
        return None if text is None else [plain({"value": text})]
    return [plain(turn) for turn in value]


def _is_broken(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _unwrapped(value: Any) -> Any:
    """A value within lists and objects, its numbers as numbers."""
    if isinstance(value, list):
        return [_unwrapped(each) for each in value]
    if isinstance(value, dict):
        return {name: _unwrapped(each) for name, each in value.items()}
    return json.loads(value) if isinstance(value, _Number) else value
