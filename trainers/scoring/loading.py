"""Builds what RL and scoring share: the renderers of teacher and student, and the scorer."""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from data.render import Encoded, Renderer
from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.attention import attention_of, suit_attention
from trainers.config import named_run
from trainers.errors import ConfigError, Fault
from trainers.models import (
    check_vocabulary,
    choose_pad_token,
    generation_end_ids,
    load_config,
    load_model,
    load_tokenizer,
)
from trainers.options import ScoringOptions
from trainers.plan.model_shapes import max_positions, model_shape, read_config
from trainers.scoring.explanation_scorer import ExplanationScorer
from trainers.scoring.frozen import FrozenModel, ResidentBackbone
from trainers.scoring.kept_scores import ScoreKeeper
from trainers.scoring.quantized import Sample, quantization_config, read_samples, report_change, reward_changes
from trainers.scoring.streaming import StreamedBackbone
from trainers.settings.reward_specs import model_keys
from trainers.student import Student
from trainers.texts import tag_format
from trainers.weights.adapter_files import base_of, tokenizer_of
from trainers.weights.weight_files import HostWeights, WeightFiles, fits_in_memory

logger = logging.getLogger(__name__)

REWARD_OPTIONS = tuple(TeacherLogprobKL.__dataclass_fields__)


def make_renderer(options: ScoringOptions, path: str, key: str) -> Renderer:
    """The template and tokenizer of the teacher (`key` is model_name_or_path) or the student (student_model).

    Args:
        path: A model or an adapter.
    """
    is_teacher = key == "model_name_or_path"
    trust = options.trust_remote_code
    base = base_of(path, key)
    config = load_config(base, key, trust)
    template = options.chat_template if is_teacher else options.student_chat_template
    tokenizer = load_tokenizer(tokenizer_of(path, key), template, options.eos_token if is_teacher else None, key, trust)
    attention_of(options.attn_implementation, config)
    rows = config.get_text_config().vocab_size
    choose_pad_token(tokenizer, rows, key)
    check_vocabulary(tokenizer, rows, key)
    kwargs = options.chat_template_kwargs if is_teacher else options.student_chat_template_kwargs
    return Renderer(tokenizer, tag_format(options), kwargs, key, generation_end_ids(base, trust))


def check_models(options: ScoringOptions) -> None:
    """Look at the models' configs, tokenizers and templates before any warm-up or weights; tell all faults together.

    Raises:
        ConfigError: With the faults of every model that is not `run:NAME`.
    """
    faults: list[Fault] = []
    for key in model_keys(options):
        path = getattr(options, key)
        if named_run(path) is None:
            try:
                make_renderer(options, path, key)
            except ConfigError as error:
                faults += error.faults
    if faults:
        raise ConfigError(faults)


def check_head(model: FrozenModel, backbone: ResidentBackbone | StreamedBackbone, temperature: float, key: str) -> None:
    """Compare the log-probabilities of a few tokens with those of the model's own logits: TRL's fused head knows what
    most families do between their last layer and their logits, not what all do. Of a model that is streamed only the
    head is read, and any states stand for its layers'.

    Raises:
        ConfigError: If they differ.
    """
    whole = backbone.model
    count = 16 if isinstance(backbone, StreamedBackbone) else 3
    ids = [i % whole.config.get_text_config().vocab_size for i in range(1, count + 1)]
    exact = whole.dtype == torch.float32 and backbone.device.type == "cpu"  # a GPU may compute fp32 as TF32
    tolerance = 1e-4 if exact else 0.5  # of the logits
    kind, remedy = type(whole).__name__, "a model of another family"
    try:
        if isinstance(backbone, StreamedBackbone):
            logits, found = _streamed_head(model, backbone, ids)
        else:
            logits, found = _resident_head(model, backbone, ids)
    except AttributeError as error:
        cause = f"the layers of {kind} cannot be asked apart from its head ({error})"
        raise ConfigError(Fault(key, whole.name_or_path, cause, remedy)) from error
    own = torch.log_softmax(logits.float() / temperature, -1).gather(1, logits.new_tensor(ids[1:]).long()[:, None])
    if not torch.allclose(found, own[:, 0].cpu(), rtol=0, atol=tolerance / min(1, temperature)):
        cause = f"{kind} does more between its layers and its logits than is known here: log-probabilities would be "
        cause += f"{found.tolist()} in place of {own[:, 0].tolist()}"
        raise ConfigError(Fault(key, whole.name_or_path, cause, remedy))


def _resident_head(model: FrozenModel, backbone: ResidentBackbone, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The logits `[tokens - 1, vocabulary]` of a model that reads some tokens, and the log-probabilities found here."""
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([ids], device=backbone.device), use_cache=False).logits[0, :-1]
    ((found, _),) = model.score([Encoded(ids, {}, [])], [[(1, len(ids))]])
    return logits, found[1:]


def _streamed_head(model: FrozenModel, backbone: StreamedBackbone, ids: list[int]) -> tuple[Tensor, Tensor]:
    shape = 1, len(ids) - 1, backbone.config.get_text_config().hidden_size
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(backbone.device, backbone.dtype)
    with backbone.placed_head():
        hidden, logits = backbone.finish(states)
        return logits[0], model.log_probs(hidden[0], torch.tensor(ids[1:], device=backbone.device))


def load_frozen(
    options: ScoringOptions,
    path: str,
    key: str,
    device: torch.device,
    dtype: torch.dtype,
    temperature: float,
    writable: bool = False,
    quantization: str | None = None,
    mode: str | None = None,
) -> FrozenModel:
    """Load a model that is only read, in the mode that the options (of a planned run) have unless `mode` says another.

    Args:
        path: Its folder or hub id.
        key: student_model, or model_name_or_path for the teacher as it was: the reference.
        temperature: Of its log-probabilities.
        quantization: None, `8bit` or `4bit`.
        writable: Whether `blend` will be called; weights that are streamed are then kept in host memory.

    Raises:
        ConfigError: If it cannot be loaded, or not in this mode.
    """
    mode = mode or (options.student_mode if key == "student_model" else options.reference_mode)
    assert mode != "auto", "the plan of memory decides it"
    trust, attention = options.trust_remote_code, options.attn_implementation
    if mode == "streamed":
        config = load_config(path, key, trust)
        on_gpu, attention = device.type == "cuda", attention_of(attention, config)

        def move(files: WeightFiles) -> Any:  # WeightFiles or HostWeights
            is_held = writable or (on_gpu and fits_in_memory(files.num_elements() * dtype.itemsize))
            return HostWeights(files, dtype, pin=on_gpu) if is_held else files

        backbone: ResidentBackbone | StreamedBackbone = StreamedBackbone(
            WeightFiles(path, key), config, device, dtype, attention, key, trust, move
        )
    else:
        device = torch.device("cpu") if mode == "cpu" else device
        arguments: dict[str, Any] = {"device_map": {"": device}}
        if quantization:
            arguments["quantization_config"] = quantization_config(quantization, dtype)
        model = load_model(path, dtype, attention, key, trust, **arguments)
        suit_attention(model, device)
        backbone = ResidentBackbone(model.eval().requires_grad_(False), device)
    frozen = FrozenModel(backbone, temperature, options.student_tokens_per_pass)
    if not quantization:
        check_head(frozen, backbone, temperature, key)
    name = "student" if key == "student_model" else "teacher" if options.stage == "score" else "reference"
    logger.info("%s: %s on %s", name, mode, device)
    return frozen


def make_scorer(
    options: ScoringOptions,
    output_dir: Path,
    student_path: str,
    student: Renderer,
    teacher: Renderer,
    device: torch.device,
    dtype: torch.dtype,
    samples: list[Sample],
) -> ExplanationScorer:
    """Load the student and put the reward's formula on it.

    Args:
        samples: Texts on which the change by a quantization is measured.
    """
    formula = TeacherLogprobKL(**{name: getattr(options, name) for name in REWARD_OPTIONS})
    # What RL scores at another time another policy has written; what stage=score is given is ranked as a whole.
    folder, by_batch = output_dir / "scores", options.stage == "rl"
    keeper = ScoreKeeper(folder, by_batch, formula) if options.keep_scores else None

    def load(quantization: str | None, mode: str | None = None) -> Student:
        temperature = options.student_temperature
        arguments = (options, student_path, "student_model", device, dtype, temperature)
        frozen = load_frozen(*arguments, quantization=quantization, mode=mode)
        return Student(frozen, student, max_positions(frozen.backbone.config))

    if kind := options.student_quantization:
        # Off the device, as a student is quantized where the full one is too large: the plan does not count that one.
        shape = model_shape(read_config(student_path, "student_model"), student_path, options.trust_remote_code)
        mode = "streamed" if shape.can_stream else "cpu"
        has_room = shape.can_stream or fits_in_memory(shape.num_parameters * dtype.itemsize)
        before = read_samples(load(None, mode), samples) if has_room else None
        clear_device_cache(garbage_collection=True)
        loaded = load(kind)
        padding = 0 if options.padding_in_kl else len(student.padding_ids)
        if before is None:
            logger.warning("student in %s: host memory has no room to read the full one: its change is not known", kind)
        else:
            report_change(kind, reward_changes(before, read_samples(loaded, samples), formula, padding))
    else:
        loaded = load(None)
    return ExplanationScorer(loaded, formula, teacher, options.padding_in_kl, keeper)
