"""2. The student: seconds per pass, resident and streamed, by tokens per pass; copies against what the card copies.

    python benchmarks/gpu/student.py --models FOLDER      about 3 minutes on an H100 (estimated); models are made once

Against one completion per forward with `accelerate.cpu_offload` and a log-softmax over all logits, its seconds per
completion measured on `--slow-completions`. Goals: at least 30 times as fast; copies hidden behind computing at 16k
tokens a pass (no slower than the resident student).
"""

import gc
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.gpu.report import Report, leave_without, parser, start
from trainers.plan.hardware import prepare_gpu

if __name__ == "__main__":
    prepare_gpu()

leave_without("student", "trl", "accelerate", "transformers", "jinja2", "datasets", "hydra", "omegaconf")

import torch
from accelerate import cpu_offload
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu.ceilings import pinned_copy
from benchmarks.score import Memory, Score, frozen, make_texts, one_by_one, synchronized
from benchmarks.shapes import SHAPES
from benchmarks.small_data import made_model
from data.render import Encoded
from trainers.attention import leave_out_cudnn
from trainers.scoring.frozen import ResidentBackbone
from trainers.scoring.streaming import StreamedBackbone
from trainers.weights.weight_files import HostWeights, WeightFiles

ATTENTION = "sdpa"


def timed(score: Score, texts: list[Encoded], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median seconds of a pass, after one that is not counted, and the most bytes that it held."""
    memory = Memory(device)
    memory.start()
    synchronized(score, texts, device)
    peak = memory.peak()[0]
    return statistics.median(synchronized(score, texts, device)[0] for _ in range(repeats)), peak


def main() -> None:
    made = parser(__doc__, "7b")
    made.add_argument("--passes", type=int, nargs="+", default=[4096, 16384, 65536], help="tokens a pass")
    made.add_argument("--mean-tokens", type=int, default=256, help="mean length of a text")
    made.add_argument("--slow-completions", type=int, default=8)
    made.add_argument("--repeats", type=int, default=3)
    arguments = made.parse_args()
    report = start("student", "2. The student", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        measure(report, arguments, str(made_model(arguments.models or Path(temporary), arguments.model)))
    report.close()


def measure(report: Report, arguments: object, folder: str) -> None:
    device = torch.device(arguments.device)
    leave_out_cudnn()  # as every run
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    texts = {
        tokens: make_texts(
            tokens // arguments.mean_tokens, SHAPES[arguments.model]["vocab_size"], arguments.mean_tokens
        )
        for tokens in arguments.passes
    }
    files = WeightFiles(folder, "student_model")
    source = HostWeights(files, dtype, pin=True) if device.type == "cuda" else files
    streamed = StreamedBackbone(source, AutoConfig.from_pretrained(folder), device, dtype, ATTENTION, "student_model")
    ceiling = pinned_copy(device) if device.type == "cuda" else pinned_copy(device, 2**24, 0.1)
    report.note(f"bare pinned copy {ceiling / 1e9:.1f} GB/s")
    rows = {}
    for tokens, batch in texts.items():
        score = frozen(streamed, 2 * tokens)  # texts vary in length: one pass, whatever they add up to
        source.bytes_read = 0
        seconds, peak = timed(score, batch, device, arguments.repeats)
        moved = source.bytes_read / (arguments.repeats + 1)
        rate = moved / seconds
        cells = {"streamed_s": seconds, "gb_per_s": rate / 1e9, "share_of_ceiling": rate / ceiling}
        cells |= {"bytes_moved": moved, "streamed_peak_gib": peak / 2**30}
        rows[tokens] = report.row(tokens=tokens, completions=len(batch), **cells)
    del streamed, source, score
    gc.collect()

    load = {"dtype": dtype, "attn_implementation": ATTENTION}
    model = AutoModelForCausalLM.from_pretrained(folder, **load, device_map={"": device}).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    resident = ResidentBackbone(model.requires_grad_(False), device)
    for tokens, batch in texts.items():
        stays, peak = timed(frozen(resident, 2 * tokens), batch, device, arguments.repeats)
        cells = {"resident_s": stays, "times_resident": rows[tokens]["streamed_s"] / stays}
        cells |= {"weights_moved": rows[tokens]["bytes_moved"] / size, "resident_peak_gib": peak / 2**30}
        report.more(rows[tokens], **cells)
    report.note(f"weights {size / 2**30:.2f} GiB")
    del model, resident
    gc.collect()

    offloaded = AutoModelForCausalLM.from_pretrained(folder, **load).eval()
    few = texts[arguments.passes[-1]][: arguments.slow_completions]
    score = one_by_one(cpu_offload(offloaded, device), device)
    synchronized(score, few[:1], device)
    memory = Memory(device)
    memory.start()
    slow = synchronized(score, few, device)[0] / len(few)
    slow_peak = memory.peak()[0] / 2**30
    for tokens, batch in texts.items():
        times = {"one_by_one_s": slow * len(batch), "times_as_fast": slow * len(batch) / rows[tokens]["streamed_s"]}
        report.row(against_tokens=tokens, **times, one_by_one_peak_gib=slow_peak)
    report.note(f"one completion per forward: {slow:.3g} s each, {len(few)} measured")


if __name__ == "__main__":
    main()
