"""Measurements in processes of their own: what they found, or why they failed."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent


def run(command: list[str], log: Path | None = None) -> dict[str, Any] | str:
    """The JSON that a command ends with, or its last error if it failed.

    Args:
        log: Where to keep all that it says.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if log is not None:
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return last_error(done.stdout + done.stderr) or f"exit status {done.returncode}"


def last_error(said: str) -> str:
    """The last line that names an error, else the last; shortened."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return (errors or lines or [""])[-1][:300]
