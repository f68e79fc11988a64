"""5. A whole RLT step: of the preset for 80 GB, of stock TRL, and of that for 48 GB with no more of the card left.

    python benchmarks/gpu/step.py --models FOLDER                              all, in this order: 20 to 25 minutes
    python benchmarks/gpu/step.py --models FOLDER --presets 80gb --stock       in parts of less than ten: this one,
    python benchmarks/gpu/step.py --models FOLDER --presets --stock NAME ...   stock TRL, two or three names at a time,
    python benchmarks/gpu/step.py --models FOLDER --presets 48gb --stock       and this (each with an --out of its own)

These times are estimates for an H100: 6 to 7 minutes for a preset, 3 for a way of stock TRL, of which starting takes
about two. In a FOLDER the models are made once for all of them, and what vLLM compiled for one serves the next.

Real runs with random weights and texts of full length. A step is one group of completions, so that it takes minutes
less; the KV cache and the micro-batch are those of the preset's own batch. For the smaller preset the rest of the card
is taken while it runs. The last step is the one that is told: an optimizer has its states from the first on only. What
a preset had measured when it was cut off is told too, and is in a folder beside its log.
Stock TRL trains with a reward that costs nothing and without a reference, beside this project's trainer with that
reward and none either: first with settings that should fit 80 GB, at last as it comes (its optimizer should not).
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import Report, bridge_way, leave_without_engine, parser, start
from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

leave_without_engine("step")

import torch

from benchmarks.preset_run import PEAKS, engine_of, run_preset
from trainers.plan.machine import GB

# Ways of bridges.py, and how each trains.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "shared-8bit": ("shared", {"optim": "adamw_8bit"}),
    "trl-8bit": ("trl", {"optim": "adamw_8bit"}),
    "trl-8bit-sleep": ("trl", {"optim": "adamw_8bit", "sleep": True}),
    "trl-default": ("trl", {"optim": "adamw_torch"}),
}
REST = ("sync", "sentinel", "kv_cache")  # of a step's seconds


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--presets", nargs="*", default=["80gb", "48gb"], help="the first comes before stock TRL")
    made.add_argument("--stock", nargs="*", choices=STOCK, default=list(STOCK), help="none: without stock TRL")
    made.add_argument("--group", type=int, default=8, help="completions of the one question of a step")
    made.add_argument("--prompt", type=int, help="tokens; default: the preset's")
    made.add_argument("--completion", type=int, help="tokens; default: the preset's")
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--stock-prompt", type=int, default=1024)
    made.add_argument("--stock-completion", type=int, default=512)
    arguments = made.parse_args()
    report = start("step", "5. A whole RLT step", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        for preset in arguments.presets[:1]:
            run_one(preset, report, arguments, models)
        for name in arguments.stock:
            run_stock(name, report, arguments, models)
        for preset in arguments.presets[1:]:
            run_one(preset, report, arguments, models)
    report.close()


def run_one(preset: str, report: Report, arguments: Namespace, models: Path) -> None:
    """A preset: a row for each phase."""
    own = {"device": arguments.device, "train_batch_size": arguments.group, "num_generations": arguments.group}
    own |= {"per_device_eval_batch_size": arguments.group}
    own |= {"max_prompt_length": arguments.prompt, "max_completion_length": arguments.completion}
    own |= {"max_steps": arguments.steps}
    overrides = [f"{key}={value}" for key, value in own.items() if value is not None]
    taken = take_all_but(int(preset.removesuffix("gb"))) if arguments.device == "cuda" else None
    if arguments.device == "cuda":
        overrides += engine_of(f"teacher_rlt_mono_{preset}")
    log = arguments.out / f"step-{preset}.log"
    run = run_preset(f"teacher_rlt_mono_{preset}", overrides, models, arguments.model, log)
    del taken
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    for phase in run.planned | run.seconds:
        if phase in PEAKS:
            seconds = {"seconds": run.seconds[phase]} if phase in run.seconds else {}
            report.row(preset=preset, phase=phase, **seconds, **run.phase(phase))
    rest = {name: run.seconds[name] for name in REST if name in run.seconds}
    if rest:
        report.row(preset=preset, phase="sync, sentinel, KV cache", seconds=sum(rest.values()))
    if run.error is not None:
        report.row(preset=preset, phase="all", error=run.error)
    chosen = ", ".join(f"{name} {value}" for name, value in run.plan.items())
    report.note(f"{preset}: {run.steps} steps measured, {run.tokens:.0f} tokens in the last; {chosen}")


def take_all_but(gb: int) -> torch.Tensor | None:
    """Hold what the card has free beyond so many GB."""
    more = torch.cuda.mem_get_info()[0] - gb * GB
    return torch.empty(more, dtype=torch.uint8, device="cuda") if more > 0 else None


def run_stock(name: str, report: Report, arguments: Namespace, models: Path) -> None:
    """A way of bridges.py."""
    way, settings = STOCK[name]
    sizes = {"model": arguments.model or "7b", "prompt": arguments.stock_prompt, "generations": arguments.group}
    sizes |= {"completion": arguments.stock_completion, "questions": 1, "micro_batch": 2, "utilization": 0.3}
    given = {"steps": 2, "full_prompts": True, "models": models}
    log = arguments.out / f"step-{name}.log"
    report.row(way=name, **sizes, **bridge_way(way, log, **sizes, **given, **settings))


if __name__ == "__main__":
    main()
