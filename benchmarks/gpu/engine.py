"""4. The engine: each weight bridge with CUDA graphs on, and whole steps beside stock TRL's.

    python benchmarks/gpu/engine.py --models FOLDER                   all: 5 to 7 minutes on an H100 (estimated)
    python benchmarks/gpu/engine.py --models FOLDER --bridges         only whole steps: stock TRL's, and with `shared`
    python benchmarks/gpu/engine.py --models FOLDER --ways            only the bridges

For each bridge: log-probabilities of sampled tokens, trainer against engine, before and after updates that reach the
weights through the bridge (the backward pass runs through views where they are shared); the seconds of a sync; tokens
per second of a whole rollout; and the KV cache released and restored again and again, the memory in use watched. For
each of `--ways`, `benchmarks/bridges.py` on the same model. The first bridge comes first, then the ways, then the
other bridges. In a FOLDER the models are made once, and what vLLM compiled for one run serves the next.
"""

import sys
import tempfile
import time
from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import Report, bridge_way, leave_without_engine, parser, start
from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

leave_without_engine("engine")

import torch

from benchmarks.bridge_ways import Setup, our_options, prompts_of
from benchmarks.commands import run, tell
from benchmarks.small_data import made_model
from trainers.engine import Engine
from trainers.rl import load_teacher, start_engine
from trainers.watch.memory_watch import MemoryWatch

WARM_UP = 5  # cycles
SIZES = ("model", "steps", "questions", "generations", "prompt", "completion", "micro_batch", "utilization")
SIZES += ("checkpointing",)


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
    """Parity before and after updates, the speed of a rollout, then the cycles of the KV cache."""
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
    cells["tokens_per_s"] = tokens_per_second(engine, prompts, setup)
    return cells | cycle_cache(engine, prompts, setup, cycles)


def tokens_per_second(engine: Engine, prompts: list[list[int]], setup: Setup) -> float:
    """Of a rollout of whole groups, after a short one that is not counted."""
    group = [prompt for prompt in prompts for _ in range(setup.arguments.generations)]
    engine.generate(group, {"max_tokens": 8, "ignore_eos": True}, 0)
    start = now(setup.device)
    rollout = engine.generate(group, {"max_tokens": setup.arguments.completion, "ignore_eos": True}, 1)
    return sum(map(len, rollout.completion_ids)) / (now(setup.device) - start)


def cycle_cache(engine: Engine, prompts: list[list[int]], setup: Setup, cycles: int) -> dict[str, Any]:
    """Release and restore the KV cache, and generate in between."""
    watch = MemoryWatch(setup.device)
    levels: list[tuple[int, int]] = []
    started = time.perf_counter()
    for cycle in range(cycles):
        engine.generate(prompts, {"max_tokens": 8, "ignore_eos": True}, cycle)
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
    """The checks of one bridge, in a process of its own."""
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as out:
        setup = Setup(arguments.folder, out, arguments, device, dtype)
        found = check_bridge(arguments.bridge, setup, arguments.cycles, arguments.updates)
    tell(found)


def main() -> None:
    made = parser(__doc__, "1.5b")
    made.add_argument("--bridges", nargs="*", choices=("shared", "copy", "lora"), default=["shared", "copy", "lora"])
    made.add_argument("--ways", nargs="*", default=["trl", "shared"], help="of bridges.py")
    made.add_argument("--cycles", type=int, default=50)
    made.add_argument("--updates", type=int, default=3)
    made.add_argument("--steps", type=int, default=3, help="of each way")
    made.add_argument("--questions", type=int, default=8)
    made.add_argument("--generations", type=int, default=8)
    made.add_argument("--prompt", type=int, default=256, help="longest prompt, in tokens")
    made.add_argument("--completion", type=int, default=256, help="tokens of each completion")
    made.add_argument("--micro-batch", type=int, default=8)
    made.add_argument("--utilization", type=float, default=0.4, help="share of the card for vLLM")
    made.add_argument("--checkpointing", action=BooleanOptionalAction, default=True, help="gradient checkpointing")
    made.add_argument("--bridge", help="check this one in this process")
    made.add_argument("--folder", help="its model")
    arguments = made.parse_args()
    if arguments.bridge:
        one_bridge(arguments)
        return
    report = start("engine", "4. The engine", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        models = arguments.models or Path(temporary)
        folder = made_model(models, arguments.model)
        for bridge in arguments.bridges[:1]:
            report_bridge(bridge, report, arguments, folder)
        for way in arguments.ways:
            sizes = {name: getattr(arguments, name) for name in SIZES}
            log = arguments.out / f"engine-way-{way}.log"
            report.row(way=way, **bridge_way(way, log, models=models, **sizes))
        for bridge in arguments.bridges[1:]:
            report_bridge(bridge, report, arguments, folder)
    report.close()


def report_bridge(bridge: str, report: Report, arguments: Namespace, folder: Path) -> None:
    """The checks of one bridge, in a row."""
    command = [sys.executable, __file__, *sys.argv[1:], "--bridge", bridge, "--folder", str(folder)]
    found = run(command, arguments.out / f"engine-{bridge}.log")
    report.row(**(found if isinstance(found, dict) else {"bridge": bridge, "error": found}))


if __name__ == "__main__":
    main()
