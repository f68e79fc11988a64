"""What training changed: held-out questions before and after, as a table and as result.json."""

import json
import logging
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainers.scoring.evaluation import HELD_OUT

logger = logging.getLogger(__name__)

UNSCORABLE = "could not be scored"
# Name in result.json, name of TRL's evaluation metric, title of the table's row.
ROWS = (
    ("reward", "eval_reward", "reward"),
    ("solution_log_prob_reward", "eval_solution_log_prob_reward", "  solution found likely (r_SS)"),
    ("kl_reward", "eval_kl_reward", "  explanation natural (-r_KL)"),
    ("match_reward", "eval_match_reward", "  closing tag (match)"),
    ("explanation_length", "eval_explanation_length", "explanation length, tokens"),
    ("truncated_fraction", "eval_completions/clipped_ratio", "cut at the length limit"),
    ("student_accuracy", "eval_student_accuracy", "student's greedy accuracy"),
    ("unscorable_fraction", "eval_unscorable_fraction", UNSCORABLE),
)


def result_rows(reward_names: list[str]) -> tuple[tuple[str, str, str], ...]:
    """The rows of a run: where the reward is not the student's alone, each reward function has one."""
    own = [(f"rewards/{name}", f"eval_rewards/{name}/mean", f"  {name}") for name in reward_names]
    return ROWS if reward_names == ["teacher_logprob_kl"] else (ROWS[0], *own, *ROWS[1:])


def write_result(
    output_dir: Path,
    before: dict[str, float],
    after: dict[str, float],
    num_questions: int,
    reward_names: list[str],
) -> None:
    """Write result.json and print the table with the paths of what the run left behind."""
    rows = result_rows(reward_names)
    result = {
        moment: {name: metrics.get(metric) for name, metric, _ in rows}
        for moment, metrics in (("before", before), ("after", after))
    }
    (output_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{num_questions} held-out questions")
    for column, justify in (("", "left"), ("before RL", "right"), ("after RL", "right"), ("change", "right")):
        table.add_column(column, justify=justify)
    for name, _, title in rows:
        old, new = result["before"][name], result["after"][name]
        if old is not None and new is not None and (title != UNSCORABLE or old or new):
            table.add_row(title, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    text = StringIO()
    Console(file=text, width=100).print(table)
    paths = {
        "teacher": output_dir,
        "result": output_dir / "result.json",
        "metrics": output_dir / "metrics.jsonl",
        "totals": output_dir / "totals.json",
        "completions": output_dir / "completions",
        "held out": output_dir / HELD_OUT,
        "log": output_dir / "training.log",
    }
    listing = "\n".join(f"{name:12} {path}" for name, path in paths.items() if path.exists())
    logger.info("\n%s%s", text.getvalue(), listing)
