"""Data sets ready for a trainer: rendered, encoded, measured against the length limits, and shown."""

import logging
from pathlib import Path
from typing import Any

from datasets import Dataset

from data.formats import TAG_FORMATS, Part, TagFormat
from data.load import first, hold_out, load_rows
from data.render import Renderer
from trainers.errors import ConfigError, Fault
from trainers.options import CommonOptions, RLOptions, SFTOptions, TrainOptions
from trainers.settings.batch import batch_plan
from trainers.settings.evaluation import evaluates, names_held_out

logger = logging.getLogger(__name__)

MUCH = 0.25  # held-out questions for each row that is left: more is told as a warning


def tag_format(options: CommonOptions) -> TagFormat:
    """The tags and system prompts that the options choose."""
    return TAG_FORMATS[options.tag_format].with_prompts(options.teacher_system_prompt, options.student_system_prompt)


def _columns(options: CommonOptions) -> dict[str, str]:
    columns = {"question": options.question_column, "solution": options.solution_column}
    return columns | ({"reasoning_trace": options.reasoning_trace_column} if options.stage == "sft" else {})


def load_train_and_eval_rows(options: TrainOptions) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and the held-out ones where they are evaluated."""
    path, columns, tags = options.dataset_id_or_path, _columns(options), tag_format(options)
    holds_out = options.eval_size is not None and not names_held_out(options)
    # Out of all rows, or another max_samples would hold out others.
    limit = None if holds_out else options.max_samples
    rows = load_rows(path, options.dataset_split, limit, columns, tags, "dataset_id_or_path")
    held_out = None
    if holds_out:
        rows, held_out = hold_out(rows, options.eval_size)
        total, rows, held_out = len(rows), first(rows, options.max_samples), first(held_out, options.max_eval_samples)
        tell = logger.warning if options.eval_size > MUCH * total else logger.info
        tell("%d questions of the training data are held out, %d rows are left of it", options.eval_size, total)
    elif names_held_out(options) and evaluates(options):
        held_out = _load_eval_rows(options)
        trained = set(rows["question"])
        if known := sum(question in trained for question in held_out["question"]):
            logger.warning("%d of %d held-out rows have a question that is trained on", known, len(held_out))
    return rows, held_out if evaluates(options) else None


def _load_eval_rows(options: TrainOptions) -> Dataset:
    path = options.eval_dataset_id_or_path or options.dataset_id_or_path
    is_file = options.eval_dataset_id_or_path is not None and Path(path).expanduser().is_file()
    return load_rows(
        path,
        "train" if is_file else options.eval_dataset_split or options.dataset_split,
        options.max_eval_samples,
        _columns(options),
        tag_format(options),
        "eval_dataset_id_or_path",
    )


def apply_overlong(rows: Dataset, length_column: str, limit: int, overlong: str, what: str) -> Dataset:
    """Deal with rows whose `length_column` exceeds `limit`, and say how many there are.

    `filter` leaves them out, `error` stops; `truncate_left` leaves them to be cut where they are used.

    Raises:
        ConfigError: With overlong=error, or if nothing is left.
    """
    lengths = rows[length_column]
    too_long = sum(length > limit for length in lengths)
    logger.info("%s: %d rows, prompts of %d to %d tokens", what, len(rows), min(lengths), max(lengths))
    if not too_long:
        return rows
    count = f"{too_long} of {len(rows)} prompts are longer than max_prompt_length {limit} (the longest: {max(lengths)})"
    if overlong == "error":
        remedy = f"max_prompt_length={max(lengths)}, or overlong=filter or overlong=truncate_left"
        raise ConfigError(Fault("overlong", overlong, count, remedy))
    if overlong == "truncate_left":
        logger.warning("%s: %s: they lose their start", what, count)
        return rows
    if too_long == len(rows):
        raise ConfigError(
            Fault("max_prompt_length", limit, f"{count}: nothing is left", f"max_prompt_length={max(lengths)}")
        )
    logger.warning("%s: %s: left out", what, count)
    return rows.filter(lambda row: row[length_column] <= limit)


def show_sample(title: str, parts: list[Part]) -> None:
    """Print a text with what the model itself writes set off from what it is given."""
    given = "".join(p.text for p in parts if not p.sampled)
    written = "".join(p.text for p in parts if p.sampled)
    logger.info("\n--- %s: given (masked)\n%s\n--- %s: written by the model\n%s\n---", title, given, title, written)


def rl_rows(rows: Dataset, renderer: Renderer, options: RLOptions, what: str) -> Dataset:
    """Add the teacher's prompt to rows of question and solution."""

    def render(row: dict[str, str]) -> dict[str, Any]:
        prompt = renderer.teacher_prompt(row["question"], row["solution"])
        return {"prompt": prompt, "prompt_tokens": len(renderer.encode_prompt(prompt))}

    rows = rows.select_columns(["question", "solution"]).map(render)
    return apply_overlong(rows, "prompt_tokens", options.max_prompt_length, options.overlong, what)


def tell_whole_questions(rows: Dataset, student: Renderer, options: RLOptions) -> None:
    """Where prompts lose their start the student still reads whole questions, and the plan of memory counts cut ones.

    Args:
        rows: With `prompt_tokens`, of the teacher.
    """
    lengths = rows["prompt_tokens"]
    if options.overlong != "truncate_left" or max(lengths) <= options.max_prompt_length:
        return
    row = rows[max(range(len(rows)), key=lambda i: lengths[i])]
    longest = len(student.encode(student.student(row["question"], "", row["solution"])).ids)
    longest += options.max_completion_length
    if longest > (planned := options.max_prompt_length + options.max_completion_length):
        logger.warning(
            "overlong=truncate_left: the student reads questions whole, up to %d tokens with an explanation; the plan "
            "of memory counts %d",
            longest,
            planned,
        )


def check_enough(questions: Dataset, options: RLOptions) -> None:
    """TRL leaves out what does not fill a rollout; see that something is left.

    Raises:
        ConfigError: If there are fewer questions than a rollout takes.
    """
    plan, count = batch_plan(options), len(questions)
    taken = plan.generation_batch // options.num_generations
    if count < taken:
        cause = f"{count} questions are left, and a rollout takes {taken}: nothing would be trained"
        remedy = f"more data, or a smaller batch: train_batch_size={count * options.num_generations}"
        if options.eval_size is not None and not names_held_out(options):
            remedy += f", or hold out fewer: eval_size below {options.eval_size}"
        raise ConfigError(Fault("dataset_id_or_path", options.dataset_id_or_path, cause, remedy))
    if rest := count % taken:
        logger.warning("each epoch leaves out %d of %d questions: a rollout takes %d", rest, count, taken)


def check_traces(rows: Dataset, options: SFTOptions, what: str) -> None:
    """Refuse data without explanations to imitate, and say how many rows have none.

    Raises:
        ConfigError: If there is no reasoning trace.
    """
    if "reasoning_trace" not in rows.column_names or not any(rows["reasoning_trace"]):
        cause = f"the {what} has no reasoning_trace to imitate (RL needs none, a warm-up does)"
        raise ConfigError(
            Fault(
                "reasoning_trace_column",
                options.reasoning_trace_column,
                cause,
                "name the column: reasoning_trace_column=...",
            )
        )
    if empty := sum(not trace for trace in rows["reasoning_trace"]):
        logger.warning("%s: %d of %d rows have no reasoning_trace: left out", what, empty, len(rows))


def sft_rows(rows: Dataset, renderer: Renderer, options: SFTOptions, what: str) -> Dataset:
    """Encode rows for TRL's SFTTrainer: `input_ids` and `labels`, -100 on what is given rather than written.

    Raises:
        ConfigError: If the data has no reasoning traces, or no row leaves a token to learn from.
    """
    role, limit = options.sft_role, options.max_prompt_length

    def encode(row: dict[str, str]) -> dict[str, Any]:
        encoded = renderer.encode(sft_parts(row, renderer, role))
        given = len(encoded.sampled) - sum(encoded.sampled)
        cut = max(0, given - limit)  # only with overlong=truncate_left
        ids, sampled = encoded.ids[cut:], encoded.sampled[cut:]
        labels = [token if own else -100 for token, own in zip(ids, sampled, strict=True)]
        return {"input_ids": ids, "labels": labels, "prompt_tokens": given, "masked": given - cut, "length": len(ids)}

    encoded = rows.filter(lambda row: bool(row["reasoning_trace"])).map(encode, remove_columns=rows.column_names)
    encoded = apply_overlong(encoded, "prompt_tokens", limit, options.overlong, what)
    keeps_ends = getattr(options, "truncation_mode", None) == "keep_end"
    keeps_all = getattr(options, "packing", False) and getattr(options, "packing_strategy", None) in (
        "bfd_split",
        "wrapped",
    )
    if options.max_length and not keeps_ends and not keeps_all:
        encoded = _learnable(encoded, options.max_length, what)
    return encoded.select_columns(["input_ids", "labels"])


def _learnable(encoded: Dataset, limit: int, what: str) -> Dataset:
    """Leave out the rows that lose all that the model is to learn where TRL cuts them; say how many, and how many are
    cut.

    Raises:
        ConfigError: If nothing is left.
    """
    cut = sum(length > limit for length in encoded["length"])
    lost = sum(masked >= limit for masked in encoded["masked"])
    if lost == len(encoded):
        cause = "every row is cut before what the model is to learn"
        raise ConfigError(Fault("max_length", limit, cause, f"max_length={max(encoded['length'])}"))
    if cut:
        told = f"{cut - lost} of {len(encoded)} rows are cut at max_length {limit}, {lost} before what is to be learned"
        logger.warning("%s: %s: these are left out", what, told)
    return encoded.filter(lambda row: row["masked"] < limit)


def sft_parts(row: dict[str, str], renderer: Renderer, role: str) -> list[Part]:
    """The text that a row teaches."""
    if role == "teacher":
        return renderer.teacher(row["question"], row["solution"], row["reasoning_trace"])
    return renderer.student(row["question"], row["reasoning_trace"], row["solution"])
