"""Engine options that cannot be, told before anything loads. Run: ./run_tests.sh tests/test_engine_specs.py"""

import subprocess
import sys

import pytest
from conftest import REPO

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.settings.engine_specs import (
    GENERATE_SET_HERE,
    batched_tokens,
    bridge_name,
    device_faults,
    generate_arguments,
    vllm_arguments,
)


def options(*overrides):
    return load_options(compose_run("teacher_rlt_tiny", ["device=cpu", *overrides]), repo=REPO)


@pytest.mark.parametrize(
    ("words", "bridge"),
    [
        ([], "shared"),
        (["use_peft=true"], "lora"),
        (["use_peft=true", "weight_bridge=copy"], "copy"),
        (["weight_bridge=shared_vllm"], "shared"),
        (["weight_bridge=lora_only", "use_peft=true"], "lora"),
        (["weight_bridge=none"], "restart"),
    ],
)
def test_bridge_and_its_names_elsewhere(words, bridge):
    assert bridge_name(options(*words)) == bridge


@pytest.mark.parametrize(
    ("words", "key", "cause", "remedy"),
    [
        (["weight_bridge=lora"], "weight_bridge", "none are trained", "use_peft=true"),
        (["weight_bridge=lora_only"], "weight_bridge", "none are trained", "use_peft=true"),
        (["weight_bridge=shared", "use_peft=true"], "weight_bridge", "use_peft trains adapters", "weight_bridge=lora"),
        (["weight_bridge=ipc"], "weight_bridge", "'shared'", "--help"),
        (["vllm_kwargs={tensor_parallel_size: 2}"], "vllm_kwargs", "one GPU", "leave tensor_parallel_size out"),
        (["vllm_kwargs={pipeline_parallel_size: 2}"], "vllm_kwargs", "one GPU", "leave pipeline_parallel_size out"),
        (["vllm_kwargs={quantization: fp8}"], "vllm_kwargs", "packs quantized weights", "weight_bridge=restart"),
        (
            ["vllm_kwargs={quantization: fp8}", "weight_bridge=copy"],
            "vllm_kwargs",
            "packs quantized weights",
            "weight_bridge=restart",
        ),
        (["vllm_kwargs={max_num_seqs: 4}"], "vllm_kwargs", "sets it itself", "use the option max_num_seqs"),
        (["vllm_kwargs={dtype: bfloat16}"], "vllm_kwargs", "sets it itself", "use the option precision"),
        (["vllm_kwargs={logprobs_mode: raw_logits}"], "vllm_kwargs", "sets it itself", "leave it out"),
        (["vllm_kwargs={kv_cache_memory_bytes: 1000}"], "vllm_kwargs", "sets it itself", "use the option kv_cache_gib"),
        (["vllm_kwargs={model_impl: transformers}"], "vllm_kwargs", "the trainer computes with them", "leave it out"),
        (["vllm_model_impl=transformers"], "vllm_model_impl", "sets it itself", "vLLM's own classes"),
        (["vllm_kwargs={blocksize: 4}"], "vllm_kwargs", "no such argument", "block_size"),
        (["use_vllm=false", "weight_bridge=copy"], "weight_bridge", "without an engine", "use_vllm=true"),
        (["use_vllm=false", "max_num_seqs=4"], "max_num_seqs", "without an engine", "use_vllm=true"),
        (["use_vllm=false", "enforce_eager=true"], "enforce_eager", "without an engine", "use_vllm=true"),
        (
            ["use_vllm=false", "enable_prefix_caching=false"],
            "enable_prefix_caching",
            "without an engine",
            "leave it out",
        ),
        (["use_vllm=false", "kv_cache_gib=2"], "kv_cache_gib", "without an engine", "leave it out"),
        (["use_vllm=false", "vllm_max_model_length=512"], "vllm_max_model_length", "without an engine", "leave it out"),
        (
            ["use_vllm=false", "vllm_gpu_memory_utilization=0.5"],
            "vllm_gpu_memory_utilization",
            "without an engine",
            "leave it out",
        ),
        (
            ["use_vllm=false", "generation_kwargs={min_new_token: 2}"],
            "generation_kwargs",
            "GenerationConfig has no such",
            "min_new_tokens",
        ),
        (["use_vllm=false", "generation_kwargs={n: 2}"], "generation_kwargs", "GenerationConfig has no such", "see"),
        (
            ["use_vllm=false", "generation_kwargs={max_new_tokens: 2}"],
            "generation_kwargs",
            "an option",
            "max_completion",
        ),
        (["use_vllm=false", "overlap_scoring=true"], "overlap_scoring", "no generation", "overlap_scoring=false"),
        (["overlap_scoring=true", "student_mode=streamed"], "overlap_scoring", "whole batch", "student_mode=cpu"),
        (
            ["overlap_scoring=true", "reward_funcs=[format]", "student_model=null", "num_probes=0"],
            "overlap_scoring",
            "no reward function asks the student",
            "overlap_scoring=false",
        ),
        (["replay_rollouts=nowhere"], "replay_rollouts", "no recorded rollouts", "record_rollouts"),
        (["use_peft=true", "reference_mode=cpu"], "reference_mode", "no second model", "reference_mode=auto"),
        (["use_lora=true"], "use_lora", "unknown under this name", "use use_peft"),
        (["lora_target=[q_proj]"], "lora_target", "unknown under this name", "lora_target_modules"),
        (["adapter_start=merged"], "adapter_start", "'merge'", "did you mean merge?"),
        (["load_in_4bit=true"], "load_in_4bit", "unknown under this name", "bitsandbytes"),
        (["use_peft=true", "lora_target_modules=[q_proj,lm_head]"], "lora_target_modules", "the head", "all-linear"),
        (["generation_kwargs={n: 2}"], "generation_kwargs", "one sample for each prompt", "leave it out"),
        (
            ["generation_kwargs={stop_token_ids: [5]}"],
            "generation_kwargs",
            "one sample for each prompt",
            "leave it out",
        ),
        (["generation_kwargs={min_p: 0.1}"], "generation_kwargs", "an option for it", "min_p"),
        (["generation_kwargs={max_new_tokens: 5}"], "generation_kwargs", "an option", "max_completion_length"),
        (["generation_kwargs={min_token: 5}"], "generation_kwargs", "SamplingParams has no such", "min_tokens"),
        (["top_p=0.9"], "top_p", "the reward's KL", "kl_penalty_reward_coeff=0"),
        (["top_k=20"], "top_k", "the reward's KL", "use_vllm=false"),
        (
            ["top_p=0.9", "reward_funcs=[format]"],
            "top_p",
            "vllm_importance_sampling_correction would take them",
            "use_vllm=false, or vllm_importance_sampling_correction=false",
        ),
        (["temperature=0.005"], "temperature", "from 0.01 to 2", "temperature=1"),
        (["lora_r=64"], "lora_r", "use_peft=false trains every weight", "use_peft=true"),
        (["lora_target_modules=[q_proj]"], "lora_target_modules", "no adapter reads it", "use_peft=true"),
        (
            ["num_iterations=2", "generation_aggregation_steps=1", "per_device_train_batch_size=8"],
            "generation_aggregation_steps",
            "each of its",
            "null",
        ),
        (
            ["save_strategy=best", "metric_for_best_model=reward"],
            "save_strategy",
            "nothing is evaluated",
            "eval_strategy",
        ),
        (["dataloader_drop_last=true"], "dataloader_drop_last", "held-out questions", "leave it out"),
        (["generation_kwargs={presence_penalty: 0.5}"], "generation_kwargs", "the reward's KL", "reward_coeff=0"),
        (
            ["generation_kwargs={min_tokens: 2}"],
            "generation_kwargs",
            "the reward's KL",
            "include_teacher_think_entropy",
        ),
        (["generation_kwargs={thinking_token_budget: 0}"], "generation_kwargs", "the reward's KL", "leave it out"),
        (
            ["generation_kwargs={structured_outputs: {regex: a}}"],
            "generation_kwargs",
            "the reward's KL",
            "leave it out",
        ),
        (["vllm_kwargs={prefill_context_parallel_size: 2}"], "vllm_kwargs", "its one GPU", "leave"),
        (["vllm_kwargs={distributed_executor_backend: mp}"], "vllm_kwargs", "sets it itself", "leave it out"),
        (["lora_r=0"], "lora_r", "greater than or equal to 1", "lora_r=1"),
    ],
)
def test_fault_has_cause_and_remedy(words, key, cause, remedy):
    with pytest.raises(ConfigError) as error:
        options(*words)
    message = str(error.value)
    assert [fault.key for fault in error.value.faults].count(key) == 1, message
    assert f"{key}=" in message and cause in message and remedy in message, message


@pytest.mark.parametrize(
    ("asked", "cause", "with_restart"),
    [
        ("cpu_offload_gb: 1", "weights in host memory", True),
        ("offload_group_size: 2", "weights in host memory", True),
        ("kv_transfer_config: {kv_connector: ExampleConnector, kv_role: kv_both}", "outlive the weights", False),
        ("kv_offloading_size: 1", "outlive the weights", False),
        ("speculative_config: {model: small, num_speculative_tokens: 3}", "loads the teacher's weights", True),
        ("speculative_config: {method: mtp, num_speculative_tokens: 1}", "loads the teacher's weights", True),
        ("spec_method: draft_model, spec_model: small, spec_tokens: 3", "loads the teacher's weights", True),
    ],
)
def test_what_would_keep_updates_from_the_engine_is_refused(asked, cause, with_restart):
    words = f"vllm_kwargs={{{asked}}}"
    ways = ["use_peft=false", "use_peft=true", "weight_bridge=copy"]
    if with_restart:
        assert options(words, "weight_bridge=restart").vllm_kwargs
    for way in ways if with_restart else [*ways, "weight_bridge=restart"]:
        with pytest.raises(ConfigError) as error:
            options(words, way)
        (fault,) = error.value.faults
        assert fault.key == "vllm_kwargs" and fault.value.startswith(asked.split(":")[0] + "=")
        assert cause in fault.cause and "leave it out" in fault.remedy
        assert ("weight_bridge=restart" in fault.remedy) is with_restart


@pytest.mark.parametrize(
    "asked",
    [
        "cpu_offload_gb: 0",
        "offload_group_size: 0",
        "kv_transfer_config: null",
        "kv_offloading_size: null",
        "speculative_config: null",
        "speculative_config: {method: ngram, num_speculative_tokens: 3}",
        "speculative_config: {model: ngram, num_speculative_tokens: 3}",
        "spec_method: suffix, spec_tokens: 3",
    ],
)
def test_what_keeps_no_update_from_the_engine_is_taken(asked):
    taken = options(f"vllm_kwargs={{{asked}}}")
    assert not device_faults(taken, "cuda", "torch.bfloat16")
    faults = device_faults(taken, "cpu", "torch.float32")
    assert [fault.value for fault in faults] == [asked.split(":")[0]] * ("spec" in asked and "null" not in asked)


@pytest.mark.parametrize("name", GENERATE_SET_HERE)
def test_what_makes_other_completions_than_samples_is_refused_without_vllm(name):
    assert name in generate_arguments()
    with pytest.raises(ConfigError, match=f"generation_kwargs='{name}=1': this project sets it itself"):
        options("use_vllm=false", f"generation_kwargs={{{name}: 1}}")


def test_every_preset_runs_without_vllm_too():
    for run in (REPO / "cfgs/run_cfg").glob("teacher_rlt*.yaml"):
        assert not load_options(compose_run(run.stem, ["use_vllm=false"]), repo=REPO, needs_device=False).use_vllm


@pytest.mark.parametrize(
    "words",
    [
        ["top_p=0.9", "kl_penalty_reward_coeff=0", "vllm_importance_sampling_correction=false"],
        ["top_p=0.9", "use_vllm=false"],
        ["top_k=20", "reward_funcs=[student_answer]", "vllm_importance_sampling_correction=false"],
        ["generation_kwargs={min_tokens: 0, presence_penalty: 0, thinking_token_budget: -1, bad_words: []}"],
        ["generation_kwargs={min_tokens: 2}", "kl_penalty_reward_coeff=0"],
        ["generation_kwargs={min_tokens: 2}", "include_teacher_think_entropy=false"],
        ["generation_kwargs={ignore_eos: true}"],
        ["generation_kwargs={min_new_tokens: 2, typical_p: 0.9}", "use_vllm=false"],
        ["vllm_kwargs={quantization: null}"],
    ],
)
def test_sampling_that_spoils_nothing_is_taken(words):
    options(*words)


@pytest.mark.parametrize(
    ("words", "where", "key", "remedy"),
    [
        (["use_peft=true"], ("cuda", "torch.float32"), "precision", "weight_bridge=copy"),
        (
            ["cast_lm_head_to_fp32=true"],
            ("cuda", "torch.bfloat16"),
            "cast_lm_head_to_fp32",
            "weight_bridge=copy",
        ),
        (["vllm_kwargs={enable_chunked_prefill: true}"], ("cpu", "torch.float32"), "vllm_kwargs", "leave it out"),
    ],
)
def test_fault_that_depends_on_the_device(words, where, key, remedy):
    (fault,) = device_faults(options(*words), *where)
    assert fault.key == key
    assert remedy in fault.remedy
    assert not device_faults(options(), *where)


def test_recording_does_not_overwrite_another(tmp_path):
    (tmp_path / "train-00000.parquet").touch()
    with pytest.raises(ConfigError, match="already holds a recording"):
        options(f"record_rollouts={tmp_path}")
    assert options(f"replay_rollouts={tmp_path}").replay_rollouts == str(tmp_path)
    with pytest.raises(ConfigError, match="no generation to overlap"):
        options(f"replay_rollouts={tmp_path}", "overlap_scoring=true")


def test_arguments_are_those_of_the_installed_vllm():
    from vllm.engine.arg_utils import EngineArgs

    assert {field for field in EngineArgs.__dataclass_fields__} <= vllm_arguments()
    assert "cpu_offload_gb" in vllm_arguments()


def test_generation_parameters_are_those_of_the_installed_transformers():
    from transformers import GenerationConfig

    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert generate_arguments() == fields


def test_kernels_that_cannot_learn_are_refused_on_a_gpu(monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    dtype = "torch.bfloat16"
    assert "without a backward pass" in device_faults(options(), "cuda", dtype)[0].cause
    assert not device_faults(options(), "cpu", dtype) and not device_faults(options("use_vllm=false"), "cuda", dtype)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    assert not device_faults(options(), "cuda", dtype)


def test_what_is_computed_at_once_is_no_more_than_the_sequences_hold():
    lengths = ("max_prompt_length=256", "max_completion_length=256")
    assert batched_tokens(options(*lengths), 8) == 8 * 512
    assert batched_tokens(options(*lengths), 64) == batched_tokens(options(*lengths), None) == 8192
    assert batched_tokens(options(*lengths, "vllm_max_model_length=600"), 8) == 4800


def test_checking_imports_neither_torch_nor_vllm():
    code = "import sys, train; from trainers.checks import load_options; from trainers.config import compose_run\n"
    code += "load_options(compose_run('teacher_rlt_tiny', ['device=cpu', 'vllm_kwargs={block_size: 32}']))\n"
    code += "load_options(compose_run('teacher_rlt_tiny', ['device=cpu', 'use_vllm=false',"
    code += " 'generation_kwargs={typical_p: 0.9}']))\n"
    code += "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)


def test_on_a_gpu_torch_keeps_its_threads():
    """vLLM's worker of a GPU leaves torch one of them, and an optimizer on the host would take as many times longer."""
    code = "import os, torch; from trainers.engine_setup import prepare_environment\n"
    code += "from vllm.utils.torch_utils import set_torch_threads_for_runtime as worker\n"
    code += "os.environ.pop('OMP_NUM_THREADS', None); torch.set_num_threads(2); worker()\n"
    code += "assert torch.get_num_threads() == 1\n"
    code += "torch.set_num_threads(2); prepare_environment(torch.device('cuda')); worker()\n"
    code += "assert torch.get_num_threads() == 2"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO)
