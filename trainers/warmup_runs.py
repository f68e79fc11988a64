"""Models named `run:NAME` are trained when they are first needed."""

import logging
import os
import shutil
import sys
from pathlib import Path

from accelerate.utils.memory import clear_device_cache

from trainers.config import REPO, named_run
from trainers.errors import OutOfMemory
from trainers.options import CommonOptions
from trainers.plan.planning import planned
from trainers.sft import run_sft
from trainers.warmup import cached_path, is_kept, warmup_options

logger = logging.getLogger(__name__)


def ensure_model(path: str | None, options: CommonOptions, root: Path = REPO) -> str | None:
    """Return the folder of a model: `run:NAME` is trained where it is not kept yet; anything else stays as it is."""
    name = named_run(path)
    if name is None:
        return path
    composed, checked = warmup_options(name, options)
    folder = cached_path(name, composed, root)
    if is_kept(folder):
        logger.info("%s: kept from an earlier run in %s", path, folder)
        return str(folder)
    start = ensure_model(checked.model_name_or_path, checked, root)
    logger.info("%s: training it now, later runs find it in %s", path, folder)
    # A folder of its own until it is whole: neither an interrupted warm-up nor one beside this can be taken for it.
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    plan = planned(checked.model_copy(update={"output_dir": str(partial)}))  # its disk counts
    partial.mkdir(parents=True, exist_ok=True)
    try:
        run_sft(plan.options, partial, start, plan=plan)
    except OutOfMemory as error:
        alone = f"train it by itself with these, ./launch_mono.sh {name}.yaml ..., and name its folder"
        raise OutOfMemory(f"{path}: {error}\n  {alone}") from error
    _end_reports()
    clear_device_cache(garbage_collection=True)  # a trainer holds itself: what comes next is planned with what is free
    if folder.exists():  # another run was first; both are alike
        shutil.rmtree(partial)
    else:
        card = partial / "README.md"
        card.write_text(card.read_text(encoding="utf-8").replace(str(partial), str(folder)), encoding="utf-8")
        partial.rename(folder)
    return str(folder)


def _end_reports() -> None:
    """What comes next is a run of its own for wandb, which would go on with this one."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
