"""What a process sets before it computes on a GPU. Run: ./run_tests.sh tests/test_gpu_environment.py"""

import os
import platform
import subprocess
import sys

import pytest
from conftest import REPO

from trainers.plan.hardware import in_wsl, prepare_allocator, use_one_gpu

ON_A_CPU = {"memory.py"}  # which measures the plan of a CPU
ENTRIES = [
    file
    for file in sorted([REPO / "train.py", *REPO.glob("benchmarks/**/*.py")])
    if "__main__" in file.read_text(encoding="utf-8") and file.name not in ON_A_CPU
]
# Runs a script until it imports torch, or has ended.
UNTIL_TORCH = """
import os, runpy, sys

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            sys.exit()

sys.meta_path.insert(0, Torch())
script = sys.argv[1]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"], os.environ.get("PYTORCH_ALLOC_CONF", ""))
"""


@pytest.fixture
def no_wsl(monkeypatch):
    linux = platform.uname_result("Linux", "pc", "6.18.33", "#1 SMP", "x86_64")
    monkeypatch.setattr(platform, "uname", lambda: linux)


@pytest.mark.parametrize("script", ENTRIES, ids=lambda file: str(file.relative_to(REPO)))
def test_every_entry_point_chooses_its_gpu_before_torch_is_there(script):
    own = ("CUDA_DEVICE_ORDER", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["CUDA_VISIBLE_DEVICES"] = "3,1"
    command = [sys.executable, "-c", UNTIL_TORCH, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPO)
    pages = "" if in_wsl() else "expandable_segments:True"
    assert done.stdout.splitlines()[-1:] == [f"3 PCI_BUS_ID {pages}"], done.stderr


def test_the_allocator_is_asked_for_pages_unless_the_user_says_otherwise(no_wsl, monkeypatch):
    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    prepare_allocator()
    assert os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}  # torch would prefer the other name
    os.environ.clear()
    prepare_allocator()
    pages = "expandable_segments:True"
    assert os.environ == {"PYTORCH_ALLOC_CONF": pages, "PYTORCH_CUDA_ALLOC_CONF": pages}


def test_wsl_goes_without_pages_and_has_vllm_pin_memory(monkeypatch):
    from vllm import envs

    wsl = platform.uname_result("Linux", "pc", "6.18.33.2-microsoft-standard-WSL2", "#1 SMP", "x86_64")
    monkeypatch.setattr(platform, "uname", lambda: wsl)
    monkeypatch.setattr(os, "environ", {})
    prepare_allocator()
    assert os.environ == {"VLLM_WSL2_ENABLE_PIN_MEMORY": "1"}
    assert envs.environment_variables["VLLM_WSL2_ENABLE_PIN_MEMORY"]() is True  # it is called so in this version
    for name, value in (("VLLM_WSL2_ENABLE_PIN_MEMORY", "0"), ("PYTORCH_ALLOC_CONF", "expandable_segments:True")):
        os.environ[name] = value
        prepare_allocator()
        assert os.environ[name] == value


@pytest.mark.parametrize(
    ("given", "seen"), [(None, "0"), ("3,1", "3"), ("GPU-5f,GPU-6a", "GPU-5f"), ("", ""), ("-1", "-1")]
)
def test_a_single_process_sees_one_gpu(given, seen, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # to be as it was afterwards
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    use_one_gpu()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == (seen, "PCI_BUS_ID")
    for processes, seen in (("", "0"), ("1", "0"), ("2", "0,1")):  # some clusters say that there is one
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        use_one_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
