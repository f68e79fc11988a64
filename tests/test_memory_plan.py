"""The plan of memory. Run: ./run_tests.sh tests/test_memory_plan.py"""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import REPO
from planned import machine, nearest, planned, problem

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.memory import cache_share
from trainers.options import options_class
from trainers.plan import planning
from trainers.plan.knobs import Change, knobs
from trainers.plan.machine import Holder, Machine, planned_card
from trainers.plan.model_shapes import AdapterShape
from trainers.plan.plan_table import knobs_text, plan_text
from trainers.plan.planning import machine_for, run_plan
from trainers.plan.remedies import nearest_fit, refuse
from trainers.plan.run_models import shapes_of
from trainers.plan.solve import Problem, micro_batch_choices, solve
from trainers.plan.workload import GIB, PHASES
from trainers.settings.batch import batch_plan

N = 7_615_616_512


def test_weights_gradients_and_states_of_seven_billion_by_hand():
    plan = planned("teacher_rlt_mono_85gb")[0]
    update = plan.phases["update"]
    assert update["weights"] == update["gradients"] == 2 * N
    assert update["optimizer"] == pytest.approx(N * 2 * (1 + 4 / 256), rel=0.001)  # two states of 8 bits, scales
    assert plan.peak == max(plan.total(phase) for phase in PHASES)  # the maximum, not the sum
    assert "KV cache" not in update and "gradients" not in plan.phases["save"]
    # Its 32 micro-batches are generated 8 at a time: the second rollout finds gradients.
    assert plan.phases["generate"]["gradients"] == 2 * N
    assert "gradients" not in planned("teacher_rlt_mono_80gb")[0].phases["generate"]


def test_buffers_of_a_preset_by_hand():
    """80 GB: 64 completions of 8192 tokens, prompts of 4096, four texts with one prompt at a time."""
    plan = planned("teacher_rlt_mono_80gb")[0]
    assert plan.phases["generate"]["KV cache"] == (64 * (8192 + 64) + 4 * 4096) * 57344
    assert plan.phases["save"]["clones"] == 2 * N
    layer = 2 * 3584 * 3584 + 2 * 512 * 3584 + 3584 + 2 * 512 + 3 * 18944 * 3584 + 2 * 3584
    head = 152064 * 3584
    assert plan.phases["score"]["streaming buffers"] == 2 * (2 * layer + head)
    # 262144 tokens of hidden states, and the rotary tables of each text.
    assert plan.phases["score"]["hidden states"] == 262144 * (3584 + 2 * 128) * 2
    moving = sum(plan.phases["score"][name] for name in ("hidden states", "scoring buffers"))
    assert plan.phases["score"]["fragmentation"] == int(0.05 * moving)  # layers come into the same two blocks
    assert "fragmentation" not in plan.phases["generate"] | plan.phases["save"]
    tokens, twice = 4096 + 4 * 8192, 3 * 4096  # what is read, and what of it attention has once more in its rows
    kept = 28 * tokens * 3584 * 2  # the input of each layer
    work = tokens * (12 * 18944 + (20.7 + 8.2) * 3584 - 2 * 2 * (3584 - 512))  # keys are not repeated
    rows = twice * 2 * (3584 + 512) * 2  # queries, keys, values, and what is made of them
    assert plan.phases["update"]["activations"] == pytest.approx(kept + work + rows, rel=1e-6)
    states = plan.phases["update"]["optimizer"]
    # Two that are kept and the one that is written, of weights alone.
    assert plan.disk["result"] == 2 * N and plan.disk["checkpoints"] == 3 * 2 * N
    whole = planned("teacher_rlt_mono_80gb", "save_only_model=false")[0].disk["checkpoints"]
    assert whole == pytest.approx(3 * (2 * N + states), rel=0.001)


def test_what_does_not_give_its_cache_back_keeps_it_while_it_learns(monkeypatch):
    released, kept = (
        planned("teacher_rlt_mono_80gb", f"weight_bridge={bridge}")[0].phases["update"].get("KV cache", 0)
        for bridge in ("copy", "restart")
    )
    assert released == 0 and kept > 0
    monkeypatch.setattr("trainers.memory.vllm_releases_cache", lambda: False)  # as before 0.31
    assert planned("teacher_rlt_mono_80gb", "weight_bridge=copy")[0].phases["update"]["KV cache"] > 0
    monkeypatch.undo()
    without = planned("teacher_rlt_mono_80gb", "use_vllm=false", "vllm_gpu_memory_utilization=0.3")[0]
    whole = 64 * 12288 * 57344  # transformers', of the whole rollout; beside it one layer's keys, as they grow
    assert without.phases["generate"]["KV cache"] == whole + whole // (2 * 28)
    apart = planned("teacher_rlt_mono_80gb", "enable_prefix_caching=false")[0]
    assert apart.phases["generate"]["KV cache"] > released  # each completion holds its own prompt


def test_cache_that_was_asked_for_is_what_is_planned_and_given():
    plan, _ = planned("teacher_rlt_mono_80gb", "kv_cache_gib=2")
    assert plan.phases["generate"]["KV cache"] == 2 * GIB and plan.options.kv_cache_gib == 2
    with pytest.raises(ConfigError, match="one sequence of the greatest length takes 0.6"):
        planned("teacher_rlt_mono_80gb", "kv_cache_gib=0.1")


def test_what_is_solved_reaches_the_engine():
    import torch

    from trainers.engine_setup import engine_arguments

    def arguments(*overrides):
        plan = planned("teacher_rlt_mono_80gb", *overrides)[0]
        return engine_arguments(plan.options, "model", torch.device("cuda"), torch.bfloat16), plan

    given, plan = arguments()
    assert given["kv_cache_memory_bytes"] == plan.phases["generate"]["KV cache"]
    assert (given["max_num_seqs"], given["max_num_batched_tokens"]) == (64, 8192)
    given, plan = arguments("vllm_gpu_memory_utilization=0.5")
    assert "kv_cache_memory_bytes" not in given
    assert (given["gpu_memory_utilization"], given["max_num_seqs"]) == (0.5, 64)
    loaded = plan.phases["load"]  # vLLM's share of the card holds what is loaded, its cache included
    assert sum(loaded.values()) == pytest.approx(0.5 * 80e9, rel=1e-6)


def test_sizes_that_the_plan_counts_on_are_those_that_are_used():
    """They are written down twice, since a plan imports neither torch nor vLLM."""
    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from trainers import memory
    from trainers.bridges import lora_ranks
    from trainers.plan import activations

    assert (activations.HEAD_TOKENS, activations.HEAD_WIDTH) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    for rank in (1, 5, 16, 300):
        assert memory._vllm_rank(rank) == next(r for r in lora_ranks() if r >= rank)


def test_copy_bridge_holds_the_weights_twice():
    once, twice = (
        planned("teacher_rlt_mono_85gb", f"weight_bridge={bridge}")[0].phases["generate"].get("engine's weights", 0)
        for bridge in ("shared", "copy")
    )
    assert twice - once == 2 * N


def test_lora_trains_adapters_only():
    plan = planned("teacher_rlt_mono_24gb")[0]
    adapters = 4 * 28 * 16 * ((3584 + 3584) * 2 + (3584 + 512) * 2 + (3584 + 18944) * 3)
    assert plan.phases["update"]["gradients"] == plan.phases["update"]["adapters"] == adapters
    assert plan.phases["update"]["optimizer"] == pytest.approx(2 * adapters, rel=0.001)
    assert plan.phases["generate"]["engine's adapters"] == adapters // 2


def test_optimizer_in_host_memory_is_not_on_the_device():
    plan = planned("teacher_rlt_mono_48gb", "optim=cpu_offload")[0]
    assert "optimizer" not in plan.phases["update"]
    assert plan.host["optimizer on the host"] == pytest.approx(12 * N, rel=0.01)


def test_gradient_checkpointing_keeps_a_fraction_of_the_activations():
    words = "optim=cpu_offload", "per_device_train_batch_size=1", "activation_offloading=false"
    on, off = (
        planned("teacher_rlt_mono_96gb", *words, f"gradient_checkpointing={value}")[0] for value in ("true", "false")
    )
    assert off.total("update") > 2 * on.total("update")


def test_resident_student_is_on_the_device_and_a_streamed_one_in_host_memory():
    resident = planned("teacher_rlt_mono_85gb", "student_mode=resident", "optim=cpu_offload")[0]
    streamed = planned("teacher_rlt_mono_85gb", "student_mode=streamed")[0]
    assert resident.phases["update"]["student"] == streamed.host["student"] == 2 * N
    assert "student" not in resident.host


@pytest.mark.parametrize("gb", [30, 40, 48, 80, 140])
def test_solving_changes_neither_the_batch_nor_the_group(gb):
    plan, asked = planned("teacher_rlt_mono", gb=gb)
    for key in ("train_batch_size", "num_generations", "max_prompt_length", "max_completion_length"):
        assert getattr(plan.options, key) == getattr(asked, key)
    assert batch_plan(plan.options).is_legal
    for key in ("per_device_train_batch_size", "student_tokens_per_pass", "optim", "student_mode"):
        assert getattr(plan.options, key) != "auto"
    assert plan.options.kv_cache_gib > 0


def test_more_memory_is_used():
    small, large = (planned("teacher_rlt_mono", "offload_untrained_models=false", gb=gb)[0] for gb in (40, 140))
    assert (small.options.optim, large.options.optim) == ("cpu_offload", "adamw_8bit")
    assert (small.options.student_mode, large.options.student_mode) == ("streamed", "resident")
    assert small.options.per_device_train_batch_size < large.options.per_device_train_batch_size


def test_micro_batches_on_offer_are_legal():
    options = load_options(compose_run("teacher_rlt_mono_85gb"), repo=REPO, needs_device=False)
    assert micro_batch_choices(options, 1) == [12, 6, 3]  # 8 of them hold whole groups of 24, and 96 is a multiple
    free = load_options(compose_run("teacher_rlt_mono"), repo=REPO, needs_device=False)
    assert micro_batch_choices(free, 1) == [32, 16, 8, 4, 2, 1]


def test_what_does_not_fit_is_refused_with_settings_that_do():
    plan, _ = planned("teacher_rlt_mono", "per_device_train_batch_size=8", gb=40)
    assert not plan.fits
    change = nearest("teacher_rlt_mono", "per_device_train_batch_size=8", gb=40)
    assert change.settings == {"per_device_train_batch_size": "auto"}
    message = str(refuse(plan, change))
    assert "the update phase needs" in message and "37.3 GiB are free" in message
    assert "-> per_device_train_batch_size=auto   (peak" in message
    again, _ = planned("teacher_rlt_mono", *str(change).split(), gb=40)
    assert again.fits  # as it is pasted


def test_last_resort_is_lora_and_then_nothing():
    change = nearest("teacher_rlt_mono", gb=22)
    assert change.settings["use_peft"] is True and change.plan.fits
    assert nearest("teacher_rlt_mono", gb=12) is None
    assert "a smaller model" in str(refuse(planned("teacher_rlt_mono", gb=12)[0], None))


def test_knobs_tell_what_each_change_does():
    options = load_options(compose_run("teacher_rlt_mono_80gb"), repo=REPO, needs_device=False)
    changes = {str(c): c.plan.peak for c in knobs(problem(options, machine(80)))}
    now = planned("teacher_rlt_mono_80gb")[0].peak
    assert changes["optim=cpu_offload"] < now
    assert any("use_peft=true" in name and peak < now for name, peak in changes.items())


def test_knobs_tell_what_is_solved_and_what_takes_more():
    """Also what is nothing to offer: the micro-batches next to the solved one, another bridge, and their like."""
    named = [f"teacher_rlt_mono_{gb}gb" for gb in (80, 24)]
    large, small = (load_options(compose_run(name), repo=REPO, needs_device=False) for name in named)
    there = problem(large, machine(80))
    now, changes = solve(there), {str(change): change.plan for change in knobs(there)}
    assert now.options.per_device_train_batch_size == 4
    assert changes["per_device_train_batch_size=8"].options.per_device_train_batch_size == 8
    assert changes["per_device_train_batch_size=8"].total("update") > now.total("update")
    copied = changes["weight_bridge=copy"]
    assert copied.phases["update"]["engine's weights"] >= now.phases["update"]["weights"]
    for change in ("gradient_checkpointing=false", "optim=flash_adamw", "student_quantization=8bit"):
        assert changes[change].peak > now.peak
    there = problem(small, machine(24))
    (copied,) = (change for change in knobs(there) if str(change) == "weight_bridge=copy")
    assert "does not fit" in knobs_text(solve(there), [copied])
    on_cpu = large.model_copy(update={"device": "cpu", "precision": "bf16"})  # where flash_adamw has no kernels
    assert "optim=flash_adamw" not in map(str, knobs(problem(on_cpu, Machine(None, *[512 * GIB] * 3))))


def test_plan_is_made_from_the_memory_that_is_free_and_names_who_holds_the_rest():
    card = replace(planned_card(80), free=30 * GIB, holders=[Holder(4711, "python", 44 * GIB)])
    taken = Machine(card, 256 * GIB, 256 * GIB, 1000 * GIB)
    options = load_options(compose_run("teacher_rlt_mono_80gb"), repo=REPO, needs_device=False)
    plan = solve(problem(options, taken))
    assert plan.available == 30 * GIB and not plan.fits
    text = plan_text(plan, taken, full=True)
    assert "30.0 of 74.5 GiB free" in text and "held by pid 4711 (python) 44.0 GiB" in text
    assert "it does not fit" in text


@pytest.mark.parametrize("run", ["teacher_rlt_mono_85gb", "teacher_rlt_mono_24gb"])
def test_the_items_of_a_phase_add_up_to_it(run):
    text = plan_text(planned(run)[0], machine(85), full=True)
    rows = re.findall(r"^(  )?(\S.*?)  +(\d+\.\d+)(?:  [█░].*)?$", text, re.MULTILINE)
    found = {}
    for indent, name, size in rows:
        if not indent:
            found[name] = float(size), []
        else:
            list(found.values())[-1][1].append(float(size))
    assert set(found) == {"load", "generate", "score", "update", "save"}
    for total, items in found.values():
        assert sum(items) == pytest.approx(total, abs=0.005 * (1 + len(items)))


def test_run_that_does_not_fit_stops_unless_told_to_go_on(monkeypatch, caplog):
    small = Machine(None, 2**28, 2**28, 1000 * GIB)
    monkeypatch.setattr("trainers.plan.planning.machine_for", lambda *_: small)
    options = load_options(compose_run("teacher_rlt_tiny"), repo=REPO)
    with pytest.raises(ConfigError, match="memory: the update phase needs"):
        planning.planned(options)
    assert planning.planned(options.model_copy(update={"ignore_memory_plan": True})).options.optim == "adamw_torch"
    assert "ignore_memory_plan: memory: the update phase needs" in caplog.text


def test_full_disk_is_told_before_the_start(monkeypatch):
    full = Machine(None, 32 * GIB, 32 * GIB, 2**20)
    monkeypatch.setattr("trainers.plan.planning.machine_for", lambda *_: full)
    with pytest.raises(ConfigError, match="disk: its checkpoints take up to"):
        planning.planned(load_options(compose_run("teacher_rlt_tiny"), repo=REPO))


def test_default_run_is_planned_through_its_warm_ups():
    options = load_options(compose_run("teacher_rlt_tiny"), repo=REPO)
    teacher, student = shapes_of(options)
    assert teacher.num_parameters == student.num_parameters == 804_480
    plan = solve(Problem(options, teacher, student, machine_for(options)))
    assert plan.work.device == "cpu" and plan.fits
    assert plan.options.kv_cache_gib < 0.1  # 128 sequences of 192 tokens, not the GiB that vLLM takes unasked


def test_sft_is_planned_too():
    assert planned("teacher_sft", gb=80)[0].phases["update"]["weights"] == 2 * N
    # Without max_length the longest text is the model's.
    endless = planned("teacher_sft", "max_length=null", gb=80)[0]
    assert endless.total("update") > planned("teacher_sft", gb=80)[0].total("update")


def test_several_processes_each_hold_buckets_and_share_the_host():
    """DistributedDataParallel copies gradients into buckets of their size; measured with gloo, 102.67 MiB of 102.67."""
    options = load_options(compose_run("teacher_sft", ["device=auto"]), num_devices=2, repo=REPO, needs_device=False)
    here = Machine(replace(planned_card(140), is_here=True), 512 * GIB, 30 * GIB, 1000 * GIB)
    one, two = (solve(problem(options, here, devices=devices)) for devices in (1, 2))
    assert "gradient buckets" not in one.phases["update"] and two.phases["update"]["gradient buckets"] == 2 * N
    assert "gradient buckets" not in two.phases["load"]
    assert two.host_need == 2 * one.host_need and one.fits_host and not two.fits_host
    assert nearest_fit(problem(options, here, devices=2)) is None  # each process reads the model on the host


@pytest.mark.parametrize("run", ["score", "rescore"])
def test_what_does_not_train_is_not_planned(run):
    options = options_class(run)(stage=run)
    with pytest.raises(ConfigError, match=f"stage='{run}': only the memory of runs that train is planned"):
        run_plan(options)


def test_solver_keeps_its_share_free():
    assert planned("teacher_rlt_mono_24gb")[0].spare == pytest.approx(0.08, abs=0.005)  # the KV cache fills up


def test_a_text_longer_than_a_pass_is_held_as_a_whole():
    short = planned("teacher_rlt_mono_80gb", "student_tokens_per_pass=1024")[0].phases["score"]["hidden states"]
    assert short == 12288 * (3584 + 2 * 128) * 2


def test_stage_plan_says_by_its_exit_whether_it_fits():
    for gb, code in ((80, 0), (12, 1)):
        words = ["stage=plan", "run_cfg=teacher_rlt_mono_24gb", f"vram_gb={gb}"]
        done = subprocess.run([sys.executable, "train.py", *words], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert f"a card of {gb} GB" in done.stdout and "max_completion_length=8192" in done.stdout


def test_an_adapter_that_is_merged_first_takes_memory_and_disk():
    options = load_options(compose_run("teacher_rlt_mono_24gb"), repo=REPO, needs_device=False)
    teacher, student = shapes_of(options)
    without = solve(Problem(options, teacher, student, machine(24)))
    adapted = replace(student, adapter=AdapterShape(16, "all-linear"))
    plan = solve(Problem(options, teacher, adapted, machine(24)))
    assert plan.host_need == 4 * N > without.host_need  # in fp32, before anything else is there
    assert sum(plan.disk.values()) - sum(without.disk.values()) == 2 * N
    # A teacher's adapter that is trained on is merged into nothing.
    continued = solve(Problem(options, replace(teacher, adapter=AdapterShape(16, "all-linear")), student, machine(24)))
    assert continued.work.continues and continued.host_need == without.host_need
    on_cpu = options.model_copy(update={"device": "cpu", "precision": "bf16", "optim": "adamw_torch"})
    loading = solve(Problem(on_cpu, teacher, adapted, Machine(None, 99 * GIB, 99 * GIB, 1000 * GIB))).phases["load"]
    assert sum(loading.values()) >= 4 * N


def test_checkpoints_without_a_limit_all_stay():
    words = ["model_name_or_path=Qwen/Qwen2.5-7B-Instruct", "save_strategy=epoch", "num_train_epochs=10"]
    limited, all_of_them = (
        planned("teacher_sft", *words, f"save_total_limit={limit}", gb=80)[0].disk["checkpoints"]
        for limit in (1, "null")
    )
    assert all_of_them == pytest.approx(11 / 2 * limited)


def test_a_cache_that_the_user_made_too_large_is_taken_back():
    change = nearest("teacher_rlt_mono_24gb", "kv_cache_gib=8", gb=24)
    assert change.settings == {"kv_cache_gib": None} and change.plan.fits
    assert nearest("teacher_rlt_mono_24gb", "vllm_gpu_memory_utilization=0.99", gb=24).settings == {
        "vllm_gpu_memory_utilization": "auto"
    }


def test_changes_that_leave_the_peak_where_it_is_are_told_by_what_else_they_change():
    """The KV cache of the 24 GB preset takes what is left, so that its peak is the solver's budget whatever changes;
    32 completions of 2048 tokens and 4 prompts of 2048 take 75776 x 57344 bytes, and of 4096 tokens 141312."""
    options = load_options(compose_run("teacher_rlt_mono_24gb"), repo=REPO, needs_device=False)
    there = problem(options, machine(24))
    now, changes = solve(there), {str(change): change for change in knobs(there)}
    shorter = changes["max_completion_length=2048"]
    cache = now.options.kv_cache_gib * GIB
    assert shorter.plan.peak == now.peak and shorter.plan.options.kv_cache_gib == cache / GIB
    assert f"(cache for {cache / (75776 * 57344):.0%} of the completions)" in knobs_text(now, [shorter])
    assert cache_share(now.work) == pytest.approx(cache / (141312 * 57344))


def test_a_setting_of_zero_is_written_as_a_number():
    assert str(Change({"beta": 0.0, "sync_ref_model": False, "kv_cache_gib": None}, None)) == (
        "beta=0.0 sync_ref_model=false kv_cache_gib=null"
    )
