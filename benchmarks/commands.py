"""Measurements in processes of their own: what they found, or why they failed."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are made here


def run(command: list[str], log: Path | None = None) -> dict[str, Any] | str:
    """The last line of JSON that a command prints, or its last error if it failed.

    Args:
        log: Where to keep all that it says.
    """
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if log is not None:
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and found:
        return json.loads(found[-1])
    return last_error(done.stdout + done.stderr) or f"exit status {done.returncode}, and no result"


def last_error(said: str) -> str:
    """What is said from the last line on that names an error, else the last line; shortened."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return " ".join(lines[named[-1] :] if named else lines[-1:])[:400]
