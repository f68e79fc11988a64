"""What the hub tells of a model or of data. A plan asks once and briefly; a run that starts has time."""

import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

HUB_TIMEOUT = 1.0  # seconds to connect, and to be answered
HUB_PATIENCE = 1.5  # for all that is asked at the same time: looking up the hub's name heeds no timeout

NO_ANSWER = "the hub has not answered"


class _Question:
    """A request to the hub on its way: one try.

    The library's own download tries five times, with pauses that grow, and logs each.
    """

    def __init__(self, url: str) -> None:
        self._until = time.monotonic() + HUB_PATIENCE
        self._response, self._error = None, None
        self._thread = Thread(target=self._ask, args=(url,), daemon=True)  # which nobody waits for at the end
        self._thread.start()

    def _ask(self, url: str) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        try:
            request = {"headers": build_hf_headers(), "timeout": HUB_TIMEOUT, "follow_redirects": True}
            response = get_session().get(url, **request)
            hf_raise_for_status(response)
            self._response = response
        except Exception as error:  # raised where the answer is waited for
            self._error = error

    def answer(self) -> Any:
        """The response.

        Raises:
            Exception: As the request did, or a TimeoutError.
        """
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if self._error is not None:
            raise self._error
        if self._response is None:
            raise TimeoutError(f"{NO_ANSWER} in {HUB_PATIENCE:g} s")
        return self._response


_question = cache(_Question)  # of a URL, and no other for it in this process


def _config_url(path: str) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(path, "config.json")


def _card_url(path: str) -> str:
    """Of what `datasets` asks for first."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(path.removeprefix(HUB_DATA), "README.md", repo_type="dataset")


def ask_ahead(models: Iterable[str], data: Iterable[str]) -> None:
    """Ask for all of them at the same time; who needs an answer later waits for what is left of the time."""
    for url_of, paths in ((_config_url, models), (_card_url, data)):
        for path in paths:
            with suppress(ValueError):  # no name on the hub, which is told where the answer is asked for
                _question(url_of(path))


def asked_config(path: str) -> tuple[dict[str, Any] | None, str]:
    """The config of a model on the hub, or None and why it cannot be had."""
    from httpx import HTTPError, InvalidURL

    try:
        return _question(_config_url(path)).answer().json(), ""
    except (OSError, ValueError, HTTPError, InvalidURL) as error:  # the hub's, and the network's
        return None, _reason(error)


def asked_data(path: str) -> str:
    """Why a data set cannot be had from the hub; empty where it can."""
    from httpx import HTTPError, InvalidURL
    from huggingface_hub.errors import EntryNotFoundError

    try:
        _question(_card_url(path)).answer()
    except EntryNotFoundError:  # a data set without a card is one all the same
        return ""
    except (OSError, ValueError, HTTPError, InvalidURL) as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated, and access was not granted to this account, or nobody is logged in"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of this name, or it is private"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


HUB_DATA = "hf://datasets/"  # what may stand before the hub id of a data set
ELSEWHERE = ("hf://", "buckets/")  # what names of data begin with that `datasets` does not look for here


def is_prepared(path: str) -> bool:
    """Whether an earlier run left the rows of a data set on the hub, as `datasets` keeps them: without a network it
    finds these alone, and not what else was downloaded."""
    from huggingface_hub.constants import HF_HOME

    *owner, name = path.removeprefix(HUB_DATA).split("/")
    name = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", name)).lower()
    kept = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets") / "___".join([*owner, name])
    found = kept.glob("*/*/*/dataset_info.json")  # configuration, version, hash
    return any(not file.parent.name.endswith(".incomplete") for file in found)


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
