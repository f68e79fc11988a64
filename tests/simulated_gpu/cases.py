"""What test_simulated_gpu.py lets run with a simulated GPU, each case in a process: `cases.py LIBRARY CASE [...]`.

The last line is JSON.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from simulated_gpu import device  # noqa: E402


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


def streamed(model: str, on_disk: str) -> dict[str, Any]:
    """A streamed pass, and with each kind of wait left out."""
    import torch
    from transformers import AutoConfig

    from trainers.scoring.streaming import StreamedBackbone
    from trainers.weights.weight_files import HostWeights, WeightFiles

    files, config = WeightFiles(model, "student_model"), AutoConfig.from_pretrained(model)
    ids = [torch.arange(34).view(2, 17) + 100 * i for i in range(3)]

    def score() -> list[Any]:
        source = files if on_disk == "True" else HostWeights(files, torch.float32, pin=True)
        gpu = torch.device("cuda")
        backbone = StreamedBackbone(source, config, gpu, torch.float32, None, "student_model")
        return [states.cpu().tolist() for states in backbone.run(ids)]

    return {"states": score(), "orders": orders(score)}


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


def orders(work: Callable[[], Any]) -> dict[str, list[str]]:
    """Accesses that nothing orders: as it is, and without one kind of waiting, of the default stream or of another."""
    import torch

    def watched() -> list[str]:
        torch.ops.simulated.watch(True)
        with device.host_mode():
            work()
        torch.ops.simulated.watch(False)
        return torch.ops.simulated.take_faults()

    found = {"as it is": watched()}
    default = torch.cuda.default_stream()
    for kind, name in ((torch.cuda.Stream, "wait_event"), (torch.cuda.Stream, "wait_stream")):
        waits = getattr(kind, name)
        for whose, is_deaf in (("default", True), ("other", False)):

            def wait(self: Any, other: Any, waits: Any = waits, is_deaf: bool = is_deaf) -> None:
                if (self is default) is not is_deaf:
                    waits(self, other)

            setattr(kind, name, wait)
            found[f"{whose} stream without {name}"] = watched()
            setattr(kind, name, waits)
    synchronize, torch.cuda.Event.synchronize = torch.cuda.Event.synchronize, lambda self: None
    found["host without synchronize"] = watched()
    torch.cuda.Event.synchronize = synchronize
    return found


def train(output_dir: str, *overrides: str) -> dict[str, Any]:
    """A run of RL, on the GPU with the CPU's engine: its steps, the plan, accesses out of order, bytes at the peak."""
    import torch

    from trainers.checks import load_options
    from trainers.config import compose_run
    from trainers.plan.planning import problem_of
    from trainers.plan.solve import solve
    from trainers.rl import run_rl

    options = load_options(compose_run("teacher_rlt_tiny", [*overrides, f"output_dir={output_dir}"]))
    solved = solve(problem_of(options))
    if options.device == "cuda":
        device.share_the_cpu_engine()
        torch.ops.simulated.watch(True)
    run_rl(solved.options, Path(output_dir))
    metrics = [json.loads(line) for line in Path(output_dir, "metrics.jsonl").read_text("utf-8").splitlines()]
    left = {"plan": solved.plan.phases, "faults": torch.ops.simulated.take_faults(), "peak": torch.ops.simulated.peak()}
    return {"metrics": [row for row in metrics if "reward" in row]} | left


if __name__ == "__main__":
    device.pretend(Path(sys.argv[1]))
    case: Any = {kind.__name__: kind for kind in (devices, streamed, offloaded, train)}[sys.argv[2]]
    print(json.dumps(case(*sys.argv[3:])))
