"""The plan of memory against two real steps of a preset on this GPU, with random weights in the shapes it names.

    python benchmarks/gpu_memory.py --models FOLDER --config teacher_rlt_mono_80gb [key=value ...]

Nothing is downloaded: teacher and student are made here (in FOLDER once for all calls, where what vLLM compiled for
them serves the next call too). A step is one group of `--group` completions of at most `--completion` tokens, behind
prompts as long as they may be, so that it ends within five minutes on an H100 (estimated). The KV cache is that of the
preset's own batch, the micro-batch what the plan finds for these lengths. With `--completion` the preset's own length
is measured, in minutes more.

Prints planned and measured peak of the phases of a step; the target is 5 %. Loading and saving are planned too, but a
run takes no note of their peaks, so they are not compared. The table, and JSON with what it was measured on, are in
`--out`, beside the run's log and its folder, in which plan and metrics are from the first step on. Without a GPU it
says so, and claims nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu.report import parser, start
from benchmarks.preset_run import engine_of, run_preset
from trainers.config import compose_run

TARGET = 0.05


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--config", default="teacher_rlt_mono_80gb", help="a run of cfgs/run_cfg")
    made.add_argument("--group", type=int, default=8, help="completions of the one question of a step")
    made.add_argument("--completion", type=int, default=1024, help="longest completion, in tokens, if not the preset's")
    made.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = made.parse_args()
    name = f"gpu_memory-{arguments.config}"
    report = start(name, f"Memory of {arguments.config} {' '.join(arguments.overrides)}", arguments)
    length = min(arguments.completion, compose_run(arguments.config, [])["max_completion_length"])
    own = {"device": arguments.device, "train_batch_size": arguments.group, "num_generations": arguments.group}
    own |= {"per_device_eval_batch_size": arguments.group, "max_completion_length": length}
    overrides = [f"{key}={value}" for key, value in own.items()]
    if arguments.device == "cuda":
        overrides += engine_of(arguments.config)
    overrides += arguments.overrides
    run = run_preset(arguments.config, overrides, arguments.models, arguments.model, arguments.out / f"{name}.log")
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


if __name__ == "__main__":
    main()
