"""Measurements in processes of their own: what they found, or why they failed."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are made here

_running: list[subprocess.Popen] = []
_ends: list[int] = []  # the signals that said so


def run(command: list[str], log: Path | None = None, **variables: str) -> dict[str, Any] | str:
    """The last line of JSON that a command prints, or its last error if it failed.

    Args:
        log: Where to keep all that it says, as it says it.
        variables: Of its environment, beside those of this process.
    """
    if _ends:
        sys.exit(128 + _ends[0])
    with log.open("w+", encoding="utf-8") if log else tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": said, "text": True}
        with subprocess.Popen(command, cwd=REPO, env=environment, **pipes) as process:
            _running.append(process)
            found, told = None, []
            for line in process.stdout:
                said.write(line)
                said.flush()
                told.append(line)
                found = _result(line) or found
        _running.remove(process)
        status = process.returncode
        if status == 0 and found is not None:
            return found
        if status < 0:
            return f"killed by signal {-status}"
        said.seek(0)
        errors = [line for line in said if line not in told]
    return last_error("".join(errors)) or last_error("".join(told)) or f"exit status {status}, and no result"


def tell(result: dict[str, Any]) -> NoReturn:
    """Print the result of a process that `run` started, and end it before anything can crash as it is taken down, as
    vLLM's allocator may."""
    print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)


def end_when_told() -> None:
    """Let SIGTERM end the command that runs, and this process only where it wants to run the next: what the command
    had measured is then told first."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, _: Any) -> None:
    _ends.append(number)
    if not _running:
        sys.exit(128 + number)
    for process in _running:
        process.terminate()


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
