"""Measurements in processes of their own: what they found, or why they failed."""

import json
import os
import re
import signal
import subprocess
import tempfile
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
            found, told = None, []
            for line in process.stdout:
                said.write(line)
                said.flush()
                told.append(line)
                found = _result(line) or found
        status = process.returncode
        # One that aborts as it ends (vLLM's allocator may) has told its result.
        if status in (0, -signal.SIGABRT) and found is not None:
            return found
        if status < 0:
            return f"killed by signal {-status}"
        said.seek(0)
        errors = [line for line in said if line not in told]
    return last_error("".join(errors)) or last_error("".join(told)) or f"exit status {status}, and no result"


def _result(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line) if line.startswith("{") else None
    except json.JSONDecodeError:  # a dict that is logged, say
        return None


def last_error(said: str) -> str:
    """What is said from the last line on that names an error, else the last line; shortened."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return " ".join(lines[named[-1] :] if named else lines[-1:])[:400]
