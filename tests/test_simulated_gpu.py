"""What a GPU would find first: tensors on the wrong device, streams that do not wait for each other, memory that stays.

The GPU is simulated (tests/simulated_gpu): its kernels are the CPU's. Run: ./run_tests.sh tests/test_simulated_gpu.py
"""

import json
import signal

import pytest
import torch
from conftest import REPO, TINY_MODEL
from planned import planned
from simulated_gpu.run import POSSIBLE

from trainers.plan.activations import HEAD_WIDTH, activations, kept_bytes

pytestmark = POSSIBLE

# Of the plan: what is not simulated, what the CPU's engine holds, if at all, and a checkpoint's, which is not saved.
ENGINE = ("weights", "engine's weights", "engine's sampling state")
APART = (*ENGINE, "CUDA context", "CUDA graphs", "fragmentation", "clones")
SMALL = 2**16  # bytes: a rollout's tokens, a streamed model's last norm


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


def test_a_graph_reads_the_weights_where_they_were(on_gpu):
    found = on_gpu("graphs")
    assert found["in place"] == [3 * 2 * 3 + 1, 2 * 3, 3, 2 * 3]
    assert found["moved"] == [3 * 1 * 3 + 1, 1 * 3, 3, 1 * 3], "a graph would hide that a weight was moved"
    assert found["left"] == 0
    assert "when stream is capturing" in found["told"]


def test_who_touches_a_pool_that_sleeps_is_stopped(on_gpu):
    found = on_gpu("asleep")
    cache, beside = 20480, 4096
    assert found["used"] == [cache + beside, cache, beside, cache, cache + beside]
    assert found["signal"] == signal.SIGSEGV
    assert found["kept"] and found["gone"]


@pytest.mark.parametrize(
    ("on_disk", "needed"),
    [
        (False, []),
        (True, ["host without synchronize"]),  # it reads into blocks that are copied from
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
    assert found["in threads"] == found["orders"]["as it is"] == []
    streams = (
        "default stream without wait_event",
        "other stream without wait_event",
        "other stream without wait_stream",
    )
    for way in [*streams, *needed]:
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
EVALUATED = {"report_before_after": True, "eval_dataset_id_or_path": REPO / "data/distances", "num_probes": 2}
EVALUATED |= {"max_eval_samples": 3, "num_generations_eval": 1, "per_device_eval_batch_size": 2}


@pytest.mark.parametrize(
    "chosen",
    [
        STREAMED | EVALUATED | {"optim": "cpu_offload", "seed": 2},
        {"overlap_scoring": True, "optim": "adamw_torch", "gradient_checkpointing": True, "seed": 2},
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
    assert len(gpu["evaluations"]) == (2 if chosen.get("report_before_after") else 0)
    for theirs, ours in zip(cpu["evaluations"], gpu["evaluations"], strict=True):
        assert {"eval_probe/empty", "eval_probe/other"} <= set(ours)
        for name in ("eval_reward", *(name for name in ours if name.startswith("eval_probe/"))):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert gpu["faults"] == []
    assert cpu["peak"] == 0, "device=cpu took memory of the GPU"

    last = {name: value * 2**30 for name, value in gpu["metrics"][-1].items() if name.startswith("memory/")}
    held = sum(p for name, p in gpu["plan"]["save"].items() if name not in APART)
    for phase in ("score", "step"):
        assert last[f"memory/{phase}"] <= held + SMALL, "something of a phase stays on the GPU"
    planned = sum(size for name, size in gpu["plan"]["update"].items() if name not in APART)
    # With this seed no completion ends early: so long they are planned.
    assert gpu["metrics"][-1]["completions/min_length"] == SHORT["max_completion_length"]
    tile = SHORT["per_device_train_batch_size"] * SHORT["max_completion_length"] * HEAD_WIDTH * 4  # nearly all of it
    assert last["memory/step_peak"] - tile == pytest.approx(planned - tile, rel=0.1)


def test_adapters_learn_in_fp16_with_a_scaled_loss_what_they_do_in_fp32(on_gpu, model_dir, rows_file, tmp_path):
    here = {"model_name_or_path": model_dir, "student_model": model_dir, "dataset_id_or_path": rows_file}
    chosen = {"use_vllm": False, "use_peft": True, "learning_rate": 1e-3, "max_grad_norm": 0.1, "max_steps": 3}
    runs = {}
    for precision in ("fp16", "fp32"):
        overrides = SHORT | here | chosen | {"precision": precision, "device": "cuda"}
        words = [f"{key}={value}" for key, value in overrides.items()]
        runs[precision] = on_gpu("train", tmp_path / precision, *words)["metrics"]
    assert len(runs["fp16"]) == 3
    for half, full in zip(runs["fp16"], runs["fp32"], strict=True):
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.01)  # what clipping saw: no longer scaled
        assert half["reward"] == pytest.approx(full["reward"], abs=1e-3)
        assert half["update/visible_fraction"] == pytest.approx(full["update/visible_fraction"], abs=0.02)
    assert runs["fp16"][0]["grad_norm"] > chosen["max_grad_norm"]


FAMILIES = ("qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
KINDS = [(precision, use_peft) for precision in ("fp32", "bf16") for use_peft in (False, True)]
WIDE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 16, "head_dim": 32, "vocab_size": 512}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
OF_TWO_TEXTS = ["per_device_train_batch_size=2", "train_batch_size=8", "num_generations=4", "share_prompts=false"]
OF_TWO_TEXTS += ["max_prompt_length=256", "max_completion_length=256", "beta=0", "sync_ref_model=false"]


def test_what_stays_on_the_device_where_activations_are_offloaded_is_planned(on_gpu, tmp_path):
    """Without checkpointing a layer leaves what is saved twice in a row: 7 hidden states of a Qwen2 in bf16."""
    chosen = [({"model_type": family} | WIDE, *rest, False) for family in FAMILIES for rest in KINDS]
    chosen += [({"model_type": "qwen2"} | WIDE, *rest, True) for rest in KINDS]
    shares = {}
    found = on_gpu("kept", json.dumps(chosen))
    for (config, precision, use_peft, checkpointing), taken in zip(chosen, found, strict=True):
        (tmp_path / "config.json").write_text(json.dumps(config))
        words = [f"model_name_or_path={tmp_path}", f"precision={precision}", f"use_peft={use_peft}"]
        words += ["lora_r=4"] if use_peft else []
        words += ["activation_offloading=true", f"gradient_checkpointing={checkpointing}", "optim=adamw_torch"]
        work = planned("teacher_rlt_mono_80gb", *OF_TWO_TEXTS, *words, gb=80)[0].work
        shares[config["model_type"], precision, use_peft, checkpointing] = kept_bytes(work) / taken
    # Of Qwen3, where all weights are trained, attention's output is not left, which is planned all the same.
    far = {name: share for name, share in shares.items() if not 0.9 < share < (1.2 if name[0] == "qwen3" else 1.05)}
    assert not far


def test_what_a_layer_leaves_where_activations_are_offloaded_by_hand():
    """7B, bf16, all weights: of a token two norms' inputs in fp32, two inputs of projections and attention's output,
    7 x 3584 x 2 bytes in each of 28 layers; of the end 4 more hidden states."""
    words = ["activation_offloading=true", "gradient_checkpointing=false", "share_prompts=false"]
    words += ["per_device_train_batch_size=1", "optim=cpu_offload", "max_prompt_length=1024"]
    plan = planned("teacher_rlt_mono_80gb", *words, "max_completion_length=2048", gb=200)[0]
    assert kept_bytes(plan.work) == 3072 * (28 * 7 + 4) * 3584 * 2
    layer = 12 * 18944 + (20.7 + 8.2) * 3584 - 2 * 2 * (3584 - 512)  # at the peak of its backward pass; see the 80 GB's
    in_course = 3072 * ((27 * 7 + 4) * 3584 * 2 + layer)
    assert activations(plan.work)[1]["activations"] == pytest.approx(in_course, rel=1e-6)
