"""A small TeacherGRPOTrainer on the real engine, in this process, for tests that need to reach into it."""

from pathlib import Path

import torch
from conftest import ROWS
from datasets import Dataset

from trainers.options import options_class
from trainers.rl import grpo_config, load_teacher, start_engine
from trainers.rollout.sampler import RolloutSampler
from trainers.rollout.sentinel import Sentinel
from trainers.teacher_grpo import TeacherGRPOTrainer
from trainers.texts import rl_rows
from trainers.watch.memory_watch import MemoryWatch
from trainers.watch.outputs import MetricsWriter
from trainers.watch.phases import PhaseTimer

CPU = torch.device("cpu")


def by_parity(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def small_options(**options):
    defaults = {
        "teacher_system_prompt": "Explain.",
        "student_system_prompt": "Solve.",
        "max_prompt_length": 128,
        "max_completion_length": 16,
        "train_batch_size": 8,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "learning_rate": 1e-3,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "report_before_after": False,
        "padding_in_kl": False,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 3.0,
        "num_iterations": 1,
        "temperature": 1.0,
        "beta": 0.0,
    }
    return options_class("rl")(**defaults | options)


def make_engine(options, renderer, model_dir, output_dir, dtype=torch.float32, adapter=None):
    model = load_teacher(options, str(model_dir), dtype, adapter)
    return start_engine(options, model, renderer, str(model_dir), CPU, dtype, Path(output_dir)), model


def make_trainer(
    renderer,
    model_dir,
    output_dir,
    callbacks=(),
    dtype=torch.float32,
    adapter=None,
    reward_funcs=(by_parity,),
    **chosen,
):
    options = small_options(**chosen)
    rows = rl_rows(Dataset.from_list(ROWS * 8), renderer, options, "questions")
    if options.use_vllm:
        engine, model = make_engine(options, renderer, model_dir, output_dir, dtype, adapter)
        prompt = renderer.encode_prompt(rows[0]["prompt"])
        sentinel = Sentinel(engine, model, prompt, dtype, options.sentinel_tolerance)
    else:
        engine, sentinel, model = None, None, load_teacher(options, str(model_dir), dtype, adapter)
    timer = PhaseTimer(MemoryWatch(CPU))
    return TeacherGRPOTrainer(
        options=options,
        sampler=RolloutSampler(options, renderer, timer, engine, sentinel),
        timer=timer,
        model=model,
        reward_funcs=list(reward_funcs),
        args=grpo_config(options, Path(output_dir), dtype),
        reference=None,
        probes=None,
        student_reward=None,
        train_dataset=rows,
        processing_class=renderer.tokenizer,
        callbacks=[MetricsWriter(Path(output_dir), timer), *callbacks],
    )
