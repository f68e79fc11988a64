"""4. The engine: each weight bridge with CUDA graphs on, then whole steps against stock TRL.

    python benchmarks/gpu/engine.py

For each bridge: log-probabilities of sampled tokens, trainer against engine, before and after updates that reach the
weights through the bridge (the backward pass runs through views where they are shared); and the KV cache released and
restored again and again, the memory in use watched. Then `benchmarks/bridges.py` on the same model.
"""

import json
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import bridge_way, leave_without_engine, parser, start

leave_without_engine("engine")

import torch

from benchmarks.bridge_ways import Setup, our_options, prompts_of
from benchmarks.commands import run
from benchmarks.small_data import made_model
from trainers.engine import Engine
from trainers.rl import load_teacher, start_engine
from trainers.watch.memory_watch import MemoryWatch

WARM_UP = 5  # cycles


def trainer_logprobs(model: Any, prompts: list[list[int]], completions: list[list[int]]) -> list[torch.Tensor]:
    """What the trainer's model gives each sampled token, fp32, on its device; with a graph for the backward pass."""
    device = next(model.parameters()).device
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1)
        found.append(logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return found


def sampled(engine: Engine, model: Any, prompts: list[list[int]], step: int, tokens: int) -> tuple[Any, float, float]:
    """A rollout, and how far trainer and engine are apart on its tokens: mean and largest difference, in nats."""
    rollout = engine.generate(prompts, {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}, step)
    with torch.no_grad():
        ours = torch.cat(trainer_logprobs(model, prompts, rollout.completion_ids)).cpu()
    apart = (ours - torch.tensor(sum(rollout.logprobs, []))).abs()
    return rollout, apart.mean().item(), apart.max().item()


def now(device: torch.device) -> float:
    """Seconds, all that was asked of the device being done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def check_bridge(bridge: str, setup: Setup, cycles: int, updates: int) -> dict[str, Any]:
    """Parity before and after updates, then the cycles of the KV cache."""
    options = our_options(setup, bridge, enforce_eager=False)
    renderer, rows = prompts_of(options, setup.folder)
    prompts = [renderer.encode_prompt(row["prompt"]) for row in rows.select(range(setup.arguments.questions))]
    model = load_teacher(options, setup.folder, setup.dtype)
    started = time.perf_counter()
    engine = start_engine(options, model, renderer, setup.folder, setup.device, setup.dtype, Path(setup.out))
    model.to(setup.device)  # what is not shared is still where it was loaded
    cells: dict[str, Any] = {"bridge": bridge, "start_s": time.perf_counter() - started}
    cells["weights_gib"] = engine.bridge.weight_bytes() / 2**30
    tokens = setup.arguments.completion
    rollout, cells["mean_before"], cells["max_before"] = sampled(engine, model, prompts, 0, tokens)
    before = torch.cat([torch.tensor(row) for row in rollout.logprobs])

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, foreach=False)
    syncs, bridged = [], []
    for step in range(updates):
        for row in trainer_logprobs(model, prompts, rollout.completion_ids):
            (-row.mean() / len(prompts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        start = now(setup.device)
        engine.sync_weights()
        syncs.append(now(setup.device) - start)
        start = now(setup.device)
        engine.bridge.sync()  # once more: without the prefix cache, whose reset walks through every block
        bridged.append(now(setup.device) - start)
        # From here on the captured graphs are replayed on weights that have changed under them.
        _, cells["mean_after"], cells["max_after"] = sampled(engine, model, prompts, step + 1, tokens)
    with torch.no_grad():
        moved = torch.cat(trainer_logprobs(model, prompts, rollout.completion_ids)).cpu() - before
    cells |= {"updates_moved": moved.abs().mean().item(), "sync_ms": 1e3 * median(syncs)}
    cells["bridge_ms"] = 1e3 * median(bridged)
    del optimizer
    return cells | cycle_cache(engine, prompts, setup, cycles)


def cycle_cache(engine: Engine, prompts: list[list[int]], setup: Setup, cycles: int) -> dict[str, Any]:
    """Release and restore the KV cache, and generate in between."""
    watch = MemoryWatch(setup.device)
    levels: list[tuple[int, int]] = []
    started, written = time.perf_counter(), 0
    for cycle in range(cycles):
        rollout = engine.generate(prompts, {"max_tokens": 8, "ignore_eos": True}, cycle)
        written += sum(map(len, rollout.completion_ids))
        held = watch.used()
        engine.release_cache()
        levels.append((held, watch.used()))
        engine.restore_cache()
    spent = time.perf_counter() - started
    resting = [level for _, level in levels[WARM_UP:]]
    return {
        "kv_gib": engine.kv_cache_bytes() / 2**30,
        "freed_gib": min(held - level for held, level in levels[WARM_UP:]) / 2**30 if engine.can_release else None,
        "drift_mib": (max(resting) - min(resting)) / 2**20,
        "cycle_s": spent / cycles,
    }


def one_bridge(arguments: Namespace) -> None:
    """The checks of one bridge, in a process of its own; the last line is JSON."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as out:
        setup = Setup(arguments.folder, out, arguments, device, dtype)
        print(json.dumps(check_bridge(arguments.bridge, setup, arguments.cycles, arguments.updates)), flush=True)


def main() -> None:
    made = parser(__doc__, "1.5b")
    made.add_argument("--bridges", nargs="+", choices=("shared", "copy", "lora"), default=["shared", "copy", "lora"])
    made.add_argument("--ways", nargs="*", default=["shared", "trl"], help="of bridges.py")
    made.add_argument("--cycles", type=int, default=50)
    made.add_argument("--updates", type=int, default=3)
    made.add_argument("--steps", type=int, default=3, help="of each way")
    made.add_argument("--questions", type=int, default=8)
    made.add_argument("--generations", type=int, default=8)
    made.add_argument("--prompt", type=int, default=256, help="longest prompt, in tokens")
    made.add_argument("--completion", type=int, default=256, help="tokens of each completion")
    made.add_argument("--micro-batch", type=int, default=8)
    made.add_argument("--utilization", type=float, default=0.4, help="share of the card for vLLM")
    made.add_argument("--bridge", help="check this one in this process")
    made.add_argument("--folder", help="its model")
    arguments = made.parse_args()
    if arguments.bridge:
        one_bridge(arguments)
        return
    report = start("engine", "4. The engine", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = made_model(arguments.models or Path(temporary), arguments.model)
        for bridge in arguments.bridges:
            log = arguments.out / f"engine-{bridge}.log"
            ours = [sys.executable, __file__, *sys.argv[1:], "--bridge", bridge, "--folder", str(folder)]
            found = run(ours, log)
            report.row(**(found if isinstance(found, dict) else {"bridge": bridge, "error": found}))
    names = (
        "models",
        "model",
        "steps",
        "questions",
        "generations",
        "prompt",
        "completion",
        "micro_batch",
        "utilization",
    )
    sizes = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    for way in arguments.ways:
        report.row(way=way, **bridge_way(way, arguments.out / f"engine-way-{way}.log", **sizes))
    report.close()


if __name__ == "__main__":
    main()
