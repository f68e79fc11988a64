"""Models named `run:NAME`: the result of another run configuration. What that is, and where it is kept."""

import hashlib
import importlib.metadata
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from trainers.checks import load_options
from trainers.config import REPO, compose_run, named_run
from trainers.errors import ConfigError, Fault
from trainers.options import CommonOptions
from trainers.weights.adapter_files import is_adapter

# Options of the asking run that its warm-ups follow.
INHERITED = (
    "seed",
    "device",
    "precision",
    "tag_format",
    "teacher_system_prompt",
    "student_system_prompt",
    "chat_template",
    "chat_template_kwargs",
    "eos_token",
    "trust_remote_code",
    "attn_implementation",
    "report_to",
)
STUDENT = {"student_chat_template": "chat_template", "student_chat_template_kwargs": "chat_template_kwargs"}
# And where both train on the same data: what the run evaluates, its warm-ups are not to have seen.
HELD_OUT = ("eval_dataset_split", "eval_size")
FOLLOWED = (*INHERITED, *HELD_OUT, "dataset_id_or_path")
# What the result depends on beside the configuration.
CODE = (
    "data/formats.py",
    "data/offsets.py",
    "data/render.py",
    "data/load.py",
    "data/files.py",
    "data/turns.py",
    "trainers/sft.py",
    "trainers/texts.py",
    "trainers/models.py",
    "trainers/master_adamw.py",
    "trainers/optimizers.py",
    "trainers/options.py",
    "trainers/settings/evaluation.py",
    "trainers/settings/optim_specs.py",
    "trainers/settings/trl_config.py",
    "trainers/attention.py",
    "trainers/weights/adapter_files.py",
    "trainers/weights/adapters.py",
    "trainers/merge.py",
    "trainers/weights/starts.py",
)
LARGE = 2**26  # bytes of a folder that are not read for this
PACKAGES = ("torch", "transformers", "trl", "tokenizers", "peft")


def warmup_options(name: str, options: CommonOptions, needs_device: bool = True) -> tuple[dict[str, Any], Any]:
    """Compose and check the warm-up `run:NAME` of a run.

    Args:
        needs_device: See `checks.load_options`.

    Raises:
        ConfigError: If it is not valid, or is no warm-up.
    """
    keys = (*FOLLOWED, *STUDENT)
    composed = _composed(name, {key: getattr(options, key) for key in keys if hasattr(options, key)})
    checked = load_options(composed, repo=REPO, needs_device=needs_device)
    if checked.stage != "sft":
        cause = f"cfgs/run_cfg/{name}.yaml has stage={checked.stage}"
        raise ConfigError(Fault(f"run:{name}", ..., cause, "name a run with stage=sft"))
    asked = {"ignore_memory_plan": options.ignore_memory_plan}  # the result does not depend on it
    return composed, checked.model_copy(update=asked)


def _composed(name: str, asking: dict[str, Any]) -> dict[str, Any]:
    """What a warm-up is told: its own configuration, and what it follows of the asking run."""
    composed = compose_run(name)
    if asking.get("precision") == "fp16" and not composed.get("use_peft"):
        asking = asking | {"precision": "auto"}  # adapters alone can be trained in fp16
    if composed.get("sft_role") == "student" and asking.keys() >= STUDENT.keys():  # the texts it will read in RL
        asking = asking | {"eos_token": None} | {theirs: asking[ours] for ours, theirs in STUDENT.items()}
    followed = {key: asking[key] for key in INHERITED if asking.get(key) is not None}
    if asking.get("dataset_id_or_path") == composed.get("dataset_id_or_path"):
        followed |= {key: asking[key] for key in HELD_OUT if key in asking}
        if followed.get("eval_dataset_split"):  # a run that names a file may have both, which is a fault without one
            followed["eval_size"] = None
    return composed | followed


def warmup_folder(root: Path = REPO) -> Path:
    """Where the results of warm-ups are kept."""
    return root / "results" / "run_models"


@cache
def _code() -> bytes:
    """The code that the result depends on, as it was when this process first asked."""
    return b"".join((REPO / file).read_bytes() for file in CODE)


def cached_path(name: str, composed: dict[str, Any], root: Path = REPO) -> Path:
    """Where the result of a warm-up is kept: a folder named by everything it depends on."""
    counted = {key: value for key, value in composed.items() if key != "report_to"}
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode())
    for package in PACKAGES:
        digest.update(f"{package}=={importlib.metadata.version(package)}".encode())
    digest.update(_code())
    for key in ("dataset_id_or_path", "eval_dataset_id_or_path", "chat_template", "model_name_or_path"):
        digest.update(_contents(composed.get(key)))
    if start := named_run(composed.get("model_name_or_path")):  # the warm-up it starts from
        parent = _composed(start, {key: composed[key] for key in FOLLOWED if key in composed})
        digest.update(cached_path(start, parent, root).name.encode())
    return warmup_folder(root) / f"{name}-{digest.hexdigest()[:12]}"


def _contents(path: str | None) -> bytes:
    """What a file holds, or the names and texts of a folder's files (of large ones sizes and times); nothing of what is
    no local path."""
    found = Path(path or "").expanduser()
    if not path or len(path) > 1000 or not found.exists():  # a template may be written out in place of its file
        return b""
    if found.is_file():
        return found.read_bytes()
    files = sorted(file for file in found.rglob("*") if file.is_file())
    stats = [(str(file.relative_to(found)), file.stat()) for file in files]
    if sum(stat.st_size for _, stat in stats) <= LARGE:
        return b"".join(name.encode() + file.read_bytes() for (name, _), file in zip(stats, files, strict=True))
    return repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]).encode()


class Waiting(NamedTuple):
    """A warm-up that is still to be trained, its options, and the folder that it will be kept in."""

    name: str
    options: CommonOptions
    folder: Path


def waiting(path: str | None, options: CommonOptions, root: Path = REPO) -> list[Waiting]:
    """The warm-ups that a model takes before it is there, the first to be trained first."""
    name = named_run(path)
    if name is None:
        return []
    composed, checked = warmup_options(name, options, needs_device=False)
    folder = cached_path(name, composed, root)
    if is_kept(folder):
        return []
    return [*waiting(checked.model_name_or_path, checked, root), Waiting(name, checked, folder)]


def is_kept(folder: Path) -> bool:
    """Whether a warm-up's result is there, whole."""
    return (folder / "config.json").is_file() or is_adapter(str(folder))
