"""Composition and checks: nothing heavy is loaded, every fault is told. Run: ./run_tests.sh tests/test_config.py"""

import ast
import dataclasses
import json
import re
import subprocess
import sys

import pytest
import yaml
from conftest import REPO
from pydantic import BaseModel

from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers import checks
from trainers import options as declared
from trainers.checks import load_options
from trainers.config import CONFIG_DIR, compose_run, find_run, hydra_arguments
from trainers.errors import ConfigError
from trainers.options import (
    FormulaOptions,
    MergeOptions,
    RescoreOptions,
    RLOptions,
    ScoreOptions,
    SFTOptions,
    TrainOptions,
    options_class,
)
from trainers.settings.trl_choices import DERIVED
from trainers.settings.trl_options import trl_options

ALL_RUNS = sorted(path.stem for path in (CONFIG_DIR / "run_cfg").rglob("*.yaml"))
NAMED_BY_THE_USER = {
    "score": ["dataset_id_or_path", "model_name_or_path", "student_model"],
    "rescore": ["scores"],
    "merge": ["model_name_or_path"],
}
RUNS = [run for run in ALL_RUNS if run not in NAMED_BY_THE_USER]


def faults(run, *overrides):
    with pytest.raises(ConfigError) as error:
        load_options(compose_run(run, list(overrides)), repo=REPO)
    return {fault.key: fault for fault in error.value.faults}


def a_card(monkeypatch):
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(checks, "cpu_builds", dict)


@pytest.mark.parametrize("run", ALL_RUNS)
def test_every_run_composes_and_is_valid_where_a_gpu_is(run, monkeypatch, tmp_path, request):
    a_card(monkeypatch)
    given = dict.fromkeys(NAMED_BY_THE_USER.get(run, ()), "hub/id")
    if run == "rescore":
        (tmp_path / "batch.safetensors").touch()
        (tmp_path / "formula.json").write_text(json.dumps(dataclasses.asdict(TeacherLogprobKL())))
        given["scores"] = tmp_path
    if run == "merge":
        given["model_name_or_path"] = request.getfixturevalue("adapter_dir")
    options = load_options(compose_run(run, [f"{key}={value}" for key, value in given.items()]), repo=REPO)
    assert options.stage == (run if run in NAMED_BY_THE_USER else "sft" if "sft" in run else "rl")


@pytest.mark.parametrize(("run", "keys"), NAMED_BY_THE_USER.items())
def test_runs_that_need_files_ask_for_exactly_these(run, keys):
    assert set(faults(run)) == set(keys)


@pytest.mark.parametrize("run", [run for run in RUNS if "tiny" not in run])
def test_big_presets_say_that_they_need_a_gpu(run, monkeypatch):
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 0)
    found = faults(run)
    assert list(found) == ["device"]
    assert "needs an NVIDIA GPU" in found["device"].cause and "without RLT_CPU" in found["device"].remedy


def test_the_cuda_build_of_vllm_is_refused_where_an_engine_would_start_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "installed_version", {"vllm": "0.31.0"}.get)
    monkeypatch.setattr(checks, "cpu_builds", dict)
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for words in ((), ("device=cpu",)):
        found = faults("teacher_rlt_tiny", *words)
        assert list(found) == ["device"] and "CUDA build" in found["device"].cause
        assert "use_vllm=false" in found["device"].remedy and "RLT_CPU=1" in found["device"].remedy
        assert "CUDA_VISIBLE_DEVICES" not in found["device"].remedy
    (tmp_path / "train-00000.parquet").touch()
    for no_engine in ("use_vllm=false", f"replay_rollouts={tmp_path}"):
        load_options(compose_run("teacher_rlt_tiny", ["device=cpu", no_engine]), repo=REPO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert faults("teacher_rlt_tiny")["device"].remedy.startswith("unset CUDA_VISIBLE_DEVICES, which hides the card")
    assert "CUDA_VISIBLE_DEVICES" not in faults("teacher_rlt_tiny", "device=cpu")["device"].remedy
    load_options(compose_run("teacher_sft_tiny"), repo=REPO)  # which has no engine
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 1)
    load_options(compose_run("teacher_rlt_tiny"), repo=REPO)
    assert "CUDA build" in faults("teacher_rlt_tiny", "device=cpu")["device"].cause


@pytest.mark.parametrize(
    ("run", "batch", "generations", "prompt", "completion", "per_device"),
    [
        ("teacher_rlt_mono", 32, 8, 2048, 4096, "auto"),  # solved for the card, see README_MONO_GPU.md
        ("teacher_rlt_mono_85gb", 96, 24, 6144, 6144, 3),
        ("teacher_rlt_mono_96gb", 128, 32, 8192, 8192, 4),
    ],
)
def test_founding_presets_keep_their_values(run, batch, generations, prompt, completion, per_device):
    kept = compose_run(run)
    assert (kept["model_name_or_path"], kept["student_model"]) == (
        "Qwen/Qwen2.5-7B-Instruct",
        "bespokelabs/Bespoke-Stratos-7B",
    )
    assert (kept["train_batch_size"], kept["num_generations"]) == (batch, generations)
    assert (kept["max_prompt_length"], kept["max_completion_length"]) == (prompt, completion)
    assert kept["per_device_train_batch_size"] == per_device
    assert kept["offload_untrained_models"] is True and kept["beta"] == 0.04  # the reference is the model RL began with
    assert (kept["use_vllm_server"], kept["use_ray"]) == (False, False)
    assert kept.get("use_peft", False) is False


def test_all_faults_are_told_at_once_with_remedies():
    found = faults(
        "teacher_rlt_tiny",
        "num_generation=3",
        "+invented=1",
        "learning_rate=abc",
        "loss_type=dapoo",
        "bf16=true",
        "max_length=3",
        "generation_aggregation_steps=3",
        "use_ray=true",
        "sync_ref_model=true",
        "kl_penalty_reward_coeff=[1,2,3]",
        "student_model=run:student_sft_tinny",
        "dataset_id_or_path=nowhere.jsonl",
        "vllm_max_model_length=10",
        "warmup_ratio=0.1",
    )
    assert "num_generations" in found["num_generation"].remedy
    assert found["invented"].cause == "unknown"
    assert "valid number" in found["learning_rate"].cause
    assert found["loss_type"].remedy == "did you mean dapo?"
    assert found["bf16"].remedy == "use precision=bf16"
    assert "stage=sft only" in found["max_length"].cause
    assert "generation_aggregation_steps=1" in found["generation_aggregation_steps"].remedy
    assert found["use_ray"].remedy == "use_ray=false"
    assert "beta=0.04" in found["sync_ref_model"].remedy
    assert "3 coefficients for 2 reductions" in found["kl_penalty_reward_coeff"].cause
    assert found["student_model"].remedy == "did you mean run:student_sft_tiny?"
    assert "no such file" in found["dataset_id_or_path"].cause
    assert "vllm_max_model_length=192" in found["vllm_max_model_length"].remedy
    assert "warmup_steps" in found["warmup_ratio"].remedy
    assert "lr_scheduler_type=constant_with_warmup" in found["warmup_ratio"].remedy


@pytest.mark.parametrize(
    ("override", "key", "cause", "remedy"),
    [
        ("num_generations=1", "num_generations", "greater than or equal to 2", "num_generations=2"),
        ("lora_r=1000", "lora_r", "less than or equal to 512", "lora_r=512"),
        ("beta=-1", "beta", "greater than or equal to 0", "beta=0"),
        ("student_tokens_per_pass=0", "student_tokens_per_pass", "equal to 1", "student_tokens_per_pass=1"),
        ("vllm_gpu_memory_utilization=2", "vllm_gpu_memory_utilization", "equal to 1", "vllm_gpu_memory_utilization=1"),
        ("adam_beta1=1", "adam_beta1", "less than 1", "--help"),
        ("model_name_or_path=./nowhere", "model_name_or_path", "no such folder", "save_pretrained"),
        ("model_name_or_path=results/nowhere", "model_name_or_path", "no such folder", "save_pretrained"),
        ("beta=0,1", "beta", "choice of several values", "beta=[0,1]"),
        ("lora_target_modules=q_proj,v_proj", "lora_target_modules", "several values", "=[q_proj,v_proj]"),
        ("--learning_rate=1e-5", "--learning_rate=1e-5", "without dashes", "learning_rate=1e-5"),
        ("--max-steps", "--max-steps", "without dashes", "max_steps=<value>"),
        ("max_steps = 3", "max_steps = 3", "spaces around the equals sign", "max_steps=3"),
        ("max_steps= 3", "max_steps = 3", "spaces around the equals sign", "max_steps=3"),
        ("max_steps =3", "max_steps = 3", "spaces around the equals sign", "max_steps=3"),
        ("top_k= -1", "top_k = -1", "spaces around the equals sign", "top_k=-1"),
        ("output_dir= ~/here", "output_dir = ~/here", "spaces around the equals sign", "output_dir=~/here"),
        ("model_cfg=nope", "configuration", "nope", "correct what it names"),
        ("model_init={model_type: qwen2}", "model_init", "stage=sft only", "leave it out"),
        ("optim=adamw_trch", "optim", "'adamw_torch'", "did you mean adamw_torch?"),
        ("optim=paged_adamw_8bit", "optim", "'adamw_8bit'", "did you mean adamw_8bit?"),
        ("optim=flash_adamw device=cpu", "optim", "NVIDIA GPU", "optim=adamw_8bit"),
        ("optim=cpu_offload use_peft=true", "optim", "adapters", "optim=adamw_torch"),
        ("optim_args=a", "optim_args", "sets it itself", "no further arguments"),
        ("scale_rewards=grup", "scale_rewards", "", "did you mean group?"),
        ("max_steps=0", "max_steps", "nothing to train", "max_steps=-1"),
        (
            "loss_type=vespo vllm_importance_sampling_mode=sequence_mask",
            "vllm_importance_sampling_mode",
            "by token",
            "token_mask",
        ),
        ("reward_weights=[1,2]", "reward_weights", "2 weights for 1 reward", "[1.0]"),
        ("bf16_full_eval=true", "bf16_full_eval", "sets it itself", "as they are"),
        ("student_mode=streamed student_quantization=4bit", "student_mode", "quantized", "student_mode=resident"),
        ("student_model=null", "student_model", "needs a student", "student_model="),
        ("eval_dataset_split=null", "eval_dataset_id_or_path", "none is named", "eval_size=64"),
        ("eval_size=64", "eval_size", "eval_dataset_split=test is evaluated", "eval_dataset_split=null, or eval_size="),
        (
            "per_device_eval_batch_size=12 num_generations_eval=8",
            "per_device_eval_batch_size",
            "no whole groups",
            "=16",
        ),
        ("chat_template=nowhere.jinja", "chat_template", "neither", "template"),
        ("temperature=0", "temperature", "greater than 0", "--help"),
        (
            "unbias_teacher_log_probs=false temperature=0.7",
            "unbias_teacher_log_probs",
            "of the rollout",
            "temperature=1",
        ),
        ("overlong=filtre", "overlong", "'filter'", "did you mean filter?"),
        ("gradient_accumulation_steps=2", "gradient_accumulation_steps", "sets it itself", "train_batch_size"),
        ("stage=rll", "stage", "no such stage", "sft, rl"),
        ("system_prompt=x", "system_prompt", "unknown under this name", "teacher_system_prompt"),
    ],
)
def test_each_fault_has_cause_and_remedy(override, key, cause, remedy):
    words = [override] if override.startswith("model_init") else override.split()
    found = faults("teacher_rlt_tiny", *words)
    assert cause in found[key].cause
    assert remedy in found[key].remedy


def test_an_empty_value_before_the_name_of_a_run_is_one():
    for word in ("eval_dataset_id_or_path=", "student_system_prompt='a='"):
        assert compose_run("", [word, "student_sft_tiny"])["stage"] == "sft"


def test_fresh_model_and_named_model_exclude_each_other():
    found = faults("student_sft_tiny", "model_name_or_path=run:student_sft_tiny")
    assert found["model_name_or_path"].cause == "set together with model_init"


def test_evaluation_batch_is_checked_only_where_something_is_evaluated(monkeypatch):
    a_card(monkeypatch)
    emergency = ["train_batch_size=64", "per_device_train_batch_size=2", "num_generations=16"]
    silent = ["num_generations_eval=16", "report_before_after=false", "eval_size=null"]
    for evaluation in (silent, []):  # the preset's own explains each question once
        options = load_options(compose_run("teacher_rlt_mono_85gb", emergency + evaluation), repo=REPO)
        assert options.generation_aggregation_steps == 8
    found = faults("teacher_rlt_mono_85gb", *emergency, "num_generations_eval=16")
    assert "per_device_eval_batch_size=32" in found["per_device_eval_batch_size"].remedy


def test_null_is_a_value_where_trl_s_type_has_it():
    kept = load_options(compose_run("teacher_rlt_tiny", ["vllm_importance_sampling_clip_max=null"]), repo=REPO)
    assert kept.vllm_importance_sampling_clip_max is None
    dropped = load_options(compose_run("teacher_rlt_tiny", ["learning_rate=null"]), repo=REPO)
    assert dropped.learning_rate == 1e-6  # TRL's default


def test_more_processes_than_gpus_are_refused(monkeypatch):
    a_card(monkeypatch)
    with pytest.raises(ConfigError, match=r"num_processes=2[\s\S]*launch\.sh 1"):
        load_options(compose_run("teacher_sft"), num_devices=2, repo=REPO)


@pytest.mark.parametrize("words", ["teacher_rlt_mono.yaml", "cfgs/run_cfg/teacher_rlt_mono.yaml", "teacher_rlt_mono"])
def test_run_is_named_by_bare_name_file_or_path(words):
    assert hydra_arguments([words]) == ["run_cfg=teacher_rlt_mono"]


@pytest.mark.parametrize("stage", ["teacher_rlt_tiny", "score", "rescore"])
@pytest.mark.parametrize("key", ["normalize_log_prob_fn", "normalize_kl_fn"])
def test_none_is_no_normalization_as_in_the_reference_implementation(stage, key, tmp_path):
    cls = options_class("rl" if stage == "teacher_rlt_tiny" else stage)
    given = ("none", "None", None, "exp")
    composed = [compose_run(stage, [f"{key}={value if value is not None else 'null'}"])[key] for value in given]
    assert [getattr(cls(**{key: value}), key) for value in composed] == [None, None, None, "exp"]
    with pytest.raises(ValueError, match="'exp' or 'exp_norm'"):
        cls(**{key: "log"})


def test_every_pair_with_spaces_is_told():
    with pytest.raises(ConfigError) as refused:
        hydra_arguments(["max_steps", "=", "3", "beta=", "0.1", "top_p = 0.9"])
    assert [fault.remedy for fault in refused.value.faults] == ["max_steps=3", "beta=0.1", "top_p=0.9"]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("-m seed=1,2", 'for seed in 1 2; do ./launch_mono.sh seed="$seed"; done'),
        ("teacher_rlt_tiny --multirun", 'for seed in 1 2; do ./launch_mono.sh teacher_rlt_tiny seed="$seed"; done'),
        (
            "--multirun teacher_rlt_tiny +beta=0,0.1 max_steps=3 seed=range(1,3)",
            'for beta in 0 0.1; do for seed in 1 2; do ./launch_mono.sh teacher_rlt_tiny beta="$beta" max_steps=3 '
            'seed="$seed"; done; done',
        ),
        (
            "-m vllm_kwargs.a={b:1},{b:2}",
            "for vllm_kwargs_a in '{b:1}' '{b:2}'; do ./launch_mono.sh vllm_kwargs.a=\"$vllm_kwargs_a\"; done",
        ),
    ],
)
def test_a_sweep_is_a_loop_of_the_shell(words, remedy):
    with pytest.raises(ConfigError) as refused:
        hydra_arguments(words.split())
    (fault,) = refused.value.faults
    assert "one value for each option" in fault.cause and fault.remedy == remedy
    told = re.sub(r"\./launch_mono\.sh", "echo", remedy)
    ran = subprocess.run(["bash", "-c", told], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(ran) == (4 if "beta" in words else 2)
    for line in ran:
        hydra_arguments(line.split())


@pytest.mark.parametrize(
    "words",
    [
        ["hub_token=hf SECRET x,"],
        ["hub_token=hf_SECRET,b"],
        ["hub_token", "=", "hf_SECRET"],
        ["hub_token=", "hf_SECRET"],
        ["--hub-token=hf_SECRET"],
        ["-m", "hub_token=hf_SECRET", "seed=1,2"],
        ["vllm_kwargs={hf_token: hf_SECRET x,}"],
    ],
)
def test_words_that_cannot_be_read_are_told_without_their_secrets(words):
    with pytest.raises(ConfigError) as refused:
        hydra_arguments(words)
    assert "SECRET" not in str(refused.value) and "<value>" in str(refused.value)


def test_a_run_with_a_space_behind_it_is_no_pair():
    with pytest.raises(ConfigError, match="no such run") as refused:
        hydra_arguments(["teacher_rlt_tiny "])
    assert "did you mean teacher_rlt_tiny.yaml" in str(refused.value)


def test_an_empty_value_may_be_followed_by_any_word_of_its_own():
    for behind in ("teacher_rlt_tiny", "~beta", "max_steps=3"):
        assert "++run_name=" in hydra_arguments(["run_name=", behind])


def test_misspelt_run_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"did you mean teacher_rlt_mono_85gb\.yaml"):
        find_run("teacher_rlt_mono_85g.yaml")


def test_overrides_may_set_keys_that_no_yaml_mentions():
    assert hydra_arguments(["unbias_student_log_probs_temp=0.5"])[1:] == ["++student_temperature=0.5"]
    for null in ("null", "None"):  # 1 in the reference implementation, whose name it is
        assert hydra_arguments([f"unbias_student_log_probs_temp={null}"])[1:] == ["++student_temperature=1.0"]
    arguments = hydra_arguments(["max_steps=5", "+epsilon_high=0.28", "trainer_cfg=grpo_tiny"])
    assert arguments == ["run_cfg=teacher_rlt_tiny", "++max_steps=5", "++epsilon_high=0.28", "trainer_cfg=grpo_tiny"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--max-steps=3", "-> max_steps=3"),
        ("--info", "--help, --check and --cfg job are all that have"),
        ("~run_cfg", "every run has one"),
        ("hydra.run.dir=x", "output_dir=<folder>"),
        ("hydra/job_logging=none", "neither makes folders nor logs"),
        ("model_cfg=nope", "Could not override 'model_cfg'"),
        ("trainer_cfg=nope", "Could not find 'trainer_cfg/nope'"),
    ],
)
def test_words_that_are_no_options_end_a_run_with_one_message(word, told):
    done = run_train("teacher_rlt_tiny", word)
    assert done.returncode == 1 and told in done.stderr and done.stderr.startswith("1 problem"), done.stderr
    assert "HYDRA_FULL_ERROR" not in done.stderr


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_trl_options_read_from_source_are_trl_s_fields_and_defaults(kind):
    import trl

    real = {f.name: f for f in dataclasses.fields({"grpo": trl.GRPOConfig, "sft": trl.SFTConfig}[kind]) if f.init}
    read = trl_options(kind)
    assert set(read) == set(real)
    for name, field in real.items():
        if field.default is not dataclasses.MISSING and name != "optim":  # computed in the source
            assert read[name].default == field.default, name


def test_one_invalid_value_hides_no_other_fault():
    words = ("weight_bridge=lora", "vllm_kwargs={tensor_parallel_size: 2}", "top_p=hot")
    assert set(faults("teacher_rlt_tiny", *words)) == {"weight_bridge", "vllm_kwargs", "top_p"}


def test_temperature_one_is_asked_of_a_reward_that_reads_the_teacher_alone():
    words = ["unbias_teacher_log_probs=false", "temperature=0.7"]
    for unread in ("kl_penalty_reward_coeff=0", "include_teacher_think_entropy=false", "reward_funcs=[format]"):
        load_options(compose_run("teacher_rlt_tiny", [*words, unread]), repo=REPO)


def test_the_formula_s_file_says_the_defaults():
    written = compose_run("score", [])
    of_dataclass = dataclasses.asdict(TeacherLogprobKL())
    for name in FormulaOptions.model_fields:
        assert written[name] == FormulaOptions.model_fields[name].default == of_dataclass[name], name
    for name in ("student_temperature", "unbias_teacher_log_probs"):
        assert written[name] == ScoreOptions.model_fields[name].default, name


def test_every_option_is_read_by_something():
    """TRL's options go to TRL's own configuration class; each of ours must be an attribute read outside options.py."""
    read = set()
    for path in [REPO / "train.py", *(REPO / "trainers").rglob("*.py"), *(REPO / "data").glob("*.py")]:
        if path.name in ("options.py", "checks.py"):  # a check alone does not make an option do something
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "options":
                read.add(node.attr)
    read |= set(TeacherLogprobKL.__dataclass_fields__)  # trainers/rl.py hands each of these to the reward
    refused_only = {"use_ray", "use_vllm_server"}  # promises of the founding documents: must be false
    own = {
        name for cls in (SFTOptions, RLOptions, ScoreOptions, RescoreOptions, MergeOptions) for name in cls.model_fields
    }
    assert own - read - refused_only == set()


def fields_of(cls):
    """Its options, TRL's included; of a class that RL and SFT share, TRL's common ones."""
    trl = {kind: set(trl_options(kind)) for kind in ("grpo", "sft")}
    if not issubclass(cls, TrainOptions):
        return set(cls.model_fields)
    return set(cls.model_fields) | (
        trl["grpo"] if cls is RLOptions else trl["sft"] if cls is SFTOptions else trl["grpo"] & trl["sft"]
    )


def test_a_function_reads_no_option_that_its_stage_has_not():
    """One that asks for `options.stage` may read what any of the stages has."""
    classes = {
        name: cls for name, cls in vars(declared).items() if isinstance(cls, type) and issubclass(cls, BaseModel)
    }
    stages = [declared.options_class(stage) for stage in ("sft", "rl", "score", "rescore", "merge")]
    seen = 0
    for path in [REPO / "train.py", *(REPO / "trainers").rglob("*.py")]:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            (annotation,) = [a.annotation for a in function.args.args if a.arg == "options"] or [None]
            if annotation is None:
                continue
            named = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
            kinds = [RLOptions, ScoreOptions] if named == {"ScoringOptions"} else [classes[name] for name in named]
            nodes = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
            read = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "options"}
            known = set.intersection(*map(fields_of, kinds)) | {name for name in dir(BaseModel) if name[:5] == "model"}
            if "stage" in read:
                known = known.union(*(cls.model_fields for cls in stages for kind in kinds if issubclass(cls, kind)))
            assert read <= known, (
                f"{path.name}: {function.name}({ast.unparse(annotation)}) reads {sorted(read - known)}"
            )
            seen += 1
    assert seen > 100


def test_a_student_that_no_reward_asks_need_not_be_there():
    words = ["reward_funcs=[format]", "student_model=./nowhere", "num_probes=0"]
    assert load_options(compose_run("teacher_rlt_tiny", words), repo=REPO).student_model == "./nowhere"


def test_derived_options_name_options_that_exist():
    trl = set(trl_options("grpo")) | set(trl_options("sft"))
    gone = {name for name in DERIVED if name not in trl}
    assert gone <= {"data_seed", "resume_from_checkpoint"}, gone


def test_yaml_files_declare_nothing_twice():
    for path in CONFIG_DIR.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for key, value in (yaml.safe_load(text) or {}).items():
            assert value != f"${{{key}}}", f"{path.name}: {key} passes itself on"


def run_train(*arguments):
    return subprocess.run(
        [sys.executable, str(REPO / "train.py"), *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_errors_and_cfg_import_neither_torch_nor_vllm():
    code = (
        "import sys; sys.argv=['train.py']; sys.path.insert(0, '.');"
        "import train, trainers.settings.help, trainers.config, trainers.checks;"
        "trainers.checks.load_options(trainers.config.compose_run('teacher_rlt_tiny'));"
        "trainers.settings.help.print_help(''); train.check(['device=cpu']);"
        "print({'torch', 'vllm', 'transformers', 'trl', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "set()", done.stderr
    assert "\n  lora_r = 16  (int, >= 1, <= 512)\n" in done.stdout
    assert "\n  student_tokens_per_pass = 'auto'  (int, >= 1 | 'auto')\n" in done.stdout
    assert "\n  reward_funcs = ['teacher_logprob_kl']  (list[str | dict[str, Any]])\n" in done.stdout
    assert not re.search(r"FieldInfo|Annotated|typing|<class", done.stdout)


@pytest.mark.parametrize("words", ["--help", "teacher_rlt_tiny --cfg job", "stage=plan teacher_rlt_mono_24gb"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(words):
    command = f"{sys.executable} {REPO / 'train.py'} {words} | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 1 and not done.stderr


@pytest.mark.parametrize("word", ["stage=plan", "+stage=plan", "++stage=plan"])
def test_a_plan_is_asked_for_in_any_of_hydra_s_ways(word):
    done = run_train(word, "teacher_rlt_mono_24gb")
    assert "update" in done.stdout and "no such stage" not in done.stdout + done.stderr


def test_two_words_that_each_ask_for_something_else_are_told():
    done = run_train("teacher_rlt_tiny", "--cfg", "job", "--check")
    assert done.returncode == 1 and "--check: there is another such word" in done.stderr


@pytest.mark.parametrize("flag", ["--cfg job", "--cfg=job", "-c job"])
def test_cfg_job_prints_the_composed_configuration(flag):
    done = run_train("teacher_rlt_mono.yaml", *flag.split(), "max_steps=7", "hub_token=hf_SECRET")
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["max_steps"] == 7 and "SECRET" not in done.stdout
    assert shown["student_model"] == "bespokelabs/Bespoke-Stratos-7B"


def test_faults_end_the_program_with_a_message_and_no_traceback(tmp_path):
    done = run_train("teacher_rlt_tiny", "num_generation=3", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 1
    assert "did you mean num_generations" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
