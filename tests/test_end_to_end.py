"""Whole runs through the command line, with the real engine. Run: ./run_tests.sh tests/test_end_to_end.py"""

import json
import os
import subprocess
import sys

import pytest
import yaml
from command_line import ask_by_its_card, completions, lines, rl, train
from conftest import REPO, TINY_MODEL
from safetensors.torch import load_file

from trainers.watch.health import NEEDED

RESULT_KEYS = {
    "reward",
    "solution_log_prob_reward",
    "kl_reward",
    "match_reward",
    "explanation_length",
    "truncated_fraction",
    "student_accuracy",
    "unscorable_fraction",
}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A student from random weights and a teacher from the student, through the SFT stage."""
    folder = tmp_path_factory.mktemp("warm")
    model = "{" + ", ".join(f"{key}: {value}" for key, value in TINY_MODEL.items()) + "}"
    common = [
        "max_steps=3",
        "max_samples=200",
        "logging_steps=1",
        "train_batch_size=8",
        "per_device_train_batch_size=4",
    ]
    train("student_sft_tiny", f"model_init={model}", f"output_dir={folder}/student", *common)
    train("teacher_sft_tiny", f"model_name_or_path={folder}/student", f"output_dir={folder}/teacher", *common)
    return folder


@pytest.fixture(scope="module")
def first_run(warm, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, rl(warm, out, "seed=1")


def test_warm_up_leaves_a_loadable_model(warm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(warm / "teacher")
    assert tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(warm / "teacher").config.model_type == "qwen2"
    losses = [line["loss"] for line in lines(warm / "student") if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_run_obeys_its_overrides(first_run):
    out, _ = first_run
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["seed"], config["max_steps"], config["num_generations"]) == (1, 3, 4)
    assert config["not_matched_penalty"] == -1.0  # defaults are written too
    assert max(line["step"] for line in lines(out)) == 3


def test_run_begins_with_its_plan_of_memory(first_run):
    out, printed = first_run
    assert "Memory plan: " in printed and "<- peak" in printed
    assert "Memory plan: " in (out / "training.log").read_text()


def test_result_has_every_figure_before_and_after(first_run):
    out, printed = first_run
    result = json.loads((out / "result.json").read_text())
    assert set(result) == {"before", "after"}
    for moment in result.values():
        assert set(moment) == RESULT_KEYS
        assert all(isinstance(value, float) for value in moment.values())
        parts = moment["solution_log_prob_reward"] + moment["kl_reward"] + moment["match_reward"]
        assert moment["reward"] == pytest.approx(parts, abs=1e-4)
    assert "8 held-out questions" in printed
    assert str(out / "metrics.jsonl") in printed


def test_metrics_have_trl_s_names_and_the_seconds_of_each_phase(first_run):
    out, _ = first_run
    steps = [line for line in lines(out) if "reward" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        for name in ("reward_std", "completions/mean_length", "entropy", "kl_reward", *NEEDED):
            assert name in line, name
        assert line["seconds/generate"] > 0 and line["seconds/score"] > 0 and line["seconds/update"] > 0


def test_what_loading_takes_is_told_with_the_first_step(first_run):
    out, _ = first_run
    told = ["memory/load_peak" in line for line in lines(out) if "reward" in line]
    assert told == [True, False, False]


def test_trainer_and_engine_agree_after_training_steps(first_run):
    out, _ = first_run
    differences = [line["sampling/sampling_logp_difference/max"] for line in lines(out) if "reward" in line]
    assert len(differences) == 3
    assert max(differences) < 1e-5


def test_start_shows_batch_texts_and_mask(first_run):
    _, printed = first_run
    assert "16 completions per step = 4 questions x 4 generations" in printed
    assert "first teacher prompt: given (masked)" in printed
    assert "first student text, with the teacher's explanation as its thought: written by the model" in printed
    assert "eta" in printed


def test_checkpoints_and_final_model_load_with_tokenizer(first_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, _ = first_run
    for folder in (out / "checkpoint-2", out):
        assert AutoTokenizer.from_pretrained(folder).chat_template
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert "model.layers.0.self_attn.q_proj.weight" in model.state_dict()


def test_the_folder_s_readme_asks_the_teacher(warm, first_run):
    out, _ = first_run
    ask_by_its_card(out)
    assert "warmed up" in (warm / "teacher" / "README.md").read_text()
    assert "```" not in (warm / "student" / "README.md").read_text()  # it is asked nothing


def test_probes_are_scored_at_every_evaluation(first_run):
    out, _ = first_run
    evaluations = [line for line in lines(out) if "eval_reward" in line]
    assert len(evaluations) == 2  # before and after
    for line in evaluations:
        assert line["eval_seconds/probe"] > 0 and line["eval_memory/probe_peak"] > 0
        assert {f"eval_probe/{name}" for name in ("empty", "shuffled", "solution", "other")} <= set(line)
        # All eight questions are probed. The teacher's log-probabilities come from a forward pass there, from the
        # rollout in the evaluation itself.
        assert line["eval_probe/teacher"] == pytest.approx(line["eval_reward"], abs=1e-4)


def test_log_is_found_at_the_root(first_run):
    out, _ = first_run
    log = (out / "training.log").read_text()
    assert "batch: 16 completions" in log
    assert "step 3/3" in log
    assert (out / "runs").is_dir()  # tensorboard's files


def test_same_seed_repeats_the_run_and_another_does_not(warm, first_run, tmp_path):
    out, _ = first_run
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    rl(warm, "again", "seed=1", cwd=elsewhere)  # a relative path, from another folder
    again = elsewhere / "again"
    for step in (1, 2, 3):
        assert completions(again, step)["completion"].tolist() == completions(out, step)["completion"].tolist()
    rl(warm, tmp_path / "other", "seed=2", "report_before_after=false", "max_steps=1")
    assert completions(tmp_path / "other", 1)["completion"].tolist() != completions(out, 1)["completion"].tolist()


def test_reference_model_and_trl_options_work(warm, tmp_path):
    """KL to a reference that follows the teacher, several updates per rollout, the copying bridge, another loss."""
    rl(
        warm,
        tmp_path / "out",
        "beta=0.04",
        "sync_ref_model=true",
        "ref_model_sync_steps=1",
        "num_iterations=2",
        "loss_type=dr_grpo",
        "epsilon_high=0.28",
        "scale_rewards=batch",
        "weight_bridge=copy",
        "student_mode=streamed",
        "reference_mode=streamed",
        "logging_steps=1",
        "eval_strategy=steps",
        "eval_steps=2",
        "report_before_after=false",
        "max_completion_length=32",
    )
    steps = [line for line in lines(tmp_path / "out") if "reward" in line]
    assert abs(steps[0]["kl"]) < 1e-5  # at first the reference is the teacher
    assert max(line.get("kl", 0) for line in lines(tmp_path / "out")) > 1e-5  # and then the teacher leaves it
    assert "reference: streamed on cpu" in (tmp_path / "out" / "training.log").read_text()
    assert max(line["sampling/sampling_logp_difference/max"] for line in steps) < 1e-5
    assert 2 in [line["step"] for line in lines(tmp_path / "out") if "eval_reward" in line]


def rewards(out):
    return [line["reward"] for line in lines(out) if "reward" in line]


def test_recorded_rollouts_are_replayed_without_an_engine(warm, first_run, tmp_path):
    recorded, _ = first_run[0], rl(warm, tmp_path / "a", "seed=1", f"record_rollouts={tmp_path}/rollouts")
    printed = rl(warm, tmp_path / "b", "seed=1", f"replay_rollouts={tmp_path}/rollouts")
    assert "weight_bridge" not in printed
    assert rewards(tmp_path / "a") == rewards(recorded)
    assert rewards(tmp_path / "b") == pytest.approx(rewards(recorded), abs=1e-5)
    for step in (1, 2, 3):
        assert (
            completions(tmp_path / "b", step)["completion"].tolist()
            == completions(recorded, step)["completion"].tolist()
        )
    assert json.loads((tmp_path / "b" / "result.json").read_text()).keys() == {"before", "after"}
    once = ("report_before_after=false", "eval_strategy=steps", "eval_steps=2")
    with pytest.raises(AssertionError, match="eval-00000.parquet was sampled after optimizer step 0, and .* step 2"):
        rl(warm, tmp_path / "late", "seed=1", *once, f"replay_rollouts={tmp_path}/rollouts")
    with pytest.raises(AssertionError, match="sampled from other prompts than this run's"):
        rl(warm, tmp_path / "c", "seed=2", "report_before_after=false", f"replay_rollouts={tmp_path}/rollouts")


def test_scoring_ahead_changes_no_number(warm, first_run, tmp_path):
    rl(warm, tmp_path / "out", "seed=1", "overlap_scoring=true", "student_mode=cpu", "report_before_after=false")
    assert rewards(tmp_path / "out") == pytest.approx(rewards(first_run[0]), abs=1e-4)
    expected = completions(first_run[0], 3)
    assert completions(tmp_path / "out", 3)["completion"].tolist() == expected["completion"].tolist()
    assert set(expected["ended"]) <= {"eos", "closing_tag", "length"}
    cut = expected["ended"] == "length"
    assert lines(first_run[0])[-3]["step"] == 3
    clipped = next(
        line["completions/clipped_ratio"] for line in lines(first_run[0]) if line.get("step") == 3 and "reward" in line
    )
    assert cut.mean() == pytest.approx(clipped)


def test_run_without_vllm(warm, tmp_path):
    rl(warm, tmp_path / "out", "use_vllm=false", "padding_in_kl=true", "seed=1", "max_steps=2")
    found = lines(tmp_path / "out")
    assert len(rewards(tmp_path / "out")) == 2
    assert not any(name.startswith(("sampling/", "sentinel/")) for line in found for name in line)
    for line in found:
        if "eval_reward" in line:  # the rollout's log-probabilities are those of a forward pass
            assert line["eval_probe/teacher"] == pytest.approx(line["eval_reward"], abs=1e-4)
    rl(warm, tmp_path / "again", "use_vllm=false", "padding_in_kl=true", "seed=1", "max_steps=2")
    assert rewards(tmp_path / "again") == rewards(tmp_path / "out")


def test_adapters_are_trained_against_the_model_without_them_and_evaluated(warm, tmp_path):
    from peft import AutoPeftModelForCausalLM

    data = f"dataset_id_or_path={REPO / 'data/distances/test.jsonl'}", "eval_dataset_split=null", "eval_size=6"
    printed = rl(warm, tmp_path / "out", "use_peft=true", "beta=0.04", "learning_rate=1e-2", *data)
    assert "weight_bridge=lora" in printed
    assert "6 questions of the training data are held out, 506 rows are left" in printed
    assert "6 held-out questions" in printed
    evaluations = [line for line in lines(tmp_path / "out") if "eval_reward" in line]
    assert len(evaluations) == 2
    for line in evaluations:  # the adapter takes part
        assert line["eval_probe/teacher"] == pytest.approx(line["eval_reward"], abs=1e-4)
    assert evaluations[0]["eval_probe/solution"] != pytest.approx(evaluations[1]["eval_probe/solution"], abs=1e-4)
    steps = [line for line in lines(tmp_path / "out") if "reward" in line]
    assert abs(steps[0]["kl"]) < 1e-5
    assert steps[-1]["kl"] > 1e-5
    assert max(line["sampling/sampling_logp_difference/max"] for line in steps) < 1e-5
    ask_by_its_card(tmp_path / "out")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.fixture(scope="module")
def warm_adapter(warm):
    """A teacher from the student, as an adapter."""
    train(
        "teacher_sft_tiny",
        f"model_name_or_path={warm}/student",
        f"output_dir={warm}/adapter",
        "use_peft=true",
        "lora_r=4",
        *("max_steps=3", "max_samples=200", "train_batch_size=8", "per_device_train_batch_size=4"),
    )
    return warm / "adapter"


def test_warm_up_s_adapter_is_trained_on_from_where_it_is(warm, warm_adapter, tmp_path):
    base = (warm / "student" / "model.safetensors").read_bytes()
    printed = rl(
        warm,
        tmp_path / "out",
        *(f"model_name_or_path={warm_adapter}", "use_peft=true", "beta=0.04", "sync_ref_model=false"),
        *("learning_rate=1e-2", "report_before_after=false", "gradient_checkpointing=true"),
    )
    assert f"its LoRA adapter is trained on, on its base {warm}/student; KL reference: that adapter" in printed
    steps = [line for line in lines(tmp_path / "out") if "reward" in line]
    assert abs(steps[0]["kl"]) < 1e-5 < steps[-1]["kl"]
    assert max(line["sampling/sampling_logp_difference/max"] for line in steps) < 1e-5
    before, after = (load_file(f / "adapter_model.safetensors") for f in (warm_adapter, tmp_path / "out"))
    assert set(before) == set(after) and all(not before[name].equal(after[name]) for name in before)
    assert (warm / "student" / "model.safetensors").read_bytes() == base
    out = tmp_path / "merged"
    train("stage=merge", f"model_name_or_path={tmp_path}/out", f"output_dir={out}")
    assert not list(out.glob("adapter*")) and (out / "model.safetensors").is_file()


def test_adapters_of_teacher_and_student_are_merged_where_every_weight_is_trained(warm, warm_adapter, tmp_path):
    printed = rl(
        warm,
        tmp_path / "out",
        *(f"model_name_or_path={warm_adapter}", f"student_model={warm_adapter}", "student_mode=streamed"),
        *("beta=0.04", "sync_ref_model=false", "reference_mode=streamed", "learning_rate=1e-3"),
        "report_before_after=false",
    )
    assert "every weight of that is trained; KL reference: the merged model" in printed
    assert "merged_start" in printed and "merged_student" in printed and " MiB: " in printed
    steps = [line for line in lines(tmp_path / "out") if "reward" in line]
    assert abs(steps[0]["kl"]) < 1e-5 < steps[-1]["kl"]
    assert max(line["sampling/sampling_logp_difference/max"] for line in steps) < 1e-5
    start, end = (load_file(f / "model.safetensors") for f in (tmp_path / "out" / "merged_start", tmp_path / "out"))
    assert set(start) == set(end) and not all(start[name].equal(end[name]) for name in start)


def test_wandb_without_an_account_logs_offline(warm, tmp_path):
    hidden = ("WANDB_API_KEY", "WANDB_MODE", "NETRC")
    command_env = {name: value for name, value in os.environ.items() if name not in hidden}
    command_env |= {"WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}  # no account to be found
    done = subprocess.run(
        [
            sys.executable,
            str(REPO / "train.py"),
            "student_sft_tiny",
            f"model_name_or_path={warm}/student",
            "model_init=null",
            "max_steps=1",
            "max_samples=64",
            "report_to=wandb",
            f"output_dir={tmp_path}/out",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=command_env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wandb: not logged in, so it logs offline" in done.stdout
    assert list(tmp_path.glob("wandb/offline-run-*"))


def score(warm, out, file, *overrides):
    train(
        "stage=score",
        f"dataset_id_or_path={file}",
        f"model_name_or_path={warm}/teacher",
        f"student_model={warm}/student",
        f"output_dir={out}",
        "teacher_system_prompt='Explain how to find the solution.'",
        "student_system_prompt='Think, then solve.'",
        *overrides,
    )
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def test_score_has_every_part_and_obeys_the_reward_options(warm, tmp_path):
    rows = [
        {"question": "What is left of 7~3~9?", "solution": "5", "explanation": "7~3=4\n4~9=5"},
        {"question": "What is left of 7~3~9?", "solution": "5", "explanation": "", "closed": False},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    default = score(warm, tmp_path / "a", file)
    for line in default:
        total = line["solution_log_prob_reward"] + line["kl_reward"] + line["match_reward"]
        assert line["reward"] == pytest.approx(total)
        assert {"answer_log_prob_mean", "answer_log_prob_min", "reasoning_kl_mean", "reasoning_kl_max"} <= set(line)
    assert [line["match_reward"] for line in default] == [0.0, -1.0]
    assert default[1]["kl_reward"] != 0.0  # nothing was written, but the padding stands between the tags
    changed = score(
        warm, tmp_path / "b", file, "answer_log_prob_coeff=[2,0]", "kl_penalty_reward_coeff=0", "reduction_kl_fn=mean"
    )
    assert changed[0]["reward"] == pytest.approx(2 * default[0]["answer_log_prob_mean"], abs=1e-5)
