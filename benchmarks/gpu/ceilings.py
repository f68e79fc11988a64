"""1. What this card can do: copies from pinned host memory, copies on the device, a bf16 matrix product.

    python benchmarks/gpu/ceilings.py

The other scripts compare themselves with these.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import parser, start
from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

import torch
from torch.utils.benchmark import Timer


def seconds(statement: str, least: float = 1.0, **names: object) -> float:
    """Median seconds of a statement, the device waited for, over at least so many seconds of repeats."""
    Timer(statement, globals=names).timeit(3)  # warm-up
    return Timer(statement, globals=names).blocked_autorange(min_run_time=least).median


def pinned_copy(device: torch.device, size: int = 2**30, least: float = 1.0) -> float:
    """Bytes per second from pinned host memory to the device."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty(size, dtype=torch.uint8, device=device)
    return size / seconds("there.copy_(host, non_blocking=True)", least, host=host, there=there)


def device_copy(device: torch.device, size: int = 2**32, least: float = 1.0) -> float:
    """Bytes per second that a copy within the device reads and writes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    there = torch.empty_like(source)
    return 2 * size / seconds("there.copy_(source)", least, source=source, there=there)


def matrix_product(device: torch.device, width: int = 8192, least: float = 1.0) -> float:
    """Floating-point operations per second of a bf16 product of two square matrices of random numbers."""
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * width**3 / seconds("torch.mm(a, b, out=out)", least, torch=torch, a=a, b=b, out=out)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = start("ceilings", "1. Ceilings of this card", arguments)
    device, small = torch.device(arguments.device), arguments.device == "cpu"
    small_copy = {"size": 2**24, "least": 0.1} if small else {}
    report.row(ceiling="pinned host to device", value=pinned_copy(device, **small_copy) / 1e9, unit="GB/s")
    report.row(ceiling="device to device", value=device_copy(device, **small_copy) / 1e9, unit="GB/s read and written")
    product = matrix_product(device, **({"width": 512, "least": 0.1} if small else {}))
    report.row(ceiling="bf16 matrix product", value=product / 1e12, unit="TFLOP/s")
    report.close()


if __name__ == "__main__":
    main()
