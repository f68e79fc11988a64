"""Types of weights, checkpointing and offloading. Run: ./run_tests.sh tests/test_precision.py

A card without bf16 hardware cannot be had here: torch's answers about the device are replaced, and nothing computes in
fp16. What fp16 does to a training is not tested.
"""

from types import SimpleNamespace

import pytest
import torch

from trainers import checks, models
from trainers.checks import load_options
from trainers.config import REPO, compose_run
from trainers.errors import ConfigError
from trainers.models import load_model, resolve_dtype, resolve_place
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
    assert resolve_place(checked("use_peft=true")) == (CUDA, torch.float16)
    assert resolve_place(checked("use_peft=false")) == (CUDA, torch.float32)
    assert resolve_place(SimpleNamespace(device="auto", precision="auto")) == (CUDA, torch.float16)  # score trains none


def test_fp16_without_a_gpu_is_refused(card):
    (fault,) = faults("device=cpu", "precision=fp16", "use_peft=true")
    assert "without a GPU" in fault.cause and "precision=fp32" in fault.remedy
    with pytest.raises(ConfigError, match="this run computes on the CPU"):  # a CPU build of torch beside a GPU
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the CPU build of torch
    with pytest.raises(ConfigError, match="activation_offloading=false"):
        resolve_place(chosen)
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
