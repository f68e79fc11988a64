"""What a run leaves on which disk: downloads, the warm-ups it trains first, and its own files."""

from pathlib import Path
from typing import NamedTuple

from trainers.config import named_run
from trainers.errors import Fault
from trainers.options import CommonOptions
from trainers.plan.machine import existing, free_disk
from trainers.plan.model_shapes import ModelShape
from trainers.plan.workload import GIB, resting_bytes
from trainers.settings.reward_specs import model_keys
from trainers.weights.adapter_files import base_of, looks_local
from trainers.weights.hub import is_downloaded

DOWNLOADED_ITEMSIZE = 2  # bytes of a weight on the hub, nearly always


class Written(NamedTuple):
    """Bytes of one kind, of those that go to the same disk before it, and how many that has free then."""

    kind: str
    folder: Path
    size: int
    before: int
    free: int

    @property
    def faults(self) -> list[Fault]:
        if self.size <= self.free:
            return []
        cause = {
            "downloads": f"models that are not here yet take about {{}} GiB in {self.folder}",
            "warm-ups": f"the models that are trained first take up to {{}} GiB in {self.folder}",
            "disk": "its checkpoints take up to {} GiB",
        }[self.kind]
        remedy = {
            "downloads": "HF_HOME=<a larger disk>, or name folders that hold them",
            "warm-ups": f"make room in {self.folder}",
            "disk": "output_dir=<a larger disk>, save_only_model=true, save_total_limit=1 or save_strategy=no",
        }[self.kind]
        return [Fault(self.kind, ..., f"{cause.format(f'{self.size / GIB:.1f}')} and {self._left()}", remedy)]

    def __str__(self) -> str:
        where = "" if self.kind == "disk" else f" in {self.folder}"
        return f"{self.kind} {self.size / GIB:.2f} of {max(0, self.free) / GIB:.2f} GiB free{where}"

    def _left(self) -> str:
        free = f"{max(0, self.free) / GIB:.1f} GiB are free"
        return f"{free} beside {self.before / GIB:.1f} of what comes before" if self.before else free


def in_turn(sizes: list[tuple[str, Path, int]], own: Path, own_free: int) -> list[Written]:
    """What is left for each kind, folder and size by those before it on the same disk.

    Args:
        own: Where the run writes; its disk has `own_free` bytes free.
    """
    taken: dict[int, int] = {}
    found = []
    for kind, folder, size in sizes:
        disk = existing(folder).stat().st_dev
        free = own_free if disk == existing(own).stat().st_dev else free_disk(folder)
        before = taken.get(disk, 0)
        found.append(Written(kind, folder, size, before, free - before))
        taken[disk] = before + size
    return found


def download_folder() -> Path:
    """Where the hub's library keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def downloads(options: CommonOptions, shapes: tuple[ModelShape | None, ...]) -> dict[str, int]:
    """Bytes of the models, by hub id, that a run downloads before it starts.

    Args:
        shapes: Of the models that it names, in the order of `model_keys`.
    """
    found = {}
    for key, shape in zip(model_keys(options), shapes, strict=False):
        path = getattr(options, key)
        base = None if path is None or named_run(path) else base_of(path, key)
        if base is not None and not looks_local(base) and not is_downloaded(base):
            found[base] = resting_bytes(shape, DOWNLOADED_ITEMSIZE)
    return found
