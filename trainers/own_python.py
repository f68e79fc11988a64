"""Which Python a script runs with: imports nothing that is to be installed, and any Python 3 can read it."""

import importlib.util
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# What is imported before the preflight could tell which packages are missing.
FIRST = ("hydra", "omegaconf", "packaging", "psutil", "pydantic", "rich", "yaml")
STARTED_OVER = "RLT_STARTED_OVER"  # set for the Python of .venv, which is not to start itself again


def use_own_python() -> None:
    """Where this Python lacks packages, start the script over with that of .venv, or say in a line how to get one."""
    started_over = os.environ.pop(STARTED_OVER, None) is not None
    missing = [name for name in FIRST if importlib.util.find_spec(name) is None]
    if not missing:
        return
    ours = [REPO / name / "bin" / "python" for name in (".venv", ".venv-cpu")]
    is_own = started_over or Path(sys.executable) in ours  # not resolved: all may be links to one Python
    own = next((python for python in ours if os.access(python, os.X_OK)), None)
    if not is_own and own is not None:
        os.environ[STARTED_OVER] = "1"
        os.execv(str(own), [str(own), *sys.argv])
    remedy = "./launch_mono.sh --check sets up .venv, which has all that is needed"
    remedy = "rm -r .venv, then {} anew".format(remedy.partition(",")[0]) if is_own else remedy
    sys.exit("{}: {} has no {}: {}".format(Path(sys.argv[0]).name, sys.executable, ", ".join(missing), remedy))
