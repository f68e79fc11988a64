"""A few steps of a preset on models of random weights, in a process of its own: planned and measured memory, seconds.

Nothing is downloaded: teacher and student are made here, and prompts and completions are as long as they may be.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.commands import run
from benchmarks.small_data import made_model, write_rows
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan.hardware import prepare_allocator
from trainers.plan.machine import MIB, nvidia_smi, read_card
from trainers.plan.planning import problem_of
from trainers.plan.solve import solve
from trainers.plan.workload import GIB

PEAKS = {"generate": "generate_peak", "score": "score_peak", "update": "step_peak"}
SECONDS = ("generate", "score", "update", "sync", "sentinel", "kv_cache")


@dataclass(frozen=True)
class PresetRun:
    """What a run took.

    Attributes:
        planned, measured: GiB at the peak of a phase; measured is what the run itself took of the card.
        seconds: Of the last step, by phase.
        tokens: Of the last step: prompts and completions that the update read.
        metrics: All that the last step logged.
        plan: What the plan decided.
        error: Why it failed, if it did.
    """

    planned: dict[str, float]
    measured: dict[str, float]
    seconds: dict[str, float]
    tokens: float
    metrics: dict[str, float]
    plan: dict[str, Any]
    error: str | None = None


def run_preset(
    config: str, overrides: list[str], models: Path | None = None, shape: str | None = None, log: Path | None = None
) -> PresetRun:
    """Run a preset in a process of its own.

    Args:
        config: A run of cfgs/run_cfg.
        overrides: `key=value`, which come before what is set here.
        models: Folder of made checkpoints, to use again; None for one that is removed.
        shape: Of benchmarks/shapes.py, for teacher and student; None for those of the models that the preset names.
        log: Where to keep what the run prints.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        order = {"config": config, "overrides": overrides, "folder": str(folder), "shape": shape}
        order["models"] = str(models or folder / "models")
        command = [sys.executable, __file__, json.dumps(order)]
        found = run(command, log)
        return PresetRun(**found) if isinstance(found, dict) else PresetRun({}, {}, {}, 0, {}, {}, found)


def compose(config: str, overrides: list[str], folder: Path, models: Path, shape: str | None) -> Any:
    """The options of the preset on made-up models and data."""
    composed = compose_run(config, overrides)
    keys = ("model_name_or_path", "student_model")
    here: dict[str, Any] = {key: made_model(models, shape, composed[key]) for key in keys if composed[key]}
    # Made-up tokenizers cut the rest of the teacher's prompt into some 510 tokens, the student's into 350.
    write_rows(folder / "rows.jsonl", words=max(32, composed["max_prompt_length"] - 500))
    here |= {"dataset_id_or_path": folder / "rows.jsonl", "output_dir": folder / "out", "report_to": "none"}
    here |= {"eval_size": "null", "report_before_after": False}
    here |= {"overlong": "truncate_left", "save_strategy": "no", "logging_steps": 1, "num_completions_to_print": 0}
    # Completions of full length: for vLLM, and for transformers. What vLLM then tells is of a distribution without the
    # end, so the KL leaves the teacher's log-probabilities out: the same work, and its numbers mean nothing here.
    least = "min_tokens" if composed.get("use_vllm", True) else "min_new_tokens"
    here |= {"stop_at_closing_tag": False, "include_teacher_think_entropy": False}
    here |= {"generation_kwargs": f"{{{least}: {composed['max_completion_length']}}}"}
    if not any(override.startswith("max_steps=") for override in overrides):
        here["max_steps"] = 2
    return load_options(compose_run(config, [*overrides, *(f"{key}={value}" for key, value in here.items())]))


def used_of_card() -> int:
    """Bytes of the card that are taken; unlike its size less what is free, without what the driver keeps for itself,
    as CUDA counts them."""
    if read_card() is None:
        return 0
    return int(nvidia_smi("--query-gpu=memory.used")[0][0]) * MIB


def measure(order: dict[str, Any]) -> PresetRun:
    """Run in this process."""
    prepare_allocator()
    folder = Path(order["folder"])
    options = compose(order["config"], order["overrides"], folder, Path(order["models"]), order["shape"])
    before = used_of_card()
    solved = solve(problem_of(options))
    if not solved.plan.fits_host:  # the kernel would end this process, or another
        need, free = solved.plan.host_need / GIB, solved.plan.host_free / GIB
        sys.exit(f"it would take {need:.1f} GiB of host memory, and {free:.1f} GiB are free")
    import trainers.rl as rl

    class Unsaved(rl.TeacherGRPOTrainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            """Nobody wants these weights, and writing those of 7B takes a minute."""

    rl.TeacherGRPOTrainer = Unsaved
    rl.run_rl(solved.options, folder / "out")
    rows = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "seconds/update" in row]
    measured = {
        phase: max(row[f"memory/{name}"] for row in rows if f"memory/{name}" in row) - before / GIB
        for phase, name in PEAKS.items()
    }
    work = solved.plan.work
    chosen = {"optim": work.optimizer, "micro_batch": work.micro_batch, "student_mode": work.student_mode}
    return PresetRun(
        {phase: solved.plan.total(phase) / GIB for phase in PEAKS},
        measured,
        {phase: steps[-1][f"seconds/{phase}"] for phase in SECONDS},
        steps[-1]["num_tokens"] - (steps[-2]["num_tokens"] if len(steps) > 1 else 0),
        steps[-1],
        chosen,
    )


if __name__ == "__main__":
    print(json.dumps(vars(measure(json.loads(sys.argv[1])))), flush=True)
