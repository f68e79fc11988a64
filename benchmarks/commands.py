"""Measurements in processes of their own: what they found, or why they failed."""

import json
import os
import re
import subprocess
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are made here


def run(command: list[str], log: Path | None = None) -> dict[str, Any] | str:
    """The last line of JSON that a command prints, or its last error if it failed.

    Args:
        log: Where to keep all that it says, as it says it.
    """
    with log.open("w+", encoding="utf-8") if log else tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        with subprocess.Popen(command, cwd=REPO, env=environment, **pipes) as process:
            found = None
            for line in process.stdout:
                said.write(line)
                said.flush()
                found = _result(line) or found
        status = process.returncode
        # One that dies of a signal as it ends (vLLM's allocator may abort there) has told its result.
        if status <= 0 and found is not None:
            return found
        said.seek(0)
        error = f"killed by signal {-status}" if status < 0 else last_error(said.read())
    return error or f"exit status {status}, and no result"


def _result(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:  # a dict that is logged, say
        return None


def last_error(said: str) -> str:
    """The last line that names an error, and the indented ones that go on with it, else the last line; shortened."""
    lines = [line for line in said.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    if named:
        first, *rest = lines[named[-1] :]
        lines = [first, *takewhile(lambda line: line[0].isspace(), rest)]
    return " ".join(line.strip() for line in (lines if named else lines[-1:]))[:400]
