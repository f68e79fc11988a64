#!/usr/bin/env python
"""Would this run work on this machine? Looks at everything at once, in seconds, and loads nothing.

    python test_config_85gb.py                            the preset for a card of 85 GB
    python test_config_85gb.py --config teacher_rlt_mono_24gb [key=value ...]
    python test_config_85gb.py --config NAME --vram-gb 24     plan for a card that is not here
    python test_config_85gb.py --json                     for programs

Presets, packages against the lock, GPU and driver, memory phase by phase, host memory, disk, wandb, access to models
and data. The exit status is 1 where the run could not work.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
if __name__ == "__main__":
    from trainers.own_python import use_own_python

    use_own_python()

from trainers.plan.plan_table import plan_text
from trainers.plan.preflight import preflight


def size(text: str) -> float:
    """A size in GB.

    Raises:
        ValueError: If it is none.
    """
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="teacher_rlt_mono_85gb", help="a run of cfgs/run_cfg")
    parser.add_argument("--vram-gb", type=size, help="plan for a card of so many GB (1e9 bytes)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options, as for train.py")
    arguments = parser.parse_args()
    found = preflight(arguments.config, arguments.overrides, arguments.vram_gb)
    if arguments.json:
        print(json.dumps(found.as_dict()))
    else:
        if found.plan is not None:
            print(plan_text(found.plan, found.machine, full=True) + "\n")
        for finding in found.findings:
            print(finding)
        print("\nthis run could work" if found.works else "\nthis run could not work: see FAIL above")
    return 0 if found.works else 1


if __name__ == "__main__":
    sys.exit(main())
