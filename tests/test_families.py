"""Families that share weights with the engine, and one that cannot. Run: ./run_tests.sh tests/test_families.py

With adapters and saved checkpoints too, one process each: ./run_tests.sh -m slow tests/test_families.py
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import REPO
from family_engine import FAMILIES, measure

from trainers.errors import ConfigError


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


@pytest.mark.slow  # two to three minutes
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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_shares_its_weights_before_and_after_updates(family):
    """Phi-3's checkpoints hold q/k/v fused; Gemma 2 has a tied head without a name, norms of 1 + w, capped scores."""
    found = measure(family, use_peft=False)
    assert found["least_moved"] > 1e-4
    assert found["before"] < 1e-5
    assert found["after"] < 1e-5


def test_what_the_engine_holds_the_other_way_round_is_refused_to_be_shared_and_can_be_copied():
    with pytest.raises(ConfigError, match=r"weight_bridge='shared'[\s\S]*c_attn[\s\S]*weight_bridge=copy"):
        measure("gpt2", use_peft=False)
    assert not torch.distributed.is_initialized()  # the engine that was refused is stopped
    for use_peft in (False, True):  # vLLM takes no adapters for it: they are merged
        found = measure("gpt2", use_peft, weight_bridge="copy")
        assert found["least_moved"] > 1e-4
        assert found["before"] < 1e-5
        assert found["after"] < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_reach_an_engine_that_is_built_anew(family):
    if family == "qwen3_moe":  # the names of Mixtral's layers are others in transformers: vLLM's loader stops at them
        with pytest.raises(ConfigError, match=r"weight_bridge='shared'[\s\S]*experts[\s\S]*weight_bridge=restart"):
            measure(family, use_peft=False)
    found = measure(family, use_peft=False, weight_bridge="restart")
    assert found["least_moved"] > 1e-4
    assert found["before"] < 1e-5
    assert found["after"] < 1e-5
