"""Warm-ups, downloads and disks of a run that is planned. Run: ./run_tests.sh tests/test_planning.py"""

import json
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from conftest import REPO
from families import COMMON, LAID_OUT_OTHERWISE
from planned import machine, problem
from transformers import AutoConfig

import train
from trainers import warmup
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.plan import disks, model_shapes, planning, preflight, run_models, start_faults
from trainers.plan.disks import downloads, in_turn
from trainers.plan.knobs import knobs
from trainers.plan.known_models import KNOWN_MODELS
from trainers.plan.machine import Machine
from trainers.plan.planning import assess, planned
from trainers.plan.run_models import shapes_of
from trainers.plan.workload import GIB
from trainers.warmup import cached_path, waiting, warmup_options
from trainers.watch.outputs import make_output_dir

SMALL = "Qwen/Qwen2.5-1.5B-Instruct"
SEVEN = 2 * 7_615_616_512  # bytes of a model in bf16


@pytest.fixture(autouse=True)
def nothing_is_kept(monkeypatch, tmp_path):
    """No warm-up of an earlier run; every model of the hub was downloaded."""
    monkeypatch.setattr(run_models, "waiting", partial(waiting, root=tmp_path))
    monkeypatch.setattr(disks, "is_downloaded", lambda path: True)


def checked(run, *overrides):
    return load_options(compose_run(run, list(overrides)), repo=REPO, needs_device=False)


def test_warm_ups_that_a_run_would_train_first_are_planned_with_it():
    found = assess(problem(checked("teacher_rlt_tiny"), Machine(None, 8 * GIB, 8 * GIB, 100 * GIB)))
    assert list(found.warmups) == ["student_sft_tiny", "teacher_sft_tiny"]  # in turn, that of both models once
    assert found.with_warmups("memory") == [] and found.disk == []
    kept = sum(sum(warmup.plan.disk.values()) for warmup in found.warmups.values())
    assert {written.kind: written.size for written in found.written}["warm-ups"] == kept >= 2 * 4 * 804_480
    assert "run:student_sft_tiny is trained first: peak" in found.text(full=False)


@pytest.mark.parametrize("run", ["teacher_rlt_tiny", "teacher_sft_tiny", "student_sft_tiny"])
def test_the_run_in_small_is_of_the_same_precision_on_a_card(run):
    for words, precision in ((), "fp32"), (("precision=bf16",), "bf16"), (("precision=auto",), "bf16"):
        found = assess(problem(checked(run, *words), machine(24)))
        plans = [found.plan, *(warmup.plan for warmup in found.warmups.values())]
        assert {plan.work.precision for plan in plans} == {precision}
        assert not found.with_warmups("start") + found.with_warmups("memory")


def test_adapters_of_the_run_in_small_need_half_precision_on_a_card_which_is_said():
    (fault,) = assess(problem(checked("teacher_rlt_tiny", "use_peft=true"), machine(24))).with_warmups("start")
    assert fault.key == "precision" and "precision=bf16" in fault.remedy
    there = problem(checked("teacher_rlt_tiny", "use_peft=true", "precision=bf16"), machine(24))
    assert not assess(there).with_warmups("start")


@pytest.mark.parametrize("run", ["teacher_rlt_mono_24gb", "teacher_sft_24gb"])
def test_a_launch_on_a_card_begins_with_what_stage_plan_prints(run, monkeypatch, caplog, capsys):
    monkeypatch.setattr(planning, "machine_for", lambda *_: machine(24))
    options = checked(run)
    with caplog.at_level("INFO"):
        planned(options)
    assert planning.run_plan(options)
    printed = capsys.readouterr().out.rstrip("\n")
    assert printed in caplog.text
    told = [str(change) for change in knobs(problem(options, machine(24)))]
    assert len(told) >= 2 and all(f"\n{change} " in printed for change in told)
    assert "\n  weights  " in printed


def test_a_launch_without_a_card_begins_with_the_phases_alone():
    found = assess(problem(checked("teacher_rlt_tiny"), Machine(None, 8 * GIB, 8 * GIB, 100 * GIB)))
    told, whole = found.text(full=False), found.text(full=True)
    assert "\nupdate " in told and "  KV cache  " not in told and "\nchange " not in told
    assert "  KV cache  " in whole and "\nchange " in whole


def test_a_warm_up_that_is_kept_from_an_earlier_run_is_not_planned(tmp_path):
    options = checked("teacher_rlt_tiny")
    composed, _ = warmup_options("teacher_sft_tiny", options)
    folder = cached_path("teacher_sft_tiny", composed, tmp_path)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert waiting(options.model_name_or_path, options, tmp_path) == []
    assert [warmup.name for warmup in waiting(options.student_model, options, tmp_path)] == ["student_sft_tiny"]


def test_a_warm_up_is_kept_under_what_it_depends_on(tmp_path):
    options = checked("teacher_rlt_tiny")
    composed, _ = warmup_options("teacher_sft_tiny", options)
    template, data = tmp_path / "t.jinja", tmp_path / "data"
    data.mkdir()

    def path(**changes):
        return cached_path("teacher_sft_tiny", composed | changes, tmp_path)

    assert path(report_to="none") == path(report_to="wandb") != path(seed=composed["seed"] + 1)
    paths = set()
    for text in ("one", "two"):
        template.write_text(text)
        (data / "rows.jsonl").write_text(text * 2)
        paths |= {path(chat_template=str(template)), path(dataset_id_or_path=str(data))}
    assert len(paths) == 4
    asked = warmup_options("teacher_sft_tiny", options.model_copy(update={"eos_token": "<|im_end|>"}))[0]
    assert asked["eos_token"] == "<|im_end|>"


def test_a_warm_up_that_does_not_fit_is_told_by_name_before_anything_starts(monkeypatch):
    """LoRA of 7B fits 24 GB; all weights of its student's warm-up, at 16384 tokens, do not."""
    options = checked("teacher_rlt_mono_24gb", "student_model=run:teacher_sft")
    monkeypatch.setattr(planning, "machine_for", lambda *_: machine(24))
    with pytest.raises(ConfigError) as refused:
        planned(options)
    (fault,) = refused.value.faults
    assert fault.key == "run:teacher_sft: memory" and fault.cause.startswith("the update phase needs")
    assert fault.remedy.startswith("train it by itself (./launch_mono.sh teacher_sft.yaml ...) and name its folder: ")
    found = preflight.preflight("teacher_rlt_mono_24gb", ["student_model=run:teacher_sft"], 24)
    (finding,) = (f for f in found.findings if f.check == "run:teacher_sft" and f.level == "error")
    assert finding.message.startswith("memory: the update phase needs") and not found.works


def test_an_adapter_that_a_warm_up_will_leave_is_trained_on_as_it_will_be():
    preset, start = "teacher_rlt_mono_24gb", "model_name_or_path=run:teacher_sft_24gb"
    found = assess(problem(checked(preset, start, "lora_r=8"), machine(24)))
    assert [(fault.key, fault.cause) for fault in found.start] == [
        ("lora_r", "the adapter that is trained on has r=16")
    ]
    assert not assess(problem(checked(preset, start, "lora_r=16"), machine(24))).start
    none = checked(preset, "model_name_or_path=run:teacher_sft", "adapter_start=continue")
    (fault,) = assess(problem(none, machine(24))).start
    assert fault.key == "adapter_start" and "leaves no adapter" in fault.cause


def test_configs_of_bases_and_of_warm_ups_are_downloaded_with_patience(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(planning, "download_config", asked.append)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / "adapter_model.safetensors").write_text("")
    monkeypatch.setattr(planning, "KNOWN_MODELS", {})
    options = checked("teacher_rlt_mono_24gb", "student_model=run:teacher_sft_12gb").model_copy(
        update={"model_name_or_path": str(tmp_path)}
    )
    planning._download_configs(options)
    assert asked == ["Qwen/Qwen2.5-1.5B-Instruct", "some/base"]


def test_who_ignores_the_plan_ignores_that_of_warm_ups():
    options = checked("teacher_rlt_tiny")
    composed, warmup = warmup_options("teacher_sft_tiny", options)
    ignoring = options.model_copy(update={"ignore_memory_plan": True})
    assert not warmup.ignore_memory_plan and warmup_options("teacher_sft_tiny", ignoring)[1].ignore_memory_plan
    assert warmup_options("teacher_sft_tiny", ignoring)[0] == composed  # the result is kept under the same name


def test_models_that_are_not_here_are_downloaded_first(monkeypatch):
    monkeypatch.setattr(disks, "is_downloaded", lambda path: False)
    options = checked("teacher_rlt_mono_24gb")  # Qwen2.5-7B-Instruct and Bespoke-Stratos-7B
    sizes = {"Qwen/Qwen2.5-7B-Instruct": SEVEN, "bespokelabs/Bespoke-Stratos-7B": SEVEN}
    assert downloads(options, shapes_of(options)) == sizes
    both = checked("teacher_rlt_mono_24gb", "student_model=Qwen/Qwen2.5-7B-Instruct")
    assert downloads(both, shapes_of(both)) == {"Qwen/Qwen2.5-7B-Instruct": SEVEN}
    there = problem(options, replace(machine(24), disk_free=30 * GIB))
    found = assess(there)
    (written,) = (w for w in found.written if w.kind == "downloads")
    assert written.size == 2 * SEVEN and written.folder == disks.download_folder()


def test_models_that_are_here_are_not_downloaded(model_dir):
    options = checked("teacher_rlt_tiny", f"model_name_or_path={model_dir}")
    assert downloads(options, shapes_of(options)) == {}  # a folder, and a warm-up
    hub = checked("teacher_rlt_mono_24gb")
    assert downloads(hub, shapes_of(hub)) == {}


@pytest.mark.parametrize(("compute", "refused"), [(7.0, True), (7.5, False)])
def test_a_card_that_the_packages_have_no_kernels_for_is_refused(compute, refused):
    there = machine(24)
    old = replace(there, card=replace(there.card, name="Tesla V100", compute=compute))
    found = assess(problem(checked("teacher_rlt_mono_24gb"), old))
    told = "\n".join(map(str, found.with_warmups("start")))
    assert ("Tesla V100 has compute capability 7.0" in told and "below 7.5" in told) == refused == bool(told)


@pytest.mark.parametrize("run", ["teacher_rlt_mono_24gb", "teacher_sft_24gb", "teacher_rlt_tiny"])
def test_a_run_on_this_machine_s_card_needs_what_compiles_its_kernels(run, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    elsewhere = machine(24)
    here = replace(elsewhere, card=replace(elsewhere.card, is_here=True))
    seven = "Qwen/Qwen2.5-7B-Instruct"
    scored = checked("score", "dataset_id_or_path=a/b", f"model_name_or_path={seven}", f"student_model={seven}")
    found = assess(problem(scored, here, longest=99)).start
    assert [fault.key for fault in found] == ["compiler"]  # TRL's head is Triton's, too
    for there, told in ((here, ["compiler"]), (elsewhere, []), (replace(here, card=None), [])):
        words = ["device=cpu"] if there.card is None else []
        assert [fault.key for fault in assess(problem(checked(run, *words), there)).with_warmups("start")] == told
    (tmp_path / "gcc").touch(0o755)
    assert assess(problem(checked(run), here)).with_warmups("start") == []
    monkeypatch.setattr(sysconfig, "get_path", lambda kind: str(tmp_path))
    (fault,) = assess(problem(checked(run), here)).with_warmups("start")
    assert str(tmp_path / "Python.h") in fault.cause and "python3-dev" in fault.remedy


def test_the_disk_that_is_looked_at_is_the_one_that_is_written_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the launchers work from any folder
    named, unnamed = (load_options(compose_run("", words), repo=REPO) for words in (["output_dir=here"], []))
    assert planning.run_folder(named) == make_output_dir("here", "run")
    assert make_output_dir(None, "run", root=tmp_path).is_relative_to(tmp_path / "results")
    assert planning.run_folder(unnamed) == REPO / "results"


def test_what_goes_to_one_disk_takes_room_in_turn(tmp_path, monkeypatch):
    own, other = tmp_path / "not" / "yet", Path("/elsewhere")
    sizes = [("downloads", tmp_path, 28), ("warm-ups", other, 7), ("disk", own, 71)]
    real = disks.existing
    monkeypatch.setattr(disks, "existing", lambda folder: Path("/proc") if folder == other else real(folder))
    monkeypatch.setattr(disks, "free_disk", lambda folder: 5)
    found = in_turn(sizes, own, 90)
    assert [(w.kind, w.before, w.free) for w in found] == [("downloads", 0, 90), ("warm-ups", 0, 5), ("disk", 28, 62)]
    assert [len(w.faults) for w in found] == [0, 1, 1]
    assert "its checkpoints take up to 71.0 GiB and 62.0 GiB are free beside 28.0 of what comes before" in str(
        replace_sizes(found[2], GIB).faults[0]
    )


def replace_sizes(written, unit):
    return written._replace(size=written.size * unit, before=written.before * unit, free=written.free * unit)


def test_a_mixture_of_experts_is_taught_by_an_engine_that_is_built_anew(tmp_path):
    AutoConfig.for_model("mixtral", **COMMON, **LAID_OUT_OTHERWISE["mixtral"]).save_pretrained(tmp_path)

    def faults(*words):
        words = ["device=cpu", f"model_name_or_path={tmp_path}", "max_prompt_length=64", *words]
        return assess(planning.problem_of(load_options(compose_run("", words), repo=REPO))).start

    assert [(f.key, f.remedy.partition(",")[0]) for f in faults("use_peft=true")] == [
        ("weight_bridge", "weight_bridge=restart"),
        ("lora_target_modules", "lora_target_modules=[q_proj"),
    ]
    assert [f.key for f in faults("weight_bridge=copy")] == ["weight_bridge"]
    named = faults("weight_bridge=restart", "use_peft=true", "lora_target_modules=[q_proj,mlp.experts.down_proj]")
    assert [f.key for f in named] == ["lora_target_modules"]
    assert not faults("weight_bridge=restart") and not faults("use_vllm=false", "use_peft=true")
    assert not faults("weight_bridge=restart", "use_peft=true", "lora_target_modules=[q_proj]")


def test_mixtures_are_known_by_whatever_their_config_calls_it():
    for config in ({"moe_k": 2}, {"text_config": {"num_local_experts": 8}}, {"ffn_config": {"moe_top_k": 4}}):
        assert start_faults.has_experts({"hidden_size": 64} | config)
    none = {"num_experts": None, "enable_moe_block": False, "n_routed_experts": 0}
    for config in ({}, none, KNOWN_MODELS[SMALL]):
        assert not start_faults.has_experts(config)


@pytest.fixture
def quantized(tmp_path):
    """A folder that has of a model in 4 bits no more than its config: what opens its weights does not get far."""
    kind = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[SMALL] | kind))
    return tmp_path


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("teacher_sft_tiny", []),
        ("teacher_sft_tiny", ["use_peft=true"]),
        ("teacher_rlt_tiny", ["student_model=run:student_sft_tiny", "use_peft=true"]),
    ],
)
def test_a_quantized_model_is_trained_by_no_stage_and_told_before_it_is_loaded(run, words, quantized):
    options = load_options(compose_run(run, ["device=cpu", f"model_name_or_path={quantized}", *words]), repo=REPO)
    with pytest.raises(ConfigError) as refused:
        planned(options.model_copy(update={"ignore_memory_plan": True}))
    (fault,) = refused.value.faults
    assert fault.key == "model_name_or_path" and fault.cause.startswith("its weights are quantized: ")
    assert "are not supported" in fault.cause and "bf16 checkpoint" in fault.remedy


def test_an_adapter_on_a_quantized_base_names_the_base_and_how_to_leave_it(quantized, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(quantized), "r": 16, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    (adapter / "adapter_model.safetensors").write_text("")
    (fault,) = assess(problem(checked("teacher_sft_24gb", f"model_name_or_path={adapter}"), machine(24))).start
    assert fault.value == str(adapter) and f"the weights of its base {quantized} are quantized" in fault.cause
    assert f"stage=merge model_name_or_path={adapter} base_model=<that>" in fault.remedy


def test_models_that_are_read_alone_may_be_quantized(quantized):
    student = checked("teacher_rlt_mono_24gb", f"student_model={quantized}")
    score = ["stage=score", f"model_name_or_path={quantized}", f"student_model={quantized}"]
    score = load_options(compose_run("", [*score, f"dataset_id_or_path={quantized}"]), repo=REPO, needs_device=False)
    assert not assess(problem(student, machine(24))).start
    assert not assess(problem(score, machine(24), longest=512)).start


def starting_from(start, monkeypatch):
    """Let the warm-up teacher_sft_tiny start from another model."""
    monkeypatch.setattr(
        warmup,
        "compose_run",
        lambda name: compose_run(name, [f"model_name_or_path={start}"] if name == "teacher_sft_tiny" else []),
    )


def test_what_a_warm_up_starts_from_is_judged_before_it_is_trained(quantized, tmp_path, monkeypatch):
    starting_from(quantized, monkeypatch)
    options = load_options(compose_run("teacher_rlt_tiny", ["device=cpu"]), repo=REPO)
    assert options.model_name_or_path == "run:teacher_sft_tiny"
    with pytest.raises(ConfigError) as refused:
        planned(options.model_copy(update={"ignore_memory_plan": True}))
    (fault,) = refused.value.faults
    assert (fault.key, fault.value) == ("run:teacher_sft_tiny: model_name_or_path", str(quantized))
    assert "its weights are quantized" in fault.cause and "bf16 checkpoint" in fault.remedy

    AutoConfig.for_model("mixtral", **COMMON, **LAID_OUT_OTHERWISE["mixtral"]).save_pretrained(tmp_path / "experts")
    starting_from(tmp_path / "experts", monkeypatch)
    (fault,) = assess(planning.problem_of(options)).with_warmups("start")
    assert fault.key == "weight_bridge" and "mixture of experts" in fault.cause


@pytest.mark.parametrize(
    ("run", "words", "key"),
    [
        ("teacher_rlt_tiny", ["model_name_or_path=."], "model_name_or_path"),
        ("teacher_sft_tiny", ["model_name_or_path=."], "model_name_or_path"),
        ("teacher_rlt_tiny", ["model_name_or_path=experts", "max_prompt_length=64"], "weight_bridge"),
        ("teacher_rlt_tiny", [f"model_name_or_path={SMALL}", "max_prompt_length=40000"], "max_completion_length"),
        ("teacher_rlt_tiny", ["vllm_kwargs={enable_chunked_prefill: true}"], "vllm_kwargs"),
        ("teacher_rlt_tiny", ["adapter_start=continue", "use_peft=true"], "adapter_start"),
        ("teacher_rlt_tiny", ["model_name_or_path=run:teacher_rlt_tiny"], "run:teacher_rlt_tiny"),
        ("teacher_rlt_tiny", ["student_model=run:teacher_rlt_tiny"], "run:teacher_rlt_tiny"),
    ],
)
def test_check_tells_what_a_start_would_of_models_that_are_here(run, words, key, quantized, monkeypatch):
    monkeypatch.chdir(quantized)
    AutoConfig.for_model("mixtral", **COMMON, **LAID_OUT_OTHERWISE["mixtral"]).save_pretrained("experts")
    with pytest.raises(ConfigError) as refused:
        train.check([run, "device=cpu", *words])
    assert [fault.key for fault in refused.value.faults] == [key]


def test_a_student_that_no_reward_asks_is_not_looked_at(capsys):
    for student in ("run:teacher_rlt_tiny", "run:nothing", "./nowhere"):
        train.check(["teacher_rlt_tiny", "device=cpu", "reward_funcs=[format]", f"student_model={student}"])
    assert capsys.readouterr().out.count("valid") == 3


def test_check_tells_of_what_a_warm_up_starts_from(quantized, monkeypatch):
    starting_from(quantized, monkeypatch)
    with pytest.raises(ConfigError) as refused:
        train.check(["teacher_rlt_tiny", "device=cpu"])
    assert [fault.key for fault in refused.value.faults] == ["run:teacher_sft_tiny: model_name_or_path"]


@pytest.mark.parametrize(
    "words",
    [
        ["teacher_rlt_tiny"],
        ["teacher_sft_tiny"],
        ["teacher_rlt_tiny", "model_name_or_path=nobody/teacher", "student_model=nobody/student"],
        ["stage=score", "model_name_or_path=nobody/a", "student_model=nobody/b", "dataset_id_or_path=nobody/c"],
    ],
)
def test_check_asks_nothing_of_the_hub_and_plans_no_memory(words, monkeypatch, capsys):
    for name in ("trainers.weights.hub.asked_config", "trainers.plan.model_shapes.asked_config"):
        monkeypatch.setattr(name, lambda path: pytest.fail(f"asked for {path}"))
    monkeypatch.setattr(planning, "solve", lambda problem: pytest.fail("planned"))
    train.check([*words, "device=cpu"])
    assert capsys.readouterr().out == "this configuration is valid\n"


@pytest.mark.parametrize("begin", [train.check, lambda words: planning.problem_of(checked(*words))])
def test_a_config_that_was_broken_off_is_told_by_name(begin, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=f"model_name_or_path='{tmp_path}': {tmp_path}/config.json cannot be read"):
        begin(["teacher_rlt_tiny", "device=cpu", f"model_name_or_path={tmp_path}"])


def test_check_tells_of_every_config_that_cannot_be_read_beside_what_else_is_wrong(tmp_path, monkeypatch):
    for name, content in (("teacher", "[]"), ("student", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    monkeypatch.chdir(tmp_path)
    words = ["./teacher", "./student"]
    words = [f"{key}={path}" for key, path in zip(("model_name_or_path", "student_model"), words, strict=True)]
    with pytest.raises(ConfigError) as refused:
        train.check(["teacher_rlt_tiny", "device=cpu", "vllm_kwargs={enable_chunked_prefill: true}", *words])
    assert [fault.key for fault in refused.value.faults] == ["vllm_kwargs", "model_name_or_path", "student_model"]
    assert "it holds a list, no mapping" in refused.value.faults[1].cause
    with pytest.raises(ConfigError) as refused:
        train.check(["stage=score", "device=cpu", "dataset_id_or_path=nobody/c", *words])
    assert [fault.key for fault in refused.value.faults] == ["model_name_or_path", "student_model"]


def test_a_config_of_an_earlier_download_that_is_broken_off_is_told_with_its_file(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("")
    monkeypatch.setattr(model_shapes, "cached_file", lambda path, name: str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"{tmp_path}/config.json cannot be read.*\\n.*remove that file"):
        train.check(["teacher_rlt_tiny", "device=cpu", "model_name_or_path=nobody/teacher"])
