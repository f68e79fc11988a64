"""Builds what RL and scoring share: the renderers of teacher and student, and the scorer."""

from pathlib import Path
from typing import Any

import torch

from data.render import Renderer
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.errors import ConfigError, Fault
from trainers.kept_scores import ScoreKeeper
from trainers.models import choose_pad_token, generation_end_ids, load_config, load_model, load_tokenizer
from trainers.reward_specs import model_keys
from trainers.scoring import ExplanationScorer
from trainers.student import FrozenModel, Student
from trainers.texts import tag_format

REWARD_OPTIONS = tuple(TeacherLogprobKL.__dataclass_fields__)


def make_renderer(options: Any, path: str, key: str) -> Renderer:
    """The template and tokenizer of the teacher (`key` is model_name_or_path) or the student (student_model)."""
    is_teacher = key == "model_name_or_path"
    trust = options.trust_remote_code
    config = load_config(path, key, trust)
    template = options.chat_template if is_teacher else options.student_chat_template
    tokenizer = load_tokenizer(path, template, options.eos_token if is_teacher else None, key, trust)
    choose_pad_token(tokenizer, config.get_text_config().vocab_size, key)
    kwargs = options.chat_template_kwargs if is_teacher else options.student_chat_template_kwargs
    return Renderer(tokenizer, tag_format(options), kwargs, key, generation_end_ids(path, trust))


def check_models(options: Any) -> None:
    """Look at the models' configs, tokenizers and templates before any warm-up or weights; tell all faults together.

    Raises:
        ConfigError: With the faults of every model that is not `run:NAME`.
    """
    faults: list[Fault] = []
    for key in model_keys(options):
        path = getattr(options, key)
        if not path.startswith("run:"):
            try:
                make_renderer(options, path, key)
            except ConfigError as error:
                faults += error.faults
    if faults:
        raise ConfigError(faults)


def make_scorer(
    options: Any,
    output_dir: Path,
    student_path: str,
    student: Renderer,
    teacher: Renderer,
    device: torch.device,
    dtype: torch.dtype,
) -> ExplanationScorer:
    """Load the student and put the reward's formula on it."""
    config = load_config(student_path, "student_model", options.trust_remote_code).get_text_config()
    model = load_model(student_path, dtype, options.attn_implementation, "student_model", options.trust_remote_code)
    frozen = FrozenModel(
        model,
        device,
        options.student_temperature,
        options.student_tokens_per_pass,
        offload=options.offload_untrained_models and not options.disable_student_offloading,
    )
    formula = TeacherLogprobKL(**{name: getattr(options, name) for name in REWARD_OPTIONS})
    keeper = ScoreKeeper(output_dir / "scores") if options.keep_scores else None
    judge = Student(frozen, student, config.max_position_embeddings)
    return ExplanationScorer(judge, formula, teacher.tokenizer, keeper)
