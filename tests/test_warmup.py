"""Models named run:NAME: what is trained, kept and inherited. Run: ./run_tests.sh tests/test_warmup.py

Training is replaced by writing an empty model folder; test_sft.py and test_end_to_end.py train for real.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from trainers import warmup, warmup_runs
from trainers.checks import load_options
from trainers.config import REPO, compose_run
from trainers.errors import ConfigError, Fault

# Of trainers/settings: what may be set, what is told of it, and what other stages make of it.
OF_CHECKS = ("batch", "config_faults", "engine_specs", "reporting", "reward_specs", "trl_choices", "trl_faults")
OF_CHECKS += ("trl_options",)


def options(*overrides):
    return load_options(compose_run("teacher_rlt_tiny", list(overrides)), repo=REPO)


@pytest.fixture
def trained(monkeypatch):
    """Records what would be trained, in order."""
    calls = []

    def run_sft(options, output_dir, start, plan):
        calls.append((options.sft_role, options.seed, options.tag_format, start))
        (output_dir / "config.json").write_text("{}")
        (output_dir / "README.md").write_text(f"in {output_dir}")

    monkeypatch.setattr(warmup_runs, "run_sft", run_sft)
    return calls


def test_a_warm_up_trains_what_it_starts_from_first_and_is_kept(trained, tmp_path):
    teacher = warmup_runs.ensure_model("run:teacher_sft_tiny", options(), tmp_path)
    student = warmup_runs.ensure_model("run:student_sft_tiny", options(), tmp_path)
    assert trained == [("student", 0, "stratos", None), ("teacher", 0, "stratos", student)]
    assert warmup_runs.ensure_model("run:teacher_sft_tiny", options(), tmp_path) == teacher
    assert len(trained) == 2  # nothing was trained again
    assert not list(tmp_path.glob("results/run_models/*.partial*"))
    assert (Path(teacher) / "README.md").read_text() == f"in {teacher}"


def test_a_warm_up_follows_the_seed_and_the_texts_of_the_run(trained, tmp_path):
    base = warmup_runs.ensure_model("run:student_sft_tiny", options(), tmp_path)
    seeded = warmup_runs.ensure_model("run:student_sft_tiny", options("seed=5"), tmp_path)
    tagged = warmup_runs.ensure_model("run:student_sft_tiny", options("tag_format=r1"), tmp_path)
    assert len({base, seeded, tagged}) == 3
    assert [call[1:3] for call in trained] == [(0, "stratos"), (5, "stratos"), (0, "r1")]


def test_each_file_that_a_warm_up_imports_is_counted_or_known_not_to_matter():
    """One that is in neither list is to be put into one: a change of it trains warm-ups anew, or does not."""
    harmless = ("trainers/plan/", "trainers/watch/", "trainers/checks.py", "trainers/config.py", "trainers/errors.py")
    harmless += ("trainers/warmup.py", "trainers/weights/hub.py", "trainers/weights/model_card.py")
    harmless += ("trainers/masking.py", "trainers/memory.py", "trainers/weights/saving.py")
    harmless += tuple(f"trainers/settings/{name}.py" for name in OF_CHECKS)
    code = "import sys, trainers.sft\nfor m in list(sys.modules.values()): print(getattr(m, '__file__', ''))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)  # noqa: S603
    ours = [Path(file).relative_to(REPO) for file in run.stdout.split() if Path(file).is_relative_to(REPO)]
    files = {
        str(file) for file in ours if file.parts[0] in ("data", "rewards", "trainers") and file.name != "__init__.py"
    }
    assert {file for file in files if not file.startswith(harmless)} == set(warmup.CODE)


def test_a_student_s_warm_up_has_the_student_s_template():
    asking = options("chat_template_kwargs={a: 1}", "student_chat_template_kwargs={b: 2}", 'eos_token="<|im_end|>"')
    asking = asking.model_copy(update={"chat_template": "teacher's", "student_chat_template": "student's"})
    keys = (*warmup.FOLLOWED, *warmup.STUDENT)
    asked = {key: getattr(asking, key) for key in keys}
    teacher, student = (warmup._composed(f"{role}_sft_tiny", asked) for role in ("teacher", "student"))
    assert (teacher["chat_template"], teacher["chat_template_kwargs"]) == ("teacher's", {"a": 1})
    assert (student["chat_template"], student["chat_template_kwargs"]) == ("student's", {"b": 2})
    assert teacher["eos_token"] == "<|im_end|>" and student.get("eos_token") is None


def test_a_warm_up_is_kept_under_what_the_model_it_starts_from_holds(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    composed = {"model_name_or_path": str(tmp_path)}
    first = warmup.cached_path("x", composed)
    assert warmup.cached_path("x", composed) == first
    (tmp_path / "model.safetensors").write_text("others")
    assert warmup.cached_path("x", composed) != first


def test_a_warm_up_on_the_same_data_holds_out_what_the_run_evaluates(rows_file):
    def told(*overrides):
        asked = warmup.warmup_options("student_sft_tiny", options(*overrides))[1]
        return asked.eval_dataset_split, asked.eval_size

    assert told() == ("test", None)
    assert told("eval_dataset_split=null", "eval_size=64") == (None, 64)
    assert told(f"dataset_id_or_path={rows_file}", "eval_dataset_split=null", "eval_size=2") == ("test", None)


def test_an_interrupted_warm_up_is_not_taken_for_a_whole_one(trained, tmp_path, monkeypatch):
    def interrupted(options, output_dir, start, plan):
        (output_dir / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(warmup_runs, "run_sft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warmup_runs.ensure_model("run:student_sft_tiny", options(), tmp_path)
    assert [p for p in tmp_path.glob("results/run_models/*") if ".partial" not in p.name] == []


def test_a_path_stays_as_it_is():
    assert warmup_runs.ensure_model("some/model", options()) == "some/model"
    assert warmup_runs.ensure_model(None, options()) is None


def test_only_a_warm_up_can_be_named():
    with pytest.raises(ConfigError, match="stage=rl"):
        warmup.warmup_options("teacher_rlt_tiny", options())


def test_a_warm_up_that_leaves_an_adapter_is_kept_too(monkeypatch, tmp_path):
    calls = []

    def run_sft(options, output_dir, start, plan):
        calls.append(start)
        (output_dir / "adapter_config.json").write_text("{}")
        (output_dir / "README.md").touch()

    monkeypatch.setattr(warmup_runs, "run_sft", run_sft)
    first = warmup_runs.ensure_model("run:student_sft_tiny", options(), tmp_path)
    assert warmup_runs.ensure_model("run:student_sft_tiny", options(), tmp_path) == first
    assert len(calls) == 1


def test_a_warm_up_is_planned_for_its_own_disk_and_refused_before_it_leaves_anything(monkeypatch, tmp_path):
    planned = []

    def refuse(options):
        planned.append(Path(options.output_dir))
        raise ConfigError(Fault("disk", ..., "full", "make room"))

    monkeypatch.setattr(warmup_runs, "planned", refuse)
    options = load_options(compose_run("teacher_rlt_tiny"), repo=REPO)
    with pytest.raises(ConfigError, match="full"):
        warmup_runs.ensure_model("run:student_sft_tiny", options, tmp_path)
    assert planned[0].parent == tmp_path / "results/run_models" and not planned[0].exists()
