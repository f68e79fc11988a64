"""Models of random weights and rows without meaning: what a measurement of memory needs."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.commands import REPO
from benchmarks.shapes import SHAPES
from trainers.plan.known_models import KNOWN_MODELS

QUESTIONS = ["What is 2+3?", "What is 4+5?", "What is 10+7+1?", "What is 6+6?"]
WORD = " say"  # one token


def write_model(folder: Path | str, sizes: dict[str, Any]) -> None:
    """Save a Qwen2 of these sizes with random weights, and a small tokenizer. A GPU makes them faster, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trainers.models import make_tokenizer

    texts = [" ".join(QUESTIONS) + "\nExplain. Solve. system\nuser\nassistant\n" + WORD * 20] * 4
    tags = [f"<|{end}_of_{name}|>" for name in ("explanation", "thought", "solution") for end in ("begin", "end")]
    tokenizer = make_tokenizer(texts, tags, 400)
    config = AutoConfig.for_model("qwen2", **config_arguments(sizes))
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_arguments(sizes: dict[str, Any]) -> dict[str, Any]:
    return {"max_position_embeddings": 32768} | {k: v for k, v in sizes.items() if k != "model_type"}


def made_model(models: Path, shape: str | None = None, name: str | None = None) -> Path:
    """A checkpoint of random weights in a shape of benchmarks/shapes.py, or of a known model; made if it is not there.

    In a process of its own: what making it leaves on the card would be taken from the run.
    """
    sizes = SHAPES[shape] if shape else KNOWN_MODELS[name]
    arguments = config_arguments(sizes)  # what is of one shape is one checkpoint, whatever it is called
    path = models / hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()[:12]
    if not (path / "tokenizer_config.json").exists():
        code = f"from benchmarks.small_data import write_model; write_model({str(path)!r}, {sizes})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=REPO, stdout=subprocess.DEVNULL)
    return path


def write_rows(file: Path, words: int, solution: str = "five " * 10, count: int = 64) -> None:
    """Write questions of so many words, all with the same solution; a number keeps each apart from the others."""
    rows = ({"question": f"{i} {QUESTIONS[i % 4]}" + WORD * words, "solution": solution} for i in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
