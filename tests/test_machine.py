"""What is read of this machine's card. Run: ./run_tests.sh tests/test_machine.py

Stand-ins for nvidia-smi, whose answers have the form of the real one's: there is no card here.
"""

import os
import platform

import pytest

from trainers.errors import ConfigError
from trainers.plan import machine, preflight
from trainers.plan.machine import Card, read_card

H100 = 'echo "NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 580.65.06"'


@pytest.fixture
def smi(monkeypatch, tmp_path):
    """A function that puts a stand-in onto the PATH, with what it does where asked for the card, and for processes."""
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def put(card=H100, processes=":", interpreter="/usr/bin/env bash"):
        stub = tmp_path / "nvidia-smi"
        stub.write_text(
            f'#!{interpreter}\ncase "$*" in\n  *query-gpu*) {card} ;;\n  *query-compute-apps*) {processes} ;;\nesac\n'
        )
        stub.chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("4711, /usr/bin/python3, 512", ["pid 4711 (python3) 0.5 GiB"]),
        ("7, /opt/app --type=gpu-process --enable-features=A,B, 1024", ["pid 7 (app) 1.0 GiB"]),
        ("7, /opt/a,b/app --path=/x/y, 1024", ["pid 7 (app) 1.0 GiB"]),
        (r"7, /opt/\xff\xfe, 1024", ["pid 7 (\ufffd\ufffd) 1.0 GiB"]),
        ("4712, [Not Found], [N/A]", []),
        ("[N/A], [Not Found], 12", []),
        ("No running processes found", []),
    ],
)
def test_processes_are_read_whatever_their_names(line, told, smi):
    smi(processes=rf"printf '{line}\n'")
    assert [str(holder) for holder in read_card().holders] == told


def test_memory_that_no_process_is_named_for_is_told(smi):
    """As in a container, where those of others are not seen."""
    smi(card='echo "NVIDIA L4, 23034, 12000, 8.9, 580.65.06"', processes="echo 4711, python3, 1024")
    assert read_card().held == ["pid 4711 (python3) 1.0 GiB", "processes that nvidia-smi does not name 9.8 GiB"]
    found = preflight.preflight("teacher_rlt_mono_24gb", []).findings
    (held,) = (each.message for each in found if each.check == "GPU" and each.level == "warning")
    assert "does not name 9.8 GiB" in held


def test_a_name_of_a_card_with_a_comma_is_read(smi):
    smi(card='echo "A card, revised, 81559, 81000, 9.0, 580.65.06"')
    assert read_card() == Card("A card, revised", 81559 * 2**20, 81000 * 2**20, 9.0, "580.65.06")


def test_a_version_that_is_none_is_unknown(smi):
    smi(card='echo "NVIDIA L4, 23034, 23000, 8.9, [N/A]"')
    assert read_card().driver == ""
    assert "warning" in [f.level for f in preflight.preflight("teacher_rlt_tiny", []).findings if f.check == "CUDA"]


def test_in_wsl_not_all_that_is_free_is_planned_with(smi, monkeypatch):
    wsl = platform.uname_result("Linux", "pc", "5.15.167.4-microsoft-standard-WSL2", "#1 SMP", "x86_64")
    monkeypatch.setattr(platform, "uname", lambda: wsl)
    smi()
    assert (read_card().total, read_card().free) == (81559 * 2**20, (81000 - 2048) * 2**20)
    smi(card='echo "NVIDIA GeForce RTX 5070, 12227, 1500, 12.0, 610.62"')
    assert read_card().free == 0
    monkeypatch.setattr(machine, "cuda_device", lambda: ("NVIDIA L4", 24 * 2**30, 8.9))
    monkeypatch.setenv("PATH", "")
    assert (read_card().total, read_card().free) == (24 * 2**30, 22 * 2**30)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ({"card": "exec sleep 60"}, "nvidia-smi has not answered in 0.5 s"),
        ({"processes": "exec sleep 60"}, "nvidia-smi has not answered in 0.5 s"),
        ({"card": "exit 9"}, "nvidia-smi failed: 9"),
        ({"card": ":"}, "nvidia-smi does not tell of the card"),
        ({"card": "echo what is this"}, "does not tell of the card; it says 'what is this'"),
        ({"card": 'echo "NVIDIA GB10, [N/A], [N/A], 12.1, 580.65.06"'}, "does not tell how much memory NVIDIA GB10"),
        ({"card": 'echo "A card, 8155, 8100, [N/A], 580.65.06"'}, "does not tell the compute capability of A card"),
        ({"interpreter": "/no/such/interpreter"}, "nvidia-smi cannot be run: "),
    ],
)
def test_an_answer_that_is_none_is_told_beside_all_else(answers, told, smi, monkeypatch):
    monkeypatch.setattr(machine, "SMI_TIMEOUT", 0.5)
    smi(**answers)
    with pytest.raises(ConfigError) as refused:
        read_card()
    (fault,) = refused.value.faults
    assert fault.key == "GPU" and told in fault.cause and "vram_gb=<GB>" in fault.remedy
    found = preflight.preflight("teacher_rlt_mono_24gb", [])
    assert not found.works and told in "".join(f.message for f in found.findings if f.check == "configuration")
    assert {f.check for f in found.findings} >= {"packages", "wandb", "model_name_or_path"}
    assert preflight.preflight("teacher_rlt_mono_24gb", [], 24).plan.available == 24 * 10**9


def test_a_driver_that_does_not_tell_is_told(monkeypatch):
    """Where there is no nvidia-smi."""

    def refuse():
        raise OSError("the CUDA driver answers (100,)")

    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(machine, "cuda_device", refuse)
    with pytest.raises(ConfigError, match="no nvidia-smi, and the CUDA driver answers"):
        read_card()
