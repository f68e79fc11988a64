"""What is let run with a simulated GPU, each case in a process: `cases.py LIBRARY CASE [...]`.

The last line is JSON. With SIMULATED_TRITON, a folder that holds Triton, vLLM's own GPU worker is the engine.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from simulated_gpu import device, gpu_engine  # noqa: E402


def devices() -> dict[str, Any]:
    """What is told of tensors on the wrong device, and what is in use."""
    import torch

    def while_there_is_one() -> int:
        one = torch.ones(1000, device="cuda")
        return torch.cuda.memory_allocated() * one.is_cuda

    used = [while_there_is_one(), torch.cuda.memory_allocated()]
    here, there, number = torch.ones(1000), torch.ones(1000, device="cuda"), torch.zeros(())
    told = []
    for wrong in (
        lambda: there + here,
        lambda: number.add_(there.sum()),
        lambda: here[torch.zeros(3, dtype=torch.long, device="cuda")],
        lambda: there.index_put_((torch.arange(3),), torch.ones(3)),
    ):
        try:
            wrong()
        except RuntimeError as error:
            told.append(str(error))
    assert (there + number)[torch.arange(3)].tolist() == [1, 1, 1]  # as on a card
    return {"told": told, "used": used}


def graphs() -> dict[str, Any]:
    """What a captured graph computes after its weights were written in place, and after they were moved."""
    import torch

    from simulated_gpu.graphs import as_kernel, simulate

    simulate()
    weight = torch.nn.Parameter(torch.zeros(1, 3, device="cuda"))
    given, scaled = (torch.zeros(1, 3, device="cuda") for _ in range(2))

    @as_kernel
    def kernel(x: Any, w: Any, *, out: Any) -> Any:
        return out.copy_(x * w)

    def in_use() -> int:
        return torch.cuda.memory_allocated()

    before, graph = in_use(), torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        made = [torch.nn.functional.linear(given, weight).relu() + 1, given * weight]
        made += [torch.nn.functional.embedding(torch.zeros(1, dtype=torch.int, device="cuda"), weight)]
        made += [kernel(given, weight, out=scaled)]

    def replayed(x: float, w: float, moved: bool = False) -> list[Any]:
        with torch.no_grad():
            given.fill_(x)
            if moved:
                weight.data = weight.data.clone()
            weight.fill_(w)
        graph.replay()
        return [values.flatten()[0].item() for values in made]

    found: dict[str, Any] = {"in place": replayed(2, 3), "moved": replayed(1, 5, moved=True)}
    graph = made = None
    found["left"] = in_use() - before
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            given.sum().item()
        except RuntimeError as error:
            found["told"] = str(error)
    return found


def asleep() -> dict[str, Any]:
    """Bytes that are taken while a pool's pages are there and not, and what becomes of who touches it then."""
    import torch

    ops = torch.ops.simulated

    def taken() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free

    ops.use_pool("kv_cache")
    cache = torch.zeros(5000, device="cuda")
    ops.use_pool("")
    beside = torch.zeros(1000, device="cuda")
    used = [taken(), ops.set_asleep("kv_cache", True), taken()]
    if (child := os.fork()) == 0:
        cache.add_(1)
        os._exit(0)
    ended = os.WTERMSIG(os.waitpid(child, 0)[1])
    used += [ops.set_asleep("kv_cache", False), taken()]
    return {"used": used, "signal": ended, "kept": (beside == 0).all().item(), "gone": cache.isnan().all().item()}


def streamed(model: str, on_disk: str) -> dict[str, Any]:
    """A streamed pass, and with each kind of wait left out."""
    import torch
    from transformers import AutoConfig

    from trainers.scoring import streaming
    from trainers.weights import weight_files
    from trainers.weights.weight_files import HostWeights, WeightFiles

    def read_into(place: Any, start: int, target: Any) -> None:
        torch.ops.simulated.host_uses(target, True)  # which no operator of torch writes
        reads(place, start, target)

    reads, weight_files._read_into, weight_files.STAGED = weight_files._read_into, read_into, 4096
    files, config = WeightFiles(model, "student_model"), AutoConfig.from_pretrained(model)
    ids = [torch.arange(34).view(2, 17) + 100 * i for i in range(3)]

    def score() -> list[Any]:
        source = files if on_disk == "True" else HostWeights(files, torch.float32, pin=True)
        gpu = torch.device("cuda")
        backbone = streaming.StreamedBackbone(source, config, gpu, torch.float32, None, "student_model")
        return [states.cpu().tolist() for states in backbone.run(ids)]

    found: dict[str, Any] = {"states": score(), "in threads": disorder(score)}
    # All threads are one host here: what the feeder's thread waits for counts for the other's kernels too. It works
    # when it is waited for, then, and no sooner, or what is found would depend on who is faster.
    streaming.ThreadPoolExecutor = WhenAsked
    return found | {"orders": orders(score)}


class WhenAsked:
    """An executor that works when a result is asked for, where it is asked for."""

    def __init__(self, **_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return SimpleNamespace(result=functools.cache(functools.partial(work, *arguments)))

    def shutdown(self, **_: Any) -> None:
        pass


def offloaded(place: str) -> dict[str, Any]:
    """Steps of the optimizer in host memory, and with each kind of wait left out."""
    import torch

    import trainers.master_adamw as master_adamw

    master_adamw.PIECE = 256  # several pieces of each weight

    def steps() -> list[Any]:
        random = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=random).to(place, torch.bfloat16) for n in (1000, 300, 7)]
        optimizer = master_adamw.MasterAdamW(map(torch.nn.Parameter, weights), 1e-3, (0.9, 0.999), 1e-8, on_host=True)
        parameters = optimizer.param_groups[0]["params"]
        for _ in range(3):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=random).to(place, torch.bfloat16) * 1
            optimizer.step()
            sum(p.detach().sum() for p in parameters)  # reads what was written
        return [p.detach().float().cpu().tolist() for p in parameters]

    return {"weights": steps(), "orders": orders(steps)}


def kept(chosen: str) -> list[int]:
    """Bytes that models leave on the device when they have read 2 x 512 tokens and activations were offloaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    from trainers.models import DTYPES
    from trainers.options import options_class
    from trainers.weights.adapters import add_adapters, base_model

    found, ids = [], torch.randint(0, 512, (2, 512), device="cuda")
    for config, precision, use_peft, checkpointing in json.loads(chosen):
        full = AutoConfig.for_model(**config, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(full, dtype=DTYPES[precision], attn_implementation="sdpa").train()
        if use_peft:
            model = add_adapters(model, options_class("rl")(use_peft=True, lora_r=4))
            model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.to("cuda")
        before = torch.cuda.memory_allocated()
        with get_act_offloading_ctx_manager(model):
            states = base_model(model).base_model(input_ids=ids, use_cache=False).last_hidden_state
            found.append(torch.cuda.memory_allocated() - before)
        del states, model
    return found


def disorder(work: Callable[[], Any]) -> list[str]:
    """Accesses that nothing orders."""
    import torch

    torch.ops.simulated.watch(True)
    with device.host_mode():
        work()
    torch.ops.simulated.watch(False)
    return torch.ops.simulated.take_faults()


def orders(work: Callable[[], Any]) -> dict[str, list[str]]:
    """Accesses that nothing orders: as it is, and without one kind of waiting, of the default stream or of another."""
    import torch

    found = {"as it is": disorder(work)}
    default = torch.cuda.default_stream()
    for kind, name in ((torch.cuda.Stream, "wait_event"), (torch.cuda.Stream, "wait_stream")):
        waits = getattr(kind, name)
        for whose, is_deaf in (("default", True), ("other", False)):

            def wait(self: Any, other: Any, waits: Any = waits, is_deaf: bool = is_deaf) -> None:
                if (self is default) is not is_deaf:
                    waits(self, other)

            setattr(kind, name, wait)
            found[f"{whose} stream without {name}"] = disorder(work)
            setattr(kind, name, waits)
    synchronize, torch.cuda.Event.synchronize = torch.cuda.Event.synchronize, lambda self: None
    found["host without synchronize"] = disorder(work)
    torch.cuda.Event.synchronize = synchronize
    return found


def train(output_dir: str, *overrides: str) -> dict[str, Any]:
    """A run of RL: its steps and evaluations, the plan, and bytes at the peak; what vLLM's own worker did, where it is
    the engine, and accesses out of order, where the CPU's is."""
    import torch

    from trainers.checks import load_options
    from trainers.config import compose_run
    from trainers.plan.planning import problem_of
    from trainers.plan.solve import solve
    from trainers.rl import run_rl

    options = load_options(compose_run("teacher_rlt_tiny", [*overrides, f"output_dir={output_dir}"]))
    plan = solve(problem_of(options))
    if options.device == "cuda" and gpu_worker is None:
        device.share_the_cpu_engine()
        torch.ops.simulated.watch(True)
    run_rl(plan.options, Path(output_dir))
    metrics = [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text("utf-8").splitlines()]
    steps, evaluations = ([row for row in metrics if name in row] for name in ("reward", "eval_reward"))
    told = {"faults": torch.ops.simulated.take_faults(), "peak": torch.ops.simulated.peak()}
    return {
        "metrics": steps,
        "evaluations": evaluations,
        "plan": plan.phases,
        "worker": gpu_worker and vars(gpu_worker),
    } | told


def family(name: str, trained: str) -> dict[str, Any]:
    """One of families.py on vLLM's GPU worker: whether trainer and engine agree, before and after updates."""
    import torch
    from family_engine import measure

    graphs = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": [4]}
    # LoRA's kernels add in the type of the model, and Triton's interpreter adds bf16 as integers.
    dtype = torch.float16 if trained == "adapters" else torch.float32
    engine = {"compilation_config": graphs, "max_num_batched_tokens": 64}
    limits = {"completions": 3, "max_tokens": 5, "max_num_seqs": 4, "kv_cache_gib": 0.01, "vllm_kwargs": engine}
    return measure(name, trained == "adapters", "cuda", dtype, **limits) | vars(gpu_worker)


def resting(model: str, sequences: str) -> dict[str, int]:
    """Bytes that vLLM's GPU worker holds beside weights and KV cache, for so many sequences at once, and the most that
    its own trial pass takes, over as many tokens as there may be (1024) and without attention."""
    import torch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from trainers.engine import Engine
    from trainers.models import load_model
    from trainers.options import options_class

    found, run = {}, GPUModelRunner.profile_run

    def profile_run(runner: Any, *arguments: Any, **named: Any) -> None:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(runner, *arguments, **named)
        found["activations"] = torch.cuda.max_memory_allocated() - before

    GPUModelRunner.profile_run = profile_run
    teacher = load_model(model, torch.bfloat16, None, "model_name_or_path", False)
    limits = {"max_prompt_length": 512, "max_completion_length": 512, "max_num_seqs": int(sequences)}
    chosen = {"kv_cache_gib": 0.01, "enforce_eager": True, "vllm_kwargs": {"max_num_batched_tokens": 1024}}
    options = options_class("rl")(**limits, **chosen)
    engine = Engine(teacher, model, options, torch.device("cuda"), torch.bfloat16, [2])
    found["held"] = torch.cuda.memory_allocated() - engine.bridge.weight_bytes() - engine.kv_cache_bytes()
    return found


if __name__ == "__main__":
    triton = os.environ.get("SIMULATED_TRITON")
    if triton:
        gpu_engine.find_triton(triton)
    device.pretend(Path(sys.argv[1]))
    gpu_worker = gpu_engine.use() if triton else None
    kinds: Any = (devices, graphs, asleep, streamed, offloaded, kept, train, family, resting)
    print(json.dumps({kind.__name__: kind for kind in kinds}[sys.argv[2]](*sys.argv[3:])))
