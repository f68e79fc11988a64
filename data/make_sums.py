"""Make the sample data set: sums of five digits, explained step by step, well or badly.

    python -m data.make_sums data

writes `sums_train.jsonl` and `sums_test.jsonl` (no question of one is in the other). A good explanation carries the
running total from line to line, so that each line follows from the one before; 60 % of the reasoning traces are
spoiled, by missing lines or by empty talk, as traces gathered in the wild are. Solutions are always right.
"""

import json
import random
import sys
from pathlib import Path

NUM_TERMS = 5
LARGEST_TERM = 9
TALK = [
    "Add the numbers from left to right and keep the total in mind until the last one.",
    "This is a sum of five digits, so the answer is found by adding them up with care.",
    "The order of the numbers does not matter, and the total can be found in the head.",
]
KINDS = {"full": 0.4, "lines missing": 0.3, "talk": 0.3}


def running_totals(terms: list[int]) -> list[str]:
    """Return one line per addition, e.g. `[7, 5, 1] -> ["7+5=12", "12+1=13"]`."""
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total}+{term}={total + term}")
        total += term
    return lines


def make_trace(terms: list[int], kind: str, rng: random.Random) -> str:
    if kind == "talk":
        return rng.choice(TALK)
    lines = running_totals(terms)
    if kind == "lines missing":
        kept = sorted(rng.sample(range(len(lines)), k=rng.randint(1, len(lines) - 2)))
        lines = [lines[i] for i in kept]
    return "\n".join(lines)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < count:
        terms = [rng.randint(1, LARGEST_TERM) for _ in range(NUM_TERMS)]
        question = f"What is {'+'.join(map(str, terms))}?"
        if question in seen:
            continue
        seen.add(question)
        kind = rng.choices(list(KINDS), weights=KINDS.values())[0]
        rows.append(
            {"question": question, "solution": str(sum(terms)), "reasoning_trace": make_trace(terms, kind, rng)}
        )
    return rows


def main(folder: str, num_train: int = 8192, num_test: int = 512) -> None:
    rows = make_rows(num_train + num_test, seed=20250608)
    for name, part in (("sums_train", rows[:num_train]), ("sums_test", rows[num_train:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data")
