"""Raw scores on disk: per-token log-probabilities of scored batches, and their rewards under another formula."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards.alignment import piece_sums
from rewards.teacher_logprob_kl import ScoredExplanation, TeacherLogprobKL
from trainers.errors import ConfigError, Fault
from trainers.settings.reward_specs import FORMULA_FILE

TENSORS = ("solution_logprobs", "teacher_logprobs", "student_logprobs")
ENDS = ("solution_ends", "teacher_ends", "student_ends")  # of the same tokens


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of one explanation and its solution, and where each token ends in its text, in characters;
    where that is not asked for (one tokenizer, nothing kept) there are no ends.

    Attributes:
        solution_logprobs, solution_ends: The student's, `[solution tokens]`.
        teacher_logprobs, teacher_ends: Of the explanation, `[teacher tokens]`; with `padding_in_kl` the padding comes
            before it, in the text too.
        student_logprobs, student_ends: Of the same text, `[student tokens]`.
    """

    solution_logprobs: Tensor
    teacher_logprobs: Tensor
    student_logprobs: Tensor
    solution_ends: list[int]
    teacher_ends: list[int]
    student_ends: list[int]

    def compared(self, closed: bool) -> ScoredExplanation:
        """What the reward is computed from: teacher and student over the pieces of text that both can cut out."""
        own, other = (self.teacher_logprobs, self.teacher_ends), (self.student_logprobs, self.student_ends)
        return ScoredExplanation(self.solution_logprobs, *piece_sums(*own, *other), closed)


@dataclass(frozen=True)
class KeptRow:
    """One scored explanation: its texts and reward, and what the reward is computed from.

    Attributes:
        closed: Whether the closing tag was written.
        batch: What was scored with others of one policy; 0 where that is everything.
    """

    question: str
    solution: str
    explanation: str
    reward: float
    tokens: TokenScores
    closed: bool
    batch: int = 0

    @property
    def scored(self) -> ScoredExplanation:
        """What the formula takes."""
        return self.tokens.compared(self.closed)


class ScoreKeeper:
    """Writes each batch as `batch_00001.safetensors` and `.parquet` into a folder.

    The tensors of all rows are laid end to end, `[tokens of the batch]`: log-probabilities as fp32, and where each
    token ends in its text as int32. The parquet file has a row per explanation, with the texts, the reward, `closed`,
    `batch`, and where the row's tokens end in the tensors.

    Args:
        folder: Where to.
        by_batch: Whether each batch is ranked by itself, or all that is kept as a whole.
        formula: Of the rewards; it is kept beside them.
    """

    def __init__(self, folder: Path, by_batch: bool, formula: TeacherLogprobKL) -> None:
        self.folder, self.by_batch, self._count = folder, by_batch, len(list(folder.glob("*.safetensors")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FORMULA_FILE).write_text(json.dumps(asdict(formula), indent=2) + "\n", encoding="utf-8")

    def keep(self, rows: list[KeptRow]) -> None:
        """Write a batch; nothing is written for an empty one."""
        if not rows:
            return
        self._count += 1
        table: list[dict[str, Any]] = [
            {"question": r.question, "solution": r.solution, "explanation": r.explanation, "reward": r.reward}
            | {"closed": r.closed, "batch": self._count if self.by_batch else 0}
            for r in rows
        ]
        tensors = {}
        for name, ends in zip(TENSORS, ENDS, strict=True):
            values = [getattr(row.tokens, name).float() for row in rows]
            tensors[name] = torch.cat(values).contiguous()
            places = [end for row, v in zip(rows, values, strict=True) for end in _all(getattr(row.tokens, ends), v)]
            tensors[ends] = torch.tensor(places, dtype=torch.int32)
            for line, end in zip(table, torch.tensor([len(v) for v in values]).cumsum(0).tolist(), strict=True):
                line[f"{name}_end"] = end
        stem = self.folder / f"batch_{self._count:05d}"
        pd.DataFrame(table).to_parquet(stem.with_suffix(".parquet"))
        save_file(tensors, stem.with_suffix(".safetensors"))


def _all(ends: list[int], logprobs: Tensor) -> list[int]:
    assert len(ends) == len(logprobs), "each token has a log-probability and an end"
    return ends


def load_kept(folder: Path) -> list[KeptRow]:
    """Read every batch of a folder, in order.

    Raises:
        ConfigError: If one was kept otherwise.
    """
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        if missing := {*TENSORS, *ENDS} - tensors.keys():
            cause = f"{path.name} has no {', '.join(sorted(missing))}: another version of this project kept it"
            raise ConfigError(Fault("scores", str(folder), cause, "score them anew, with keep_scores=true"))
        begin = dict.fromkeys(TENSORS, 0)
        for line in pd.read_parquet(path.with_suffix(".parquet")).to_dict("records"):
            spans: dict[str, Any] = {}
            for name, ends in zip(TENSORS, ENDS, strict=True):
                span = slice(begin[name], line[f"{name}_end"])
                spans |= {name: tensors[name][span], ends: tensors[ends][span].tolist()}
                begin[name] = span.stop
            texts = line["question"], line["solution"], line["explanation"]
            rows.append(KeptRow(*texts, line["reward"], TokenScores(**spans), line["closed"], line["batch"]))
    return rows
