"""Families that share weights with the engine, one process each. Run: ./run_tests.sh tests/test_families.py"""

import json
import subprocess
import sys

import pytest
from conftest import REPO
from family_engine import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_trainer_and_engine_agree_before_and_after_updates(family):
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "family_engine.py"), family],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=REPO,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["least_moved"] > 1e-4  # every parameter was trained, norms and biases too
    assert result["before"] < 1e-5
    assert result["after"] < 1e-5
