"""A GRPO step with each weight bridge, and with stock `trl.GRPOTrainer` on the same engine, in one run.

    python benchmarks/bridges.py                    on a CPU: 34M random parameters, 16 completions of 48 tokens a step
    python benchmarks/bridges.py                    on a GPU: the shape of Qwen2.5-1.5B, 64 completions of 256 tokens
    python benchmarks/bridges.py --model 7b --ways shared lora trl trl-lora --optim adamw_8bit --utilization 0.3
        --micro-batch 2                             on a GPU of 80 GB: the shape of Qwen2.5-7B

7B must be asked for: with torch's AdamW in bf16 weights, gradients and states take 57 GiB and the second copy of the
weights, in TRL's engine, 14 more, which leaves an 80 GB card no room for activations and a KV cache; and a student of
that shape would take the CPU minutes.

Ways:
    shared, copy, restart       this project's bridges, all weights trained
    lora                        this project's, adapters of rank 16 trained
    trl                         TRL's trainer as it comes: vllm_mode=colocate, its importance-sampling correction on
    trl-fastest                 the same without that correction, so without the forward pass it costs
    trl-lora                    TRL as it comes, adapters of rank 16 trained: it merges them and copies all weights
    trl-lora-fastest            the same without the correction
    score, score-overlap        shared, with this project's reward by a student of the same shape on the CPU, afterwards
                                and while the engine still generates (overlap_scoring)

Every way samples as many tokens from the same prompts (end of turn ignored), earns the same kind of reward (score ways
aside), and updates with the same optimizer. TRL's engine gets this project's engine arguments (on a CPU fp32, eager,
where it would otherwise compile, and blocks of the prefix cache as small); on a CPU both need the live linear weights
of trainers/weights/cpu_kernels.py. This project's ways read the prompt of a group once (`share_prompts`), which is part
of what is compared. `sentinel` is the trainer's part; the engine's is in `generate`.

Each way runs in a process of its own: one step that is not counted, then `--steps` that are. The ways take turns step
by step, so that what else happens on the machine meets them alike; with `--one-by-one` (always on a GPU, which would
not hold them all) one ends before the next begins. A machine that drops what rests of memory makes a way pay for having
waited: there `sync` and `sentinel` are to be taken one by one. Medians are printed, `rest` is the update, and what each
step took as it ends, so that a way that is cut off has told of its steps; the ratios are medians over the rounds. The
last line is JSON.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

import torch

from benchmarks.bridge_ways import OURS, READY, STEP, THEIRS, work
from benchmarks.commands import tell
from benchmarks.shapes import SHAPES
from benchmarks.small_data import made_model


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="1.5b" if gpu else "34m")
    parser.add_argument("--models", type=Path, help="folder of made checkpoints, used again if they are there")
    parser.add_argument("--ways", nargs="+", choices=(*OURS, *THEIRS), default=[*OURS, *THEIRS])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one-by-one", action="store_true", default=gpu)
    parser.add_argument("--questions", type=int, default=8 if gpu else 4)
    parser.add_argument("--generations", type=int, default=8 if gpu else 4)
    parser.add_argument("--prompt", type=int, default=256 if gpu else 64, help="longest prompt, in tokens")
    parser.add_argument("--full-prompts", action="store_true", help="every prompt as long as that")
    parser.add_argument("--completion", type=int, default=256 if gpu else 48, help="tokens of each completion")
    parser.add_argument("--micro-batch", type=int, default=8 if gpu else None, help="completions in one backward pass")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the GPU for vLLM")
    parser.add_argument("--optim", choices=("adamw_torch", "adamw_8bit"), default="adamw_torch")
    checkpointing = {"action": argparse.BooleanOptionalAction, "default": gpu}
    parser.add_argument("--checkpointing", **checkpointing, help="gradient checkpointing, of TRL the default")
    parser.add_argument("--sleep", action="store_true", help="of TRL: its engine's weights leave the GPU too")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.way:
        tell(work(arguments.way, arguments.folder, arguments))
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the workers end too
    with tempfile.TemporaryDirectory() as temporary:
        folder = str(made_model(arguments.models or Path(temporary), arguments.model))
        runs: dict[str, dict[str, Any]] = {}
        for together in [[way] for way in arguments.ways] if arguments.one_by_one else [arguments.ways]:
            workers: dict[str, Worker] = {}
            try:
                for way in together:
                    workers[way] = Worker(way, folder)
                for _ in range(arguments.steps + 1):
                    for worker in workers.values():
                        worker.step()
                runs |= {way: worker.result() for way, worker in workers.items()}
            finally:
                for worker in workers.values():
                    worker.process.kill()
    report(runs, arguments)


class Worker:
    """The process of one way; it has started when it is ready for its first step."""

    def __init__(self, way: str, folder: str) -> None:
        self.way = way
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process writes
        command = [sys.executable, *sys.argv, "--way", way, "--folder", folder]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self._last = self._read()

    def _read(self) -> str:
        """What it says next: that it is ready, or its result."""
        for line in self.process.stdout:
            if line.startswith(STEP):
                print(f"{self.way}, {line.strip()}", flush=True)
            if line.strip() == READY or line.startswith('{"steps"'):
                return line.strip()
        self.errors.seek(0)
        sys.exit(f"{self.way} failed:\n{self.errors.read()[-3000:]}")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._last = self._read()

    def result(self) -> dict[str, Any]:
        self.process.wait()
        return json.loads(self._last)


def report(runs: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table, the ratios and a line of JSON."""
    tokens = arguments.questions * arguments.generations * arguments.completion
    phases = ("kv cache", "sync", "sentinel", "generate", "score", "rest", "step")
    result: dict[str, dict[str, float]] = {}
    for way, run in runs.items():
        steps = run["steps"]
        result[way] = {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in phases}
        result[way]["sentinel_share"] = statistics.median(s.get("sentinel", 0.0) / s["step"] for s in steps)
        result[way]["tokens_per_second"] = tokens / result[way]["generate"]
        result[way]["weight_mib"] = run["weight_bytes"] / 2**20
        if run["peak_bytes"] is not None:
            result[way]["peak_gib"] = run["peak_bytes"] / 2**30
        for name in ("free_before_release", "free_after_release"):
            if name in run:
                result[way][f"{name}_gib"] = run[name] / 2**30
    columns = {f"{phase} ms": (phase, 1e3) for phase in ("kv cache", "sync", "sentinel")}
    columns |= {"sentinel %": ("sentinel_share", 100)}  # of the step
    columns |= {f"{phase} s": (phase, 1) for phase in ("generate", "score", "rest", "step")}
    columns |= {"tokens/s": ("tokens_per_second", 1), "weight mib": ("weight_mib", 1)}
    print(f"{'':14}" + "".join(f"{head:>12}" for head in columns))
    for way, row in result.items():
        print(f"{way:14}" + "".join(f"{row[name] * factor:12.2f}" for name, factor in columns.values()))
    for way, row in result.items():
        if (before := row.get("free_before_release_gib")) is not None:
            print(
                f"{way}: {before:.2f} GiB free with the KV cache, {row['free_after_release_gib']:.2f} after its release"
            )
    for way in ("shared", "copy", "lora"):
        for other in THEIRS:
            if way in result and other in result and (way == "lora") == other.startswith("trl-lora"):
                print(f"a step of {way} against {other}: {times_as_fast(runs[other], runs[way])}")
    if {"score", "score-overlap"} <= set(result):
        print(f"overlap_scoring: {times_as_fast(runs['score'], runs['score-overlap'])} as without")
    print(json.dumps({"model": arguments.model, "tokens": tokens, "ways": result}))


def times_as_fast(slow: dict[str, Any], fast: dict[str, Any]) -> str:
    """Median, least and largest ratio of the two ways' steps of the same round."""
    ratios = sorted(a["step"] / b["step"] for a, b in zip(slow["steps"], fast["steps"], strict=True))
    return f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) as fast"


if __name__ == "__main__":
    main()
