"""The plan of memory against two real steps of a preset on this GPU, with random weights in the shapes it names.

    python benchmarks/gpu_memory.py --models FOLDER --config teacher_rlt_mono_80gb [key=value ...]
    python benchmarks/gpu_memory.py --models FOLDER --config teacher_rlt_mono_80gb --whole

Nothing is downloaded: teacher and student are made here (in FOLDER once for all calls, where what vLLM compiled for
them serves the next call too). A step is one group of `--group` completions of at most `--completion` tokens, behind
prompts as long as they may be, so that it ends within five minutes on an H100 (estimated). The KV cache is that of the
preset's own batch, the micro-batch what the plan finds for these lengths. With `--whole` the preset's own step is
measured: its whole batch, and completions of its full length, which takes many times as long.

Prints planned and measured peak of loading, of the phases of a step, and of saving the model, which is removed again;
the target is 5 %. For saving, torch first gives back what it has kept free of the update's memory. The table, and JSON
with what it was measured on, are in `--out`, beside the run's log and its folder, in which plan and metrics are from
the first step on. Without a GPU it says so, and claims nothing.
"""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

from benchmarks.gpu.report import parser, start
from benchmarks.preset_run import engine_of, run_preset
from trainers.config import compose_run

TARGET = 0.05


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--config", default="teacher_rlt_mono_80gb", help="a run of cfgs/run_cfg")
    made.add_argument("--group", type=int, default=8, help="completions of the one question of a step")
    made.add_argument("--completion", type=int, default=1024, help="longest completion, in tokens, if not the preset's")
    made.add_argument("--whole", action="store_true", help="the preset's own batch and lengths")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = made.parse_args()
    name = f"gpu_memory-{arguments.config}"
    report = start(name, f"Memory of {arguments.config} {' '.join(arguments.overrides)}", arguments)
    log = arguments.out / f"{name}.log"
    run = run_preset(arguments.config, chosen(arguments), arguments.models, arguments.model, log, saves=True)
    off = []
    for phase in run.planned:
        cells = run.phase(phase)
        report.row(phase=phase, **cells)
        off += [phase] if abs(cells.get("plan_off", 0)) > TARGET else []
    report.note(f"{run.steps} steps measured, {run.tokens:.0f} tokens in the last; {run.plan}")
    report.close()
    if run.error is not None:
        sys.exit(f"{arguments.config} failed: {run.error}")
    if off:
        sys.exit(f"off by more than {TARGET:.0%}: {', '.join(off)}")


def chosen(arguments: Namespace) -> list[str]:
    """What the run is told beside its preset."""
    own: dict[str, Any] = {"device": arguments.device}
    if not arguments.whole:
        length = min(arguments.completion, compose_run(arguments.config, [])["max_completion_length"])
        own |= dict.fromkeys(("train_batch_size", "num_generations", "per_device_eval_batch_size"), arguments.group)
        own |= {"max_completion_length": length}
    overrides = [f"{key}={value}" for key, value in own.items()]
    if arguments.device == "cuda" and not arguments.whole:
        overrides += engine_of(arguments.config)
    return overrides + arguments.overrides


if __name__ == "__main__":
    main()
