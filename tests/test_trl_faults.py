"""What TRL, transformers or Hydra would refuse only once a model is loaded, or with a traceback, is told before."""

import subprocess
import sys

import pytest
from conftest import REPO

from trainers.checks import load_options
from trainers.config import _resolved, compose_run, hydra_arguments
from trainers.errors import ConfigError
from trainers.options import options_class
from trainers.settings import reporting
from trainers.settings.reporting import REPORTERS, reporters
from trainers.settings.trl_faults import WITHOUT_WARMUP
from trainers.settings.trl_options import enum_values


def refused(run, *overrides):
    with pytest.raises(ConfigError) as error:
        load_options(compose_run(run, list(overrides)), repo=REPO)
    return str(error.value)


RL, SFT = "teacher_rlt_tiny", "teacher_sft_tiny"


@pytest.mark.parametrize(
    ("run", "override", "told"),
    [
        (RL, "report_to=mlflow", "needs the package mlflow"),
        (SFT, "report_to=[tensorboard,nosuch]", "report_to='nosuch': nothing is known by that name"),
        (RL, "lr_scheduler_type=warmup_stable_decay", "it needs num_decay_steps"),
        (SFT, "lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr: 1e-7}"),
        (RL, "gradient_checkpointing_kwargs={selective: true}", "selective=True': there is no such argument"),
        (SFT, "gradient_checkpointing_kwargs={selective: true}", "gradient_checkpointing is off"),
        (RL, "accelerator_config={dispatch_batches: true}", "RL's batches are texts"),
        (RL, "temperature=2.5", "vLLM samples at temperatures from 0.01 to 2"),
        (SFT, "padding_free=true", "not held to max_length"),
        (SFT, "packing_strategy=other", "'bfd', 'bfd_split' or 'wrapped'"),
        (SFT, "loss_type=grpo", "'nll' or 'dft'"),
        (RL, "loss_type=dft", "'grpo', 'dr_grpo'"),
        (SFT, "pad_token=x", "chosen by itself"),
        (RL, "use_liger_kernel=true", "TRL drops it"),
        (RL, "adam_beta1=2", "less than 1"),
        (RL, "log_level=loud", "'detail', 'debug'"),
        (SFT, "neftune_noise_alpha=-1", "greater than 0"),
        (RL, "warmup_steps=0.1", "lr_scheduler_type=constant_with_warmup, or warmup_steps=0"),
        (SFT, "lr_scheduler_type=constant", "lr_scheduler_type=constant_with_warmup, or warmup_steps=0"),
        (RL, "eval_steps=25", "eval_strategy=steps, or leave it out"),
        (SFT, "eval_steps=25 eval_strategy=epoch", "eval_strategy=epoch does not read it"),
        (SFT, "save_steps=25", "save_strategy=steps, or leave it out"),
    ],
)
def test_what_would_be_told_late_is_told_at_once(run, override, told):
    extra = ["gradient_checkpointing=false"] if run == SFT and "selective" in override else []
    message = refused(run, *([override] if "{" in override else override.split()), *extra)
    assert message.startswith("1 problem") and told in message


def test_packing_needs_a_length():
    assert "packing fills rows of that length" in refused(SFT, "packing=true", "max_length=null")


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss_type=dft"],
        ["packing=true", "padding_free=true"],
        ["lr_scheduler_type=cosine_with_min_lr", "lr_scheduler_kwargs={min_lr_rate: 0.1}"],
        ["gradient_checkpointing=true", "gradient_checkpointing_kwargs={selective: true}"],
        ["report_to=all"],
        ["report_to=null"],
        ["lr_scheduler_type=constant_with_warmup"],
        ["lr_scheduler_type=constant", "warmup_steps=0"],
        ["save_strategy=steps", "save_steps=25", "eval_strategy=steps", "eval_steps=25"],
    ],
)
def test_what_goes_is_taken(overrides):
    load_options(compose_run(SFT, overrides), repo=REPO)


def test_schedules_without_a_warm_up_are_those_that_transformers_takes_none_for():
    """`get_scheduler` makes these before it looks whether it was given steps of warm-up, and all others after."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    names, without = enum_values("trainer_utils.py", "SchedulerType"), []
    for name in names:
        try:
            get_scheduler(name, optimizer, num_warmup_steps=None, num_training_steps=4)
            without.append(name)
        except ValueError as error:
            assert "requires `num_warmup_steps`" in str(error)
    assert sorted(without) == sorted(WITHOUT_WARMUP)


def test_a_preset_of_rl_may_be_told_to_save_otherwise():
    load_options(compose_run(RL, ["save_strategy=no"]), repo=REPO)


def test_names_of_reporters_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(REPORTERS) == set(INTEGRATION_TO_CALLBACK)
    options = options_class("sft")
    assert reporters(options(report_to=None)) == reporters(options(report_to="none")) == []
    assert reporters(options(report_to="wandb")) == ["wandb"]
    assert {"tensorboard", "wandb"} <= set(reporters(options(report_to="all"))) and "mlflow" not in reporters(
        options(report_to="all")
    )


def test_the_hub_is_not_sent_to_without_an_account(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in refused(RL, "push_to_hub=true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(reporting, "_hub_token", lambda: None)
    assert "no account of the hub is known" in refused(RL, "log_completions_hub_repo=me/texts")
    load_options(compose_run(RL, ["push_to_hub=true", "hub_token=hf_x"]), repo=REPO)
    monkeypatch.setattr(reporting, "_hub_token", lambda: "token")
    load_options(compose_run(RL, ["push_to_hub=true"]), repo=REPO)


def test_what_hydra_cannot_read_is_told_with_its_quotes():
    with pytest.raises(ConfigError, match="no value in Hydra's grammar") as error:
        hydra_arguments(["eos_token=<|im_end|>", "reward_funcs=[format"])
    assert """'eos_token="<|im_end|>"'""" in str(error.value) and str(error.value).startswith("2 problems")
    assert compose_run(RL, ['eos_token="<|im_end|>"'])["eos_token"] == "<|im_end|>"


def test_what_leads_nowhere_is_told():
    from omegaconf import OmegaConf

    with pytest.raises(ConfigError, match="output_dir: Interpolation key 'foo' not found"):
        _resolved(OmegaConf.create({"output_dir": "${foo}"}))
    done = subprocess.run([sys.executable, REPO / "train.py", "output_dir=${foo}"], capture_output=True, text=True)
    assert done.returncode == 1 and "1 problem" in done.stderr and "Traceback" not in done.stderr
