"""What is offered where a run does not fit. Run: ./run_tests.sh tests/test_remedies.py"""

import time
from dataclasses import replace

import pytest
from conftest import REPO
from planned import problem

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.plan import preflight
from trainers.plan.knobs import is_roomy, knobs
from trainers.plan.machine import Machine, planned_card
from trainers.plan.planning import assess
from trainers.plan.remedies import host_remedy, nearest_fit, refuse
from trainers.plan.solve import solve
from trainers.plan.workload import GIB


def machine(gb, host, **card):
    """A card of `gb` GB that is here, beside `host` GiB of free host memory."""
    return Machine(replace(planned_card(gb), is_here=True, **card), 512 * GIB, host * GIB, 1000 * GIB)


def asked(run, there, *overrides):
    options = load_options(compose_run(run, list(overrides)), repo=REPO, needs_device=False)
    return problem(options, there)


def test_a_smaller_micro_batch_and_a_resident_reference_are_found_together():
    """By itself the one leaves the host short, and the other the card."""
    there = asked("teacher_rlt_mono_96gb", machine(96, 24), "per_device_train_batch_size=8", "optim=adamw_8bit")
    change = nearest_fit(there)
    assert change.settings == {"per_device_train_batch_size": "auto", "reference_mode": "resident"}
    for key, value in change.settings.items():
        assert not solve(there.changed({key: value})).fits
    plan = change.plan
    assert plan.fits and plan.peak <= 0.92 * plan.available


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["lora_r=512"], {"lora_r": 16}),
        (["attn_implementation=eager"], {"attn_implementation": None}),
        (["use_vllm=false", "per_device_train_batch_size=1"], {"use_vllm": True}),
        (["kv_cache_gib=8"], {"kv_cache_gib": None}),
    ],
)
def test_what_was_set_and_costs_too_much_goes_back_to_its_default_before_texts_are_shortened(words, offered):
    there = asked("teacher_rlt_mono_24gb", machine(24, 64), *words)
    assert not solve(there).fits
    change = nearest_fit(there)
    assert change.settings == offered and change.plan.fits


@pytest.mark.parametrize(
    ("words", "given_up"),
    [
        (["disable_student_offloading=true"], {}),
        (["offload_untrained_models=false"], {}),
        (["student_mode=resident"], {"student_mode": "streamed"}),
    ],
)
def test_where_a_student_beside_the_engine_has_no_room_the_host_is_offered_for_it_too(words, given_up):
    there = asked("teacher_rlt_mono_24gb", machine(24, 64), "overlap_scoring=true", *words)
    assert solve(there).options.student_mode == "resident" and not solve(there).fits
    change = nearest_fit(there)
    assert change.settings == {"overlap_scoring": False} | given_up
    kept = change.overlapped
    assert kept.settings == {"student_mode": "cpu"} and kept.plan.fits and is_roomy(kept.plan)
    assert kept.plan.options.overlap_scoring and f", or {kept.as_remedy()}" in str(refuse(solve(there), change))
    assert "student_mode=cpu" in map(str, knobs(there))
    short = replace(there.machine, host_free=16 * GIB)  # of which the student alone takes 14.2
    if found := nearest_fit(replace(there, machine=short)):
        assert found.overlapped is None


def test_without_scoring_beside_the_engine_a_student_on_the_host_is_offered_nowhere():
    there = asked("teacher_rlt_mono_24gb", machine(20, 64), "student_mode=resident")
    assert nearest_fit(there).overlapped is None and "student_mode=cpu" not in map(str, knobs(there))


def test_graphs_and_activations_are_given_up_before_texts_are_shortened():
    tight = nearest_fit(asked("teacher_rlt_mono_24gb", machine(20, 64), "activation_offloading=false"))
    assert tight.settings == {"enforce_eager": True, "activation_offloading": True}
    left = nearest_fit(asked("teacher_rlt_mono_24gb", machine(20, 64)))  # the solver has tried both
    assert left.settings == {"enforce_eager": True} and left.plan.options.activation_offloading


def test_what_fits_with_less_to_spare_than_the_solver_keeps_says_so():
    """An update of 20.1 GiB with CUDA graphs of 0.91, on a card of 21 GB, which are 19.56 GiB."""
    change = nearest_fit(asked("teacher_rlt_mono_24gb", machine(21, 64), "activation_offloading=false"))
    plan = change.plan
    assert plan.peak <= 0.92 * plan.available and change.tighter.settings == {"enforce_eager": True}
    spare = 100 * change.tighter.plan.spare
    assert 0 < spare < 8
    assert f", or enforce_eager=true   (peak 19.2 GiB, only {spare:.1f} % to spare)" in change.as_remedy()


@pytest.mark.parametrize(("compute", "precision"), [(7.5, "fp16"), (8.0, "bf16")])
def test_a_card_without_bf16_is_offered_fp16_for_adapters(compute, precision):
    there = asked("teacher_rlt_mono_24gb", machine(24, 64, compute=compute), "precision=fp32", "weight_bridge=copy")
    change = nearest_fit(there)
    assert change.settings == {"precision": precision, "weight_bridge": None}


def test_a_card_without_bf16_is_offered_no_half_precision_for_all_weights():
    """The adapters that it is offered in the end are fp32 beside fp16 weights, as `auto` has it there."""
    change = nearest_fit(asked("teacher_rlt_mono", machine(48, 64, compute=7.5), "precision=fp32"))
    assert change.settings["use_peft"] is True and change.settings["precision"] == "auto"
    assert change.plan.work.precision == "fp16"


def test_nothing_that_fits_is_found_in_a_second():
    there = asked("teacher_rlt_mono_80gb", machine(12, 8), "offload_untrained_models=false", "student_mode=cpu")
    started = time.process_time()
    assert nearest_fit(there) is None
    assert time.process_time() - started < 1.5


@pytest.mark.parametrize(
    ("run", "gb", "words", "told"),
    [
        # 4 GiB of the process and 14.19 of a 7B in bf16, which is read on the host, whatever is trained of it.
        ("teacher_sft", 200, [], "18.2 GiB of free host memory"),
        # A resident student has no room on the card, and would save nothing but the blocks through which
        # it is read from disk.
        ("teacher_rlt_mono_24gb", 24, [], "18.4 GiB of free host memory"),
        (
            "teacher_rlt_mono_24gb",
            200,
            ["student_mode=cpu"],
            "18.2 GiB of free host memory, with student_mode=resident",
        ),
        ("teacher_rlt_mono_24gb", 24, ["student_mode=cpu"], "18.4 GiB of free host memory"),
    ],
)
def test_a_host_that_is_too_small_whatever_is_changed_is_told_what_is_needed(run, gb, words, told):
    there = asked(run, machine(gb, 14), *words)
    assert nearest_fit(there) is None
    assert host_remedy(there, solve(there)) == f"a machine with {told}"


@pytest.mark.parametrize(("host", "offered"), [(104, ["use_peft"]), (108, ["beta", "use_peft"])])
def test_what_takes_less_of_the_host_is_offered_where_it_fits_both(host, offered):
    """On 40 GB the optimizer is on the host, 85.5 GiB, and the reference, 14.2: the card has no room for them."""
    there = asked("teacher_rlt_mono", machine(40, host))
    *told, last = host_remedy(there, solve(there)).split(", ")
    assert [text.partition("=")[0] for text in told] == offered and last == "or a machine with more memory"
    for text in told:
        words = text.partition(" (it then needs")[0].split()
        assert solve(asked("teacher_rlt_mono", machine(40, host), *words)).fits


def test_a_length_that_is_not_set_is_halved_from_what_the_model_can_read():
    """Qwen2.5-7B-Instruct: 32768 tokens."""
    there = asked("teacher_sft", machine(80, 400), "max_length=null")
    assert "max_length=16384" in [str(change) for change in knobs(there)]


@pytest.mark.parametrize("length", [16384, "null"])
def test_texts_of_a_warm_up_are_halved_until_they_fit(length):
    """7B with LoRA on 20 GB has room for 2048 tokens, and tightly for 4096."""
    there = asked("teacher_sft", machine(20, 64), "use_peft=true", f"max_length={length}")
    assert not solve(there).fits
    change = nearest_fit(there)
    assert change.settings == {"max_length": 2048} and change.tighter.settings == {"max_length": 4096}
    assert change.plan.fits and change.tighter.plan.fits
    assert not solve(there.changed({"max_length": 8192})).fits


@pytest.mark.parametrize(
    ("run", "words", "rate"),
    [
        ("teacher_rlt_mono", [], 1e-5),
        ("teacher_rlt_mono", ["learning_rate=3e-7"], 3e-6),
        ("teacher_rlt_mono", ["learning_rate=2e-5"], None),  # larger than that of all weights: it was meant for these
        ("teacher_sft", [], 1e-4),
    ],
)
def test_adapters_are_offered_with_their_learning_rate(run, words, rate):
    change = nearest_fit(asked(run, machine(22, 64), *words))
    assert change.settings["use_peft"] is True and change.settings.get("learning_rate") == rate
    presets = (compose_run(f"{run}_24gb"), compose_run(run))
    assert presets[0]["learning_rate"] == pytest.approx(10 * presets[1]["learning_rate"])


def test_longer_texts_than_a_cache_of_a_size_that_was_asked_for_can_hold_are_left_out_of_what_if():
    """A text of 12288 tokens takes 0.66 GiB of keys and values, one of 20480 takes 1.1."""
    there = asked("teacher_rlt_mono_80gb", machine(80, 64), "kv_cache_gib=1")
    changes = [str(change) for change in knobs(there)]
    assert "max_completion_length=4096" in changes and "max_completion_length=16384" not in changes
    roomy = asked("teacher_rlt_mono_80gb", machine(80, 64), "kv_cache_gib=1.2")
    assert "max_completion_length=16384" in map(str, knobs(roomy))


@pytest.mark.parametrize(
    ("run", "gb", "named"),
    [
        ("teacher_rlt_mono", 12, "teacher_rlt_mono_12gb, made for 12 GB"),
        ("teacher_rlt_mono_80gb", 16, "teacher_rlt_mono_16gb, made for 16 GB"),
        ("teacher_sft", 16, "teacher_sft_16gb, made for 16 GB"),
        ("teacher_rlt_mono", 11, None),
    ],
)
def test_who_can_only_take_a_smaller_model_is_told_the_run_for_the_card(run, gb, named):
    there = asked(run, machine(gb, 400))
    message = str(refuse(solve(there), nearest_fit(there)))
    assert f"a smaller model{f', or the run {named}' if named else ''}; ignore_memory_plan" in message
    if named:
        name, _, size = named.partition(", made for ")
        assert size == f"{compose_run(name)['vram_gb']} GB"
        plan = solve(asked(name, machine(gb, 400)))
        assert plan.fits and is_roomy(plan)


def test_a_plan_with_less_to_spare_than_the_solver_keeps_is_a_warning_with_what_keeps_it():
    tight = asked("teacher_rlt_mono_24gb", machine(24, 64), "vllm_gpu_memory_utilization=0.93")
    found = assess(tight)
    (finding,) = (finding for finding in preflight._memory(found) if finding.check == "memory")
    assert found.plan.fits and not found.memory and finding.level == "warning"
    assert "% to spare, and 8 are to be kept free" in finding.message
    assert finding.remedy.startswith("vllm_gpu_memory_utilization=auto   (peak 20.6 GiB)")
    assert "or" not in finding.remedy.split()
    (warmup,) = preflight._warmup("before", found, "error")
    assert (warmup.check, warmup.level) == ("run:before", "warning")
    roomy = assess(asked("teacher_rlt_mono_24gb", machine(24, 64)))
    assert [f.level for f in preflight._memory(roomy) if f.check == "memory"] == ["ok"]
