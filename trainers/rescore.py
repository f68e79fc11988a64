"""stage=rescore: what the rewards, and the order within each group, would be under another formula. No model needed."""

import json
import logging
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.kept_scores import load_kept

logger = logging.getLogger(__name__)


def run_rescore(options: Any, output_dir: Path) -> Path:
    """Write rescored.jsonl (a line per kept explanation, in order) and rescore.json (how the ranking changes).

    Returns:
        The file with the rewards.
    """
    formula = TeacherLogprobKL(**{name: getattr(options, name) for name in TeacherLogprobKL.__dataclass_fields__})
    rows = load_kept(Path(options.scores).expanduser())
    groups: dict[tuple[int, str, str], list[tuple[float, float]]] = defaultdict(list)
    path = output_dir / "rescored.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            reward, parts = formula(row.scored)
            groups[row.batch, row.question, row.solution].append((row.reward, reward))
            texts = {"question": row.question, "explanation": row.explanation}
            file.write(json.dumps({"reward": reward, "reward_before": row.reward, **parts, **texts}) + "\n")
    changes = ranking_changes(list(groups.values()))
    (output_dir / "rescore.json").write_text(json.dumps(changes, indent=2) + "\n", encoding="utf-8")
    logger.info(
        "%d explanations of %d questions: %d of %d pairs of one question change their order, another explanation is "
        "best for %d of %d questions: %s",
        len(rows),
        len(groups),
        changes["pairs_reversed"],
        changes["pairs"],
        changes["best_changed"],
        changes["groups"],
        path,
    )
    return path


def ranking_changes(groups: list[list[tuple[float, float]]]) -> dict[str, int]:
    """Count how the order within groups differs between two rewards.

    Args:
        groups: For each group, (old, new) of each member; groups of one have no order and are left out.

    Returns:
        `groups` and `pairs` compared, `pairs_reversed` (strictly one way before and strictly the other way after) and
        `best_changed` (none of the best by the new reward was among the best by the old).
    """
    ordered = [group for group in groups if len(group) > 1]
    pairs = [pair for group in ordered for pair in combinations(group, 2)]
    reversed_ = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
    best_changed = sum((max(old for old, _ in g), max(new for _, new in g)) not in g for g in ordered)
    return {
        "groups": len(ordered),
        "pairs": len(pairs),
        "pairs_reversed": reversed_,
        "best_changed": best_changed,
    }
