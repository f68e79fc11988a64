"""Conversations: who says what in a turn, in whatever way that is written."""

from typing import Any

from trainers.errors import ConfigError, Fault

CHATS = ("conversations", "messages")  # columns of whole conversations
ASKS, ANSWERS = ("user", "human"), ("assistant", "gpt")


def is_turns(value: Any) -> bool:
    """Whether these are the turns of a conversation, as TRL's conversational prompts are."""
    keys = [set(turn) if isinstance(turn, dict) else set() for turn in value] if isinstance(value, list) else []
    return bool(keys) and all({"role", "content"} <= each or {"from", "value"} <= each for each in keys)


def plain(turn: Any) -> dict[str, str]:
    """A turn in one form: who speaks, what is said, and what of it is no text, such as an image; "" for none.

    The texts of several parts are joined with nothing between them, as chat templates join them.
    """
    content = _either(turn, "value", "content")
    parts = content if isinstance(content, list) else [content]
    texts = [_text(part) for part in parts]
    others = [_kind(part) for part, text in zip(parts, texts, strict=True) if text is None]
    no_text = _either(turn, "no_text") or next(iter(others), "")  # that of a turn in this form is known
    return {"from": speaker(turn), "value": "".join(filter(None, texts)), "no_text": no_text}


def speaker(turn: Any) -> str:
    return str(_either(turn, "from", "role") or "")


def said(turn: Any, column: str, row: int, key: str, path: str) -> str:
    """What is said in a turn.

    Raises:
        ConfigError: If a part of it is no text.
    """
    found = plain(turn)
    if found["no_text"]:
        cause = f"row {row} has in the column {column!r} a turn with what is no text ({found['no_text']})"
        raise ConfigError(Fault(key, path, cause, "models read text alone here: remove the rows with more than text"))
    return found["value"]


def first_exchange(turns: list[Any], column: str, row: int, key: str, path: str) -> tuple[str, str]:
    """What is asked first, and what is answered to it."""
    question = answer = ""
    for turn in turns:
        if speaker(turn) in ASKS and not question:
            question = said(turn, column, row, key, path)
        elif speaker(turn) in ANSWERS and question:
            answer = said(turn, column, row, key, path)
            break
    return question, answer


def _either(turn: Any, *names: str) -> Any:
    """What stands under the first of the names that a turn has, and that is not null: in tables each has all names."""
    return next((turn[name] for name in names if turn.get(name) is not None), None) if isinstance(turn, dict) else None


def _text(part: Any) -> str | None:
    """The text of a part of what is said, which may be empty; None if it is something else."""
    if not isinstance(part, dict):
        return None if isinstance(part, list | bytes) else "" if part is None else str(part)
    kind, text = part.get("type"), part.get("text")
    if kind not in (None, "text"):
        return None
    return str(text) if isinstance(text, str) else "" if text is None and kind else None


def _kind(part: Any) -> str:
    return str(part.get("type") or ", ".join(part) or "{}") if isinstance(part, dict) else type(part).__name__
