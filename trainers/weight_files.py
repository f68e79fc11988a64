"""Where the weights of a streamed model lie: in safetensors files, or in host memory."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from trainers.errors import ConfigError, Fault


def find_weight_files(path: str, key: str) -> dict[str, Path]:
    """For each tensor of a checkpoint (a folder or a hub id) its safetensors file.

    Raises:
        ConfigError: If it has none.
    """
    missing = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **missing):
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), Path(single))
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **missing):
        shards = {Path(shard).name: Path(shard) for shard in get_checkpoint_shard_files(path, index)[0]}
        weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: shards[file] for name, file in weight_map.items()}
    cause = "it has no safetensors files, and only those can be read layer by layer"
    raise ConfigError(Fault(key, path, cause, "save it anew with save_pretrained, or student_mode=resident"))


def fits_in_memory(num_bytes: int) -> bool:
    """Whether host memory can take so many bytes and keep a fifth of what is free."""
    return num_bytes < 0.8 * psutil.virtual_memory().available


class WeightFiles:
    """The tensors of a checkpoint on disk. Each is mapped into memory only while it is used.

    Attributes:
        bytes_read: Bytes handed out by `read` so far.
    """

    def __init__(self, path: str, key: str) -> None:
        self.files = find_weight_files(path, key)
        self.bytes_read = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in set(self.files.values()):
            with safe_open(file, framework="pt") as opened:
                self._shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def num_elements(self) -> int:
        return sum(math.prod(shape) for shape in self._shapes.values())

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored; pages are read when touched, and given back with the tensor."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def read(self, group: dict[str, str], into: dict[str, Tensor]) -> None:
        """Copy the tensors `group` names into the tensors of the same keys."""
        with ExitStack() as stack:
            files = {self.files[stored] for stored in group.values()}
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
            for name, stored in group.items():
                tensor = opened[self.files[stored]].get_tensor(stored)
                into[name].copy_(tensor)
                self.bytes_read += tensor.nbytes


class HostWeights:
    """The tensors of a checkpoint in host memory, in the type they are computed in.

    Args:
        files: Where they are read from, once.
        pin: Lock the pages, so that a GPU can copy from them while the CPU goes on.
    """

    def __init__(self, files: WeightFiles, dtype: torch.dtype, pin: bool) -> None:
        self.bytes_read = 0
        self._tensors = {name: files.tensor(name).to(dtype, copy=True) for name in files}
        if pin:
            for tensor in self._tensors.values():
                _pin(tensor)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def tensor(self, name: str) -> Tensor:
        """The tensor itself: what is written to it is what the next pass reads."""
        return self._tensors[name]

    def read(self, group: dict[str, str], into: dict[str, Tensor]) -> None:
        """Copy the tensors `group` names into the tensors of the same keys; from pinned memory it returns at once."""
        for name, stored in group.items():
            into[name].copy_(self._tensors[stored], non_blocking=True)
            self.bytes_read += self._tensors[stored].nbytes


def _pin(tensor: Tensor) -> None:
    """Page-lock memory in place: `Tensor.pin_memory` would round each tensor up to a power of two."""
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)))
