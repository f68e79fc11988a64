"""Let cases of cases.py run from a test."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from simulated_gpu.device import build

POSSIBLE = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated GPU is compiled, and there is no g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings CUDA's own kernels"),
]


def on_simulated_gpu(library: Path) -> Callable[..., Any]:
    """Build the simulated GPU there; return a function that lets a case run with it, in a process, and returns what it
    tells."""
    build(library)
    here = Path(__file__).resolve().parent

    def run(case: str, *arguments: Any, **variables: str) -> Any:
        command = [sys.executable, str(here / "cases.py"), str(library), case, *map(str, arguments)]
        environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"SIMULATED_TRITON": ""} | variables
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=here.parents[1], env=os.environ | environment, timeout=600
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
