"""What a GPU would find first: tensors on the wrong device, streams that do not wait for each other, memory that stays.

The GPU is simulated (tests/simulated_gpu): its kernels are the CPU's. Run: ./run_tests.sh tests/test_simulated_gpu.py
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO, TINY_MODEL
from simulated_gpu.device import build

from trainers.plan.activations import HEAD_WIDTH

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated GPU is compiled, and there is no g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch brings CUDA's own kernels"),
]

# Of the plan: what is not simulated, the weights, which the CPU's engine holds, and a checkpoint's, which is not saved.
APART = ("CUDA context", "CUDA graphs", "fragmentation", "weights", "engine's weights", "clones")
SMALL = 2**16  # bytes: a rollout's tokens, a streamed model's last norm


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """A function that lets a case of cases.py run with a simulated GPU."""
    library = tmp_path_factory.mktemp("simulated") / "libsimulated.so"
    build(library)

    def run(case, *arguments):
        command = [sys.executable, str(REPO / "tests/simulated_gpu/cases.py"), str(library), case]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, cwd=REPO, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def deep_model(tokenizer, tmp_path_factory):
    """More layers than a streamed model has room for at once."""
    from trainers.models import make_model

    path = tmp_path_factory.mktemp("deep")
    make_model({**TINY_MODEL, "num_hidden_layers": 4}, tokenizer, 0, torch.float32, None).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_simulation_tells_devices_apart(on_gpu):
    found = on_gpu("devices")
    assert ["same device" in message for message in found["told"]] == [True] * 4
    assert found["used"] == [4096, 0]


@pytest.mark.parametrize(
    ("on_disk", "needed"),
    [
        (False, ["default stream without wait_event", "other stream without wait_event"]),
        (True, ["other stream without wait_event"]),  # read by the CPU: a copy is there when it returns
    ],
)
def test_a_streamed_pass_waits_for_its_copies_and_they_for_it(on_gpu, deep_model, on_disk, needed):
    from transformers import AutoModelForCausalLM

    found = on_gpu("streamed", deep_model, on_disk)
    model = AutoModelForCausalLM.from_pretrained(deep_model)
    for i, states in enumerate(found["states"]):
        with torch.no_grad():
            expected = model.model(torch.arange(34).view(2, 17) + 100 * i).last_hidden_state
        torch.testing.assert_close(torch.tensor(states), expected, rtol=0, atol=1e-5)
    assert found["orders"]["as it is"] == []
    for way in [*needed, "other stream without wait_stream"]:
        assert found["orders"][way], f"a streamed pass is told to be in order {way}"


def test_an_optimizer_in_host_memory_waits_for_its_copies(on_gpu):
    found = on_gpu("offloaded", "cuda")
    assert found["weights"] == on_gpu("offloaded", "cpu")["weights"]
    assert found["orders"]["as it is"] == []
    streams = ("default stream without wait_stream", "other stream without wait_stream")
    for way in [*streams, "host without synchronize"]:
        assert found["orders"][way], f"a step is told to be in order {way}"


SHORT = {"max_prompt_length": 128, "max_completion_length": 16, "train_batch_size": 8, "num_generations": 4}
SHORT |= {"per_device_train_batch_size": 4, "max_steps": 2, "report_before_after": False, "num_probes": 0}
SHORT |= {
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "precision": "fp32",
    "num_completions_to_print": 0,
}
SHORT |= {"teacher_system_prompt": "Explain.", "student_system_prompt": "Solve."}
STREAMED = {"student_mode": "streamed", "reference_mode": "streamed", "beta": 0.1, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    "chosen",
    [
        STREAMED | {"optim": "cpu_offload"},
        {"overlap_scoring": True, "optim": "adamw_torch", "gradient_checkpointing": True},
    ],
    ids=["streamed", "overlapped"],
)
def test_rl_computes_on_a_gpu_what_it_does_on_a_cpu(on_gpu, model_dir, rows_file, tmp_path, chosen):
    here = {"model_name_or_path": model_dir, "student_model": model_dir, "dataset_id_or_path": rows_file}
    overrides = [f"{key}={value}" for key, value in (SHORT | here | chosen).items()]
    gpu = on_gpu("train", tmp_path / "gpu", *overrides, "device=cuda")
    cpu = on_gpu("train", tmp_path / "cpu", *overrides, "device=cpu")
    assert len(gpu["metrics"]) == 2
    for theirs, ours in zip(cpu["metrics"], gpu["metrics"], strict=True):
        for name in ("reward", "solution_log_prob_reward", "kl_reward", "loss", "grad_norm", "entropy"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert gpu["faults"] == []
    assert cpu["peak"] == 0, "device=cpu took memory of the GPU"

    last = {name: value * 2**30 for name, value in gpu["metrics"][-1].items() if name.startswith("memory/")}
    held = sum(p for name, p in gpu["plan"]["save"].items() if name not in APART)
    for phase in ("score", "step"):
        assert last[f"memory/{phase}"] <= held + SMALL, "something of a phase stays on the GPU"
    planned = sum(size for name, size in gpu["plan"]["update"].items() if name not in APART)
    tile = SHORT["per_device_train_batch_size"] * SHORT["max_completion_length"] * HEAD_WIDTH * 4  # nearly all of it
    assert last["memory/step_peak"] - tile == pytest.approx(planned - tile, rel=0.1)
