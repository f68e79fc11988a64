"""A GRPO step with each weight bridge, and with stock `trl.GRPOTrainer` on the same engine, in one run.

    python benchmarks/bridges.py                    on a CPU: 34M random parameters, 16 completions of 48 tokens a step
    python benchmarks/bridges.py --model 7b         on a GPU: the shape of Qwen2.5-7B, 64 completions of 256 tokens

Ways:
    shared, copy, restart       this project's bridges, all weights trained
    lora                        this project's, adapters of rank 16 trained
    trl                         TRL's trainer as it comes: vllm_mode=colocate, its importance-sampling correction on
    trl-fastest                 the same without that correction, so without the forward pass it costs
    trl-lora                    TRL as it comes, adapters of rank 16 trained: it merges them and copies all weights
    score, score-overlap        shared, with this project's reward by a student of the same shape on the CPU, afterwards
                                and while the engine still generates (overlap_scoring)

Every way samples as many tokens from the same prompts (end of turn ignored), earns the same kind of reward (score ways
aside), and updates with the same optimizer. TRL's engine gets this project's engine arguments (fp32 and eager on a CPU,
where it would otherwise compile); on a CPU both need the live linear weights of `keep_linear_weights_on_cpu`.

Each way runs in a process of its own: one step that is not counted, then `--steps` that are. The ways take turns step
by step, so that what else happens on the machine meets them alike; with `--one-by-one` (always on a GPU, which would
not hold them all) one ends before the next begins. Medians are printed, `rest` is the update; the ratios are medians
over the rounds. The last line is JSON.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

from benchmarks.shapes import SHAPES
from data.formats import TAG_FORMATS
from trainers.models import make_model, make_tokenizer

OURS = ("shared", "copy", "lora", "restart", "score", "score-overlap")
READY = "ready for a step"
THEIRS = ("trl", "trl-fastest", "trl-lora")
TAGS = TAG_FORMATS["stratos"].with_prompts("Explain.", "Solve.")
ROWS = [{"question": f"What is {i}+{i + 1}?", "solution": str(2 * i + 1)} for i in range(64)]


def by_parity(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs nothing and differs within a group."""
    return [float(sum(ids) % 2) for ids in completion_ids]


class Clock:
    """Seconds by phase, of functions that it wraps."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.inside = device, False
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:  # one timed function calls another: the outer one's time
                return function(*args, **kwargs)
            self.inside, start = True, self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[phase] += self.now() - start

        setattr(owner, name, timed)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                print(READY, flush=True)
                sys.stdin.readline()
                clock.seconds.clear()
                clock.start = clock.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                total = clock.now() - clock.start
                clock.steps.append({**clock.seconds, "step": total, "rest": total - sum(clock.seconds.values())})

        return Steps()


def make_folder(folder: str, shape: dict[str, Any], dtype: torch.dtype) -> None:
    """A random model and its tokenizer, as a checkpoint."""
    tags = [t for pair in (TAGS.explanation, TAGS.thought, TAGS.solution) for t in pair]
    tokenizer = make_tokenizer([" ".join(row.values()) for row in ROWS] * 4, tags, 400)
    model = {"model_type": "qwen2", "max_position_embeddings": 4096, **shape}
    make_model(model, tokenizer, 0, dtype, None).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def work(way: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps one way; return the seconds of each step by phase, and what was held."""
    import transformers

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    transformers.logging.set_verbosity_error()
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as out:
        trained = ours if way in OURS else stock
        trainer, bytes_held = trained(way, folder, out, arguments, device, dtype, clock)
        trainer.add_callback(clock.callback())
        trainer.train()
        return {"steps": clock.steps[1:], "weight_bytes": bytes_held()} | freed_by_release(trainer, device)


def freed_by_release(trainer: Any, device: torch.device) -> dict[str, int]:
    """Free bytes of the GPU with the KV cache in place and after its release."""
    engine = getattr(trainer, "engine", None)
    if engine is None or device.type != "cuda":
        return {}
    engine.restore_cache()
    before = torch.cuda.mem_get_info()[0]
    engine.release_cache()
    return {"free_before_release": before, "free_after_release": torch.cuda.mem_get_info()[0]}


def training_arguments(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What both trainers are told."""
    completions = arguments.questions * arguments.generations
    return {
        "max_steps": arguments.steps + 1,
        "learning_rate": 1e-5,
        "num_generations": arguments.generations,
        "per_device_train_batch_size": arguments.micro_batch or completions,
        "max_completion_length": arguments.completion,
        "temperature": 1.0,
        "beta": 0.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": device.type == "cuda",
        "generation_kwargs": {"min_tokens": arguments.completion, "ignore_eos": True},
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "vllm_gpu_memory_utilization": arguments.utilization,
    }


def ours(
    way: str,
    folder: str,
    out: str,
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
) -> tuple[Any, Any]:
    """This project's trainer."""
    from datasets import Dataset

    from trainers.judges import make_renderer, make_scorer
    from trainers.options import options_class
    from trainers.outputs import MetricsWriter
    from trainers.phases import PhaseTimer
    from trainers.rl import grpo_config, load_teacher, make_judge, start_engine
    from trainers.sentinel import Sentinel
    from trainers.teacher_grpo import TeacherGRPOTrainer
    from trainers.texts import rl_rows

    bridge = {"score": "shared", "score-overlap": "shared"}.get(way, way)
    options = options_class("rl")(
        model_name_or_path=folder,
        student_model=folder,
        student_mode="cpu",
        teacher_system_prompt="Explain.",
        student_system_prompt="Solve.",
        max_prompt_length=arguments.prompt,
        train_batch_size=arguments.questions * arguments.generations,
        weight_bridge=bridge,
        use_peft=bridge == "lora",
        stop_at_closing_tag=False,
        padding_in_kl=False,
        overlap_scoring=way == "score-overlap",
        **training_arguments(arguments, device),
    )
    teacher = make_renderer(options, folder, "model_name_or_path")
    rows = rl_rows(Dataset.from_list(ROWS), teacher, options, "questions")
    model = load_teacher(options, folder, dtype)
    engine = start_engine(options, model, teacher, folder, device, dtype, Path(out))
    reward: Any = by_parity
    if way.startswith("score"):
        student = make_renderer(options, folder, "student_model")
        reward = make_judge(
            options, make_scorer(options, Path(out), folder, student, teacher, device, dtype, []), device
        )
    timer = PhaseTimer()
    trainer = TeacherGRPOTrainer(
        options=options,
        renderer=teacher,
        timer=timer,
        model=model,
        reward_funcs=[reward],
        args=grpo_config(options, Path(out), dtype),
        reference=None,
        probes=None,
        engine=engine,
        sentinel=Sentinel(engine, model, teacher.encode_prompt(rows[0]["prompt"]), dtype, None),
        ahead=getattr(reward, "ahead", None),
        train_dataset=rows,
        processing_class=teacher.tokenizer,
        callbacks=[MetricsWriter(Path(out), timer)],
    )
    clock.wrap(engine, "restore_cache", "kv cache")
    clock.wrap(engine, "release_cache", "kv cache")
    clock.wrap(engine, "sync_weights", "sync")
    clock.wrap(trainer.sentinel, "check", "sentinel")
    clock.wrap(engine, "generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    return trainer, engine.bridge.weight_bytes


def stock(
    way: str,
    folder: str,
    out: str,
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
) -> tuple[Any, Any]:
    """TRL's trainer."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from trainers.bridges import keep_linear_weights_on_cpu
    from trainers.engine import prepare_environment
    from trainers.judges import make_renderer
    from trainers.models import load_model
    from trainers.options import options_class
    from trainers.shared_weights import held_bytes
    from trainers.texts import rl_rows

    prepare_environment(device)
    import trl.generation.vllm_generation as generation

    changes: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cpu":
        keep_linear_weights_on_cpu()
        changes |= {"enforce_eager": True, "distributed_executor_backend": "uni", "max_num_batched_tokens": 8192}
    engine_class = generation.LLM
    generation.LLM = lambda **kwargs: engine_class(**kwargs | changes)
    prompts = options_class("rl")(
        teacher_system_prompt="Explain.", student_system_prompt="Solve.", max_prompt_length=arguments.prompt
    )
    teacher = make_renderer(prompts, folder, "model_name_or_path")
    rows = rl_rows(Dataset.from_list(ROWS), teacher, prompts, "questions")
    completions = arguments.questions * arguments.generations
    config = GRPOConfig(
        output_dir=out,
        gradient_accumulation_steps=completions // (arguments.micro_batch or completions),
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=arguments.prompt + arguments.completion,
        vllm_importance_sampling_correction=way != "trl-fastest",
        disable_tqdm=True,
        **training_arguments(arguments, device),
    )
    trainer = GRPOTrainer(
        model=load_model(folder, dtype, None, "model_name_or_path", False),
        reward_funcs=[by_parity],
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if way == "trl-lora" else None,
    )
    clock.wrap(trainer.vllm_generation, "sync_weights", "sync")
    clock.wrap(trainer.vllm_generation, "generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return trainer, lambda: held_bytes(trainer.model.parameters(), runner.model.parameters())


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="1.5b" if gpu else "34m")
    parser.add_argument("--ways", nargs="+", choices=(*OURS, *THEIRS), default=[*OURS, *THEIRS])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--one-by-one", action="store_true", default=gpu)
    parser.add_argument("--questions", type=int, default=8 if gpu else 4)
    parser.add_argument("--generations", type=int, default=8 if gpu else 4)
    parser.add_argument("--prompt", type=int, default=256 if gpu else 64, help="longest prompt, in tokens")
    parser.add_argument("--completion", type=int, default=256 if gpu else 48, help="tokens of each completion")
    parser.add_argument("--micro-batch", type=int, default=8 if gpu else None, help="completions in one backward pass")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the GPU for vLLM")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.way:
        print(json.dumps(work(arguments.way, arguments.folder, arguments)))
        return
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        make_folder(folder, SHAPES[arguments.model], dtype)
        runs: dict[str, dict[str, Any]] = {}
        for together in [[way] for way in arguments.ways] if arguments.one_by_one else [arguments.ways]:
            workers = {way: Worker(way, folder) for way in together}
            for _ in range(arguments.steps + 1):
                for worker in workers.values():
                    worker.step()
            runs |= {way: worker.result() for way, worker in workers.items()}
    report(runs, arguments)


class Worker:
    """The process of one way; it has started when it is ready for its first step."""

    def __init__(self, way: str, folder: str) -> None:
        self.way = way
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process writes
        command = [sys.executable, *sys.argv, "--way", way, "--folder", folder]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self._last = self._read()

    def _read(self) -> str:
        """What it says next: that it is ready, or its result."""
        for line in self.process.stdout:
            if line.strip() == READY or line.startswith('{"steps"'):
                return line.strip()
        self.errors.seek(0)
        sys.exit(f"{self.way} failed:\n{self.errors.read()[-3000:]}")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._last = self._read()

    def result(self) -> dict[str, Any]:
        self.process.wait()
        return json.loads(self._last)


def report(runs: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table, the ratios and a line of JSON."""
    tokens = arguments.questions * arguments.generations * arguments.completion
    phases = ("kv cache", "sync", "sentinel", "generate", "score", "rest", "step")
    result: dict[str, dict[str, float]] = {}
    for way, run in runs.items():
        steps = run["steps"]
        result[way] = {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in phases}
        result[way]["tokens_per_second"] = tokens / result[way]["generate"]
        result[way]["weight_mib"] = run["weight_bytes"] / 2**20
        for name in ("free_before_release", "free_after_release"):
            if name in run:
                result[way][f"{name}_gib"] = run[name] / 2**30
    columns = {"kv cache ms": 1e3, "sync ms": 1e3, "sentinel ms": 1e3, "generate s": 1, "score s": 1, "rest s": 1}
    columns |= {"step s": 1, "tokens_per_second": 1, "weight_mib": 1}
    print(f"{'':14}" + "".join(f"{head.replace('_per_second', '/s').replace('_', ' '):>12}" for head in columns))
    for way, row in result.items():
        values = [row[head.removesuffix(" ms").removesuffix(" s")] * factor for head, factor in columns.items()]
        print(f"{way:14}" + "".join(f"{value:12.2f}" for value in values))
    for way in ("shared", "copy", "lora"):
        for other in THEIRS:
            if way in result and other in result and (way == "lora") == (other == "trl-lora"):
                print(f"a step of {way} against {other}: {times_as_fast(runs[other], runs[way])}")
    if {"score", "score-overlap"} <= set(result):
        print(f"overlap_scoring: {times_as_fast(runs['score'], runs['score-overlap'])} as without")
    print(json.dumps({"model": arguments.model, "tokens": tokens, "ways": result}))


def times_as_fast(slow: dict[str, Any], fast: dict[str, Any]) -> str:
    """Median, least and largest ratio of the two ways' steps of the same round."""
    ratios = sorted(a["step"] / b["step"] for a, b in zip(slow["steps"], fast["steps"], strict=True))
    return f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) as fast"


if __name__ == "__main__":
    main()
