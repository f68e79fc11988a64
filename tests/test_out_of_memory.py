"""What a run ends with that runs out of memory. Run: ./run_tests.sh tests/test_out_of_memory.py"""

import logging
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO
from planned import planned

from trainers import warmup_runs
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.engine import Engine
from trainers.errors import ConfigError, OutOfMemory
from trainers.plan import planning
from trainers.plan.workload import GIB
from trainers.rl import run_rl
from trainers.score import run_score
from trainers.sft import run_sft
from trainers.watch import outputs
from trainers.watch.out_of_memory import is_out_of_memory, out_of_memory_told, remedies_of
from trainers.watch.phases import PhaseTimer

TORCH = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1.16 GiB.")
VLLM = ValueError("No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
# Phase, where the error is raised, the error, and what of the remedies the small models' plan leaves.
FAILING = (
    ("load", "vllm.LLM", VLLM, "kv_cache_gib=0.8   ("),
    ("generate", "trainers.engine.Engine.generate", TORCH, "kv_cache_gib=0.8   ("),
    ("score", "trl.GRPOTrainer._calculate_rewards", TORCH, "a card that nothing else uses"),
    (
        "update",
        "trl.GRPOTrainer._compute_loss",
        TORCH,
        "gradient_checkpointing=true per_device_train_batch_size=64   (",
    ),
)


def raising(error):
    def failing(*_, **__):
        raise error

    return failing


def small(model_dir, rows_file, out, *words):
    here = [f"model_name_or_path={model_dir}", f"dataset_id_or_path={rows_file}", f"output_dir={out}"]
    here += ["device=cpu", "eval_dataset_split=null", "report_to=none", "save_strategy=no", "max_steps=1"]
    return planning.planned(load_options(compose_run("", [*words, *here]), repo=REPO))


def ends(out, run, *arguments):
    """What a run is ended with, and its log."""
    outputs.start_logging(out, False, root=out)
    with pytest.raises(OutOfMemory) as ended, outputs.ending_in_the_log(out):
        run(*arguments)
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    logging.getLogger().handlers[0].flush()
    return str(ended.value), (out / "training.log").read_text()


@pytest.mark.parametrize(("phase", "place", "error", "remedy"), FAILING)
def test_rl_ends_with_the_phase_what_it_took_and_what_helps(
    model_dir, rows_file, tmp_path, monkeypatch, phase, place, error, remedy
):
    """A mock: there is no card here whose memory could run out, so torch's and vLLM's errors are raised where they
    would come from, in a real run on the CPU."""
    monkeypatch.setattr(place, raising(error))
    words = ["teacher_rlt_tiny", f"student_model={model_dir}", "kv_cache_gib=1", "report_before_after=false"]
    words += ["train_batch_size=64", "per_device_train_batch_size=64", "num_probes=0", "share_prompts=false"]
    plan = small(model_dir, rows_file, tmp_path, *words, "vllm_kwargs={disable_log_stats: true}")
    message, log = ends(tmp_path, run_rl, plan.options, tmp_path, plan)
    first, said, help, *_, last = message.splitlines()
    assert first.startswith(f"out of memory in the phase {phase}: ")
    assert f"; {plan.total(phase) / GIB:.2f} are planned for it, of {plan.available / GIB:.2f} that were free" in first
    assert said == f"  {' '.join(str(error).split())}" and help.startswith(f"  -> {remedy}")
    assert last == f"  the traceback is in {tmp_path}/training.log"
    assert "Traceback" not in message and "in failing" in log and log.endswith(f"{message}\n")


def test_a_warm_up_ends_so_too_and_one_of_another_run_is_named(model_dir, rows_file, tmp_path, monkeypatch):
    """A mock, as above."""
    monkeypatch.setattr("trl.SFTTrainer.compute_loss", raising(TORCH))
    words = ["teacher_sft_tiny", "model_init=null", "train_batch_size=64", "per_device_train_batch_size=64"]
    plan = small(model_dir, rows_file, tmp_path, *words)
    message, log = ends(tmp_path, run_sft, plan.options, tmp_path, str(model_dir), 1, plan)
    assert message.startswith("out of memory in the phase update: ") and "in failing" in log
    assert "\n  -> gradient_checkpointing=true" in message and "\n  or per_device_train_batch_size=32   (" in message

    monkeypatch.setattr(warmup_runs, "run_sft", raising(OutOfMemory("out of memory in the phase update")))
    asking = load_options(compose_run("teacher_rlt_tiny"), repo=REPO)
    with pytest.raises(OutOfMemory) as ended:
        warmup_runs.ensure_model("run:student_sft_tiny", asking, tmp_path)
    assert str(ended.value).splitlines() == [
        "run:student_sft_tiny: out of memory in the phase update",
        "  train it by itself with these, ./launch_mono.sh student_sft_tiny.yaml ..., and name its folder",
    ]


def test_scoring_ends_so_too(model_dir, rows_file, tmp_path, monkeypatch):
    """A mock, as above."""
    monkeypatch.setattr("trainers.scoring.explanation_scorer.ExplanationScorer.score", raising(TORCH))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "solution": "b", "explanation": "c"}\n')
    words = ["stage=score", f"model_name_or_path={model_dir}", f"student_model={model_dir}", "device=cpu"]
    words += [f"dataset_id_or_path={rows}", f"output_dir={tmp_path}"]
    message, log = ends(tmp_path, run_score, load_options(compose_run("", words), repo=REPO), tmp_path)
    assert message.startswith("out of memory in the phase score: ") and "GiB are planned then" not in message
    assert "a card that nothing else uses" in message and "Tried to allocate 1.16 GiB" in log


@pytest.mark.parametrize(
    "told",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "CUDA Error: out of memory at csrc/cumem_allocator.cpp:139",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
    ],
)
def test_what_libraries_say_of_it_is_known_and_a_card_that_tells_no_more_hides_it_not(told, tmp_path):
    """A mock: the texts are those of their sources; the memory of a card whose context is broken cannot be read."""
    timer = PhaseTimer(SimpleNamespace(peak=raising(RuntimeError("CUDA error: an illegal memory access"))))
    with pytest.raises(OutOfMemory, match="cannot be read any more .CUDA error: an illegal") as ended:  # noqa: SIM117
        with out_of_memory_told(timer, torch.device("cpu"), None, tmp_path):
            raise RuntimeError(told)
    assert "in the phase load" in str(ended.value) and told.split()[0] in str(ended.value)


def test_the_program_ends_with_the_message_alone(tmp_path):
    code = "import sys, train\nfrom trainers.errors import OutOfMemory\n"
    code += "def failing(*_): raise OutOfMemory('out of memory in the phase score')\n"
    code += f"train.run = failing\nsys.argv = ['train.py', 'output_dir={tmp_path}']\ntrain.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 1 and done.stderr == "out of memory in the phase score\n"


# By run, phase, and what is set beside: the remedies in order, without what they keep as it was.
OFFERED = (
    ("teacher_rlt_mono_24gb", "generate", [], ["kv_cache_gib=2.4", "enforce_eager=true"]),
    ("teacher_rlt_mono_24gb", "load", ["enforce_eager=true"], ["kv_cache_gib=3.2"]),
    (
        "teacher_rlt_mono_24gb",
        "score",
        [],
        ["student_tokens_per_pass=98304", "student_mode=cpu", "max_completion_length=2048"],
    ),
    (
        "teacher_rlt_mono_12gb",
        "score",
        ["student_mode=resident", "kv_cache_gib=0.5"],
        ["student_mode=streamed", "student_mode=cpu"],
    ),
    (
        "teacher_rlt_mono_80gb",
        "update",
        [],
        ["activation_offloading=true", "per_device_train_batch_size=2", "max_completion_length=4096"],
    ),
    ("teacher_rlt_mono_24gb", "update", ["activation_offloading=true"], ["max_completion_length=2048"]),
    (
        "teacher_sft_24gb",
        "update",
        ["max_length=2048", "per_device_train_batch_size=4"],
        ["activation_offloading=true", "per_device_train_batch_size=2", "max_length=1024"],
    ),
)


@pytest.mark.parametrize(("run", "phase", "words", "offered"), OFFERED)
def test_what_is_offered_applies_to_the_run_in_order(run, phase, words, offered):
    plan = planned(run, *words)[0]
    assert [told.split()[0] for told, _ in remedies_of(plan, phase)] == offered


@pytest.mark.parametrize(
    ("card", "gb", "offloads"),
    [
        *((card, None, False) for card in ("12gb", "24gb", "48gb", "80gb", "96gb", "sft_16gb")),
        *(("sft_24gb", None, True), ("96gb", 76, True)),
    ],
)
def test_what_is_offered_makes_the_phase_as_small_as_it_says_once_it_is_pasted(card, gb, offloads):
    """With it alone `auto` would take a larger micro-batch, or a larger cache, in the room that it leaves, or no longer
    offload activations."""
    run = f"teacher_{card}" if card.startswith("sft") else f"teacher_rlt_mono_{card}"
    plan = planned(run, gb=gb)[0]
    assert plan.options.activation_offloading is offloads
    for phase in plan.phases:
        for words, size in remedies_of(plan, phase):
            again = planned(run, *words.split(), gb=gb)[0]
            assert again.total(phase) == pytest.approx(size, abs=2**21), (phase, words)
            assert size < plan.total(phase)


def test_vllm_s_error_is_no_fault_of_the_arguments_that_were_asked_for(monkeypatch):
    engine = Engine.__new__(Engine)
    engine._asked = {"block_size": 32}
    monkeypatch.setattr("vllm.LLM", raising(VLLM))
    with pytest.raises(ValueError, match="No available memory") as told:
        engine._start({})
    assert is_out_of_memory(told.value) and not isinstance(told.value, ConfigError)
    monkeypatch.setattr("vllm.LLM", raising(ValueError("no such block size")))
    with pytest.raises(ConfigError) as refused:
        engine._start({})
    assert not is_out_of_memory(refused.value)


def test_other_errors_stay_what_they_are(model_dir, rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.sft.load_teacher", raising(ZeroDivisionError()))
    plan = small(model_dir, rows_file, tmp_path, "teacher_sft_tiny", "model_init=null")
    with pytest.raises(ZeroDivisionError):
        run_sft(plan.options, tmp_path, str(model_dir), 1, plan)
    chained = RuntimeError("the KV cache finds no room again")
    chained.__cause__ = RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp")
    assert is_out_of_memory(chained)
