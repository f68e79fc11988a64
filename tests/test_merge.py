"""Adapters of an earlier run: merged, trained on, or refused. Run: ./run_tests.sh tests/test_merge.py"""

import json
import logging
import shutil

import pytest
import torch
from conftest import REPO
from peft import PeftModel
from planned import problem
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.merge import RECORD, merge_adapter, whole_model
from trainers.options import options_class
from trainers.plan import run_models, start_faults
from trainers.plan.machine import Machine
from trainers.plan.solve import solve
from trainers.plan.workload import GIB
from trainers.weights.adapter_files import find_base, is_adapter, open_adapter
from trainers.weights.adapters import ADAPTER, add_adapters
from trainers.weights.starts import Start, load_teacher, resolve_start

IDS = torch.arange(40).remainder(30)[None]


def options(stage="rl", **values):
    return options_class(stage)(stage=stage, **values)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def checked(*words, run="teacher_rlt_tiny", num_devices=1):
    place = [] if run == "merge" else ["device=cpu"]
    return load_options(compose_run(run, [*place, *map(str, words)]), num_devices, REPO)


def faults(*words, **kwargs):
    with pytest.raises(ConfigError) as error:
        checked(*words, **kwargs)
    return {fault.key: fault for fault in error.value.faults}


@pytest.fixture
def copy(adapter_dir, tmp_path):
    """The adapter in a folder of its own, and a way to change its adapter_config.json."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapter_dir, folder)

    def change(**values):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | values))
        return folder

    return change


def test_merged_model_says_what_base_and_adapter_say_together(model_dir, adapter_dir, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    untouched = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter_dir))
    out = tmp_path / "merged"
    train.run(checked(f"model_name_or_path={adapter_dir}", f"output_dir={out}", run="merge"), {}, "merge")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert not isinstance(merged, PeftModel) and not is_adapter(out)
    assert (logits(merged) - expected).abs().max() < 1e-5
    assert (expected - untouched).abs().max() > 0.1
    assert set(load_file(out / "model.safetensors")) == set(load_file(model_dir / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(adapter_dir).chat_template
    assert tokenizer.eos_token_id in merged.generation_config.eos_token_id
    assert json.loads((out / RECORD).read_text())["base"] == str(model_dir)
    with pytest.raises(ConfigError, match="already holds a model"):
        checked(f"model_name_or_path={adapter_dir}", f"output_dir={out}", run="merge")


def test_merge_rounds_the_sum_once(model_dir, adapter_dir, tmp_path):
    """An adapter's part below half a bf16 step of its weight still counts where the sum is taken before rounding."""
    adapter = open_adapter("model_name_or_path", str(adapter_dir))
    merge_adapter(adapter, torch.float32, False, tmp_path / "fp32", "model_name_or_path")
    merge_adapter(adapter, torch.bfloat16, False, tmp_path / "bf16", "model_name_or_path")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_base_that_moved_is_found_beside_the_adapter_or_named(model_dir, copy, tmp_path):
    folder = copy(base_model_name_or_path="/gone/base")
    assert find_base(folder, "/gone/base") == "/gone/base"
    found = faults(f"model_name_or_path={folder}", run="merge")
    assert "/gone/base is no model folder" in found["model_name_or_path"].cause
    assert "base_model=" in found["model_name_or_path"].remedy
    assert checked(f"model_name_or_path={folder}", f"base_model={model_dir}", run="merge").base_model == str(model_dir)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert find_base(folder, "/gone/base") == str(tmp_path / "base")
    assert find_base(folder, "owner/name") == "owner/name"


def test_what_cannot_be_merged_is_refused_before_anything_loads(model_dir, adapter_dir, copy, tmp_path):
    assert "holds no LoRA adapter" in faults(f"model_name_or_path={model_dir}", run="merge")["model_name_or_path"].cause
    assert "no such folder" in faults("model_name_or_path=./nowhere", run="merge")["model_name_or_path"].cause
    assert "no adapter is named" in faults(run="merge")["model_name_or_path"].cause
    named = f"model_name_or_path={adapter_dir}"
    assert faults(named, "base_model=./nowhere", run="merge")["base_model"].cause.startswith("its base ./nowhere")
    assert "one process" in faults(named, run="merge", num_devices=2)["num_processes"].cause
    folder = copy(base_model_name_or_path=None)
    assert "names no base" in faults(f"model_name_or_path={folder}", run="merge")["model_name_or_path"].cause
    copy(base_model_name_or_path=str(adapter_dir))
    assert "LoRA adapter itself" in faults(f"model_name_or_path={folder}", run="merge")["model_name_or_path"].cause
    copy(base_model_name_or_path=str(model_dir))
    shutil.copy(model_dir / "model.safetensors", folder)
    assert "both a LoRA adapter and" in faults(f"model_name_or_path={folder}", run="merge")["model_name_or_path"].cause
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").unlink()
    assert "no adapter_model" in faults(f"model_name_or_path={folder}", run="merge")["model_name_or_path"].cause


def test_adapter_that_does_not_fit_or_is_broken_is_no_model(adapter_dir, copy, tmp_path):
    weights = load_file(adapter_dir / "adapter_model.safetensors")
    name = min(weights)

    def merge(changed, message):
        folder = copy()
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(ConfigError, match=message):
            merge_adapter(open_adapter("k", str(folder)), None, False, tmp_path / "out", "k")
        assert not (tmp_path / "out" / "config.json").exists()

    merge({key: value for key, value in weights.items() if key != name}, "1 of its weights or layers")
    merge(weights | {name.replace("layers.0", "layers.7"): weights[name].clone()}, "1 of its weights or layers")
    merge(weights | {name: weights[name][:, :-1].contiguous()}, "does not fit its base: .*size mismatch")
    merge(weights | {name: weights[name] * float("nan")}, "the adapter is broken")


def test_start_is_recognised_and_its_reference_named(model_dir, adapter_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def start(out, **values):
        caplog.clear()
        return resolve_start(options(**values), str(adapter_dir), tmp_path / out, torch.float32)

    found = start("a", use_peft=True, beta=0.1)
    assert (found.path, found.adapter.folder, found.tokenizer) == (str(model_dir), adapter_dir, str(adapter_dir))
    assert f"start from {adapter_dir}: its LoRA adapter is trained on, on its base {model_dir}" in caplog.text
    assert "KL reference: that adapter as it is now" in caplog.text
    assert not (tmp_path / "a").exists()
    merged = Start(str(tmp_path / "b" / "merged_start"))
    assert start("b", use_peft=False, beta=0.1, sync_ref_model=True) == merged
    assert "every weight of that is trained; KL reference: the merged model, which follows" in caplog.text
    assert start("b", use_peft=True, adapter_start="merge", beta=0.1) == merged
    assert "merged before" in caplog.text and "KL reference: the merged model, without the fresh" in caplog.text
    assert start("a", use_peft=True, beta=0.0).adapter and "no KL reference (beta=0)" in caplog.text
    with pytest.raises(ConfigError, match="merge of another adapter"):
        resolve_start(options(), str(adapter_dir), tmp_path / "b", torch.bfloat16)
    assert resolve_start(options(beta=0.1), str(model_dir), tmp_path / "c", torch.float32) == Start(str(model_dir))
    assert f"start from {model_dir}: it is a whole model, and every weight of that is trained" in caplog.text
    assert "KL reference: that model" in caplog.text
    with pytest.raises(ConfigError, match="is no folder with a LoRA adapter"):  # of run:NAME it shows only here
        resolve_start(options(use_peft=True, adapter_start="continue"), str(model_dir), tmp_path, torch.float32)


def test_student_that_is_an_adapter_becomes_a_model_of_the_run(model_dir, adapter_dir, tmp_path):
    path = whole_model(options(), "student_model", str(adapter_dir), tmp_path, torch.float32)
    assert path == str(tmp_path / "merged_student")
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir))
    assert (logits(AutoModelForCausalLM.from_pretrained(path)) - expected).abs().max() < 1e-5
    assert whole_model(options(), "student_model", str(model_dir), tmp_path, torch.float32) == str(model_dir)


def test_continued_adapter_trains_and_its_copy_does_not(model_dir, adapter_dir, tmp_path):
    chosen = options(use_peft=True, beta=0.1)
    start = resolve_start(chosen, str(adapter_dir), tmp_path, torch.float32)
    model = load_teacher(chosen, start.path, torch.float32, start.adapter)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 28 and all(f"lora_{name.split('lora_')[1][0]}.{ADAPTER}." in name for name in trained)
    config = model.peft_config[ADAPTER]
    assert (config.r, config.lora_alpha, config.inference_mode) == (4, 8, False)  # the checkpoint's
    before = logits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert (logits(model) - before).abs().max() > 0.01
    model.set_adapter("ref")
    assert (logits(model) - before).abs().max() < 1e-6
    assert "ref" not in load_teacher(options(use_peft=True), start.path, torch.float32, start.adapter).peft_config


@pytest.mark.parametrize("continued", [False, True])
def test_adapters_are_in_fp32_on_a_base_in_bf16(model_dir, adapter_dir, tmp_path, continued):
    chosen = options(use_peft=True, beta=0.1)
    start = resolve_start(chosen, str(adapter_dir if continued else model_dir), tmp_path, torch.bfloat16)
    model = load_teacher(chosen, start.path, torch.bfloat16, start.adapter)
    assert set(model.peft_config) == ({ADAPTER, "ref"} if continued else {ADAPTER})
    types = {("lora_" in name, parameter.dtype) for name, parameter in model.named_parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


SMALL = Machine(None, 8 * GIB, 8 * GIB, 100 * GIB)


def test_continued_adapter_is_planned_with_its_own_rank_and_its_copy(model_dir, adapter_dir, tmp_path):
    """Rank 4 and every layer, whatever lora_r and lora_target_modules would be for a fresh one; see conftest.py."""

    def planned(*words):
        chosen = checked(f"model_name_or_path={adapter_dir}", "use_peft=true", *words)
        plan = solve(problem(chosen, SMALL))
        return plan, plan.phases["load"]

    chosen = options(use_peft=True, beta=0.1)
    start = resolve_start(chosen, str(adapter_dir), tmp_path, torch.float32)
    model = load_teacher(chosen, start.path, torch.float32, start.adapter)
    held = {name: sum(p.nbytes for n, p in model.named_parameters() if f".{name}." in n) for name in (ADAPTER, "ref")}
    plan, items = planned("beta=0.1")
    assert (items["adapters"], items["reference's adapters"]) == (held[ADAPTER], held["ref"])
    assert plan.work.trained_bytes == held[ADAPTER]
    model.save_pretrained(tmp_path / "saved")
    saved = sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*.safetensors"))
    assert plan.disk["result"] == pytest.approx(saved, rel=0.1)  # beside headers
    assert "reference's adapters" not in planned("beta=0")[1]
    merged = planned("beta=0.1", "adapter_start=merge", "lora_r=2")[1]
    assert merged["adapters"] == held[ADAPTER] // 2 and "reference's adapters" not in merged


def test_adapter_of_a_warm_up_is_planned_before_it_is_there(monkeypatch, model_dir):
    """The warm-up's rank counts, since its adapter is trained on."""
    warmup = checked("use_peft=true", "lora_r=3", "lora_target_modules=[q_proj]", f"model_name_or_path={model_dir}",
                     "model_init=null", run="student_sft_tiny")  # fmt: skip
    for module in (run_models, start_faults):
        monkeypatch.setattr(module, "warmup_options", lambda name, options, **_: ({}, warmup))
    rl = checked("use_peft=true", "model_name_or_path=run:teacher_sft_tiny", f"student_model={model_dir}")
    work = solve(problem(rl, SMALL)).work
    assert work.adapter == (3, ["q_proj"]) and work.trained_bytes == 2 * 4 * 3 * (64 + 64)  # two layers, fp32


@pytest.mark.parametrize(
    ("words", "key", "cause", "remedy"),
    [
        (["use_peft=true", "lora_r=16"], "lora_r", "r=4", "leave lora_r out"),
        (["use_peft=true", "lora_alpha=32"], "lora_alpha", "lora_alpha=8", "adapter_start=merge"),
        (["use_peft=true", "lora_target_modules=[q_proj]"], "lora_target_modules", "down_proj", "leave"),
        (["adapter_start=continue"], "adapter_start", "every weight", "use_peft=true"),
    ],
)
def test_options_against_the_adapter_are_refused(adapter_dir, words, key, cause, remedy):
    fault = faults(f"model_name_or_path={adapter_dir}", *words)[key]
    assert cause in fault.cause and remedy in fault.remedy


def test_options_with_the_adapter_are_taken(adapter_dir):
    named = f"model_name_or_path={adapter_dir}"
    for words in (
        [],
        ["use_peft=true"],
        ["use_peft=true", "lora_r=4", "lora_alpha=8", "lora_dropout=0"],
        ["use_peft=true", "adapter_start=merge", "lora_r=2"],
    ):
        assert checked(named, *words).model_name_or_path == str(adapter_dir)
        assert checked(named, *words, "model_init=null", run="student_sft_tiny").model_name_or_path == str(adapter_dir)
    for run in ("teacher_rlt_mono_24gb", "teacher_sft_24gb"):  # no preset sets what its adapter may have otherwise
        words = [named, "precision=fp32", "per_device_train_batch_size=1", "optim=adamw_torch"]
        assert checked(*words, run=run).use_peft
    assert "is no folder with" in faults("adapter_start=merge", "model_name_or_path=a/b")["adapter_start"].cause
    assert (
        "one process"
        in faults(named, "model_init=null", run="student_sft_tiny", num_devices=2)["model_name_or_path"].cause
    )


def test_all_linear_against_an_adapter_of_some_layers_is_refused(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    add_adapters(model, options(use_peft=True, lora_target_modules=["q_proj"])).save_pretrained(tmp_path / "some")
    chosen = options(use_peft=True, lora_target_modules="all-linear")
    start = resolve_start(chosen, str(tmp_path / "some"), tmp_path, torch.float32)
    with pytest.raises(ConfigError, match="has none for model.layers.0.self_attn.k_proj"):
        load_teacher(chosen, start.path, torch.float32, start.adapter)
    load_teacher(options(use_peft=True), start.path, torch.float32, start.adapter)


@pytest.mark.parametrize("beyond", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"peft_type": "IA3"}])
def test_adapter_that_the_engine_has_no_place_for_is_merged_not_continued(copy, beyond):
    folder = copy(**beyond)
    fault = faults(f"model_name_or_path={folder}", "use_peft=true")["model_name_or_path"]
    assert "cannot be trained on" in fault.cause and "stage=merge" in fault.remedy
    assert checked(f"model_name_or_path={folder}", "use_peft=true", "adapter_start=merge")


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["model.embed_tokens"]},
        {"target_modules": ".*(q_proj|lm_head)"},
        {"target_modules": r".*\.(q_proj|embed_tokens)"},
        {"target_modules": ".*", "exclude_modules": ["embed_tokens"]},
    ],
)
def test_adapter_on_head_or_embedding_is_merged_not_continued(copy, targets):
    folder = copy(**targets)
    fault = faults(f"model_name_or_path={folder}", "use_peft=true")["model_name_or_path"]
    assert "cannot be trained on: TRL computes" in fault.cause and fault.remedy == "adapter_start=merge"
    assert ("lm_head" in fault.cause) != ("embed_tokens" in fault.cause)
    assert checked(f"model_name_or_path={folder}", "use_peft=true", "adapter_start=merge")


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ".*(q_proj|v_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": ["embed", "head"]},
        {"target_modules": ".*", "exclude_modules": "lm_head|.*embed_tokens"},
    ],
)
def test_adapter_on_layers_is_continued_however_it_names_them(copy, targets):
    assert checked(f"model_name_or_path={copy(**targets)}", "use_peft=true")


@pytest.mark.parametrize(
    ("targets", "cause"),
    [
        (".*(q_proj|lm_head)", "the head's weight"),
        (r".*\.embed_tokens", "the head's weight"),
        ("embed_tokens", "the head's weight"),
        ("(q_proj", "nor a regular expression"),
    ],
)
def test_pattern_for_fresh_adapters_is_read_as_peft_reads_it(targets, cause):
    words = compose_run("teacher_rlt_tiny", ["device=cpu", "use_peft=true"])
    with pytest.raises(ConfigError, match=cause) as error:
        load_options(words | {"lora_target_modules": targets}, 1, REPO)
    assert all("all-linear" in fault.remedy for fault in error.value.faults)
    assert load_options(words | {"lora_target_modules": ".*(q_proj|v_proj)"}, 1, REPO)
