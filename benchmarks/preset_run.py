"""A few steps of a preset on models of random weights, in a process of its own: planned and measured memory, seconds.

Nothing is downloaded: teacher and student are made here, and prompts and completions are as long as they may be. What
a run plans and measures is in files from the first step on: one that fails or is cut off has measured until then.
"""

import json
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

from benchmarks.commands import run, tell
from benchmarks.small_data import made_model, write_rows
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.memory import max_num_seqs
from trainers.plan.machine import MIB, nvidia_smi, read_card
from trainers.plan.planning import problem_of
from trainers.plan.solve import device_of, solve
from trainers.plan.workload import GIB, Plan

PEAKS = {"load": "load_peak", "generate": "generate_peak", "score": "score_peak", "update": "step_peak"}
PEAKS |= {"save": "save_peak"}
SECONDS = ("generate", "score", "update", "sync", "sentinel", "kv_cache")
PLAN, METRICS = "plan.json", "out/metrics.jsonl"  # of a run's folder


@dataclass(frozen=True)
class PresetRun:
    """What a run took; of one that ended early what it had measured until then, which may be nothing.

    Attributes:
        planned, measured: GiB at the peak of a phase; measured is what the run itself took of the card.
        seconds: Of the last step, by phase.
        tokens: Of the last step: prompts and completions that the update read.
        metrics: All that the last step logged.
        plan: What the plan decided, and on a GPU what it makes of host memory.
        steps: How many were measured.
        error: Why it failed, if it did.
    """

    planned: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: float = 0
    metrics: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    error: str | None = None

    def phase(self, name: str) -> dict[str, float]:
        """Cells of a phase, those that are known."""
        cells = {"planned_gib": self.planned.get(name), "measured_gib": self.measured.get(name)}
        if all(cells.values()):
            cells["plan_off"] = cells["planned_gib"] / cells["measured_gib"] - 1
        return {name: value for name, value in cells.items() if value is not None}


def run_preset(
    config: str,
    overrides: list[str],
    models: Path | None = None,
    shape: str | None = None,
    log: Path | None = None,
    saves: bool = False,
) -> PresetRun:
    """Run a preset in a process of its own.

    Args:
        config: A run of cfgs/run_cfg.
        overrides: `key=value`, which come before what is set here.
        models: Folder of made checkpoints, to use again; None for one that is removed.
        shape: Of benchmarks/shapes.py, for teacher and student; None for those of the models that the preset names.
        log: Where to keep what the run prints, and, in the folder of that name without its suffix, what it writes.
        saves: Write the trained model too, for what that takes, and remove it.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = log.with_suffix("") if log else Path(temporary) / "run"
        folder.mkdir(parents=True, exist_ok=True)
        for name in (PLAN, METRICS):  # an earlier run's
            (folder / name).unlink(missing_ok=True)
        order = {"config": config, "overrides": overrides, "folder": str(folder), "shape": shape, "saves": saves}
        order["models"] = str(models or Path(temporary) / "models")
        said = run([sys.executable, __file__, json.dumps(order)], log)
        return read_run(folder, said if isinstance(said, str) else None)


def read_run(folder: Path, error: str | None) -> PresetRun:
    """What a run left in its folder.

    Args:
        error: Why it ended, if it failed.
    """
    if not (folder / PLAN).exists():
        return PresetRun(error=error)
    begin = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    if error == "killed by signal 9" and (host := begin["plan"].get("host memory")):
        error = f"{error}: {host}"
    text = (folder / METRICS).read_text(encoding="utf-8") if (folder / METRICS).exists() else ""
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]  # the last may be cut off
    steps = [row for row in rows if "seconds/update" in row]
    peaks = {phase: [row[f"memory/{name}"] for row in rows if f"memory/{name}" in row] for phase, name in PEAKS.items()}
    last = steps[-1] if steps else {}
    before = steps[-2]["num_tokens"] if len(steps) > 1 else 0
    return PresetRun(
        begin["planned"],
        {phase: max(found) - begin["used_before"] for phase, found in peaks.items() if found},
        {phase: last[f"seconds/{phase}"] for phase in SECONDS if f"seconds/{phase}" in last},
        last["num_tokens"] - before if last else 0,
        last,
        begin["plan"],
        len(steps),
        error,
    )


def engine_of(config: str) -> list[str]:
    """The engine's settings that the plan finds for the preset's own batch on this card: overrides for a smaller."""
    options = load_options(compose_run(config))
    solved = planned(options)[0].options
    return [f"kv_cache_gib={solved.kv_cache_gib}", f"max_num_seqs={max_num_seqs(options)}"]


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
    return int(nvidia_smi("--query-gpu=memory.used")[0]) * MIB


def planned(options: Any) -> tuple[Plan, str]:
    """The plan of a run, and what it makes of host memory; on a GPU it judges the card alone.

    Host memory that is free now is no measure where a machine takes it from a larger one as it is needed (micro-VMs,
    gVisor): what the run would take is said, and it is tried.
    """
    problem = problem_of(options)
    if device_of(options, problem.machine) != "cuda":
        return solve(problem), ""
    plan = solve(replace(problem, machine=replace(problem.machine, host_free=sys.maxsize)))
    need, free, total = plan.host_need / GIB, problem.machine.host_free / GIB, problem.machine.host_total / GIB
    return plan, f"it would take {need:.1f} GiB of host memory; {free:.1f} of {total:.1f} GiB were free before"


def measure(order: dict[str, Any]) -> None:
    """Run in this process; what was planned and measured is in the files of its folder."""
    folder = Path(order["folder"])
    options = compose(order["config"], order["overrides"], folder, Path(order["models"]), order["shape"])
    before = used_of_card()
    plan, host = planned(options)
    with suppress(OSError):  # not every sandbox has it
        # Where host memory does not suffice, the kernel ends this process before any other.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="utf-8")
    work = plan.work
    chosen = {"optim": work.optimizer, "micro_batch": work.micro_batch, "student_mode": work.student_mode}
    chosen |= {"activations": "on the host"} if plan.options.activation_offloading else {}
    chosen |= {"host memory": host} if host else {}
    wanted = [phase for phase in PEAKS if phase != "save" or order["saves"]]
    phases = {phase: plan.total(phase) / GIB for phase in wanted if phase in plan.phases}
    begin = {"planned": phases, "plan": chosen, "used_before": before / GIB}
    (folder / PLAN).write_text(json.dumps(begin), encoding="utf-8")
    import torch

    import trainers.rl as rl

    class Watched(rl.TeacherGRPOTrainer):
        def save_model(self, *args: Any, **kwargs: Any) -> None:
            """Nobody wants these weights, and writing those of 7B takes a minute: only where that is measured."""
            if not order["saves"]:
                return
            memory = self.timer.memory
            torch.cuda.empty_cache()  # what torch has kept of the update is no need of the save's
            memory.take()
            with tempfile.TemporaryDirectory(dir=folder) as out:
                super().save_model(out)
            with (folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(memory.take()) + "\n")

    rl.TeacherGRPOTrainer = Watched
    rl.run_rl(plan.options, folder / "out")


if __name__ == "__main__":
    measure(json.loads(sys.argv[1]))
    tell({"ended": True})
