"""The plan and the memory of the host. Run: ./run_tests.sh tests/test_host_memory.py"""

from dataclasses import replace

import pytest
from conftest import REPO
from planned import problem

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.plan import planning
from trainers.plan.host_memory import STAGED
from trainers.plan.machine import Machine, planned_card
from trainers.plan.plan_table import plan_text
from trainers.plan.planning import memory_faults
from trainers.plan.remedies import nearest_fit
from trainers.plan.solve import solve
from trainers.plan.workload import GIB

SEVEN = 2 * 7_615_616_512  # bytes of the teacher, and of the student, in bf16
LORA = {"use_peft": True, "learning_rate": 1e-5, "sync_ref_model": False}  # a rate ten times that of all weights
METHOD = ("train_batch_size", "num_generations", "max_prompt_length", "max_completion_length", "beta")
LARGE = ("train_batch_size=512", "max_completion_length=8192", "beta=0", "sync_ref_model=false")


def machine(gb, host):
    """A card of `gb` GB that is here, beside `host` GiB of free host memory."""
    return Machine(replace(planned_card(gb), is_here=True), 512 * GIB, int(host * GIB), 1000 * GIB)


def checked(*overrides, run="teacher_rlt_mono"):
    """What the plan decides is where models rest, not activations."""
    words = ["activation_offloading=false", *overrides]
    return load_options(compose_run(run, words), repo=REPO, needs_device=False)


def planned(gb, host, *overrides):
    options = checked(*overrides)
    return solve(problem(options, machine(gb, host)))


def nearest(gb, host, *overrides):
    options = checked(*overrides)
    return nearest_fit(problem(options, machine(gb, host)))


def test_optimizer_that_the_host_cannot_hold_is_not_chosen():
    """With room for both, the optimizer's states go to the host for the sake of a larger KV cache."""
    roomy, narrow = planned(62, 512, *LARGE), planned(62, 64, *LARGE)
    assert (roomy.options.optim, narrow.options.optim) == ("cpu_offload", "adamw_8bit")
    assert roomy.host_need > 64 * GIB and roomy.fits and narrow.fits
    assert narrow.options.kv_cache_gib < roomy.options.kv_cache_gib
    for key in METHOD:
        assert getattr(narrow.options, key) == getattr(roomy.options, key) == getattr(checked(*LARGE), key)


def test_settings_on_offer_fit_the_host_too():
    plan = planned(40, 64)
    assert plan.fits_device and not plan.fits_host and not plan.fits
    change = nearest(40, 64)
    assert change.settings == LORA and change.plan.fits
    (fault,) = memory_faults(problem(checked(), machine(40, 64)), plan, change)
    needs = "process 4.0, optimizer on the host 85.5, student 14.2, reference 14.2, saving 1.9"
    assert fault.key == "host memory" and fault.cause.startswith(f"it needs 119.7 GiB ({needs}) and 64.0 GiB are free")
    assert fault.remedy.startswith("use_peft=true learning_rate=1e-05 sync_ref_model=false   (peak")
    assert planned(40, 64, *str(change).split()).fits  # as it is pasted


def test_what_the_user_put_on_the_host_is_taken_off_it_where_there_is_room_on_the_card():
    assert nearest(80, 64, "optim=cpu_offload").settings == {"optim": "adamw_8bit"}
    assert nearest(80, 30).settings == {"reference_mode": "resident"}  # student and reference: 28.4 GiB
    offloading = nearest(80, 24, "activation_offloading=true")
    assert "reference_mode" in offloading.settings and offloading.plan.host_need <= 24 * GIB


def test_run_that_fits_neither_is_told_both(monkeypatch):
    monkeypatch.setattr("trainers.plan.planning.machine_for", lambda *_: machine(22, 10))
    with pytest.raises(ConfigError) as refused:
        planning.planned(checked())
    message = str(refused.value)
    assert "memory: the update phase needs" in message and "20.5 GiB are free" in message
    assert "host memory: it needs" in message and "10.0 GiB are free" in message
    assert nearest(22, 10) is None


def test_settings_on_offer_hold_nothing_that_is_needless():
    """On the way to LoRA shorter completions helped; with it they need not be shorter."""
    change = nearest(22, 512)
    assert change.settings == LORA | {"enforce_eager": True, "activation_offloading": True}
    assert change.tighter.settings == LORA


def test_streamed_student_is_read_from_disk_where_the_host_has_no_room():
    """It is kept below four fifths of what the process, of 4 GiB, leaves."""
    most = 4 + SEVEN / GIB / 0.8
    plans = [planned(80, most + more, "beta=0", "sync_ref_model=false") for more in (0.1, -0.1)]
    assert [plan.host.get("student") for plan in plans] == [SEVEN, None]
    assert [plan.host.get("reading from disk", 0) for plan in plans] == [0, 2 * STAGED]
    assert all(plan.fits for plan in plans)


def test_reference_that_is_written_to_is_never_left_on_disk():
    assert planned(80, 20, "sync_ref_model=true").host["reference"] == SEVEN
    assert "reference" not in planned(80, 20, "sync_ref_model=false", "student_mode=resident").host


def test_table_tells_what_the_host_cannot_hold():
    options = checked()
    small = machine(40, 64)
    assert "reference 14.19, saving 1.86; it does not fit" in plan_text(solve(problem(options, small)), small)


def test_host_of_a_card_that_is_elsewhere_is_not_judged():
    there = Machine(planned_card(40), 16 * GIB, 8 * GIB, 1000 * GIB)
    options = checked()
    plan = solve(problem(options, there))
    assert plan.options.optim == "cpu_offload" and plan.fits and plan.host["student"] == SEVEN


def test_teacher_is_read_beside_student_and_reference_where_no_engine_shares_it():
    """Both are loaded before the trainer moves the teacher to the device."""
    streamed = ("student_mode=streamed", "reference_mode=streamed", "optim=adamw_8bit")
    with_engine, without = planned(80, 512, *streamed), planned(80, 512, *streamed, "use_vllm=false")
    assert "reading the teacher" not in with_engine.host
    assert without.host["reading the teacher"] == pytest.approx(SEVEN, rel=1e-6)
    copied = planned(80, 512, *streamed, "weight_bridge=copy")
    assert copied.host["reading the teacher"] == pytest.approx(SEVEN, rel=1e-6)
    offloaded = planned(80, 512, *streamed[:2], "optim=cpu_offload", "use_vllm=false")
    assert "reading the teacher" not in offloaded.host  # gone before the optimizer, which is larger, comes


def test_offloaded_activations_are_pinned_in_powers_of_two():
    """3072 tokens of a hidden width of 3584 in bf16 are 21 MiB, for which 32 MiB are pinned; there are 28 layers."""
    lengths = ("max_prompt_length=1024", "max_completion_length=2048", "per_device_train_batch_size=1")
    plan = planned(80, 512, *lengths, "activation_offloading=true")
    assert plan.host["activations"] == 28 * 32 * 2**20


@pytest.mark.parametrize("overrides", [[], ["optim=cpu_offload"], ["weight_bridge=copy", "optim=adamw_8bit"]])
def test_a_whole_model_is_saved_two_gb_at_a_time_beside_what_the_host_holds(overrides):
    host = planned(80, 512, "student_mode=resident", *overrides).host
    reading = host.get("reading the teacher", 0)  # is over by then, and leaves as much room
    assert host.get("saving", 0) == max(0, 2 * 10**9 - reading)
    assert ("weight_bridge=copy" in overrides) == (reading > 0)


def test_what_is_saved_of_adapters_is_the_adapters():
    """With a rank of 16 there are 40 370 176 weights of them in fp32; a restart writes the merged model."""
    lora = ("use_peft=true", "sync_ref_model=false")
    assert planned(80, 512, *lora).host["saving"] == 4 * 40_370_176
    restart = planned(80, 512, *lora, "weight_bridge=restart", "student_mode=streamed").host
    assert restart["reading the teacher"] == SEVEN and "saving" not in restart


def test_a_weight_larger_than_a_shard_is_saved_alone():
    """The embedding of 152064 x 3584 in fp32."""
    plan = planned(140, 512, "precision=fp32", "student_mode=streamed", "optim=adamw_8bit")
    assert plan.host["saving"] == 4 * 152064 * 3584 > 2 * 10**9


def test_without_checkpointing_every_tensor_that_a_layer_keeps_goes_to_the_host():
    """Of 3072 tokens in bf16: 4 of the inner width (111 MiB, pinned as 128), 8 of the hidden width and 5 of the width
    of the queries (21 MiB, pinned as 32): 928 MiB in each of 28 layers."""
    lengths = ("max_prompt_length=1024", "max_completion_length=2048", "per_device_train_batch_size=1")
    plan = planned(80, 512, *lengths, "activation_offloading=true", "gradient_checkpointing=false")
    assert plan.host["activations"] == 28 * 928 * 2**20


def test_prompts_that_are_read_once_are_offloaded_once():
    """Two completions of 2048 tokens after a prompt of 1024: 5120 tokens (inner 185 MiB, pinned as 256; hidden and
    queries 35, as 64). In attention the prompt is there twice: 1024 tokens more of queries, what is made of them (7 MiB
    each), keys and values (1 each), as if they were one tensor (16)."""
    lengths = ("max_prompt_length=1024", "max_completion_length=2048", "per_device_train_batch_size=2")
    words = (*lengths, "activation_offloading=true", "gradient_checkpointing=false", "generation_aggregation_steps=4")
    plan = planned(140, 512, *words)
    assert plan.work.shared_prompts == 1
    assert plan.host["activations"] == 2**20 * 28 * (4 * 256 + 13 * 64 + 16)


@pytest.mark.parametrize(("limit", "kept"), [(1, 2), (2, 2), (3, 3)])
def test_the_best_checkpoint_is_kept_beside_the_last(limit, kept):
    best = "load_best_model_at_end=true", "metric_for_best_model=reward", "eval_strategy=steps", "eval_steps=25"
    words = f"save_total_limit={limit}", "save_steps=25"
    plain, chosen = (planned(80, 512, *words, *more).disk for more in ((), best))
    one = plain["checkpoints"] / (limit + 1)
    assert chosen["checkpoints"] == pytest.approx((kept + 1) * one)


@pytest.mark.parametrize("run", ["teacher_rlt_mono_85gb", "teacher_rlt_mono_24gb"])
def test_an_engine_that_is_built_anew_takes_disk_for_the_whole_model(run):
    """The merged one where adapters are trained: 7.6 billion weights of bf16."""
    disks = []
    for bridge in ("copy", "restart"):
        options = load_options(compose_run(run, [f"weight_bridge={bridge}"]), repo=REPO, needs_device=False)
        disks.append(solve(problem(options, machine(options.vram_gb, 200))).disk)
    assert disks[1] == disks[0] | {"engine's weights": 2 * 7_615_616_512}
