"""Warm-up by supervised fine-tuning (TRL's SFTTrainer): a model learns the teacher's or the student's format."""

from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from data.formats import Part
from data.render import Renderer
from trainers.errors import ConfigError, Fault
from trainers.models import (
    check_vocabulary,
    choose_pad_token,
    generation_end_ids,
    load_config,
    load_tokenizer,
    make_model,
    make_tokenizer,
    resolve_place,
)
from trainers.optimizers import OwnOptimizer
from trainers.options import SFTOptions, trl_arguments
from trainers.plan.workload import Plan
from trainers.settings.trl_config import precision_arguments, tell_length
from trainers.texts import check_traces, load_train_and_eval_rows, sft_parts, sft_rows, show_sample, tag_format
from trainers.watch.heartbeat import heartbeat
from trainers.watch.out_of_memory import out_of_memory_told
from trainers.watch.outputs import Interrupt, MetricsWriter, Progress, use_tensorboard_dir
from trainers.watch.phases import PhaseTimer
from trainers.weights.adapter_files import base_of, tokenizer_of
from trainers.weights.model_card import write_model_card
from trainers.weights.saving import OwnSaving
from trainers.weights.starts import load_teacher, resolve_start


class WarmupTrainer(OwnOptimizer, OwnSaving, SFTTrainer):
    """TRL's trainer with the optimizer of our options.

    Args:
        timer: Is told what goes on.
    """

    def __init__(self, options: SFTOptions, timer: PhaseTimer, **kwargs: Any) -> None:
        self.options, self.timer = options, timer
        super().__init__(**kwargs)
        self.watch_updates()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.timer.during("evaluation", "loss"):
            return super().evaluate(*args, **kwargs)


def run_sft(
    options: SFTOptions, output_dir: Path, model_path: str | None, num_devices: int = 1, plan: Plan | None = None
) -> None:
    """Train, and save the model with its tokenizer and template to `output_dir`.

    Args:
        options: SFT options.
        output_dir: Where everything goes.
        model_path: The model or the adapter to start from; None makes the model of `options.model_init`.
        num_devices: Processes that train together.
        plan: Of its memory: told where that runs out.
    """
    tell_length(options)
    device, dtype = resolve_place(options)
    rows, eval_rows = load_train_and_eval_rows(options)
    check_traces(rows, options, "training data")
    if eval_rows is not None:
        check_traces(eval_rows, options, "held-out data")
    start = None if model_path is None else resolve_start(options, model_path, output_dir, dtype)
    tokenizer = _tokenizer(options, None if start is None else start.tokenizer, rows)
    ends = () if start is None else generation_end_ids(start.path, options.trust_remote_code)
    renderer = Renderer(tokenizer, tag_format(options), options.chat_template_kwargs, "model_name_or_path", ends)
    train_set = sft_rows(rows, renderer, options, "training data")
    eval_set = None if eval_rows is None else sft_rows(eval_rows, renderer, options, "held-out data")
    first = next(row for row in rows if row["reasoning_trace"])
    show_sample(f"first {options.sft_role} text", sft_parts(first, renderer, options.sft_role))
    arguments = sft_config(options, output_dir, num_devices, dtype)
    use_tensorboard_dir(output_dir)
    timer = PhaseTimer()
    with heartbeat(timer, output_dir), out_of_memory_told(timer, device, plan, output_dir):
        if start is None:
            model = make_model(options.model_init, tokenizer, options.seed, dtype, options.attn_implementation)
        else:
            model = load_teacher(options, start.path, dtype, start.adapter)
        trainer = WarmupTrainer(
            options=options,
            timer=timer,
            model=model,
            args=arguments,
            train_dataset=train_set,
            eval_dataset=eval_set,
            processing_class=tokenizer,
            callbacks=[MetricsWriter(output_dir, timer), Interrupt(), Progress()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.save_model(str(output_dir))
    if trainer.is_world_process_zero():
        write_model_card(output_dir, options, renderer.end_ids)


def sft_config(options: SFTOptions, output_dir: Path, num_devices: int, dtype: Any) -> SFTConfig:
    """TRL's arguments for these options; its own checks run here, before a model is loaded.

    Raises:
        ConfigError: If TRL refuses a value.
    """
    per_device = options.per_device_train_batch_size
    arguments = trl_arguments(options, "sft") | precision_arguments(options, dtype)
    try:
        return SFTConfig(
            **{
                **arguments,
                "output_dir": str(output_dir),
                "activation_offloading": options.activation_offloading,
                "seed": options.seed,
                "gradient_accumulation_steps": options.train_batch_size // (per_device * num_devices),
                # An evaluation takes no more memory than a step, which is planned.
                "per_device_eval_batch_size": min(options.per_device_eval_batch_size, per_device),
                "disable_tqdm": True,  # our own Progress takes its place
            }
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(Fault("TRL's SFTConfig", ..., str(error), "correct the option it names")) from error


def _tokenizer(options: SFTOptions, model_path: str | None, rows: Any) -> Any:
    """The tokenizer of the model to train: the model's, or a fresh one made from the data."""
    if model_path is not None:
        trust = options.trust_remote_code
        key, template = "model_name_or_path", options.chat_template
        vocab_size = load_config(base_of(model_path, key), key, trust).get_text_config().vocab_size
        tokenizer = load_tokenizer(tokenizer_of(model_path, key), template, options.eos_token, key, trust)
    else:
        vocab_size = options.model_init.get("vocab_size", 512)
        tags = tag_format(options)
        plain = Renderer(make_tokenizer([], [], 512), tags, None, "model_init")
        texts = (_text(plain.teacher(**_row(r))) + _text(plain.student(**_row(r))) for r in rows)
        tokenizer = make_tokenizer(texts, tags.every_tag, vocab_size)
    choose_pad_token(tokenizer, vocab_size, "model_name_or_path")
    check_vocabulary(tokenizer, vocab_size, "model_name_or_path")
    return tokenizer


def _row(row: dict[str, str]) -> dict[str, str]:
    return {"question": row["question"], "solution": row["solution"], "explanation": row["reasoning_trace"]}


def _text(parts: list[Part]) -> str:
    return "".join(part.text for part in parts)
