"""Let torch's CPU build believe in a GPU: device.cpp, and what `torch.cuda` would tell of it.

What it is good for: a tensor on the wrong device fails as on a GPU; accesses of two streams that nothing orders are
told, and those of the host to pinned memory, in `host_mode` and its thread; bytes in use are counted. Not for time,
rounding or kernels.
"""

import ctypes
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).parent / "device.cpp"
TOTAL = 8 * 2**30


def build(library: Path) -> None:
    """Compile it (a quarter of a minute)."""
    torch = Path(find_spec("torch").origin).parent
    include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    link = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20"]
    subprocess.run(["g++", *flags, *include, str(SOURCE), "-o", str(library), *link], check=True)


def pretend(library: Path) -> None:
    """Give this process its GPU. Nothing may have imported torch: it looks for CUDA once."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import bitsandbytes  # noqa: F401  looks for kernels where it finds a GPU
    import torch
    import torch._dynamo
    import torch._inductor.utils

    _tell_of_the_device(torch)
    _stand_in_for_kernels(torch)
    import trainers.plan.hardware as hardware
    import trainers.plan.machine as machine

    hardware.num_cuda_devices, hardware.cpu_builds = lambda: 1, dict
    machine.read_card = lambda: machine.Card("simulated", TOTAL, TOTAL, 9.0)


def _streams(torch: Any) -> dict[str, Any]:
    """Streams and events, by their names in `torch.cuda`; what they order, device.cpp is told."""
    ops, here = torch.ops.simulated, threading.local()
    events, streams, numbers = count(1), count(1), []

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.number = next(events)

        def record(self, stream: Any = None) -> None:
            ops.record(self.number, (stream or current()).number)

        def wait(self, stream: Any = None) -> None:
            (stream or current()).wait_event(self)

        def synchronize(self) -> None:
            ops.wait_event(0, self.number)

        def query(self) -> bool:
            return True

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, *_: Any, **__: Any) -> None:
            self.number = next(streams)
            numbers.append(self.number)

        def wait_stream(self, other: "Stream") -> None:
            ops.wait_stream(self.number, other.number)

        def wait_event(self, event: Event) -> None:
            ops.wait_event(self.number, event.number)

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            ops.wait_stream(0, self.number)

    default = Stream()

    def current(device: Any = None) -> Stream:
        return getattr(here, "stream", default)

    @contextmanager
    def use(stream: Stream | None) -> Any:
        before = current()
        here.stream = stream or before
        ops.use_stream(here.stream.number)
        try:
            yield
        finally:
            here.stream = before
            ops.use_stream(before.number)

    def synchronize(device: Any = None) -> None:
        for number in numbers:
            ops.wait_stream(0, number)

    return {
        "Stream": Stream,
        "Event": Event,
        "current_stream": current,
        "default_stream": lambda device=None: default,
        "stream": use,
        "synchronize": synchronize,
    }


def _tell_of_the_device(torch: Any) -> None:
    """What `torch.cuda` says."""
    ops, cuda = torch.ops.simulated, torch.cuda

    @contextmanager
    def on_device(device: Any) -> Any:
        yield

    def host_register(address: int, size: int, flags: int) -> int:
        ops.pin(address, size)
        return 0

    def clone(storage: Any) -> Any:
        if storage.device.type != "cuda":
            return of_cpu(storage)
        return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()

    of_cpu, torch.storage._StorageBase.clone = torch.storage._StorageBase.clone, clone
    runtime = SimpleNamespace(cudaHostRegister=host_register, cudaHostUnregister=lambda at: host_register(at, 0, 0))
    properties = SimpleNamespace(name="simulated", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132)
    random_state = torch.zeros(8, dtype=torch.uint8)
    answers = _streams(torch) | {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": on_device,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (TOTAL - ops.memory() + ops.asleep(), TOTAL),
        "memory_allocated": lambda device=None: ops.memory(),
        "memory_reserved": lambda device=None: ops.memory(),
        "max_memory_allocated": lambda device=None: ops.peak(),
        "max_memory_reserved": lambda device=None: ops.peak(),
        "reset_peak_memory_stats": lambda device=None: ops.reset_peak(),
        "empty_cache": lambda: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: random_state,
        "get_rng_state_all": lambda: [random_state],
        "set_rng_state": lambda state, device=None: None,
        "set_rng_state_all": lambda states: None,
        "cudart": lambda: runtime,
        "check_error": lambda code: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    for name in ("manual_seed_all", "get_rng_state", "set_rng_state"):
        setattr(cuda.random, name, answers[name])


def _stand_in_for_kernels(torch: Any) -> None:
    """What a CPU build has no kernel for: attention on a GPU, products into fp32, TRL's head in Triton."""
    of_cpu = torch.nn.functional.scaled_dot_product_attention

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **kw):
        if not q.is_cuda:
            return of_cpu(q, k, v, attn_mask, dropout_p, is_causal, **kw)
        if kw.pop("enable_gqa", False):
            k, v = (t.repeat_interleave(q.size(-3) // t.size(-3), -3) for t in (k, v))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, float("-inf"))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, **kw)[0]

    torch.nn.functional.scaled_dot_product_attention = attention

    @contextmanager
    def in_kernel() -> Any:
        torch.ops.simulated.in_kernel(True)
        try:
            yield
        finally:
            torch.ops.simulated.in_kernel(False)

    def addmm(into: Any, a: Any, b: Any, dtype: Any, *, beta: float = 1, alpha: float = 1, out: Any) -> Any:
        assert into.dtype == out.dtype == dtype
        with in_kernel():
            a, b = a.cpu().to(dtype), b.cpu().to(dtype)
            return out.copy_(torch.addmm(into.cpu(), a, b, beta=beta, alpha=alpha))

    global library  # lives as long as the process
    library = torch.library.Library("aten", "IMPL")
    library.impl("addmm.dtype_out", addmm, "CUDA")

    from trl.kernels import chunked_logprob

    class Kernel:
        """TRL's own stand-in for the kernel, which writes into its arguments."""

        def __init__(self, tile: Any) -> None:
            self.tile = tile

        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, *arguments: Any, **constants: Any) -> None:
            tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
            assert all(t.is_cuda for t in tensors)
            with in_kernel():
                there = [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
                self.tile(*there, **constants)
                for mine, its in zip(tensors, (t for t in there if isinstance(t, torch.Tensor)), strict=True):
                    mine.copy_(its)

    chunked_logprob._TRITON_AVAILABLE = True
    chunked_logprob.triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
    chunked_logprob._forward_kernel = Kernel(chunked_logprob._forward_tile)
    chunked_logprob._backward_kernel = Kernel(chunked_logprob._backward_tile)


def share_the_cpu_engine() -> None:
    """Let the trainer on the simulated GPU share weights with vLLM's CPU build: the same bytes, as the GPU's."""
    import torch

    import trainers.engine as engine
    import trainers.engine_setup as setup
    import trainers.weights.shared_weights as shared
    from trainers.weights.cpu_kernels import adapt_vllm

    cpu = torch.device("cpu")
    prepare, arguments, tensors = setup.prepare_environment, setup.engine_arguments, shared.engine_tensors

    def prepare_environment(device: Any) -> None:
        prepare(cpu)
        adapt_vllm()

    engine.prepare_environment = setup.prepare_environment = prepare_environment
    engine.engine_arguments = lambda options, path, device, dtype: arguments(options, path, cpu, dtype)
    engine.vllm_releases_cache = lambda: False  # that is CUDA's allocator's, not simulated
    shared.engine_tensors = lambda model, names: (
        (name, torch.ops.simulated.as_gpu(tensor)) for name, tensor in tensors(model, names)
    )


def host_mode() -> Any:
    """A context in which what the CPU's operators do to pinned memory is told, too."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class HostMode(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
            if tensors and not is_view and not any(t.is_cuda for t in tensors):
                for i, argument in enumerate(function._schema.arguments):
                    given = args[i] if i < len(args) else kwargs.get(argument.name)
                    writes = bool(argument.alias_info and argument.alias_info.is_write)
                    for tensor in tree_leaves(given):
                        if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                            torch.ops.simulated.host_uses(tensor, writes)
            return function(*args, **kwargs)

    return HostMode()
