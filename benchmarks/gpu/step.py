"""5. A whole RLT step: of the preset for 80 GB, of that for 48 GB with no more of the card left, and of stock TRL.

    python benchmarks/gpu/step.py
    python benchmarks/gpu/step.py --presets 80gb --no-stock      in parts, each under ten minutes: this one,
    python benchmarks/gpu/step.py --presets 48gb --no-stock      this,
    python benchmarks/gpu/step.py --presets                      and stock TRL (each with an --out of its own)

Real runs with random weights and texts of full length. A step is one group of completions, so that it takes minutes
less; the KV cache and the micro-batch are those of the preset's own batch. For the smaller preset the rest of the card
is taken while it runs. The second step is the one that is told: an optimizer has its states from the first on only.
Stock TRL trains with a reward that costs nothing and without a reference; its settings come nearer and nearer to what
fits, beside this project's trainer with that reward and none either.
"""

import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import Report, bridge_way, leave_without_engine, parser, start

leave_without_engine("step")

import torch

from benchmarks.preset_run import run_preset
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.memory import max_num_seqs
from trainers.plan.machine import GB
from trainers.plan.planning import problem_of
from trainers.plan.solve import solve

# Of bridges.py: what is trained, and how; from TRL's defaults to what should need least.
STOCK: tuple[tuple[str, dict[str, Any]], ...] = (
    ("shared", {"optim": "adamw_8bit"}),
    ("trl", {"optim": "adamw_torch"}),
    ("trl", {"optim": "adamw_8bit"}),
    ("trl", {"optim": "adamw_8bit", "sleep": True}),
)


def main() -> None:
    made = parser(__doc__, "7b")  # the shape that both presets name
    made.add_argument("--presets", nargs="*", default=["80gb", "48gb"])
    made.add_argument("--group", type=int, default=8, help="completions of the one question of a step")
    made.add_argument("--prompt", type=int, help="tokens; default: the preset's")
    made.add_argument("--completion", type=int, help="tokens; default: the preset's")
    made.add_argument("--steps", type=int, default=2)
    made.add_argument("--stock-prompt", type=int, default=1024)
    made.add_argument("--stock-completion", type=int, default=512)
    made.add_argument("--no-stock", action="store_true")
    arguments = made.parse_args()
    report = start("step", "5. A whole RLT step", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        for preset in arguments.presets:
            run_one(preset, report, arguments, arguments.models or Path(temporary))
        for way, settings in () if arguments.no_stock else STOCK:
            run_stock(way, settings, report, arguments, arguments.models or Path(temporary))
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
        overrides += engine_of(preset)
    log = arguments.out / f"step-{preset}.log"
    run = run_preset(f"teacher_rlt_mono_{preset}", overrides, models, arguments.model, log)
    del taken
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    if run.error is not None:
        report.row(preset=preset, phase="all", error=run.error)
        return
    for phase, planned in run.planned.items():
        measured = run.measured[phase]
        cells = {"planned_gib": planned, "measured_gib": measured, "plan_off": planned / measured - 1}
        report.row(preset=preset, phase=phase, seconds=run.seconds[phase], **cells)
    rest = {name: run.seconds[name] for name in ("sync", "sentinel", "kv_cache")}
    report.row(preset=preset, phase="sync, sentinel, KV cache", seconds=sum(rest.values()))
    chosen = ", ".join(f"{name} {value}" for name, value in run.plan.items())
    report.note(f"{preset}: {run.tokens:.0f} tokens a step; {chosen}")


def engine_of(preset: str) -> list[str]:
    """The engine's settings that the plan finds for the preset's own batch on this card."""
    options = load_options(compose_run(f"teacher_rlt_mono_{preset}"))
    solved = solve(problem_of(options)).options
    return [f"kv_cache_gib={solved.kv_cache_gib}", f"max_num_seqs={max_num_seqs(options)}"]


def take_all_but(gb: int) -> torch.Tensor | None:
    """Hold what the card has free beyond so many GB."""
    more = torch.cuda.mem_get_info()[0] - gb * GB
    return torch.empty(more, dtype=torch.uint8, device="cuda") if more > 0 else None


def run_stock(way: str, settings: dict[str, Any], report: Report, arguments: Namespace, models: Path) -> None:
    """A way of bridges.py."""
    log = arguments.out / f"step-{way}{''.join(f'-{value}' for value in settings.values())}.log"
    sizes = {"model": arguments.model, "prompt": arguments.stock_prompt, "generations": arguments.group}
    sizes |= {"completion": arguments.stock_completion, "questions": 1, "micro_batch": 2, "utilization": 0.3}
    told = " ".join(name if value is True else value for name, value in settings.items())
    given = {"steps": 2, "full_prompts": True, "models": models}
    report.row(way=way, settings=told, **sizes, **bridge_way(way, log, **sizes, **given, **settings))


if __name__ == "__main__":
    main()
