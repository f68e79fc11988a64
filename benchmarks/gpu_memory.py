"""The plan of memory against two real steps of a preset on this GPU, with random weights in the shapes it names.

    python benchmarks/gpu_memory.py --config teacher_rlt_mono_80gb [key=value ...]

Nothing is downloaded: teacher and student are made here, prompts and completions are as long as they may be. Prints
planned and measured peak of the phases of a step; the target is 5 %. Without a GPU it says so, and claims nothing.
The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.small_data import write_rows
from trainers.checks import load_options
from trainers.config import REPO, compose_run
from trainers.known_models import KNOWN_MODELS
from trainers.machine import read_card
from trainers.planning import machine_for, plan_run
from trainers.workload import GIB

TARGET = 0.05
MEASURED = {"generate": "memory/generate_peak", "score": "memory/score_peak", "update": "memory/step_peak"}


def compose(config: str, overrides: list[str], folder: Path) -> Any:
    """The preset on made-up models and data."""
    composed = compose_run(config, overrides)
    paths = {}
    for key in ("model_name_or_path", "student_model"):
        name = composed[key]
        paths[key] = folder / name.replace("/", "--")
        if not paths[key].exists():
            # In a process of its own: what it leaves on the card would be taken from the run.
            code = (
                f"from benchmarks.small_data import write_model; write_model({str(paths[key])!r}, {KNOWN_MODELS[name]})"
            )
            subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
    write_rows(folder / "rows.jsonl", words=composed["max_prompt_length"])
    here = paths | {"dataset_id_or_path": folder / "rows.jsonl", "output_dir": folder / "out", "max_steps": 2}
    here |= {"overlong": "truncate_left", "save_strategy": "no", "report_to": "none", "logging_steps": 1}
    here |= {"stop_at_closing_tag": False, "generation_kwargs": "{ignore_eos: true, stop_token_ids: []}"}
    return load_options(compose_run(config, [*overrides, *(f"{key}={value}" for key, value in here.items())]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="teacher_rlt_mono_80gb", help="a run of cfgs/run_cfg")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    card = read_card()
    if card is None:
        print("this machine shows no NVIDIA GPU: nothing was measured")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options = compose(arguments.config, arguments.overrides, folder)
        solved = plan_run(options, machine_for(options))
        plan = solved.plan
        from trainers.rl import run_rl

        run_rl(solved.options, folder / "out")
        lines = (folder / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    before = card.total - card.free
    result = {}
    print(f"{card.name}, driver {card.driver}: {arguments.config} {' '.join(arguments.overrides)}")
    print(f"{'phase':10} {'planned GiB':>12} {'measured GiB':>13} {'off':>7}")
    for phase, name in MEASURED.items():
        measured = max(row[name] for row in rows if name in row) - before / GIB
        planned = plan.total(phase) / GIB
        result[phase] = {"planned": planned, "measured": measured}
        print(f"{phase:10} {planned:12.2f} {measured:13.2f} {planned / measured - 1:+7.1%}")
    print(json.dumps({"card": card.name, "driver": card.driver, "config": arguments.config, "phases": result}))
    off = [phase for phase, row in result.items() if abs(row["planned"] / row["measured"] - 1) > TARGET]
    if off:
        sys.exit(f"off by more than {TARGET:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    main()
