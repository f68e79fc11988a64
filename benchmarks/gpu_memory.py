"""The plan of memory against two real steps of a preset on this GPU, with random weights in the shapes it names.

    python benchmarks/gpu_memory.py --config teacher_rlt_mono_80gb [key=value ...]

Nothing is downloaded: teacher and student are made here, prompts and completions are as long as they may be. Prints
planned and measured peak of the phases of a step; the target is 5 %. Without a GPU it says so, and claims nothing.
The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.preset_run import run_preset
from trainers.plan.machine import read_card

TARGET = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="teacher_rlt_mono_80gb", help="a run of cfgs/run_cfg")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    card = read_card()
    if card is None:
        print("this machine shows no NVIDIA GPU: nothing was measured")
        return
    run = run_preset(arguments.config, arguments.overrides)
    if run.error is not None:
        sys.exit(f"{arguments.config} failed: {run.error}")
    print(f"{card.name}, driver {card.driver}: {arguments.config} {' '.join(arguments.overrides)}")
    print(f"{'phase':10} {'planned GiB':>12} {'measured GiB':>13} {'off':>7}")
    off = []
    for phase, planned in run.planned.items():
        error = planned / run.measured[phase] - 1
        print(f"{phase:10} {planned:12.2f} {run.measured[phase]:13.2f} {error:+7.1%}")
        off += [phase] if abs(error) > TARGET else []
    print(json.dumps({"card": card.name, "driver": card.driver, "config": arguments.config, "run": vars(run)}))
    if off:
        sys.exit(f"off by more than {TARGET:.0%}: {', '.join(off)}")


if __name__ == "__main__":
    main()
