"""Secrets among the options: what they are called, and how what is written or shown hides them."""

import re
from collections.abc import Mapping
from typing import Any

SECRETS = ("token", "key", "apikey", "password", "passwd", "secret", "credentials", "authorization")
MARKERS = ("eos_token", "bos_token", "pad_token", "unk_token")  # texts of a tokenizer, which are no secrets
HIDDEN = "***"


def masked(value: Any, name: str = "") -> Any:
    """A copy in which whatever bears the name of a secret is hidden, at any depth of mappings and lists.

    Args:
        name: What the value itself is called.
    """
    if isinstance(value, Mapping):
        return {key: masked(inner, name if _is_secret(name) else str(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner, name) for inner in value]
    is_hidden = _is_secret(name) and value is not None and not isinstance(value, bool)
    return HIDDEN if is_hidden else value


def _is_secret(name: str) -> bool:
    """By the last of its words: `hub_token`, `apiKey` and `X-API-KEY` are, `max_tokens` is none."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return words[-1:] != [] and words[-1] in SECRETS and name not in MARKERS
