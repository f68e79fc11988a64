"""What this machine has, found out without importing torch."""

import ctypes
import os
from functools import cache


def cuda_device() -> tuple[str, int, float]:
    """Name, bytes and compute capability of the first CUDA device that this process may use.

    Raises:
        OSError: If the driver does not tell.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    device, size, name = ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    codes = (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device),
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    if any(codes):
        raise OSError(f"the CUDA driver answers {codes}")
    return name.value.decode(), size.value, float(f"{major.value}.{minor.value}")


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
