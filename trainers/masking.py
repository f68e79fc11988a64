"""Secrets among the options: what they are called, and how what is written or shown hides them."""

import re
from collections.abc import Mapping
from typing import Any

PASSWORDS = ("password", "passwd", "secret")  # which may be numbers
SECRETS = ("token", "key", "apikey", "credentials", "authorization", *PASSWORDS)
# Texts of a tokenizer, which are no secrets.
MARKERS = tuple(f"{name}_token" for name in ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image"))
HIDDEN = "***"


def masked(value: Any, name: str = "") -> Any:
    """A copy in which whatever bears the name of a secret is hidden, at any depth of mappings and lists.

    Args:
        name: What the value itself is called.
    """
    if isinstance(value, Mapping):
        return {key: masked(inner, name if _is_secret(name, inner) else str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner, name) for inner in value]
    return HIDDEN if _is_secret(name, value) else value


def hides(text: str) -> bool:
    """Whether words that could not be read as values have the name of a secret among them."""
    return any(_is_secret(name, text) for name in re.findall(r"[\w-]+(?=\s*[:=])", text))


def _is_secret(name: str, value: Any) -> bool:
    """By the last word of its name: `hub_token`, `apiKey` and `X-API-KEY` are, `max_tokens` is none; nor is a number,
    such as a reward `per_token`."""
    if value is None or isinstance(value, bool) or name in MARKERS:
        return False
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return bool(words) and words[-1] in (PASSWORDS if isinstance(value, int | float) else SECRETS)
