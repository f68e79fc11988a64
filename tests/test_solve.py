"""What `auto` becomes, and what is offered where a run does not fit. Run: ./run_tests.sh tests/test_solve.py"""

import json

import pytest
from conftest import REPO
from planned import machine, nearest, planned, problem

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.options import options_class
from trainers.plan import preflight
from trainers.plan.knobs import knobs
from trainers.plan.known_models import KNOWN_MODELS
from trainers.plan.machine import Machine
from trainers.plan.planning import assess
from trainers.plan.remedies import nearest_fit, refuse
from trainers.plan.solve import share_faults, solve
from trainers.plan.start_faults import start_faults
from trainers.plan.workload import GIB


@pytest.mark.parametrize(
    ("run", "words", "gb"),
    [
        ("teacher_rlt_mono", ["overlap_scoring=true", "offload_untrained_models=false"], 48),
        ("teacher_rlt_mono", ["reward_funcs=[teacher_logprob_kl,length]", "length_soft_cache=3000"], 18),
        ("teacher_rlt_mono", ["cast_lm_head_to_fp32=true", "weight_bridge=copy"], 30),
        ("teacher_rlt_mono_24gb", ["vllm_gpu_memory_utilization=0.5", "per_device_train_batch_size=32"], 24),
    ],
)
def test_what_is_offered_would_be_taken(run, words, gb):
    offered = nearest(run, *words, gb=gb)
    if offered is not None:
        pasted = [word for word in str(offered).split() if "=" in word]
        plan, options = planned(run, *words, *pasted, gb=gb)
        assert plan.fits_device and not start_faults(plan) and not share_faults(plan, machine(gb))


def test_activations_rest_on_the_host_where_no_micro_batch_fits_without():
    """A card of 40 GB would keep 7.7 percent free with one text at a time; one of 80 GB has room for eight."""
    asked = "activation_offloading=auto"
    small, large = (planned("teacher_rlt_mono", asked, gb=gb)[0] for gb in (40, 80))
    assert small.options.activation_offloading is True and small.peak <= 0.92 * small.available
    assert large.options.activation_offloading is False and large.options.per_device_train_batch_size == 8
    for given, decided in (("false", False), ("true", True)):
        for plan in (planned("teacher_rlt_mono", f"activation_offloading={given}", gb=gb)[0] for gb in (40, 80)):
            assert plan.options.activation_offloading is decided
    assert planned("teacher_rlt_mono", "activation_offloading=false", gb=40)[0].spare < 0.08
    on_a_cpu = load_options(compose_run("teacher_rlt_tiny", ["device=cpu", asked]), repo=REPO)
    assert solve(problem(on_a_cpu, machine(40))).options.activation_offloading is False


@pytest.mark.parametrize(("share", "starts"), [("0.5", False), ("0.76", False), ("0.79", True), ("auto", True)])
def test_a_share_of_the_card_that_leaves_vllm_no_cache_is_told(share, starts):
    """Of 24 GB, 22.35 GiB, 17.24 are taken before the cache, and 6208 tokens of 57344 bytes are 0.33: 78.6 percent."""
    words = [f"vllm_gpu_memory_utilization={share}", "vram_gb=24"]
    options = load_options(compose_run("teacher_rlt_mono_24gb", words), repo=REPO, needs_device=False)
    found = assess(problem(options, machine(24)))
    assert not found.memory and [fault.key for fault in found.start] == ["vllm_gpu_memory_utilization"] * (not starts)
    for fault in found.start:
        assert fault.remedy == "vllm_gpu_memory_utilization=auto"
        assert f"of these {float(share) * 24e9 / GIB:.1f} GiB 17.2 are taken" in fault.cause
    given = load_options(
        compose_run("teacher_rlt_mono_24gb", [*words, "kv_cache_gib=1"]), repo=REPO, needs_device=False
    )
    assert not assess(problem(given, machine(24))).start  # which is what counts then


def test_the_least_cache_that_is_offered_would_be_taken():
    """12352 tokens of 57344 bytes are 0.65967 GiB, which rounded to three digits were too few."""
    with pytest.raises(ConfigError) as refused:
        planned("teacher_rlt_mono_80gb", "kv_cache_gib=0.1")
    (fault,) = refused.value.faults
    assert fault.remedy == "kv_cache_gib=0.66"
    for completion in range(1000, 1016):  # rounded down for some of them
        words = ["max_prompt_length=1000", f"max_completion_length={completion}"]
        with pytest.raises(ConfigError) as refused:
            planned("teacher_rlt_mono_80gb", *words, "kv_cache_gib=0.01")
        assert planned("teacher_rlt_mono_80gb", *words, refused.value.faults[0].remedy)


@pytest.mark.parametrize(
    ("words", "gb"),
    [
        (["optim=flash_adamw"], 48),
        (["use_peft=true", "precision=fp16"], 48),  # with the preset's sync_ref_model: one key apart
        (["model_name_or_path=run:teacher_sft"], 48),
    ],
)
def test_a_card_that_is_not_here_is_planned_for_as_if_it_were(words, gb):
    plan, _ = planned("teacher_rlt_mono", *words, gb=gb)
    assert not start_faults(plan)


@pytest.mark.parametrize(
    ("words", "student", "reference"),
    [
        ([], "streamed", "streamed"),
        (["offload_untrained_models=false"], "resident", "resident"),
        (["disable_student_offloading=true"], "resident", "streamed"),
        (["student_quantization=4bit"], "resident", "streamed"),
        (["overlap_scoring=true"], "cpu", "streamed"),  # which takes no streamed student
        (["overlap_scoring=true", "disable_student_offloading=true"], "resident", "streamed"),
        (["overlap_scoring=true", "offload_untrained_models=false"], "resident", "resident"),
        (["overlap_scoring=true", "student_mode=resident"], "resident", "streamed"),
        (["overlap_scoring=true", "student_quantization=4bit"], "resident", "streamed"),
        (["student_mode=cpu", "reference_mode=resident"], "cpu", "resident"),
        (["offload_untrained_models=false", "student_mode=streamed"], "streamed", "resident"),
    ],
)
def test_where_student_and_reference_rest_on_a_card_with_room(words, student, reference):
    plan, _ = planned("teacher_rlt_mono_80gb", *words, gb=200)
    assert (plan.options.student_mode, plan.options.reference_mode) == (student, reference)


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "fp8"}, 16),
    ],
)
def test_a_student_that_is_stored_quantized_rests_on_the_card_and_takes_what_it_is_stored_in(
    quantization, bits, tmp_path
):
    """Not as bf16 weights that are streamed, which its loading refuses. fp8 may become bf16 on some cards."""
    config = KNOWN_MODELS["Qwen/Qwen2.5-7B-Instruct"] | {"quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}", gb=200)
    assert plan.options.student_mode == "resident"
    linear = 28 * (2 * 3584 * 3584 + 2 * 512 * 3584 + 3 * 3584 * 18944)
    rest = plan.work.student.num_parameters - linear
    assert plan.phases["score"]["student"] == 2 * rest + linear * bits // 8
    assert "student_quantization=8bit" not in map(str, knobs(problem(plan.options, machine(200))))
    asked, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}", "student_mode=cpu", gb=200)
    assert asked.host["student"] == plan.phases["score"]["student"] and not start_faults(asked)
    for word in ("student_mode=streamed", "student_quantization=8bit"):
        refused, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}", word, gb=200)
        assert [fault.key for fault in start_faults(refused)] == [word.partition("=")[0]]
    (told,) = told_to_stay(f"student_model={tmp_path}")
    assert told == ("student_mode", f"a student in {'fp8' if bits == 16 else f'{bits}bit'} cannot be streamed")


def told_to_stay(*words):
    """Of which models is told that they stay on the card although they are asked off it, and why."""
    options = load_options(compose_run("teacher_rlt_mono_80gb", list(words)), repo=REPO, needs_device=False)
    found = assess(problem(options, machine(200)))
    findings = [f for f in preflight._memory(found) if f.check.endswith("=resident")]
    for finding in findings:
        key = finding.check.removesuffix("=resident")
        assert finding.level == "warning" and finding.remedy.startswith(f"{key}=cpu ")
        assert f"  warning: {finding.check}: {finding.message}" in found.text(full=False)
        planned("teacher_rlt_mono_80gb", *words, f"{key}=cpu", gb=200)
    stay = ": it stays on the card, whatever offload_untrained_models says"
    assert all(finding.message.endswith(stay) for finding in findings)
    return [(f.check.removesuffix("=resident"), f.message.removesuffix(stay)) for f in findings]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], True),
        (["overlap_scoring=true"], True),
        (["disable_student_offloading=true"], False),
        (["offload_untrained_models=false"], False),
        (["student_mode=resident"], False),
        (["student_mode=cpu"], False),
    ],
)
def test_a_quantized_student_that_stays_on_the_card_unlike_asked_is_told(words, told):
    quantized = [("student_mode", "a student in 4bit cannot be streamed")] * told
    assert told_to_stay("student_quantization=4bit", *words) == quantized


@pytest.mark.parametrize(
    ("family", "can_stream", "mode", "intermediate"),
    [
        ("qwen3_moe", True, "streamed", 4 * (200 + 64)),
        # Cannot be: whatever offload_untrained_models says, there is room for it. A shared expert reads all.
        ("glm4_moe", False, "resident", 4 * (200 + 64) + 200),
    ],
)
def test_a_mixture_of_experts_reads_with_all_its_chosen_experts(family, can_stream, mode, intermediate, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": family, "num_experts_per_tok": 4, "moe_intermediate_size": 200}
    config |= {"num_experts": 8} if family == "qwen3_moe" else {"n_routed_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    plan, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}")
    shape = plan.work.student
    assert (shape.can_stream, shape.intermediate) == (can_stream, intermediate)
    assert plan.options.student_mode == mode
    assert plan.options.reference_mode == "streamed"
    stays = f"{family} cannot be streamed"
    for key, words in (
        ("student_mode", [f"student_model={tmp_path}"]),
        ("reference_mode", [f"model_name_or_path={tmp_path}", "use_vllm=false"]),
    ):
        assert told_to_stay(*words) == ([] if can_stream else [(key, stays)])
    asked, _ = planned("teacher_rlt_mono_80gb", f"student_model={tmp_path}", "student_mode=cpu")
    assert asked.options.student_mode == "cpu"


def test_a_mixture_that_the_card_has_no_room_for_and_cannot_be_streamed_is_read_on_the_host(tmp_path):
    """With a warning. 30B, 57 GiB, in a family whose layers hold buffers; beside a 7B in training there is no room."""
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
    sizes |= {"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    config = {"model_type": "glm4_moe", "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    words = [f"student_model={tmp_path}", "vram_gb=80"]
    for further, warned in (([], 1), (["student_mode=cpu"], 0)):
        options = load_options(compose_run("teacher_rlt_mono_80gb", words + further), repo=REPO, needs_device=False)
        found = assess(problem(options, machine(80)))
        assert found.plan.options.student_mode == "cpu" and found.plan.fits
        assert found.text(full=False).count("  warning: student_mode=cpu: it cannot be streamed") == warned
        findings = [f for f in preflight._memory(found) if f.check == "student_mode=cpu"]
        assert [finding.level for finding in findings] == ["warning"] * warned


def test_a_student_that_is_kept_off_the_card_beside_the_engine_is_read_on_the_host_with_a_warning():
    for words, warned in (([], 1), (["student_mode=cpu"], 0)):
        words = ["overlap_scoring=true", *words]
        options = load_options(compose_run("teacher_rlt_mono_24gb", words), repo=REPO, needs_device=False)
        found = assess(problem(options, machine(24)))
        work, said = found.plan.work, found.text(full=False)
        assert (work.student_mode, found.plan.options.student_mode) == ("cpu", "cpu") and found.plan.fits
        assert found.plan.host["student"] == 2 * work.student.num_parameters
        assert "student" not in found.plan.phases["generate"] and "student_mode=cpu" in said
        assert said.count("  warning: student_mode=cpu: offload_untrained_models keeps it off the card") == warned
        findings = [f for f in preflight._memory(found) if f.check == "student_mode=cpu"]
        told = [("warning", "overlap_scoring=false, or disable_student_offloading=true")] * warned
        assert [(finding.level, finding.remedy) for finding in findings] == told


def test_on_a_cpu_a_student_beside_the_engine_is_resident():
    words = ["overlap_scoring=true", "offload_untrained_models=true", "model_name_or_path=Qwen/Qwen2.5-1.5B-Instruct"]
    words.append("student_model=Qwen/Qwen2.5-1.5B-Instruct")
    options = load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    plan = solve(problem(options, Machine(None, 99 * GIB, 99 * GIB, 999 * GIB)))
    assert plan.options.student_mode == "resident"


def test_a_student_larger_than_the_memory_of_a_cpu_is_streamed(tmp_path):
    words = ["device=cpu", "precision=fp32", "student_model=bespokelabs/Bespoke-Stratos-7B"]
    options = load_options(compose_run("teacher_rlt_tiny", words), repo=REPO)
    small = Machine(None, 20 * GIB, 20 * GIB, 1000 * GIB)
    plan = solve(problem(options, small))
    assert plan.fits and plan.options.student_mode == "streamed"
    large = Machine(None, 64 * GIB, 64 * GIB, 1000 * GIB)
    assert solve(problem(options, large)).options.student_mode == "resident"


SEVEN_B = {
    "stage": "score",
    "dataset_id_or_path": str(REPO / "data/distances/train.jsonl"),
    "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "student_model": "bespokelabs/Bespoke-Stratos-7B",
}


@pytest.mark.parametrize(
    ("gb", "student", "teacher"),
    [(80, "resident", "resident"), (24, "resident", "streamed"), (12, "streamed", "streamed")],
)
def test_where_the_models_of_a_scoring_rest(gb, student, teacher):
    options = options_class("score")(**SEVEN_B)
    plan = solve(problem(options, machine(gb), longest=4096))
    assert (plan.options.student_mode, plan.options.reference_mode) == (student, teacher)
    assert plan.fits and list(plan.phases) == ["load", "score"]
    weights = {name: size for name, size in plan.phases["score"].items() if name in ("student", "teacher")}
    expected = {"student": student, "teacher": teacher}
    assert weights == {name: 2 * 7_615_616_512 for name, mode in expected.items() if mode == "resident"}


def test_the_longest_text_counts_and_what_cannot_be_read_does_not():
    options = options_class("score")(**SEVEN_B)
    short, long, unread, more = (
        solve(problem(options, machine(80), longest=n)).peak for n in (4096, 16384, 131072, 10**7)
    )
    assert short < long < unread == more


def test_a_scoring_that_does_not_fit_is_offered_what_does():
    options = options_class("score")(**SEVEN_B, student_mode="resident", reference_mode="resident")
    change = nearest_fit(problem(options, machine(24), longest=4096))
    assert change.settings in ({"student_mode": "streamed"}, {"reference_mode": "streamed"})
    plan = solve(problem(options, machine(24), longest=4096))
    assert "stage=score" in str(refuse(plan, change))
    assert change.plan.fits and not plan.fits
