"""Families that share weights with the engine, one process each. Run: ./run_tests.sh -m slow"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import REPO
from family_engine import FAMILIES

pytestmark = pytest.mark.slow  # two to three minutes


def run_family(family):
    return subprocess.run(
        [sys.executable, str(REPO / "tests" / "family_engine.py"), family],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two processes on two cores
    )


@pytest.fixture(scope="module")
def runs():
    """Two at a time: most of each is imports on one core."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FAMILIES, pool.map(run_family, FAMILIES), strict=True))


@pytest.mark.parametrize("trained", ["all weights", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_and_engine_agree_before_and_after_updates(runs, family, trained):
    done = runs[family]
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])[trained]
    assert result["least_moved"] > 1e-4  # every parameter was trained, norms and biases too
    assert result["before"] < 1e-5
    assert result["after"] < 1e-5
    if trained == "all weights":
        assert result["fresh transformers"] < 1e-5
        assert result["fresh vllm"] < 1e-5
