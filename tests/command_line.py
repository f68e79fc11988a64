"""Runs through the command line, and what they leave."""

import json
import re
import subprocess
import sys

import pandas as pd
from conftest import REPO


def train(*arguments, cwd=REPO):
    command = [sys.executable, str(REPO / "train.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def rl(warm, out, *overrides, cwd=REPO):
    return train(
        "teacher_rlt_tiny.yaml",
        f"model_name_or_path={warm}/teacher",
        f"student_model={warm}/student",
        f"output_dir={out}",
        "max_samples=64",
        "max_eval_samples=8",
        "max_steps=3",
        "train_batch_size=16",
        "per_device_train_batch_size=8",
        "num_generations=4",
        "generation_aggregation_steps=2",
        "per_device_eval_batch_size=8",
        "max_completion_length=16",
        "logging_steps=1",
        "save_steps=2",
        *overrides,
        cwd=cwd,
    )


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def completions(out, step):
    return pd.read_parquet(out / "completions" / f"completions_{step:05d}.parquet")


def code_of_its_card(out):
    (code,) = re.findall("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    return code


def ask_by_its_card(out):
    """Run the Python in the README.md of a trained teacher."""
    done = subprocess.run(
        [sys.executable, "-c", code_of_its_card(out)], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "<|im_end|>" not in done.stdout and "<|end_of_explanation|>" not in done.stdout
