"""The ways of training that `benchmarks/bridges.py` compares: this project's trainer with each bridge, and TRL's."""

import argparse
import functools
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.preset_run import used_of_card
from benchmarks.shapes import SHAPES
from benchmarks.small_data import WORD
from data.render import Renderer

OURS = ("shared", "copy", "lora", "restart", "score", "score-overlap")
THEIRS = ("trl", "trl-fastest", "trl-lora", "trl-lora-fastest")
READY = "ready for a step"
STEP = "step "  # a line of this begin tells what one took
ROWS = [{"question": f"What is {i}+{i + 1}?", "solution": str(2 * i + 1)} for i in range(64)]


@dataclass(frozen=True)
class Setup:
    """What a way works with.

    Attributes:
        folder: The model's.
        out: What it may write to.
        arguments: Sizes of the work (benchmarks/bridges.py).
        device, dtype: Where and in which type it computes.
    """

    folder: str
    out: str
    arguments: argparse.Namespace
    device: torch.device
    dtype: torch.dtype


def place() -> tuple[torch.device, torch.dtype]:
    """The GPU and bf16, or the CPU and fp32."""
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.bfloat16
    return torch.device("cpu"), torch.float32


def cpu_kv_cache(arguments: argparse.Namespace) -> int:
    """Bytes of the KV cache that the work fills, as the plan of a run sizes it on a CPU."""
    shape = SHAPES[arguments.model]
    each = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * 4
    each *= shape["hidden_size"] // shape["num_attention_heads"]
    return arguments.questions * arguments.generations * (arguments.prompt + arguments.completion + 64) * each


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
                told = ", ".join(f"{phase} {seconds:.4g} s" for phase, seconds in clock.steps[-1].items())
                print(f"{STEP}{len(clock.steps) - 1}: {told}", flush=True)

        return Steps()


def work(way: str, folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps one way; return the seconds of each step by phase, and what was held."""
    import transformers

    device, dtype = place()
    transformers.logging.set_verbosity_error()
    peak = Peak(device)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as out:
        trained = ours if way in OURS else stock
        trainer, bytes_held = trained(way, Setup(folder, out, arguments, device, dtype), clock)
        trainer.add_callback(clock.callback())
        with peak:
            trainer.train()
        held = {"weight_bytes": bytes_held(), "peak_bytes": peak.bytes}
        return {"steps": clock.steps[1:]} | held | (freed_by_release(trainer) if way in OURS else {})


class Peak:
    """The most of the card that was in use, looked at 50 times a second, beyond what others used when this was made; in
    bytes, None on a CPU. To be made before this process takes any of the card.

    What vLLM's allocator gives back it unmaps behind torch's back: torch's own peak would count it on.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._before = used_of_card() if device.type == "cuda" else 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True) if device.type == "cuda" else None

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            free, total = torch.cuda.mem_get_info()
            self.bytes = max(self.bytes or 0, total - free - self._before)

    def __enter__(self) -> "Peak":
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread:
            self._thread.join()


def freed_by_release(trainer: Any) -> dict[str, int]:
    """Free bytes of the GPU with the KV cache of our trainer's engine in place, and after its release where it can."""
    engine = trainer.sampler.engine
    if not engine.can_release:
        return {}
    engine.restore_cache()
    before = torch.cuda.mem_get_info()[0]
    engine.release_cache()
    return {"free_before_release": before, "free_after_release": torch.cuda.mem_get_info()[0]}


def training_arguments(setup: Setup) -> dict[str, Any]:
    """What both trainers are told."""
    arguments = setup.arguments
    completions = arguments.questions * arguments.generations
    return {
        "max_steps": arguments.steps + 1,
        "learning_rate": 1e-5,
        "num_generations": arguments.generations,
        "per_device_train_batch_size": arguments.micro_batch or completions,
        "max_completion_length": arguments.completion,
        "temperature": 1.0,
        "beta": 0.0,
        "gradient_checkpointing": arguments.checkpointing,
        "generation_kwargs": {"min_tokens": arguments.completion, "ignore_eos": True},
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "vllm_gpu_memory_utilization": arguments.utilization,
    }


def our_options(setup: Setup, bridge: str, **further: Any) -> Any:
    """This project's options for the work of `setup`."""
    from trainers.options import options_class

    arguments = setup.arguments
    if setup.device.type == "cpu":
        further |= {"kv_cache_gib": cpu_kv_cache(arguments) / 2**30}
    return options_class("rl")(
        model_name_or_path=setup.folder,
        teacher_system_prompt="Explain.",
        student_system_prompt="Solve.",
        max_prompt_length=arguments.prompt,
        max_num_seqs=arguments.questions * arguments.generations,
        train_batch_size=arguments.questions * arguments.generations,
        weight_bridge=bridge,
        use_peft=bridge == "lora",
        stop_at_closing_tag=False,
        padding_in_kl=False,
        **training_arguments(setup) | further,
    )


def prompts_of(options: Any, folder: str, full: bool = False) -> tuple[Renderer, Any]:
    """The teacher's renderer, and `ROWS` as it renders them; `full`: with prompts as long as they may be."""
    from datasets import Dataset

    from trainers.scoring.loading import make_renderer
    from trainers.texts import rl_rows

    renderer = make_renderer(options, folder, "model_name_or_path")
    rows = rl_rows(Dataset.from_list(ROWS), renderer, options, "questions")
    if full:
        longest = max(len(renderer.encode_prompt(prompt)) for prompt in rows["prompt"])
        more = (options.max_prompt_length - longest) // len(renderer.encode_text(WORD))
        longer = [row | {"question": row["question"] + WORD * more} for row in ROWS]
        rows = rl_rows(Dataset.from_list(longer), renderer, options, "questions")
    return renderer, rows


def ours(way: str, setup: Setup, clock: Clock) -> tuple[Any, Callable[[], int]]:
    """This project's trainer, and what counts the bytes of its weights."""
    from trainers.rl import grpo_config, load_teacher, start_engine
    from trainers.rollout.sampler import RolloutSampler
    from trainers.rollout.sentinel import Sentinel
    from trainers.teacher_grpo import TeacherGRPOTrainer
    from trainers.watch.outputs import MetricsWriter
    from trainers.watch.phases import PhaseTimer

    further = {"optim": setup.arguments.optim, "overlap_scoring": way == "score-overlap"}
    if way.startswith("score"):
        further |= {"student_model": setup.folder, "student_mode": "cpu", "student_tokens_per_pass": 16384}
        further |= {"include_teacher_think_entropy": False}  # with min_tokens, see preset_run.py
    options = our_options(setup, "shared" if way.startswith("score") else way, **further)
    renderer, rows = prompts_of(options, setup.folder, setup.arguments.full_prompts)
    model = load_teacher(options, setup.folder, setup.dtype)
    engine = start_engine(options, model, renderer, setup.folder, setup.device, setup.dtype, Path(setup.out))
    reward = judge_by_student(options, setup, renderer) if way.startswith("score") else by_parity
    timer = PhaseTimer()
    sentinel = Sentinel(engine, model, renderer.encode_prompt(rows[0]["prompt"]), setup.dtype, None)
    sampler = RolloutSampler(options, renderer, timer, engine, sentinel)
    sampler.ahead = getattr(reward, "ahead", None)
    trainer = TeacherGRPOTrainer(
        options=options,
        sampler=sampler,
        timer=timer,
        model=model,
        reward_funcs=[reward],
        args=grpo_config(options, Path(setup.out), setup.dtype),
        reference=None,
        probes=None,
        student_reward=None,
        train_dataset=rows,
        processing_class=renderer.tokenizer,
        callbacks=[MetricsWriter(Path(setup.out), timer)],
    )
    clock.wrap(engine, "restore_cache", "kv cache")
    clock.wrap(engine, "release_cache", "kv cache")
    clock.wrap(engine, "sync_weights", "sync")
    clock.wrap(sentinel, "check", "sentinel")
    clock.wrap(engine, "generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    if sampler.ahead is not None:
        clock.wrap(sampler.ahead, "wait", "score")
    return trainer, engine.bridge.weight_bytes


def judge_by_student(options: Any, setup: Setup, teacher: Renderer) -> Any:
    """The reward of a student on the CPU."""
    from trainers.rl import make_student_reward
    from trainers.scoring.loading import make_renderer, make_scorer

    student = make_renderer(options, setup.folder, "student_model")
    scorer = make_scorer(options, Path(setup.out), setup.folder, student, teacher, setup.device, setup.dtype, [])
    return make_student_reward(options, scorer, setup.device)


def stock(way: str, setup: Setup, clock: Clock) -> tuple[Any, Callable[[], int]]:
    """TRL's trainer, and what counts the bytes of its weights and its engine's."""
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import GRPOTrainer

    from trainers.models import load_model
    from trainers.options import options_class
    from trainers.weights.shared_weights import held_bytes

    adapt_vllm_of_trl(setup)
    arguments, folder = setup.arguments, setup.folder
    prompts = options_class("rl")(
        teacher_system_prompt="Explain.", student_system_prompt="Solve.", max_prompt_length=arguments.prompt
    )
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(
        model=load_model(folder, setup.dtype, None, "model_name_or_path", False),
        reward_funcs=[by_parity],
        args=stock_config(way, setup),
        train_dataset=prompts_of(prompts, folder, arguments.full_prompts)[1],
        processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
        peft_config=adapters if way.startswith("trl-lora") else None,
    )
    clock.wrap(trainer.vllm_generation, "sync_weights", "sync")
    clock.wrap(trainer.vllm_generation, "generate", "generate")
    clock.wrap(trainer, "_calculate_rewards", "score")
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.worker.model_runner
    return trainer, lambda: held_bytes(trainer.model.parameters(), runner.model.parameters())


def stock_config(way: str, setup: Setup) -> Any:
    """TRL's arguments."""
    from trl import GRPOConfig

    arguments = setup.arguments
    completions = arguments.questions * arguments.generations
    return GRPOConfig(
        output_dir=setup.out,
        gradient_accumulation_steps=completions // (arguments.micro_batch or completions),
        use_cpu=setup.device.type == "cpu",
        bf16=setup.dtype == torch.bfloat16,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=arguments.prompt + arguments.completion,
        vllm_enable_sleep_mode=arguments.sleep,
        vllm_importance_sampling_correction=not way.endswith("fastest"),
        disable_tqdm=True,
        # What torchao's optimizer of 8 bits is called there, and torch's own, as TRL takes it of its own accord.
        optim={"adamw_8bit": "adamw_torch_8bit", "adamw_torch": "adamw_torch_fused"}[arguments.optim],
        **training_arguments(setup),
    )


def adapt_vllm_of_trl(setup: Setup) -> None:
    """Give TRL's engine the arguments that this project's has, so that only the trainers differ."""
    from trainers.engine_setup import prepare_environment
    from trainers.settings.engine_specs import batched_tokens

    prepare_environment(setup.device)
    import trl.generation.vllm_generation as generation

    changes: dict[str, Any] = {"dtype": str(setup.dtype).removeprefix("torch.")}
    if setup.device.type == "cuda":
        options = our_options(setup, "shared")
        changes["max_num_batched_tokens"] = batched_tokens(options, options.max_num_seqs)
    else:
        from trainers.weights.cpu_kernels import adapt_vllm

        adapt_vllm()
        changes |= {"enforce_eager": True, "distributed_executor_backend": "uni", "max_num_batched_tokens": 8192}
        changes |= {"block_size": 32, "enable_chunked_prefill": False}
        # Of its own accord it would take a share of the machine's memory for its KV cache, and touch all of it.
        changes |= {"kv_cache_memory_bytes": cpu_kv_cache(setup.arguments), "gpu_memory_utilization": 0.01}
    engine_class = generation.LLM
    generation.LLM = lambda **kwargs: engine_class(**kwargs | changes)
