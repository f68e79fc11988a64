"""Scoring a batch with a student that does not stay on the device: streamed, against two other ways, in one run.

    python benchmarks/score.py                      on a CPU: 0.16B random parameters kept on disk, 64 completions
    python benchmarks/score.py                      on a GPU: the shape of Qwen2.5-7B, 16k tokens in one pass, 8 of the
                                                    64 completions by (a)

(a) the way of the original implementation: one completion per forward, `accelerate.cpu_offload`, log-softmax over all
    logits;
(b) a plain batched forward of a model that stays on the device;
(c) this project's streamed student.

All three score the same texts, and their log-probabilities are compared. Times are medians over `--repeats` rounds in
which the three take turns, after one round that is not counted. The last line is JSON.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

import psutil
import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.ceilings import pinned_copy
from benchmarks.shapes import SHAPES
from data.render import Encoded
from trainers.attention import leave_out_cudnn
from trainers.plan.workload import MICRO_TOKENS
from trainers.scoring.frozen import FrozenModel, ResidentBackbone, passes
from trainers.scoring.streaming import StreamedBackbone
from trainers.watch.memory_watch import forget_resident_peak, resident_peak
from trainers.weights.weight_files import HostWeights, WeightFiles

Score = Callable[[list[Encoded]], list[torch.Tensor]]


class CountingWeights(Mapping):
    """A state dict that counts the bytes it hands out."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors, self.bytes_read = tensors, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        self.bytes_read += self.tensors[name].nbytes
        return self.tensors[name]

    def __iter__(self) -> Any:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class Memory:
    """The most memory held since `start`, in bytes: of the device on a GPU, else of the process beyond what it had."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):  # not in every sandbox
            forget_resident_peak()
        self.before = psutil.Process().memory_info().rss

    def peak(self) -> tuple[int, int]:
        """Peak of the device and of the process."""
        resident = resident_peak() - self.before
        return (torch.cuda.max_memory_allocated() if self.device.type == "cuda" else resident), resident


def make_texts(count: int, vocab_size: int, mean: int, seed: int = 0) -> list[Encoded]:
    """Random texts of half to one and a half times `mean` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(mean // 2, mean * 3 // 2, (count,), generator=generator).tolist()
    return [Encoded(torch.randint(0, vocab_size, (n,), generator=generator).tolist(), {}, []) for n in lengths]


def wanted(text: Encoded) -> tuple[int, int]:
    """Explanation and solution: all but the first quarter, the question."""
    return len(text.ids) // 4, len(text.ids)


def one_by_one(model: Any, device: torch.device) -> Score:
    """(a): a forward and a log-softmax over all logits for each text."""

    @torch.no_grad()
    def score(texts: list[Encoded]) -> list[torch.Tensor]:
        results = []
        for text in texts:
            ids = torch.tensor([text.ids], device=device)
            logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
            own = logprobs[0, :-1].gather(1, ids[0, 1:, None])[:, 0].float().cpu()
            start, end = wanted(text)
            results.append(own[start - 1 : end - 1])
        return results

    return score


def count_passes(texts: list[Encoded], tokens_per_pass: int, device: torch.device) -> int:
    """How often (c) moves all weights."""
    return len(passes([len(text.ids) for text in texts], tokens_per_pass, MICRO_TOKENS[device.type]))


def frozen(backbone: Any, tokens_per_pass: int) -> Score:
    model = FrozenModel(backbone, 1.0, tokens_per_pass)

    def score(texts: list[Encoded]) -> list[torch.Tensor]:
        spans = [[wanted(text)] for text in texts]
        return [lp[slice(*span)] for (lp, _), (span,) in zip(model.score(texts, spans), spans, strict=True)]

    return score


def synchronized(score: Score, texts: list[Encoded], device: torch.device) -> tuple[float, list[torch.Tensor]]:
    start = time.perf_counter()
    result = score(texts)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def copy_ceiling(source: Any, device: torch.device) -> float:
    """Bytes per second that reach the device when nothing is computed."""
    if device.type == "cpu":
        groups = [{"x": name} for name in source if "layers" in name]
        into = {}
        start = time.perf_counter()
        for group in groups:
            shape = source.shape(group["x"])
            into[shape] = into.get(shape, {"x": torch.empty(shape)})
            source.read(group, into[shape])
        moved = source.bytes_read
        source.bytes_read = 0
        return moved / (time.perf_counter() - start)
    return pinned_copy(device)


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", choices=SHAPES, help="default: 0.16b, 7b on a GPU")
    made.add_argument("--completions", type=int, default=64)
    made.add_argument("--mean-tokens", type=int, help="mean length of a text; default: 96, 256 on a GPU")
    made.add_argument("--tokens-per-pass", type=int, help="padded tokens at most; default: 16384, 32768 on a GPU")
    made.add_argument(
        "--slow-completions", type=int, help="completions for (a), its time scaled up; default: all, 8 on a GPU"
    )
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = made.parse_args()
    gpu = torch.device(args.device).type == "cuda"
    args.model = args.model or ("7b" if gpu else "0.16b")
    args.mean_tokens = args.mean_tokens or (256 if gpu else 96)
    # With their padding 16k tokens are more, and a second pass would move all weights again.
    args.tokens_per_pass = args.tokens_per_pass or (32768 if gpu else 16384)
    args.slow_completions = args.slow_completions or (8 if gpu else args.completions)
    return args


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    leave_out_cudnn()  # as every run
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    texts = make_texts(args.completions, SHAPES[args.model]["vocab_size"], args.mean_tokens)
    few = texts[: args.slow_completions]
    config = AutoConfig.for_model("qwen2", **SHAPES[args.model], max_position_embeddings=32768)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        with device:  # a GPU draws the numbers of 7B in seconds, a CPU in minutes
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(folder)
        del model
        gc.collect()
        report = measure(folder, config, device, dtype, texts, few, args)
    show(report, args)


def measure(
    folder: str, config: Any, device: torch.device, dtype: torch.dtype, texts: list, few: list, args: Any
) -> dict[str, Any]:
    """Peak memory of each way by itself, then their times in turns."""
    memory = Memory(device)
    files = WeightFiles(folder, "student_model")
    memory.start()
    source = HostWeights(files, dtype, pin=True) if device.type == "cuda" else files
    streamed = StreamedBackbone(source, config, device, dtype, "sdpa", "student_model")
    score_c = frozen(streamed, args.tokens_per_pass)
    _, result_c = synchronized(score_c, texts, device)
    peak_c, moved_c = memory.peak(), source.bytes_read
    source.bytes_read = 0
    ceiling = copy_ceiling(files, device)

    memory.start()
    load = {"dtype": dtype, "attn_implementation": "sdpa"}
    offloaded = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    weights = CountingWeights({name: value for name, value in offloaded.state_dict().items()})
    score_a = one_by_one(cpu_offload(offloaded, device, state_dict=weights), device)
    _, result_a = synchronized(score_a, few, device)
    peak_a, moved_a = memory.peak(), weights.bytes_read * len(texts) / len(few)

    memory.start()
    model = AutoModelForCausalLM.from_pretrained(folder, **load, device_map={"": device}).eval()
    resident = ResidentBackbone(model.requires_grad_(False), device)
    score_b = frozen(resident, args.tokens_per_pass)
    _, result_b = synchronized(score_b, texts, device)
    peak_b = memory.peak()

    seconds: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for _ in range(args.repeats):
        seconds["a"].append(synchronized(score_a, few, device)[0] * len(texts) / len(few))
        seconds["b"].append(synchronized(score_b, texts, device)[0])
        seconds["c"].append(synchronized(score_c, texts, device)[0])
    difference = {
        "a": max((x - y).abs().max().item() for x, y in zip(result_a, result_c, strict=False)),
        "b": max((x - y).abs().max().item() for x, y in zip(result_b, result_c, strict=True)),
    }
    size = sum(p.nbytes for p in resident.model.parameters())
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model_bytes": size,
        "parameters": sum(p.numel() for p in resident.model.parameters()),
        "tokens": sum(len(text.ids) for text in texts),
        "passes": count_passes(texts, args.tokens_per_pass, device),
        "seconds": seconds,
        "median": {name: statistics.median(values) for name, values in seconds.items()},
        "bytes_moved": {"a": moved_a, "b": 0, "c": moved_c},
        "peak_bytes": {"a": peak_a[0], "b": peak_b[0], "c": peak_c[0]},
        "peak_resident_bytes": {"a": peak_a[1], "b": peak_b[1], "c": peak_c[1]},
        "copy_ceiling": ceiling,
        "largest_difference": difference,
    }


def show(report: dict[str, Any], args: Any) -> None:
    ways = {"a": "one by one, cpu_offload", "b": "batched, resident", "c": "streamed"}
    print(
        f"{args.completions} completions, {report['tokens']} tokens, {report['passes']} passes; "
        f"{report['parameters'] / 1e6:.0f}M parameters, {report['model_bytes'] / 2**20:.0f} MiB, on {report['device']}"
    )
    print(f"{'':28}{'seconds':>10}{'a pass':>9}{'spread':>16}{'weights moved':>16}{'peak MiB':>10}{'of model':>10}")
    for way, title in ways.items():
        values, peak = report["seconds"][way], report["peak_bytes"][way]
        a_pass = "" if way == "a" else f"{report['median'][way] / report['passes']:.2f}"
        print(
            f"({way}) {title:24}{report['median'][way]:10.2f}{a_pass:>9}{min(values):11.2f}-{max(values):.2f}"
            f"{report['bytes_moved'][way] / report['model_bytes']:15.1f}x{peak / 2**20:10.0f}"
            f"{peak / report['model_bytes']:10.2f}"
        )
    if report["device"] != "cpu":
        resident = ", ".join(f"({way}) {peak / 2**20:.0f} MiB" for way, peak in report["peak_resident_bytes"].items())
        print(f"peak memory of the process beyond what it had: {resident}")
    median, moved = report["median"], report["bytes_moved"]
    rate = moved["c"] / median["c"]
    print(
        f"streamed: {median['a'] / median['c']:.2f}x as fast as (a), {median['c'] / median['b']:.2f}x the time of (b), "
        f"{moved['a'] / moved['c']:.0f}x fewer bytes than (a); "
        f"{rate / 1e9:.2f} GB/s, {rate / report['copy_ceiling']:.0%} of the {report['copy_ceiling'] / 1e9:.1f} GB/s "
        "that a bare copy reaches"
    )
    print(
        "largest difference of a log-probability: "
        + ", ".join(f"({k}) {v:.1e}" for k, v in report["largest_difference"].items())
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
