"""What this machine has, found out without importing torch."""

import ctypes
import os
from functools import cache


@cache
def num_cuda_devices() -> int:
    """Return how many CUDA devices the driver lets this process use (0 without a driver)."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no NVIDIA driver on this machine
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
