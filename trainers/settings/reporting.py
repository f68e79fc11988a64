"""Where a run reports its metrics to (`report_to`), and what that needs; imports neither torch nor transformers."""

import importlib.util
import netrc
import os
import sys
from contextlib import suppress

from trainers.errors import Fault
from trainers.options import TrainOptions

# Where transformers reports to, and the package it needs for that; None: none.
REPORTERS = {
    "azure_ml": "azureml",
    "clearml": "clearml",
    "codecarbon": "codecarbon",
    "comet_ml": "comet_ml",
    "dagshub": "dagshub",
    "dvclive": "dvclive",
    "flyte": "flytekit",
    "kubeflow": None,
    "mlflow": "mlflow",
    "neptune": "neptune",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def reporters(options: TrainOptions) -> list[str]:
    """Where a run reports to, by transformers' names; nothing for stages that do not train."""
    asked = getattr(options, "report_to", None)
    named = asked if isinstance(asked, list) else [asked]
    if named in ([None], ["none"]):
        return []
    return [name for name in REPORTERS if not _lacks(name)] if named == ["all"] else named


def report_faults(options: TrainOptions) -> list[Fault]:
    """Places to report to that there are not, or whose package is not installed."""
    faults = []
    for name in reporters(options):
        if name not in REPORTERS:
            remedy = f"none, all, or a list of: {', '.join(REPORTERS)}"
            faults.append(Fault("report_to", name, "nothing is known by that name", remedy))
        elif package := _lacks(name):
            remedy = f"{sys.executable} -m pip install {package}, or report_to=tensorboard"
            faults.append(Fault("report_to", name, f"it needs the package {package}, which is not installed", remedy))
    return faults


def _lacks(reporter: str) -> str | None:
    package = REPORTERS[reporter]
    return package if package is not None and importlib.util.find_spec(package) is None else None


def hub_faults(options: TrainOptions) -> list[Fault]:
    """What is to be sent to the Hugging Face hub where that cannot be."""
    asked = {
        "push_to_hub": options.push_to_hub,
        "log_completions_hub_repo": getattr(options, "log_completions_hub_repo", None),
    }
    faults = []
    for key, value in asked.items():
        if value and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            faults.append(Fault(key, value, "HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, or leave {key} out"))
        elif value and _hub_token() is None and not (key == "push_to_hub" and options.hub_token):
            faults.append(Fault(key, value, "no account of the hub is known", f"hf auth login, or leave {key} out"))
    return faults


def _hub_token() -> str | None:
    from huggingface_hub import get_token  # some tenths of a second

    return get_token()


def wandb_is_offline() -> bool:
    """Whether wandb has to log offline, as no account is known and nothing else was asked for."""
    if "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ:
        return False
    with suppress(OSError, netrc.NetrcParseError):  # no such file, or not ours to judge
        return not any("wandb" in host for host in netrc.netrc().hosts)
    return True
