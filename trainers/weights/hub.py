"""What the hub tells of a model. A plan asks once and briefly; a run that starts has time."""

import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

HUB_TIMEOUT = 1.0  # seconds for each model


@cache
def asked_config(path: str) -> tuple[dict[str, Any] | None, str]:
    """The config of a model on the hub, or None and why it cannot be had: one try, and no other in this process.

    The library's own download tries five times, with pauses that grow, and logs each.
    """
    from httpx import HTTPError
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    try:
        request = {"headers": build_hf_headers(), "timeout": HUB_TIMEOUT, "follow_redirects": True}
        answer = get_session().get(hf_hub_url(path, "config.json"), **request)
        hf_raise_for_status(answer)
        return answer.json(), ""
    except (OSError, ValueError, HTTPError) as error:  # the hub's, and the network's
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]


def cached_file(path: str, name: str) -> str | None:
    """A file of a model that an earlier download left, if it did."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with suppress(HFValidationError):  # no name of a model on the hub
        kept = try_to_load_from_cache(path, name)
        return kept if isinstance(kept, str) else None
    return None


def is_downloaded(path: str) -> bool:
    """Whether an earlier download left the weights of a model, all of them: one that was broken off leaves an index."""
    stems = ("model.safetensors", "pytorch_model.bin")
    if any(cached_file(path, name) for name in stems):
        return True
    indices = (cached_file(path, f"{stem}.index.json") for stem in stems)
    return any(index is not None and _has_all_of(path, Path(index)) for index in indices)


def _has_all_of(path: str, index: Path) -> bool:
    """Whether every file that an index names is there."""
    with suppress(OSError, ValueError, KeyError, AttributeError):  # one that cannot be read
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all(cached_file(path, name) for name in names)
    return False


def download_config(path: str) -> None:
    """Leave the config of a model among the downloads, as a run that loads it would; where that fails, what reads it
    tells why."""
    from httpx import HTTPError
    from huggingface_hub import hf_hub_download

    if cached_file(path, "config.json") is None:
        with suppress(OSError, ValueError, HTTPError):
            hf_hub_download(path, "config.json")
