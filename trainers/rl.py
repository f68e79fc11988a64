"""The RL stage: wires data, models, engine, student and trainer, and reports what training changed."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig

from data.render import Renderer
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.batch import batch_plan
from trainers.errors import ConfigError, Fault
from trainers.models import (
    choose_pad_token,
    load_config,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from trainers.options import trl_arguments
from trainers.outputs import MetricsWriter, Progress
from trainers.phases import PhaseTimer
from trainers.result import write_result
from trainers.scoring import StudentReward
from trainers.student import Student
from trainers.teacher_grpo import TeacherGRPOTrainer
from trainers.texts import load_eval_rows, load_train_rows, rl_rows, show_sample, tag_format
from trainers.trl_config import precision_arguments
from trainers.warmup import resolve_model

logger = logging.getLogger(__name__)

REWARD_OPTIONS = tuple(TeacherLogprobKL.__dataclass_fields__)


def run_rl(options: Any, output_dir: Path) -> Path:
    """Train the teacher, and save it with its tokenizer and template to `output_dir`.

    Returns:
        The folder of the trained teacher.
    """
    logger.info("batch: %s", batch_plan(options).equation())
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.precision, device)
    arguments = grpo_config(options, output_dir, dtype)
    rows, eval_rows = load_train_rows(options), load_eval_rows(options)
    teacher_path = resolve_model(options.model_name_or_path, options)
    student_path = resolve_model(options.student_model, options)
    teacher, student = (
        _renderer(options, teacher_path, "model_name_or_path"),
        _renderer(options, student_path, "student_model"),
    )
    train_set = rl_rows(rows, teacher, options, "training questions")
    eval_set = None if eval_rows is None else rl_rows(eval_rows, teacher, options, "held-out questions")
    show_sample("first teacher prompt", teacher.teacher(rows[0]["question"], rows[0]["solution"], "..."))
    show_sample("first student text", student.student(rows[0]["question"], "...", rows[0]["solution"]))

    timer = PhaseTimer()
    trust, attention = options.trust_remote_code, options.attn_implementation
    reward = StudentReward(
        student=Student(
            load_model(student_path, dtype, attention, "student_model", trust),
            student,
            device,
            options.student_temperature,
            options.student_tokens_per_pass,
            offload=options.offload_untrained_models and not options.disable_student_offloading,
        ),
        reward=TeacherLogprobKL(**{name: getattr(options, name) for name in REWARD_OPTIONS}),
        teacher_tokenizer=teacher.tokenizer,
        eos_ids=[teacher.tokenizer.eos_token_id, teacher.tokenizer.pad_token_id],
        max_student_tokens=load_config(student_path, "student_model", trust).get_text_config().max_position_embeddings,
        timer=timer,
    )
    trainer = TeacherGRPOTrainer(
        options=options,
        renderer=teacher,
        timer=timer,
        model=load_model(teacher_path, dtype, attention, "model_name_or_path", trust),
        reward_funcs=[reward],
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        processing_class=teacher.tokenizer,
        callbacks=[MetricsWriter(output_dir, timer), Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    before = trainer.evaluate() if options.report_before_after else None
    trainer.train()
    trainer.save_model(str(output_dir))
    if before is not None:
        write_result(output_dir, before, trainer.evaluate(), len(eval_set))
    return output_dir


def grpo_config(options: Any, output_dir: Path, dtype: torch.dtype) -> GRPOConfig:
    """TRL's arguments for these options; its own checks run here, before a model is loaded.

    Raises:
        ConfigError: If TRL refuses a value.
    """
    plan = batch_plan(options)
    derived = {
        "output_dir": str(output_dir),
        "seed": options.seed,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_generation": plan.aggregation,
        "remove_unused_columns": False,  # the reward reads question and solution
        "use_vllm": False,  # TeacherGRPOTrainer brings its own engine
        "disable_tqdm": True,  # our own Progress takes its place
        "trust_remote_code": options.trust_remote_code,
    }
    try:
        return GRPOConfig(**(trl_arguments(options, "grpo") | precision_arguments(options, dtype) | derived))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(Fault("TRL's GRPOConfig", ..., str(error), "correct the option it names")) from error


def _renderer(options: Any, path: str, key: str) -> Renderer:
    """The template and tokenizer of teacher or student."""
    is_teacher = key == "model_name_or_path"
    trust = options.trust_remote_code
    config = load_config(path, key, trust)
    template = options.chat_template if is_teacher else options.student_chat_template
    tokenizer = load_tokenizer(path, template, options.eos_token if is_teacher else None, key, trust)
    choose_pad_token(tokenizer, config.get_text_config().vocab_size, key)
    return Renderer(tokenizer, tag_format(options), options.chat_template_kwargs if is_teacher else None, key)
