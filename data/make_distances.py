"""Make the sample data set: chains of distances between digits, explained step by step, well or badly.

    python -m data.make_distances data/distances

writes `train.jsonl` and `test.jsonl` (no question of one is in the other). `a~b` is the distance
between two digits, and a chain is worked out from left to right: 7~3~9 = 4~9 = 5. A good explanation writes one
distance per line, each starting from the result of the line before; 60 % of the reasoning traces are spoiled, since
they break off half-way or are empty talk, as traces gathered in the wild are. Solutions are always right.
"""

import json
import random
import sys
from pathlib import Path

NUM_DIGITS = 6
TALK = [
    "Work from left to right and keep the last distance in mind until the end is reached.",
    "Only the distance of two digits matters here, so it is found by counting with care.",
    "The order of two digits does not matter, and the end can be found in the head.",
]
KINDS = {"full": 0.4, "broken off": 0.3, "talk": 0.3}


def work_out(digits: list[int]) -> tuple[list[str], int]:
    """Return one line per distance and what is left, e.g. `[7, 3, 9] -> (["7~3=4", "4~9=5"], 5)`."""
    lines, left = [], digits[0]
    for digit in digits[1:]:
        lines.append(f"{left}~{digit}={abs(left - digit)}")
        left = abs(left - digit)
    return lines, left


def make_trace(lines: list[str], kind: str, rng: random.Random) -> str:
    if kind == "talk":
        return rng.choice(TALK)
    if kind == "broken off":
        lines = lines[: rng.randint(1, len(lines) - 2)]
    return "\n".join(lines)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng, seen, rows = random.Random(seed), set(), []
    while len(rows) < count:
        digits = [rng.randint(0, 9) for _ in range(NUM_DIGITS)]
        question = f"What is left of {'~'.join(map(str, digits))}?"
        if question in seen:
            continue
        seen.add(question)
        lines, left = work_out(digits)
        kind = rng.choices(list(KINDS), weights=KINDS.values())[0]
        rows.append({"question": question, "solution": str(left), "reasoning_trace": make_trace(lines, kind, rng)})
    return rows


def main(folder: str, num_train: int = 8192, num_test: int = 512) -> None:
    rows = make_rows(num_train + num_test, seed=20250608)
    for name, part in (("train", rows[:num_train]), ("test", rows[num_train:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        Path(folder, f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "data/distances")
