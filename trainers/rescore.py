"""stage=rescore: what the rewards, and the order within each group, would be under another formula. No model needed."""

import json
import logging
import math
from collections import defaultdict
from itertools import combinations
from pathlib import Path

from rewards.teacher_logprob_kl import TeacherLogprobKL
from trainers.options import RescoreOptions
from trainers.scoring.kept_scores import load_kept
from trainers.settings.reward_specs import changed_formula, kept_formula
from trainers.watch.outputs import whole_file

logger = logging.getLogger(__name__)


def run_rescore(options: RescoreOptions, output_dir: Path) -> Path:
    """Write rescored.jsonl (a line per kept explanation, in order) and rescore.json (how the ranking changes).

    Returns:
        The file with the rewards.
    """
    folder = Path(options.scores).expanduser()
    kept, values = kept_formula(folder), changed_formula(options)
    changes = [f"{name} {kept[name]} -> {value}" for name, value in sorted(values.items()) if value != kept[name]]
    logger.info("formula: as scored%s", f", but {', '.join(changes)}" if changes else "")
    formula = TeacherLogprobKL(**values)
    rows = load_kept(folder)
    groups: dict[tuple[int, str, str], list[tuple[float, float]]] = defaultdict(list)
    path = output_dir / "rescored.jsonl"
    with whole_file(path) as file:
        for row in rows:
            reward, parts = formula(row.scored)
            if bad := {k: v for k, v in (parts | {"reward": reward}).items() if not math.isfinite(v)}:
                sample = f"explanation {row.explanation[:200]!r} of the question {row.question[:200]!r}"
                raise FloatingPointError(f"not finite under this formula: {bad}, the {sample}")
            groups[row.batch, row.question, row.solution].append((row.reward, reward))
            texts = {"question": row.question, "solution": row.solution, "explanation": row.explanation}
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
    pairs = sum(len(group) * (len(group) - 1) // 2 for group in ordered)
    reversed_ = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for group in ordered for a, b in combinations(group, 2))
    best_changed = sum((max(old for old, _ in g), max(new for _, new in g)) not in g for g in ordered)
    return {
        "groups": len(ordered),
        "pairs": pairs,
        "pairs_reversed": reversed_,
        "best_changed": best_changed,
    }
