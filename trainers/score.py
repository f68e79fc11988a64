"""stage=score: the reward of explanations from anywhere, one line each in scores.jsonl."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from data.explanation import written_explanation
from data.load import read_rows, select_texts
from data.render import Renderer
from trainers.config import named_run
from trainers.errors import ConfigError, Fault
from trainers.merge import whole_model
from trainers.models import resolve_place
from trainers.options import ScoreOptions
from trainers.plan.planning import planned
from trainers.plan.workload import SCORED_AT_ONCE
from trainers.scoring.explanation_scorer import NOT_FINITE, Scored, teacher_logprobs
from trainers.scoring.loading import check_models, load_frozen, make_renderer, make_scorer
from trainers.scoring.quantized import samples_of
from trainers.settings.reward_specs import model_keys
from trainers.texts import tag_format
from trainers.warmup_runs import ensure_model
from trainers.watch.heartbeat import heartbeat
from trainers.watch.out_of_memory import out_of_memory_told
from trainers.watch.outputs import whole_file
from trainers.watch.phases import PhaseTimer

logger = logging.getLogger(__name__)

MEASURED = 64  # texts whose tokens are counted before anything is loaded
# What data may say of the closing tag, as text; nothing: it is there.
CLOSED = dict.fromkeys(("true", "1", "1.0", "none", ""), True) | dict.fromkeys(("false", "0", "0.0"), False)


def run_score(options: ScoreOptions, output_dir: Path) -> Path:
    """Score every row; the order is the data's.

    Returns:
        The file with the scores.

    Raises:
        FloatingPointError: If scores are not finite: when all others are written, those with the reason in place of a
            reward.
    """
    device, dtype = resolve_place(options)
    if Path(options.dataset_id_or_path).expanduser().resolve() == (output_dir / "scores.jsonl").resolve():
        cause = "the scores would be written over it"
        raise ConfigError(Fault("dataset_id_or_path", options.dataset_id_or_path, cause, "name another output_dir"))
    rows = load_score_rows(options)
    check_models(options)
    keys = model_keys(options)
    if any(named_run(getattr(options, key)) for key in keys):
        planned(options, longest=1)  # what cannot be, however short the texts, is told before they are trained
    options = options.model_copy(update={key: ensure_model(getattr(options, key), options) for key in keys})
    teacher, student = (make_renderer(options, getattr(options, key), key) for key in keys)
    plan = planned(options, longest=longest_text(rows, teacher, student))
    timer = PhaseTimer()
    with heartbeat(timer, output_dir), out_of_memory_told(timer, device, plan, output_dir):
        return _load_and_score(plan.options, output_dir, rows, (teacher, student), (device, dtype), timer)


def _load_and_score(
    options: ScoreOptions,
    output_dir: Path,
    rows: Dataset,
    renderers: tuple[Renderer, Renderer],
    place: tuple[torch.device, torch.dtype],
    timer: PhaseTimer,
) -> Path:
    """The part of `run_score` that needs the models' weights."""
    (teacher, student), (device, dtype) = renderers, place
    teacher_path, student_path = (
        whole_model(options, key, getattr(options, key), output_dir, dtype) for key in model_keys(options)
    )
    samples = samples_of(rows)
    scorer = make_scorer(options, output_dir, student_path, student, teacher, device, dtype, samples)
    temperature = options.temperature if options.unbias_teacher_log_probs else 1.0
    teacher_model = load_frozen(options, teacher_path, "model_name_or_path", device, dtype, temperature)
    path = output_dir / "scores.jsonl"
    rewards: list[float] = []
    poisoned: list[int] = []
    timer.begin("score")
    with whole_file(path) as file:
        for start in range(0, len(rows), SCORED_AT_ONCE):
            batch = rows.select(range(start, min(start + SCORED_AT_ONCE, len(rows)))).to_list()
            explanations = [written_explanation(teacher, row["explanation"], row["closed"]) for row in batch]
            questions, solutions = [r["question"] for r in batch], [r["solution"] for r in batch]
            logprobs = teacher_logprobs(
                questions, solutions, explanations, teacher, teacher_model, options.padding_in_kl
            )
            for i, result in enumerate(scorer.score(questions, explanations, solutions, logprobs, stop=False), start):
                file.write(json.dumps(_line(result)) + "\n")
                rewards += [result.reward] if isinstance(result, Scored) else []
                poisoned += [i] if isinstance(result, str) and result.startswith(NOT_FINITE) else []
            logger.info("scored %d of %d", start + len(batch), len(rows))
    if not options.keep_scores and (output_dir / "scores").exists():
        logger.warning("%s holds what an earlier run has kept, not the scores of this one", output_dir / "scores")
    mean = f"mean reward {sum(rewards) / len(rewards):.4f}" if rewards else "none could be scored"
    logger.info("%d of %d explanations scored, %s: %s", len(rewards), len(rows), mean, path)
    if poisoned:
        raise FloatingPointError(
            f"{len(poisoned)} of {len(rows)} explanations have a score that is not finite (the first: row "
            f"{poisoned[0]}), as {path} tells -> look at the weights of teacher and student, and try precision=fp32"
        )
    return path


def load_score_rows(options: ScoreOptions) -> Dataset:
    """Rows with question, solution, explanation and closed (true where the data does not say).

    Raises:
        ConfigError: If a column is missing, or does not say whether the tag is there.
    """
    path, key = options.dataset_id_or_path, "dataset_id_or_path"
    raw = read_rows(path, options.dataset_split, options.max_samples, key)
    if options.explanation_column not in raw.column_names:
        cause = (
            f"its columns are {', '.join(raw.column_names)}; it needs explanation (as {options.explanation_column!r})"
        )
        raise ConfigError(Fault(key, path, cause, "explanation_column=<your column>"))
    columns = {
        "question": options.question_column,
        "solution": options.solution_column,
        "explanation": options.explanation_column,
    }
    if missing := sum(value is None for value in raw[options.explanation_column]):
        logger.warning("%d of %d rows have no explanation: scored as an empty one", missing, len(raw))
    rows = select_texts(raw, columns, key, path)
    tags = tag_format(options).every_tag
    if tagged := [i for i, text in enumerate(rows["explanation"]) if any(tag in text for tag in tags)]:
        logger.warning(
            "%d of %d explanations hold a tag of tag_format=%s (the first: row %d), which is scored as text: an "
            "explanation is what stands between the tags, and closed=false says that the closing one is missing",
            len(tagged),
            len(rows),
            options.tag_format,
            tagged[0],
        )
    has_closed = options.closed_column in raw.column_names
    if not has_closed and options.closed_column != type(options).model_fields["closed_column"].default:
        cause = f"no such column of {path}: {', '.join(raw.column_names)}"
        raise ConfigError(Fault("closed_column", options.closed_column, cause, "closed_column=<your column>"))
    given = raw[options.closed_column] if has_closed else [None] * len(raw)
    closed = [CLOSED.get(str(value).strip().lower()) for value in given]
    if None in closed:
        at = closed.index(None)
        cause = f"row {at} has {given[at]!r} in the column {options.closed_column!r}"
        raise ConfigError(Fault(key, path, cause, "true, or false where the closing tag is missing"))
    return rows.add_column("closed", closed)


def longest_text(rows: Dataset, teacher: Renderer, student: Renderer) -> int:
    """Tokens of the longest text that teacher or student will read, found among those with the most characters."""
    columns = ("question", "solution", "explanation")
    sizes = [sum(map(len, row)) for row in zip(*(rows[name] for name in columns), strict=True)]
    most = sorted(range(len(rows)), key=lambda i: sizes[i])[-MEASURED:]
    texts = [
        renderer.encode(parts)
        for question, solution, explanation in ([row[name] for name in columns] for row in rows.select(most))
        for renderer, parts in (
            (teacher, teacher.teacher(question, solution, explanation)),
            (student, student.student(question, explanation, solution)),
        )
    ]
    return max(len(text.ids) for text in texts)


def _line(result: Scored | str) -> dict[str, Any]:
    if isinstance(result, str):
        return {"reward": None, "reason": result}
    return {"reward": result.reward, **result.parts, "student_solves": result.solves}
