"""The card, the memory and the disk of this machine, found out without importing torch."""

import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil

from trainers.errors import ConfigError, Fault
from trainers.plan.hardware import cuda_device, in_wsl, num_cuda_devices

logger = logging.getLogger(__name__)

MIB = 2**20
MIN_COMPUTE = 7.5  # what the CUDA 13 builds of torch and vLLM have kernels for begins with Turing
SMI_TIMEOUT = 20.0  # seconds; where the driver was not loaded before, it takes some
WSL_KEPT = 2 * 2**30  # of the memory that is free, what Windows refused to give all the same (microsoft/WSL#41176)
DRIVERS_OWN = 2 * 2**30  # bytes; less may be missing where no process holds anything
GB = 10**9  # the unit of `vram_gb`: a card sold as 80 GB has at least 80 times so many bytes


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of the card."""

    pid: int
    name: str
    used: int

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.name}) {self.used / 2**30:.1f} GiB"


@dataclass(frozen=True)
class Card:
    """A GPU; sizes in bytes.

    Attributes:
        compute: Its compute capability; bf16 arithmetic begins with 8.0.
        unnamed: Of what is not free, what no process that is known holds: those of other containers, or a display's.
        is_here: False for one that is only planned for.
    """

    name: str
    total: int
    free: int
    compute: float = 8.0
    driver: str = ""
    holders: list[Holder] = field(default_factory=list)
    unnamed: int = 0
    is_here: bool = True

    @property
    def held(self) -> list[str]:
        """Who holds what is not free, for people."""
        told = f"processes that nvidia-smi does not name {self.unnamed / 2**30:.1f} GiB"
        return [*map(str, self.holders), *([told] if self.unnamed else [])]


@dataclass(frozen=True)
class Machine:
    """What a run has; sizes in bytes."""

    card: Card | None
    host_total: int
    host_free: int
    disk_free: int

    @property
    def is_here(self) -> bool:
        """Whether the run would be on this machine: the rest of one whose card is elsewhere is elsewhere too."""
        return self.card is None or self.card.is_here


def planned_card(vram_gb: float) -> Card:
    """A card of so many GB that is not here."""
    vram_gb = float(vram_gb)  # it may be text where other options are at fault, and none were converted
    size = int(vram_gb * GB)
    return Card(f"a card of {vram_gb:g} GB", size, size, is_here=False)


def read_machine(folder: Path, vram_gb: float | None = None) -> Machine:
    """Look at this machine.

    Args:
        folder: Where the run will write; its disk is the one that counts.
        vram_gb: Plan for a card of so many GB instead of the one that is here.
    """
    card = read_card() if vram_gb is None else planned_card(vram_gb)
    return Machine(card, *host_room(), free_disk(folder))


def free_disk(folder: Path) -> int:
    """Bytes that are free where the folder is, or will be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder


def host_room(root: Path = Path("/")) -> tuple[int, int]:
    """Bytes of host memory that this process may use in all, and may still take: those of the machine, or of a
    container where that grants less.

    Args:
        root: Of the file system that tells of containers.
    """
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _cgroup_limits(root):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


class _Names(NamedTuple):
    """The file system of control groups, their files, and what they call file pages that are not in use any more."""

    mount: str
    limit: str
    usage: str
    idle: str


V2 = _Names("cgroup2", "memory.max", "memory.current", "inactive_file")
V1 = _Names("cgroup", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Bytes granted to, and bytes in use by, each control group (cgroups(7)) that this process is in and that has a
    limit; what cannot be read limits nothing."""
    mounts = [line.split() for line in _lines(root / "proc/self/mountinfo")]
    for line in _lines(root / "proc/self/cgroup"):  # number:controllers:path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = V1 if controllers else V2
        for mount in mounts:  # number, parent, device, root, mount point, ..., "-", type, source, options
            if mount[-3] != names.mount or (controllers and "memory" not in mount[-1].split(",")):
                continue
            # In a container the mount may begin at the container's own group, and the path at the machine's.
            folder = root / mount[4].lstrip("/")
            for part in ("", *path.removeprefix(mount[3]).strip("/").split("/")):
                folder = folder / part
                yield from _limit(folder, names)


def _limit(folder: Path, names: _Names) -> Iterator[tuple[int, int]]:
    """What one control group grants and what is in use of it, if it has a limit."""
    limit, used = ("".join(_lines(folder / name)).strip() for name in (names.limit, names.usage))
    if limit.isdigit() and used.isdigit():  # not "max"
        idle = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith(f"{names.idle} ")]
        # The kernel gives up page cache before it refuses memory.
        yield int(limit), max(0, int(used) - sum(map(int, idle)))


def _lines(file: Path) -> list[str]:
    """The lines of a file, none where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def read_card() -> Card | None:
    """The GPU that this process computes on, as `nvidia-smi` describes it, or None where there is none.

    Raises:
        ConfigError: If it cannot be asked.
    """
    if num_cuda_devices() == 0:
        return None
    if shutil.which("nvidia-smi") is None:  # as in a container with the driver alone
        try:
            name, size, capability = cuda_device()
        except OSError as error:
            raise _unknown(f"there is no nvidia-smi, and {error}") from error
        logger.warning("there is no nvidia-smi: all %.1f GiB of %s are taken to be free", size / 2**30, name)
        return Card(name, size, _obtainable(size), capability)
    lines = nvidia_smi("--query-gpu=name,memory.total,memory.free,compute_cap,driver_version")
    cells = _cells(lines[0] if lines else "", 1, 4)
    if cells is None:
        raise _unknown(f"nvidia-smi does not tell of the card; it says {' '.join(lines)!r}")
    name, total, free, compute, driver = cells
    if not (total.isdigit() and free.isdigit()):  # one that shares the memory of the host
        raise _unknown(f"nvidia-smi does not tell how much memory {name} has")
    try:
        capability = float(compute)
    except ValueError:  # "[N/A]"
        raise _unknown(f"nvidia-smi does not tell the compute capability of {name}") from None
    driver = driver if driver.partition(".")[0].isdigit() else ""
    holders = _holders()
    unnamed = (int(total) - int(free)) * MIB - sum(holder.used for holder in holders)
    unnamed = unnamed if unnamed >= DRIVERS_OWN else 0
    return Card(name, int(total) * MIB, _obtainable(int(free) * MIB), capability, driver, holders, unnamed)


def _obtainable(free: int) -> int:
    return max(0, free - WSL_KEPT) if in_wsl() else free


def _holders() -> list[Holder]:
    """The processes that hold memory of the card, as far as the driver tells."""
    found = []
    for line in nvidia_smi("--query-compute-apps=pid,process_name,used_memory"):
        cells = _cells(line, 2, 1)  # the name is the start of a command line, with commas in it
        if cells is not None and cells[0].isdigit() and cells[2].isdigit():  # "[N/A]", as in a container
            pid, command, used = cells
            program = command.partition(" --")[0]  # its arguments may be paths too
            found.append(Holder(int(pid), program.rpartition("/")[2], int(used) * MIB))
    return found


def _cells(line: str, before: int, after: int) -> list[str] | None:
    """Cells of a line, of which one may hold commas: nvidia-smi quotes nothing.

    Args:
        before: The number of that cell, from 1 on.
        after: How many follow it.
    """
    *first, rest = line.split(",", before - 1)
    cells = [*first, *rest.rsplit(",", after)]
    return [cell.strip() for cell in cells] if len(cells) == before + after else None


def _unknown(cause: str) -> ConfigError:
    return ConfigError(Fault("GPU", ..., cause, "put nvidia-smi right; stage=plan vram_gb=<GB> plans without it"))


def nvidia_smi(query: str) -> list[str]:
    """Lines of what `nvidia-smi` answers about the card that this process computes on.

    Raises:
        ConfigError: If it fails, or does not answer.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # an index or a UUID
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={first}"]
    read = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}  # the name of a process is any bytes
    try:
        done = subprocess.run(command, timeout=SMI_TIMEOUT, **read)
    except subprocess.TimeoutExpired as error:
        raise _unknown(f"nvidia-smi has not answered in {SMI_TIMEOUT:g} s") from error
    except OSError as error:
        raise _unknown(f"nvidia-smi cannot be run: {error}") from error
    if done.returncode:
        raise _unknown(f"nvidia-smi failed: {(done.stderr.strip() or done.stdout.strip() or done.returncode)}")
    return [line for line in done.stdout.splitlines() if line.strip()]
