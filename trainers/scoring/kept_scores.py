"""Raw scores on disk: per-token log-probabilities of scored batches, and their rewards under another formula."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards.teacher_logprob_kl import ScoredExplanation, TeacherLogprobKL
from trainers.settings.reward_specs import FORMULA_FILE

TENSORS = ("solution_logprobs", "teacher_logprobs", "student_logprobs")


@dataclass(frozen=True)
class KeptRow:
    """One scored explanation: its texts and reward, and what the reward is computed from.

    Attributes:
        batch: What was scored with others of one policy; 0 where that is everything.
    """

    question: str
    solution: str
    explanation: str
    reward: float
    scored: ScoredExplanation
    batch: int = 0


class ScoreKeeper:
    """Writes each batch as `batch_00001.safetensors` and `.parquet` into a folder.

    The tensors of all rows are laid end to end, `[tokens of the batch]`, as fp32; the parquet file has a row per
    explanation, with the texts, the reward, `closed`, `batch`, and where the row's spans end in each tensor.

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
            | {"closed": r.scored.closed, "batch": self._count if self.by_batch else 0}
            for r in rows
        ]
        tensors = {}
        for name in TENSORS:
            values = [getattr(row.scored, name).float() for row in rows]
            tensors[name] = torch.cat(values).contiguous()
            for line, end in zip(table, torch.tensor([len(v) for v in values]).cumsum(0).tolist(), strict=True):
                line[f"{name}_end"] = end
        stem = self.folder / f"batch_{self._count:05d}"
        pd.DataFrame(table).to_parquet(stem.with_suffix(".parquet"))
        save_file(tensors, stem.with_suffix(".safetensors"))


def load_kept(folder: Path) -> list[KeptRow]:
    """Read every batch of a folder, in order."""
    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        begin = dict.fromkeys(TENSORS, 0)
        for line in pd.read_parquet(path.with_suffix(".parquet")).to_dict("records"):
            spans: dict[str, Tensor] = {}
            for name in TENSORS:
                spans[name] = tensors[name][begin[name] : line[f"{name}_end"]]
                begin[name] = line[f"{name}_end"]
            scored = ScoredExplanation(**spans, closed=line["closed"])
            texts = line["question"], line["solution"], line["explanation"]
            rows.append(KeptRow(*texts, line["reward"], scored, line.get("batch", 0)))
    return rows
