"""The README.md beside a trained model: what it is, and the lines that ask it for an explanation."""

import sys
from pathlib import Path
from typing import Any

from trainers.options import RLOptions, TrainOptions
from trainers.settings.reward_specs import uses_student

MARK = "<!-- written with the model; a later run into this folder writes it anew -->"
PEFT = "# Model Card for Model ID"  # what peft writes beside an adapter, with nothing filled in

HEAD = """{mark}
# {title}

Trained from `{base}` on `{data}` ({how}). The options of the run are in `config.yaml`, its metrics in `metrics.jsonl`,
what it said in `training.log`.
"""

USE = """
It explains, given a question and its solution. As `ask.py` in the folder of the project that trained it, by
`{venv}/bin/python ask.py`:

```python
import torch
from {library} import {loader}
from transformers import AutoTokenizer

from data.explanation import sampled_explanation
from data.formats import TAG_FORMATS
from data.render import Renderer

folder = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
device = "cuda" if torch.cuda.is_available() else "cpu"
model = {loader}.from_pretrained(folder, dtype="auto"{trust}).to(device)
tags = TAG_FORMATS[{tag_format!r}].with_prompts({teacher!r}, {student!r})
renderer = Renderer(tokenizer, tags, {template!r}, "model_name_or_path", {end_ids!r})
sampling = {sampling!r}  # as trained, whatever generation_config.json says


def explain(question: str, solution: str) -> str:
    ids = renderer.encode_prompt(renderer.teacher_prompt(question, solution))  # as in training, token by token
    asked, closing = torch.tensor([ids], device=device), tags.explanation[1]
    stops = {{"max_new_tokens": {limit}, "stop_strings": [closing], "tokenizer": tokenizer}}
    stops["eos_token_id"] = list(renderer.end_ids){further}
    written = model.generate(asked, do_sample=True, **sampling, **stops)[0, len(ids) :]
    return sampled_explanation(renderer, written.tolist()).text.strip()


print(explain("What is 2+3?", "5"))
```

vLLM takes the same `ids` as `prompt_token_ids`, with `**sampling`{vllm}, `stop=[closing]` and
`skip_special_tokens=False`{merged}.
"""
MERGED = """; for its plain
engine merge the adapter first: `./launch_mono.sh stage=merge model_name_or_path={folder} output_dir=<new folder>`"""

NOTHING_FURTHER = {"further": "", "vllm": ""}
UNALTERED = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def write_model_card(folder: Path, options: TrainOptions, end_ids: tuple[int, ...]) -> None:
    """Write README.md, unless there is one that is not ours.

    Args:
        end_ids: Tokens that end what the model writes.
    """
    card = folder / "README.md"
    there = card.read_text(encoding="utf-8", errors="replace") if card.exists() else MARK
    if MARK not in there and PEFT not in there:
        return
    base, is_rl = options.model_name_or_path or "random weights", options.stage == "rl"
    teaches = is_rl or options.sft_role == "teacher"
    how = "supervised, on its reasoning traces"
    if is_rl:
        how = f"GRPO, judged by `{options.student_model}`" if uses_student(options) else "GRPO"
    title = f"A reasoning {'teacher' if teaches else 'student'}{', warmed up' * (not is_rl)}"
    text = HEAD.format(mark=MARK, title=title, base=base, data=options.dataset_id_or_path, how=how)
    if teaches:
        text += USE.format(
            venv=name if (name := Path(sys.prefix).name).startswith(".venv") else ".venv",
            merged=MERGED.format(folder=folder) if options.use_peft else "",
            library="peft" if options.use_peft else "transformers",
            loader="AutoPeftModelForCausalLM" if options.use_peft else "AutoModelForCausalLM",
            folder=str(folder),
            trust=", trust_remote_code=True" * options.trust_remote_code,
            end_ids=end_ids,
            tag_format=options.tag_format,
            teacher=options.teacher_system_prompt,
            student=options.student_system_prompt,
            template=options.chat_template_kwargs,
            limit=options.max_completion_length if is_rl else 2048,
            sampling=_sampling(options) if is_rl else UNALTERED,
            **(_further(options) if is_rl else NOTHING_FURTHER),
        )
    card.write_text(text, encoding="utf-8")


def _sampling(options: RLOptions) -> dict[str, Any]:
    """What the run sampled with, by the names that transformers and vLLM share."""
    given = {name: value for name in UNALTERED if (value := getattr(options, name)) is not None}
    given["top_k"] = max(0, given.get("top_k", 0))  # vLLM has -1 for all, too
    return UNALTERED | given


def _further(options: RLOptions) -> dict[str, str]:
    """Where the run's other arguments of sampling stand: vLLM's and transformers' have names of their own."""
    if not options.generation_kwargs:
        return NOTHING_FURTHER
    if options.use_vllm:
        return NOTHING_FURTHER | {"vllm": f", `**{options.generation_kwargs}`"}
    return NOTHING_FURTHER | {"further": f"\n    stops |= {options.generation_kwargs!r}"}
