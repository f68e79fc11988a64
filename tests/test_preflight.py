"""The preflight. Run: ./run_tests.sh tests/test_preflight.py"""

import json
import os
import subprocess
import sys
import sysconfig
from functools import partial

import pytest
from conftest import REPO

from trainers.errors import ConfigError, Fault
from trainers.plan import machine, preflight, run_models, start_faults
from trainers.plan.known_models import KNOWN_MODELS
from trainers.plan.machine import Card, host_room, read_card
from trainers.plan.workload import GIB
from trainers.warmup import waiting
from trainers.weights.hub import is_downloaded

SCRIPT = [sys.executable, str(REPO / "test_config_85gb.py")]


def run(*arguments, **environment):
    env = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, env=env, cwd="/")


def levels(findings, check):
    return [finding.level for finding in findings if finding.check == check]


@pytest.fixture
def card(monkeypatch):
    """A machine with a card that is not here: nvidia-smi's answers are all that is made up."""

    def put(**values):
        found = Card(
            **{"name": "NVIDIA H100 80GB HBM3", "total": 85 * 10**9, "free": 84 * 10**9, "driver": "580.65.06"} | values
        )
        monkeypatch.setattr(machine, "read_card", lambda: found)

    return put


def test_json_has_the_plan_and_every_finding():
    done = run("--config", "teacher_rlt_mono_24gb", "--vram-gb", "24", "--json")
    found = json.loads(done.stdout)
    assert set(found) == {"fits", "peak_gib", "phases", "host_gib", "disk_gib", "findings"}
    assert found["fits"] is True
    assert found["peak_gib"] == pytest.approx(max(sum(items.values()) for items in found["phases"].values()), abs=0.01)
    assert found["phases"]["update"]["weights"] == pytest.approx(14.185, abs=0.001)
    assert {f["check"] for f in found["findings"]} >= {
        "presets", "packages", "python", "GPU", "memory", "host memory", "disk", "wandb",
        "model_name_or_path", "student_model",
    }  # fmt: skip


def test_card_that_is_too_small_fails_with_settings_that_fit():
    done = run("--config", "teacher_rlt_mono_80gb", "--vram-gb", "24")
    assert done.returncode == 1
    assert "FAIL  memory: the update phase needs" in done.stdout
    assert "use_peft=true" in done.stdout and "this run could not work" in done.stdout


def test_machine_without_the_card_fails():
    done = run()
    assert done.returncode == 1
    assert "FAIL  GPU: this machine shows no NVIDIA GPU; the plan is for a card of 85 GB" in done.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["precision=fp32"], "precision: vLLM's adapter kernels"),
        (["max_completion_length=40000"], "max_completion_length: with max_prompt_length 2048 it exceeds"),
        (["vllm_max_model_length=100000"], "vllm_max_model_length: it exceeds the teacher's 32768 positions"),
    ],
)
def test_what_a_run_would_refuse_at_its_start_fails(words, named):
    done = run("--config", "teacher_rlt_mono_24gb", "--vram-gb", "80", *words)
    assert done.returncode == 1
    assert f"FAIL  configuration: {named}" in done.stdout


def test_a_quantized_teacher_fails(tmp_path):
    config = KNOWN_MODELS["Qwen/Qwen2.5-1.5B-Instruct"] | {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("--config", "teacher_rlt_mono_24gb", "--vram-gb", "24", f"model_name_or_path={tmp_path}")
    assert "FAIL  configuration: model_name_or_path: its weights are quantized" in done.stdout


def test_a_config_alone_is_no_download(tmp_path):
    kept = tmp_path / "hub" / "models--some--model"
    (kept / "snapshots" / "1").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    (kept / "snapshots" / "1" / "config.json").write_text(json.dumps(KNOWN_MODELS["Qwen/Qwen2.5-1.5B-Instruct"]))
    arguments = ["--config", "teacher_rlt_mono_24gb", "--vram-gb", "24", "model_name_or_path=some/model"]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    assert "model_name_or_path: some/model is not here" in run(*arguments, **environment).stdout
    (kept / "snapshots" / "1" / "model.safetensors").write_text("")
    assert "model_name_or_path: some/model was downloaded before" in run(*arguments, **environment).stdout


@pytest.mark.parametrize("stem", ["model.safetensors", "pytorch_model.bin"])
def test_a_download_that_was_broken_off_is_none(stem, tmp_path, monkeypatch):
    """The index comes before the files that it names."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--some--model"
    folder = kept / "snapshots" / "1"
    folder.mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("1")
    (folder / f"{stem}.index.json").write_text(
        json.dumps({"weight_map": {"a": "1 of 2", "b": "2 of 2", "c": "1 of 2"}})
    )
    found = []
    for name in ("1 of 2", "2 of 2"):
        found.append(is_downloaded("some/model"))
        (folder / name).write_text("")
    assert [*found, is_downloaded("some/model")] == [False, False, True]
    (folder / f"{stem}.index.json").write_text("{")
    assert not is_downloaded("some/model")


@pytest.mark.parametrize("size", ["0", "nan", "-3", "much"])
def test_a_card_of_no_size_is_told(size):
    done = run("--vram-gb", size)
    assert done.returncode == 2 and "--vram-gb: invalid size value" in done.stderr


def test_default_run_could_work_here():
    done = run("--config", "teacher_rlt_tiny", "output_dir=/tmp/nowhere")
    assert done.returncode == 0, done.stdout
    assert "this run could work" in done.stdout


def test_a_preset_that_is_broken_fails(monkeypatch):
    monkeypatch.setattr(preflight, "_runs", lambda: ["teacher_rlt_tiny", "teacher_rlt_mono_7gb"])
    found = preflight.preflight("teacher_rlt_tiny", [])
    (presets,) = (each for each in found.findings if each.check == "presets")
    assert presets.level == "error" and "teacher_rlt_mono_7gb" in presets.message and not found.works


@pytest.mark.parametrize(("words", "faults"), [(["num_generation=8", "beta=-1"], 2), (["weight_decay=much"], 1)])
def test_faults_of_the_configuration_are_findings_beside_all_others(words, faults, card, monkeypatch):
    card()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = preflight.preflight("teacher_rlt_mono_85gb", [*words, "report_to=wandb"])
    assert levels(found.findings, "configuration") == ["error"] * faults
    assert {each.check for each in found.findings} >= {
        "presets", "packages", "python", "GPU", "CUDA", "memory", "host memory", "disk", "wandb",
        "model_name_or_path", "student_model",
    }  # fmt: skip
    assert not found.works and found.as_dict()["fits"] is False


def test_a_size_in_quotes_is_read_beside_a_fault():
    """There is no card here: the run's own `vram_gb` is planned for."""
    found = preflight.preflight("teacher_rlt_mono_85gb", ["weight_decay=much", "vram_gb='80'"]).findings
    assert any("the plan is for a card of 80 GB" in each.message for each in found if each.check == "GPU")


def test_a_warm_up_that_is_not_valid_leaves_all_others(card, tmp_path):
    card()
    words = ["model_name_or_path=run:teacher_sft", "student_model=run:teacher_rlt_tiny", "vram_gb='80'"]
    found = preflight.preflight("teacher_rlt_mono_85gb", words).findings
    (fault,) = (each for each in found if each.check == "configuration")
    assert "teacher_rlt_tiny" in fault.message
    assert {each.check for each in found} >= {"CUDA", "memory", "host memory", "disk", "wandb", "student_model"}


def test_faults_are_told_of_a_stage_that_is_not_planned_too():
    found = preflight.preflight("score", ["num_generation=8"]).findings
    told = " ".join(each.message for each in found if each.check == "configuration")
    assert "num_generation: unknown" in told and "stage: only the memory of runs that train is planned" in told


@pytest.mark.parametrize("words", [["beta=1,2"], ["stage=nothing"]])
def test_what_cannot_be_read_leaves_the_machine(words, card):
    card()
    found = preflight.preflight("teacher_rlt_mono_85gb", words).findings
    assert levels(found, "configuration") == ["error"]
    assert levels(found, "GPU") == ["ok"]
    assert [each for key in ("memory", "host memory", "disk") for each in levels(found, key)] == ["warning"] * 3


def test_a_card_that_cannot_be_asked_leaves_memory_and_disk(monkeypatch):
    def broken():
        raise ConfigError(Fault("GPU", ..., "nvidia-smi failed", "put it right"))

    monkeypatch.setattr(machine, "read_card", broken)
    found = preflight.preflight("teacher_rlt_mono_85gb", ["beta=-1"]).findings
    assert levels(found, "configuration") == ["error", "error"]
    assert levels(found, "host memory") == levels(found, "disk") == ["warning"]


def test_neither_torch_nor_vllm_is_imported():
    """Not by the processes either that it looks at presets and packages with: that is what keeps it under 3 s."""
    script = [sys.executable, "-X", "importtime", *SCRIPT[1:]]
    done = subprocess.run(
        [*script, "--config", "teacher_rlt_mono_24gb", "--vram-gb", "24"], capture_output=True, text=True
    )
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "GPU: planned for a card of 24 GB" in done.stdout and "hydra" in imported
    assert not imported & {"torch", "vllm", "transformers", "trl", "datasets", "peft", "accelerate"}


def test_card_that_others_use_is_told_and_planned_with_what_is_free(card):
    card(free=20 * GIB, holders=[machine.Holder(7, "python", 50 * GIB)])
    found = preflight.preflight("teacher_rlt_mono_85gb", [])
    assert levels(found.findings, "GPU") == ["ok", "warning"]
    assert levels(found.findings, "memory") == ["error"]
    assert found.plan.available == 20 * GIB


def test_cpu_packages_on_a_machine_with_a_card_fail(card):
    card()
    found = preflight.preflight("teacher_rlt_mono_85gb", [])
    assert "error" in levels(found.findings, "CUDA")  # this environment has the CPU build
    assert levels(found.findings, "memory") == ["ok"]


def test_a_cpu_build_of_torch_among_the_cuda_packages_fails(card, monkeypatch):
    card()
    monkeypatch.setattr(preflight, "lock_file", lambda: REPO / "requirements.txt")
    monkeypatch.setattr(preflight, "cpu_builds", lambda: {"torch": "2.13.0+cpu"})
    found = preflight.preflight("teacher_rlt_mono_85gb", []).findings
    assert ["CPU build" in f.message for f in found if f.check == "CUDA" and f.level == "error"] == [True]


def test_old_driver_fails(card):
    card(driver="535.1")
    found = preflight.preflight("teacher_rlt_mono_85gb", [])
    assert "driver 535.1 is older than 580" in next(f.message for f in found.findings if f.check == "CUDA")


@pytest.mark.parametrize(
    ("version", "level"), [("0.0.1", "warning"), (None, "error")], ids=["another version", "not installed"]
)
def test_packages_are_compared_with_the_lock(monkeypatch, version, level):
    real = preflight.importlib.metadata.version

    def fake(name):
        if name != "trl":
            return real(name)
        if version is None:
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(preflight.importlib.metadata, "version", fake)
    for folder, launcher in ((".venv", "./launch_mono.sh"), (".venv-cpu", "RLT_CPU=1 ./launch_mono.sh")):
        monkeypatch.setattr(preflight.sys, "prefix", f"/repo/{folder}")
        (finding,) = preflight._packages()
        assert finding.level == level and "trl" in finding.message
        assert finding.remedy.startswith(f"rm -r {folder}, then {launcher} sets")


def test_wandb_without_an_account_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = preflight.preflight("teacher_rlt_tiny", ["report_to=wandb"])
    assert levels(found.findings, "wandb") == ["warning"]  # the run logs offline
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert levels(preflight.preflight("teacher_rlt_tiny", ["report_to=wandb"]).findings, "wandb") == ["ok"]


def test_card_without_nvidia_smi_is_known_by_its_driver(monkeypatch):
    """What the driver says is made up: there is none here."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(machine, "cuda_device", lambda: ("NVIDIA L4", 24 * 10**9, 8.9))
    found = read_card()
    assert (found.total, found.free, found.compute) == (24 * 10**9, 24 * 10**9, 8.9)
    findings = preflight.preflight("teacher_rlt_mono_24gb", []).findings
    assert "warning" in levels(findings, "CUDA") and levels(findings, "memory") == ["ok"]


@pytest.mark.parametrize(
    ("there", "level", "named"),
    [
        (["gcc", "g++"], "ok", "C, C++"),
        (["clang", "clang++"], "ok", "C, C++"),
        (["gcc"], "warning", "missing here: a C++ compiler,"),
        (["g++"], "error", "missing here: a C compiler;"),
    ],
)
def test_what_kernels_are_compiled_with_is_looked_for(there, level, named, monkeypatch, tmp_path):
    for name in there:
        (tmp_path / name).touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    found = preflight._compiler()
    assert found.level == level and named in found.message
    (tmp_path / "Python.h").unlink()
    assert preflight._compiler().level == "error" and "Python.h" in preflight._compiler().message


def test_a_missing_compiler_is_told_once(card, monkeypatch):
    card()
    monkeypatch.setattr(preflight, "compiler_fault", lambda: Fault("compiler", ..., "no C", "install it"))
    monkeypatch.setattr(start_faults, "compiler_fault", preflight.compiler_fault)
    found = preflight.preflight("teacher_rlt_mono_24gb", []).findings
    assert [f for f in found if "no C" in f.message] == [preflight.Finding("compiler", "error", "no C", "install it")]


def test_what_nvidia_smi_says_is_read(monkeypatch, tmp_path):
    """A stand-in for nvidia-smi, whose answers have the form of the real one's: there is no card here."""
    answers = tmp_path / "nvidia-smi"
    answers.write_text(
        "#!/usr/bin/env bash\n"
        '[[ "$*" == *--id=3 ]] || exit 9\n'
        'case "$*" in\n'
        '  *query-gpu*) echo "NVIDIA H100 80GB HBM3, 81559, 81000, 9.0, 580.65.06" ;;\n'
        '  *query-compute-apps*) echo "4711, /usr/bin/python3, 512"; echo "4712, [Not Found], [N/A]" ;;\n'
        "esac\n"
    )
    answers.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    found = read_card()
    assert (found.name, found.total, found.free) == ("NVIDIA H100 80GB HBM3", 81559 * 2**20, 81000 * 2**20)
    assert (found.compute, found.driver) == (9.0, "580.65.06")
    assert [str(holder) for holder in found.holders] == ["pid 4711 (python3) 0.5 GiB"]
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 0)
    assert read_card() is None  # the run would not see it either
    monkeypatch.setattr(machine, "num_cuda_devices", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="nvidia-smi failed"):
        read_card()


def control_groups(root, membership, mounts, groups):
    """A made-up file system of control groups; `groups` maps a folder to its files."""
    files = {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts}
    files |= {f"sys/fs/cgroup/{folder}/{name}": text for folder, f in groups.items() for name, text in f.items()}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_memory_of_a_container_is_what_a_run_has(tmp_path):
    """Version 2: the group itself has no limit, its parent grants 3 GiB and holds 2, half a GiB of it idle cache."""
    control_groups(
        tmp_path,
        "0::/pod/job",
        "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate",
        {
            "pod/job": {"memory.max": "max", "memory.current": "4096", "memory.stat": "inactive_file 0"},
            "pod": {
                "memory.max": str(3 * GIB),
                "memory.current": str(2 * GIB),
                "memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {GIB // 2}",
            },
        },
    )
    assert host_room(tmp_path) == (3 * GIB, 3 * GIB - 2 * GIB + GIB // 2)


@pytest.mark.parametrize(
    ("path", "root", "folder"),
    [
        ("/docker/7", "/", "memory/docker/7"),
        ("/docker/7", "/docker/7", "memory"),
        ("/docker/7/job", "/docker/7", "memory/job"),
        ("/", "/", "memory"),
    ],
    ids=["of a machine", "seen from a container", "below a container's", "with a namespace of its own"],
)
def test_memory_of_a_container_of_the_first_version(tmp_path, path, root, folder):
    control_groups(
        tmp_path,
        f"5:cpu,cpuacct:/other\n4:memory:{path}\n0::/",
        f"34 31 0:31 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
        "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        {
            folder: {
                "memory.limit_in_bytes": str(GIB),
                "memory.usage_in_bytes": str(GIB // 2),
                "memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 4}",
            }
        },
    )
    assert host_room(tmp_path) == (GIB, GIB - GIB // 4)


def test_memory_without_a_limit_is_the_machines(tmp_path):
    import psutil

    total = psutil.virtual_memory().total
    assert host_room(tmp_path)[0] == total  # nothing there to read
    mounts = "34 31 0:31 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
    unlimited = {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": str(GIB)}  # and no memory.stat
    control_groups(tmp_path, "4:memory:/a", mounts, {"memory/a": unlimited})
    assert host_room(tmp_path)[0] == total
    used = {"memory.limit_in_bytes": "4096", "memory.usage_in_bytes": "8192"}
    control_groups(tmp_path, "4:memory:/a", mounts, {"memory/a": used, "memory": {"memory.usage_in_bytes": "1"}})
    assert host_room(tmp_path) == (4096, 0)


def test_what_needs_no_config_is_told_where_two_cannot_be_had_and_nobody_waits():
    """Neither model is known, and the hub's name cannot be resolved (that is what .invalid is for, RFC 6761)."""
    models = ["model_name_or_path=nobody/nothing", "student_model=nobody/none"]
    network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "https://hub.invalid"}
    done = run("--config", "teacher_rlt_mono_24gb", "--json", "--vram-gb", "24", "report_to=wandb", *models, **network)
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == 1 and "retry" not in done.stderr.lower()
    levels = {finding["check"]: finding["level"] for finding in found if finding["check"] != "configuration"}
    assert {"GPU", "memory", "host memory", "disk", "wandb", "model_name_or_path", "student_model"} <= levels.keys()
    named = [f["message"].split(":")[0] for f in found if f["check"] == "configuration"]
    assert named == ["model_name_or_path", "student_model"]


SEVEN, SMALL = "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
LARGE = {"run:teacher_sft_24gb": SEVEN}


@pytest.mark.parametrize(
    ("teacher", "student", "asked"),
    [
        ("run:teacher_sft_24gb", "run:teacher_sft_12gb", LARGE | {"run:teacher_sft_12gb": SMALL}),
        ("run:teacher_sft_24gb", "run:teacher_sft", LARGE),  # from the same model
        ("run:teacher_sft_24gb", SEVEN, {"student_model": SEVEN}),
        ("run:teacher_sft_tiny", SMALL, {"student_model": SMALL}),  # from a warm-up that begins with fresh weights
    ],
)
def test_models_that_warm_ups_start_from_are_asked_for_each_once(teacher, student, asked, monkeypatch, tmp_path):
    paths = []
    monkeypatch.setattr(run_models, "waiting", partial(waiting, root=tmp_path))  # no warm-up of an earlier run
    monkeypatch.setattr(preflight, "is_downloaded", lambda path: False)
    monkeypatch.setattr(preflight, "asked_config", lambda path: (None, paths.append(path) or "you have no access"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(preflight, "ask_ahead", lambda models, data: None)
    words = [f"model_name_or_path={teacher}", f"student_model={student}", "max_prompt_length=128"]
    words += ["dataset_id_or_path=.", "eval_size=null", "report_before_after=false"]
    findings = preflight.preflight("teacher_rlt_mono_24gb", words, 24).findings
    told = {f.check: f.message.removeprefix("model_name_or_path: ") for f in findings if "no access" in f.message}
    assert told == {key: f"{path} cannot be had: you have no access" for key, path in asked.items()}
    assert paths == list(asked.values())


def test_a_warm_up_that_is_kept_needs_no_start(monkeypatch):
    monkeypatch.setattr(run_models, "waiting", lambda path, options: [])
    found = preflight.preflight("teacher_rlt_mono_24gb", ["model_name_or_path=run:teacher_sft_24gb"], 24)
    assert not levels(found.findings, "run:teacher_sft_24gb")
