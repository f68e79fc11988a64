"""stage=score against the formula and a plain forward pass. Run: ./run_tests.sh tests/test_score.py"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import REPO, ROWS
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig

from trainers.checks import load_options
from trainers.config import compose_run
from trainers.errors import ConfigError
from trainers.models import check_vocabulary, load_model
from trainers.options import options_class
from trainers.rescore import run_rescore
from trainers.score import load_score_rows, run_score
from trainers.scoring.explanation_scorer import is_same_tokenizer
from trainers.scoring.frozen import FrozenModel, ResidentBackbone
from trainers.scoring.loading import check_head
from trainers.scoring.streaming import StreamedBackbone
from trainers.weights.weight_files import WeightFiles

THREE = ("solution_log_prob_reward", "kl_reward", "match_reward")  # parts of a reward
SEVEN = {
    "mean": lambda x: x.mean().item(),
    "sum": lambda x: x.sum().item(),
    "min": lambda x: x.min().item(),
    "max": lambda x: x.max().item(),
    "median": lambda x: x.sort().values[(len(x) - 1) // 2].item(),
    "first_quartile": lambda x: x.quantile(0.25).item(),
    "last_quartile": lambda x: x.quantile(0.75).item(),
}


def options(model_dir, file, **values):
    defaults = {
        "stage": "score",
        "dataset_id_or_path": str(file),
        "model_name_or_path": str(model_dir),
        "student_model": str(model_dir),
        "teacher_system_prompt": "Explain.",
        "student_system_prompt": "Solve.",
        "temperature": 0.9,
    }
    return options_class("score")(**{**defaults, **values})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_logprobs(model, encoded, first, last, temperature):
    """Log-probability of each token from the part `first` to the part `last`, by a plain forward pass."""
    with torch.no_grad():
        logprobs = (model(torch.tensor([encoded.ids])).logits[0] / temperature).log_softmax(-1)
    start, end = encoded.spans[first][0], encoded.spans[last][1]
    return torch.stack([logprobs[t - 1, encoded.ids[t]] for t in range(start, end)])


def test_tags_inside_explanations_are_told(model_dir, tmp_path, caplog):
    row = {"question": "What is 2+3?", "solution": "5"}
    rows = [row | {"explanation": text} for text in ("2+3=5", "2+3=5<|end_of_explanation|>")]
    path = write(tmp_path / "rows.jsonl", rows)
    load_score_rows(options(model_dir, path))
    assert "1 of 2 explanations hold a tag of tag_format=stratos (the first: row 1)" in caplog.text
    caplog.clear()
    load_score_rows(options(model_dir, path, tag_format="r1"))
    assert not caplog.text


def test_what_data_may_say_of_the_closing_tag(model_dir, tmp_path):
    row = {**ROWS[0], "explanation": "2+3=5"}
    given = [True, False, 0, 1, "false", "True", None]
    for value, closed in zip(given, [True, False, False, True, False, True, True], strict=True):
        path = write(tmp_path / "rows.jsonl", [{**row, "closed": value}])
        assert load_score_rows(options(model_dir, path))["closed"] == [closed]
    path = write(tmp_path / "rows.jsonl", [{**row, "closed": "perhaps"}])
    with pytest.raises(ConfigError, match="row 0 has 'perhaps'"):
        load_score_rows(options(model_dir, path))


def test_a_misspelt_column_of_closing_tags_is_told(model_dir, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "explanation": "2+3=5", "finished": False}])
    assert load_score_rows(options(model_dir, path, closed_column="finished"))["closed"] == [False]
    with pytest.raises(ConfigError, match=r"closed_column='finishd'[\s\S]*finished"):
        load_score_rows(options(model_dir, path, closed_column="finishd"))


def test_one_column_may_be_two_things(model_dir, tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[:1])
    rows = load_score_rows(options(model_dir, path, explanation_column="solution"))
    assert rows[0]["explanation"] == rows[0]["solution"] == ROWS[0]["solution"]


def test_what_is_kept_of_a_scored_file_gives_its_rewards_again(model_dir, tmp_path):
    rows = [{**row, "explanation": text} for row in ROWS for text in (row["reasoning_trace"], "so it is")]
    chosen = options(model_dir, write(tmp_path / "rows.jsonl", rows), keep_scores=True)
    scored = [json.loads(line) for line in run_score(chosen, tmp_path).read_text().splitlines()]
    again = tmp_path / "again"
    again.mkdir()
    path = run_rescore(load_options(compose_run("rescore", [f"scores={tmp_path}/scores"])), again)
    rescored = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reward"] for line in rescored] == [line["reward"] for line in scored]
    assert [line["explanation"] for line in rescored] == [row["explanation"] for row in rows]
    assert json.loads((again / "rescore.json").read_text())["groups"] == len(ROWS)


def test_neither_scoring_nor_scoring_again_needs_vllm(model_dir, tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys\nsys.modules['vllm'] = None\n")

    def run(*command):
        without = {**os.environ, "PYTHONPATH": str(hidden)}
        return subprocess.run([sys.executable, *command], cwd=REPO, env=without, capture_output=True, text=True)

    assert "ModuleNotFoundError" in run("-c", "import vllm").stderr
    path = write(tmp_path / "rows.jsonl", [{**row, "explanation": row["reasoning_trace"]} for row in ROWS])
    words = [f"{key}={model_dir}" for key in ("model_name_or_path", "student_model")]
    words += [f"dataset_id_or_path={path}", "keep_scores=true", "device=cpu"]
    for stage, given in (("score", words), ("rescore", [f"scores={tmp_path}/score/scores"])):
        done = run("train.py", f"stage={stage}", f"output_dir={tmp_path}/{stage}", *given)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("score/scores.jsonl", "rescore/rescored.jsonl"):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(lines) == len(ROWS) and all(line["reward"] < 0 for line in lines)


@pytest.mark.parametrize(("temperature", "together"), [(0.7, 256), (1.3, 2)])
def test_every_row_by_the_formula_in_order(model_dir, renderer, tmp_path, monkeypatch, temperature, together):
    monkeypatch.setattr("trainers.score.SCORED_AT_ONCE", together)
    rows = [{**row, "explanation": row["reasoning_trace"], "closed": i != 2} for i, row in enumerate(ROWS)]
    chosen = options(model_dir, write(tmp_path / "rows.jsonl", rows), student_temperature=temperature)
    path = run_score(chosen, tmp_path)
    scored = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(scored) == len(rows)
    model = load_model(str(model_dir), torch.float32, "eager", "student_model", False)
    for row, line in zip(rows, scored, strict=True):
        student = renderer.encode(renderer.student(row["question"], row["explanation"], row["solution"]))
        teacher = renderer.encode(renderer.teacher(row["question"], row["solution"], row["explanation"]))
        solution = plain_logprobs(model, student, "solution", "solution", temperature)
        kl = plain_logprobs(model, teacher, "padding", "explanation", 0.9)
        kl = kl - plain_logprobs(model, student, "padding", "explanation", temperature)
        match = 0.0 if row["closed"] else -1.0
        expected = solution.mean() + 0.01 * solution.min() - 3 * kl.mean() - 0.03 * kl.max() + match
        assert line["reward"] == pytest.approx(expected.item(), abs=1e-4)
        assert line["match_reward"] == match
        reduced = {f"answer_log_prob_{name}": reduce(solution) for name, reduce in SEVEN.items()}
        reduced |= {f"reasoning_kl_{name}": reduce(kl) for name, reduce in SEVEN.items()}
        assert line.keys() - reduced.keys() == {"reward", "student_solves", *THREE}
        assert {name: line[name] for name in reduced} == pytest.approx(reduced, abs=1e-3)
        assert sum(line[name] for name in THREE) == pytest.approx(line["reward"])


def test_the_teacher_s_log_probs_may_be_those_at_temperature_one(model_dir, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{**ROWS[0], "explanation": "2+3=5"}])

    def score(**values):
        return run_score(options(model_dir, path, **values), tmp_path).read_text()

    assert score(unbias_teacher_log_probs=False) == score(temperature=1.0) != score()


def test_row_that_cannot_be_scored_says_why(model_dir, tmp_path):
    rows = [{**ROWS[0], "explanation": "2+3=5 " * 300}, {**ROWS[0], "explanation": "2+3=5"}]
    path = run_score(options(model_dir, write(tmp_path / "rows.jsonl", rows)), tmp_path)
    long, short = [json.loads(line) for line in path.read_text().splitlines()]
    assert long["reward"] is None
    assert "512 tokens" in long["reason"]
    assert short["reward"] < 0


def test_a_row_that_is_not_finite_is_told_and_the_others_are_scored(model_dir, renderer, tmp_path, caplog):
    """A student that has no number for a seven: the rest of the file is written before the run fails."""
    poisoned = tmp_path / "student"
    shutil.copytree(model_dir, poisoned)
    weights = load_file(poisoned / "model.safetensors")
    (seven,) = renderer.encode_text("7")
    weights["model.embed_tokens.weight"][seven] = math.nan
    config = json.loads((poisoned / "config.json").read_text()) | {"tie_word_embeddings": False}
    (poisoned / "config.json").write_text(json.dumps(config))
    weights["lm_head.weight"] = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"].clone()
    save_file(weights, poisoned / "model.safetensors", {"format": "pt"})
    rows = [{**ROWS[0], "explanation": text} for text in ("2+3=5", "2+3=7", "3+2=5")]
    chosen = options(model_dir, write(tmp_path / "rows.jsonl", rows), student_model=str(poisoned))
    with pytest.raises(FloatingPointError, match=r"1 of 3 explanations[\s\S]*first: row 1\)[\s\S]*precision=fp32"):
        run_score(chosen, tmp_path)
    first, bad, last = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert bad["reward"] is None and bad["reason"].startswith("not finite: student's log-prob of the solution nan")
    assert first["reward"] < 0 and last["reward"] < 0
    assert "1 of 3 explanations cannot be scored: not finite" in caplog.text


def test_text_longer_than_the_teacher_reads_says_so(model_dir, tmp_path):
    short = tmp_path / "teacher"
    shutil.copytree(model_dir, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    rows = [{**ROWS[0], "explanation": "2+3=5 " * 20}, {**ROWS[0], "explanation": "2+3=5"}]
    values = {"model_name_or_path": str(short), "student_model": str(model_dir)}
    path = run_score(options(model_dir, write(tmp_path / "rows.jsonl", rows), **values), tmp_path)
    long, fits = [json.loads(line) for line in path.read_text().splitlines()]
    assert long == {"reward": None, "reason": "longer than the 100 tokens that the teacher can read"}
    assert fits["reward"] < 0


def test_what_does_not_fit_is_refused_before_a_weight_is_read(model_dir, tmp_path, monkeypatch):
    rows = [{**row, "explanation": row["reasoning_trace"]} for row in ROWS]
    values = {"student_mode": "resident", "reference_mode": "resident"}
    chosen = options(model_dir, write(tmp_path / "rows.jsonl", rows), **values)
    monkeypatch.setattr("trainers.plan.machine.host_room", lambda: (2**30, 2**29))
    with monkeypatch.context() as context, pytest.raises(ConfigError, match="memory[\\s\\S]*ignore_memory_plan=true"):
        context.setattr("trainers.scoring.loading.load_model", lambda *_, **__: pytest.fail("weights were read"))
        run_score(chosen, tmp_path)
    assert run_score(chosen.model_copy(update={"ignore_memory_plan": True}), tmp_path).exists()


def test_special_tokens_that_no_text_brings_may_lie_beyond_the_embedding(tokenizer):
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(more, len(tokenizer), "model_name_or_path")
    more.pad_token = "<image>"
    with pytest.raises(ConfigError, match="goes up to"):
        check_vocabulary(more, len(tokenizer), "model_name_or_path")


def test_a_tokenizer_that_goes_beyond_the_embedding_is_refused(model_dir, tokenizer, tmp_path):
    short = tmp_path / "student"
    shutil.copytree(model_dir, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer) - 1}))
    file = write(tmp_path / "rows.jsonl", [{**ROWS[0], "explanation": "2+3=5"}])
    with pytest.raises(ConfigError, match=rf"goes up to {len(tokenizer) - 1} .* has {len(tokenizer) - 1} rows"):
        run_score(options(model_dir, file, student_model=str(short)), tmp_path)


def test_what_cannot_be_is_told_before_a_warm_up_is_trained_for_it(model_dir, tmp_path, monkeypatch):
    chosen = options(model_dir, write(tmp_path / "rows.jsonl", [{**ROWS[0], "explanation": "2+3=5"}]))
    chosen = chosen.model_copy(update={"student_model": "run:student_sft_tiny"})
    monkeypatch.setattr("trainers.plan.machine.host_room", lambda: (2**30, 2**29))
    monkeypatch.setattr("trainers.score.ensure_model", lambda *_: pytest.fail("a warm-up was trained"))
    with pytest.raises(ConfigError, match="memory"):
        run_score(chosen, tmp_path)


def test_scores_are_not_written_over_what_they_are_of(model_dir, tmp_path):
    file = write(tmp_path / "scores.jsonl", [{"question": "a", "solution": "b", "explanation": "c"}])
    given = options(model_dir, file)
    with pytest.raises(ConfigError, match="the scores would be written over it"):
        run_score(given, tmp_path)
    assert len(file.read_text().splitlines()) == 1


def test_rows_without_an_explanation_are_counted(model_dir, tmp_path, caplog):
    rows = [{"question": "a", "solution": "b", "explanation": e} for e in ("c", None, "")]
    load_score_rows(options(model_dir, write(tmp_path / "rows.jsonl", rows)))
    assert "1 of 3 rows have no explanation" in caplog.text


def test_a_model_whose_files_lack_weights_is_refused(model_dir, tmp_path):
    folder = tmp_path / "lacking"
    shutil.copytree(model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 of its weights, the first is model.layers.1.mlp.up_proj.weight"):
        load_model(str(folder), torch.float32, None, "student_model", False)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_model_that_does_more_than_its_head_is_refused(model_dir, streamed):
    cpu = torch.device("cpu")
    if streamed:
        files, config = WeightFiles(str(model_dir), "student_model"), AutoConfig.from_pretrained(model_dir)
        backbone = StreamedBackbone(files, config, cpu, torch.float32, None, "student_model")
    else:
        backbone = ResidentBackbone(load_model(str(model_dir), torch.float32, None, "student_model", False), cpu)
    frozen = FrozenModel(backbone, 0.7, 64)
    check_head(frozen, backbone, 0.7, "student_model")
    backbone.lm_head.register_forward_hook(lambda module, given, logits: 1.1 * logits)
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM does more between its layers and its logits"):
        check_head(frozen, backbone, 0.7, "student_model")


def test_one_vocabulary_cut_in_two_ways_is_two_tokenizers(tokenizer):
    other = copy.deepcopy(tokenizer)
    assert is_same_tokenizer(tokenizer, other)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Digits(individual_digits=True)
    assert tokenizer.get_vocab() == other.get_vocab() and not is_same_tokenizer(tokenizer, other)


def test_missing_explanations_are_named(model_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"needs explanation[\s\S]*explanation_column="):
        run_score(options(model_dir, write(tmp_path / "rows.jsonl", ROWS)), tmp_path)


def test_teacher_and_student_may_be_adapters(model_dir, adapter_dir, tmp_path):
    file = write(tmp_path / "rows.jsonl", [{**row, "explanation": row["reasoning_trace"]} for row in ROWS])
    names = ("model_name_or_path", "student_model")
    given = run_score(options(model_dir, file, **dict.fromkeys(names, str(adapter_dir))), tmp_path)
    merged = [str(tmp_path / folder) for folder in ("merged_start", "merged_student")]
    (tmp_path / "again").mkdir()
    again = run_score(options(model_dir, file, **dict(zip(names, merged, strict=True))), tmp_path / "again")
    (tmp_path / "base").mkdir()
    base = run_score(options(model_dir, file), tmp_path / "base")
    assert given.read_text() == again.read_text() != base.read_text()
