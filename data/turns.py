"""Conversations: who says what in a turn, in whatever way that is written."""

from typing import Any

CHATS = ("conversations", "messages")  # columns of whole conversations
ASKS, ANSWERS = ("user", "human"), ("assistant", "gpt")


def is_turns(value: Any) -> bool:
    """Whether these are the turns of a conversation, as TRL's conversational prompts are."""
    keys = [set(turn) if isinstance(turn, dict) else set() for turn in value] if isinstance(value, list) else []
    return bool(keys) and all({"role", "content"} <= each or {"from", "value"} <= each for each in keys)


def turn_of(turn: Any, *names: str) -> str:
    """Who speaks in a turn of a conversation, or what is said."""
    return next((str(turn[name]) for name in names if name in turn), "") if isinstance(turn, dict) else ""


def first_exchange(turns: list[Any]) -> tuple[str, str]:
    """What is asked first, and what is answered to it."""
    question = answer = ""
    for turn in turns:
        who, said = turn_of(turn, "from", "role"), turn_of(turn, "value", "content")
        if who in ASKS and not question:
            question = said
        elif who in ANSWERS and question:
            answer = said
            break
    return question, answer
