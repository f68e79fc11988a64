"""The files of a run and what is shown of it. Run: ./run_tests.sh tests/test_outputs.py"""

import json
import logging
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPO

from trainers.errors import ConfigError, Fault
from trainers.options import options_class
from trainers.watch import outputs
from trainers.watch.outputs import MetricsWriter, Progress, make_output_dir, progress_line, save_config
from trainers.watch.phases import PhaseTimer


def test_default_folder_has_the_run_and_the_time_and_latest_leads_there(tmp_path):
    first = make_output_dir(None, "some_run", root=tmp_path)
    assert first.parent == tmp_path / "results" / "some_run"
    assert (first.parent / "latest").resolve() == first
    second = make_output_dir(None, "some_run", root=tmp_path)  # in the same second
    assert second != first
    assert (first.parent / "latest").resolve() == second


def test_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"):
        make_output_dir(str(tmp_path / "file" / "out"), "run")
    for among_ours in ("", str(tmp_path)):
        with pytest.raises(ConfigError, match="among the project's own"):
            make_output_dir(among_ours, "run", root=tmp_path)


def test_config_separates_what_was_set_and_hides_secrets(tmp_path):
    resolved = {"seed": 3, "hub_token": "hf_secret", "eos_token": "<|im_end|>", "max_steps": 7}
    save_config(tmp_path, {"max_steps": 7, "hub_token": "hf_secret"}, resolved)
    text = (tmp_path / "config.yaml").read_text()
    assert yaml.safe_load(text) == {"seed": 3, "hub_token": "***", "eos_token": "<|im_end|>", "max_steps": 7}
    assert text.index("max_steps") < text.index("# Defaults") < text.index("seed")


def test_secrets_are_hidden_at_any_depth_and_what_sounds_like_them_is_not(tmp_path):
    own = {"_target_": "judge.score", "api_key": "sk-1", "headers": [{"Authorization": "Bearer sk-2"}], "max_tokens": 9}
    own |= {"per_token": -0.01, "sep_token": "<s>"}
    resolved = {
        "reward_funcs": ["teacher_logprob_kl", own],
        "vllm_kwargs": {"hf_token": "hf_3", "deep": {"apiKey": "sk-4", "X-API-KEY": "sk-5", "password": 123456}},
        "secret": {"user": "sk-6", "keys": ["sk-7"]},
        "max_completion_length": 64,
        "generation_kwargs": {"stop_tokens": ["a"], "token": None, "use_key": True},
    }
    for composed in ({"max_completion_length": 64}, dict.fromkeys(list(resolved)[:3])):
        save_config(tmp_path, composed, resolved)
        text = (tmp_path / "config.yaml").read_text()
        assert not re.search("sk-|hf_3|123456", text)
        read = yaml.safe_load(text)
        assert read["reward_funcs"][1]["_target_"] == "judge.score" and read["reward_funcs"][1]["max_tokens"] == 9
        assert (read["reward_funcs"][1]["per_token"], read["reward_funcs"][1]["sep_token"]) == (-0.01, "<s>")
        assert read["vllm_kwargs"]["hf_token"] == read["reward_funcs"][1]["api_key"] == "***"
        assert read["max_completion_length"] == 64 and read["generation_kwargs"] == resolved["generation_kwargs"]
    assert resolved["vllm_kwargs"]["hf_token"] == "hf_3"  # the run's own stays
    assert "sk-1" not in str(Fault("reward_funcs", resolved["reward_funcs"], "cause", "remedy"))
    assert "hf_3" not in str(Fault("hf_token", "hf_3", "unknown", "remedy"))


def test_wandb_keeps_no_command_line_with_a_secret(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["train.py", "++vllm_kwargs={hf_token: hf_3}"]
    monkeypatch.setattr(sys, "argv", list(words))
    outputs.prepare_wandb(options_class("rl")(report_to="wandb"))
    outputs.prepare_wandb(options_class("rl")(report_to="none", vllm_kwargs={"hf_token": "hf_3"}))
    assert sys.argv == words
    outputs.prepare_wandb(options_class("rl")(report_to="wandb", vllm_kwargs={"hf_token": "hf_3"}))
    assert sys.argv == ["train.py"]


def test_metrics_of_an_earlier_run_in_the_folder_are_kept_apart(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    writer = MetricsWriter(tmp_path, PhaseTimer())
    writer.on_log(None, SimpleNamespace(is_world_process_zero=True, global_step=1), None, logs={"reward": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "reward": 0.5}
    (kept,) = tmp_path.glob("metrics-*.jsonl")
    assert json.loads(kept.read_text()) == {"step": 9}


def test_progress_line_has_the_headline_and_the_time_left():
    state = SimpleNamespace(global_step=15, max_steps=60)
    line = progress_line(state, {"reward": -0.5, "loss": 1e-9, "student_accuracy": 0.75}, seconds_per_step=2.0)
    assert (
        line == "step 15/60  reward -0.5  student accuracy 0.75  eta 1:30"
    )  # 45 steps of 2 s; GRPO's loss says nothing
    assert "loss 0.2" in progress_line(state, {"loss": 0.2}, 0.0)


def run_progress(is_terminal):
    progress = Progress(is_terminal)
    state = SimpleNamespace(global_step=0, max_steps=2, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    state.global_step = 1
    progress.on_step_end(None, state, None)
    progress.on_log(None, state, None, logs={"reward": -0.5})
    progress.on_train_end(None, state, None)


def test_a_terminal_shows_a_bar_and_the_log_still_has_the_line(capfd, caplog):
    caplog.set_level(logging.INFO)
    run_progress(is_terminal=True)
    shown = capfd.readouterr()
    assert "step 1/2  reward -0.5" in shown.out + shown.err
    assert "1/2 [" in shown.err  # the bar, with its own time left
    (record,) = [r for r in caplog.records if "step 1/2" in r.message]
    assert not outputs._Quiet().filter(record)  # not shown twice


def test_without_a_terminal_there_are_plain_lines(capfd, caplog):
    caplog.set_level(logging.INFO)
    run_progress(is_terminal=False)
    assert [r.message for r in caplog.records] == ["step 1/2  reward -0.5  eta 0:00"]
    assert "[" not in capfd.readouterr().err


def test_an_evaluation_is_a_line_of_its_own(caplog):
    caplog.set_level(logging.INFO)
    state = SimpleNamespace(global_step=20, max_steps=60, is_world_process_zero=True)
    progress = Progress(is_terminal=False)
    progress.on_log(None, state, None, logs={"eval_reward": -0.25, "eval_loss": 1e-9, "eval_kl_reward": 0.5})
    progress.on_log(None, state, None, logs={"train_runtime": 3.0})
    assert [r.message for r in caplog.records] == ["held out, after step 20:  reward -0.25  -r_KL 0.5"]


def test_what_stops_a_run_is_in_its_log(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), outputs.ending_in_the_log(tmp_path):
        1 / 0  # noqa: B018
    with pytest.raises(ConfigError), outputs.ending_in_the_log(tmp_path):
        raise ConfigError(Fault("beta", 1, "a cause", "a remedy"))
    assert all(word in caplog.text for word in ("ZeroDivisionError", "a cause", "a remedy"))
    assert all(record.only_file for record in caplog.records)  # the program's end shows it


def test_an_interrupt_names_the_last_whole_checkpoint(tmp_path, caplog):
    def interrupt():
        caplog.clear()
        with pytest.raises(SystemExit) as ended, outputs.ending_in_the_log(tmp_path):
            raise KeyboardInterrupt
        assert ended.value.code == 130
        return caplog.text

    assert "no checkpoint was written" in interrupt()
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    assert f"model_name_or_path={tmp_path}/checkpoint-10" in interrupt()


def test_libraries_are_quiet_and_we_are_not():
    def record(name, level):
        return logging.LogRecord(name, level, "f", 1, "m", (), None)

    quiet = outputs._Quiet()
    assert quiet.filter(record("trainers.rl", logging.INFO))
    assert not quiet.filter(record("transformers.trainer", logging.INFO))
    assert quiet.filter(record("transformers.trainer", logging.WARNING))
    assert not quiet.filter(record("vllm.config", logging.WARNING))
    assert quiet.filter(record("vllm.config", logging.ERROR))
    assert outputs._Quiet(everything=True).filter(record("vllm.config", logging.DEBUG))


def test_the_link_at_the_root_leads_to_the_log_of_the_last_run(tmp_path):
    code = "import sys; from pathlib import Path; from trainers.watch.outputs import start_logging\n"
    code += "root = Path(sys.argv[1])\n"
    code += "for name in ('first', 'last'): (root / name).mkdir(); start_logging(root / name, False, root=root)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=REPO)
    link = tmp_path / "logs/training.log"
    assert link.is_symlink() and link.resolve() == (tmp_path / "last/training.log").resolve()


def test_a_folder_that_another_run_is_writing_to_is_refused_until_that_has_ended(tmp_path):
    code = "import sys; from pathlib import Path; from trainers.watch.outputs import start_logging\n"
    code += f"start_logging(Path({str(tmp_path)!r}), False, root=Path({str(tmp_path)!r}))\n"
    alone = [sys.executable, "-c", code]
    other = subprocess.Popen(
        [*alone[:2], code + "print('ready', flush=True); sys.stdin.read()"],
        cwd=REPO,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == "ready\n"
    refused = subprocess.run(alone, cwd=REPO, capture_output=True, text=True)
    assert refused.returncode == 1
    assert f"output_dir={str(tmp_path)!r}: another run is writing there" in refused.stderr
    other.kill()  # without a chance to clean up
    other.wait()
    assert subprocess.run(alone, cwd=REPO).returncode == 0


def test_a_run_spoils_no_model_that_lies_in_its_folder(tmp_path, model_dir):
    from trainers.weights.adapter_files import output_faults

    folder = tmp_path / "m"
    shutil.copytree(model_dir, folder)

    def faults(**changes):
        chosen = {"output_dir": str(folder), "model_name_or_path": None, "student_model": None, "use_peft": False}
        chosen["save_strategy"] = "steps"
        return [fault.cause for fault in output_faults(SimpleNamespace(**chosen | changes))]

    assert faults() == []  # a later run of the same kind
    assert "model_name_or_path lies there" in faults(model_name_or_path=str(folder))[0]
    assert "student_model lies there" in faults(student_model=str(folder) + "/")[0]
    assert "a whole model of another run" in faults(use_peft=True)[0]
    (folder / "checkpoint-6").mkdir()
    assert "checkpoint-6 of an earlier run" in faults()[0] and faults(save_strategy="no") == []
    (folder / "checkpoint-6").rmdir()
    (folder / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter of another run" in faults()[0]
    (tmp_path / "new").mkdir()
    assert faults(output_dir=str(tmp_path / "new"), use_peft=True) == []
