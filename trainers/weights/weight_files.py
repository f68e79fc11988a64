"""Where the weights of a streamed model lie: in safetensors files, or in host memory."""

import copy
import ctypes
import json
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from trainers.errors import ConfigError, Fault
from trainers.models import damaged_fault
from trainers.plan.host_memory import STAGED, STREAMED_SHARE
from trainers.plan.machine import host_room

logger = logging.getLogger(__name__)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_weight_files(path: str, key: str) -> list[Path]:
    """The safetensors files of a checkpoint (a folder or a hub id).

    Raises:
        ConfigError: If it has none.
    """
    missing = {"_raise_exceptions_for_missing_entries": False}
    if single := cached_file(path, SAFE_WEIGHTS_NAME, **missing):
        return [Path(single)]
    if index := cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **missing):
        return [Path(shard) for shard in get_checkpoint_shard_files(path, index)[0]]
    cause = "it has no safetensors files, and only those can be read layer by layer"
    remedy = (
        f"save it anew with save_pretrained, or {'student' if key == 'student_model' else 'reference'}_mode=resident"
    )
    raise ConfigError(Fault(key, path, cause, remedy))


def fits_in_memory(num_bytes: int) -> bool:
    """Whether host memory can take so many bytes and keep a fifth of what is free."""
    return num_bytes < STREAMED_SHARE * host_room()[1]


class _Place(NamedTuple):
    """Where a tensor lies on disk; `offset` in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def _places(file: Path, key: str) -> dict[str, _Place]:
    """Read the header of a safetensors file: eight bytes with its length, then JSON with type, shape and offsets.

    The library's `safe_open` maps the file as a whole, copy-on-write, and Linux refuses to map more than the machine's
    memory that way.

    Raises:
        ConfigError: If the file ends before its tensors do.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length)) if 0 < length <= size - 8 else None
    ends = (e["data_offsets"][1] for name, e in (header or {}).items() if name != "__metadata__")
    whole = 8 + length + max(ends, default=0)
    if header is None or size < whole:
        cause = "its header is not whole" if header is None else f"it has {size} of {whole} bytes"
        raise ConfigError(damaged_fault(key, str(file), cause))
    return {
        name: _Place(file, DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
        for name, e in header.items()
        if e.get("dtype") in DTYPES  # neither the metadata nor what is no plain float
    }


class WeightFiles:
    """The tensors of a checkpoint on disk, each read when it is asked for.

    Attributes:
        bytes_read: Bytes handed out by `read` so far.
    """

    def __init__(self, path: str, key: str) -> None:
        self.bytes_read = 0
        self._staging: _Staging | None = None
        self._places = {n: p for file in find_weight_files(path, key) for n, p in _places(file, key).items()}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def only(self, names: Collection[str]) -> "WeightFiles":
        """These tensors of them."""
        found = copy.copy(self)
        found._places = {name: place for name, place in self._places.items() if name in names}
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def num_elements(self) -> int:
        return sum(math.prod(place.shape) for place in self._places.values())

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored, mapped: a page is read when it is touched, and given back with the tensor."""
        file, dtype, shape, offset = self._places[name]
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        data = np.memmap(file, dtype=np.uint8, mode="c", offset=offset, shape=(size,))
        return torch.from_numpy(data).view(dtype).reshape(shape)

    def read(self, group: dict[str, str], into: dict[str, Tensor]) -> None:
        """Copy the tensors `group` names into the tensors of the same keys."""
        for name, stored in group.items():
            place, target = self._places[stored], into[name]
            if target.is_cuda:
                self._staging = self._staging or _Staging()
                self._staging.copy(partial(self._read_part, stored), target)
            else:
                self._read_part(stored, 0, target)
            self.bytes_read += math.prod(place.shape) * place.dtype.itemsize

    def _read_part(self, name: str, start: int, target: Tensor) -> None:
        """Read as many elements as a tensor of the host has, from `start` on."""
        place = self._places[name]
        if target.dtype == place.dtype and target.is_contiguous():
            _read_into(place, start, target)
        else:
            target.copy_(self.tensor(name).view(-1)[start : start + target.numel()].view(target.shape))


class _Staging:
    """Two pinned blocks of the host, through which files go to a GPU: while one is copied, the other is read into.

    From a file's mapped pages, which cannot be pinned, a copy would keep the CPU until it is done, and come from a
    buffer of the driver's.
    """

    def __init__(self) -> None:
        self._blocks = [torch.empty(STAGED, dtype=torch.uint8) for _ in range(2)]
        for block in self._blocks:
            if _pin(block):
                weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, block.data_ptr())
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._last = 0

    def copy(self, read: Callable[[int, Tensor], None], target: Tensor) -> None:
        """Copy to the device, on the current stream, what `read` reads from an element on."""
        whole, step = target.view(-1), STAGED // target.itemsize
        for start in range(0, len(whole), step):
            part, self._last = whole[start : start + step], 1 - self._last
            if (event := self._copied[self._last]) is not None:
                event.synchronize()  # the block may still be copied from
            block = self._blocks[self._last][: part.nbytes].view(target.dtype)
            read(start, block)
            part.copy_(block, non_blocking=True)
            self._copied[self._last] = torch.cuda.current_stream(target.device).record_event()


def _read_into(place: _Place, start: int, target: Tensor) -> None:
    left = memoryview(target.view(-1).view(torch.uint8).numpy())
    with place.file.open("rb", buffering=0) as file:
        file.seek(place.offset + start * place.dtype.itemsize)
        while left:
            count = file.readinto(left)
            if not count:
                raise OSError(f"{place.file} ends within a tensor: it is not whole")
            left = left[count:]


class HostWeights:
    """The tensors of a checkpoint in host memory, in the type they are computed in.

    Args:
        files: Where they are read from, once.
        pin: Lock the pages, so that a GPU can copy from them while the CPU goes on.
    """

    def __init__(self, files: WeightFiles, dtype: torch.dtype, pin: bool) -> None:
        self.bytes_read = 0
        sizes = {name: math.prod(files.shape(name)) for name in files}
        block = torch.empty(sum(sizes.values()), dtype=dtype)
        parts = zip(sizes, block.split(list(sizes.values())), strict=True)
        self._tensors = {name: part.view(files.shape(name)) for name, part in parts}
        for name, tensor in self._tensors.items():
            tensor.copy_(files.tensor(name))
        if pin and _pin(block):
            weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, block.data_ptr())

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

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


def _pin(tensor: Tensor) -> bool:
    """Page-lock memory in place, where the system lets so much be locked (WSL about half of what there is).

    `Tensor.pin_memory` would round it up to a power of two.
    """
    runtime = torch.cuda.cudart()
    if code := int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)):
        # CUDA keeps an error until it is asked for, and torch asks behind its next kernel.
        ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}").cudaGetLastError()
        reason = torch.cuda.CudaError(code)
        logger.warning("%.1f GiB cannot be pinned (%s): copies from them are slower", tensor.nbytes / 2**30, reason)
    return not code
