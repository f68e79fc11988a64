"""The README tells the truth about files and runs. Run: ./run_tests.sh tests/test_readme.py"""

import re

import pytest
from conftest import REPO

from trainers.options import STAGES, options_class

DOCS = ["README.md", "README_MONO_GPU.md", "docs/engine.md", "docs/memory.md", "docs/reward.md"]
README = (REPO / "README.md").read_text(encoding="utf-8")


def test_every_file_named_in_the_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    current = REPO
    for line in tree.strip().splitlines():
        for word in re.findall(r"[\w./]+\.(?:py|sh|md|yaml)\b|^[\w/]+/", line):
            if word.endswith("/"):
                current = REPO / word
                continue
            if "/" in word:
                path, current = REPO / word, (REPO / word).parent
            else:
                path = next((p for p in (current / word, REPO / word) if p.exists()), current / word)
            assert path.exists(), f"{word} in {line!r}"


def test_every_package_is_in_the_tree():
    tree = README.split("## The tree")[1].split("```")[1]
    packages = {path.parent for path in (REPO / "trainers").rglob("__init__.py")}
    packages |= {REPO / name for name in ("cfgs", "data", "rewards", "benchmarks", "docs")}
    for package in packages:
        assert f"\n{package.relative_to(REPO)}/" in tree, package


@pytest.mark.parametrize("file", DOCS)
def test_every_run_named_exists(file):
    runs = {path.stem for path in (REPO / "cfgs/run_cfg").glob("*.yaml")}
    named = set(re.findall(r"\b(?:teacher|student)_(?:rlt|sft)\w*", (REPO / file).read_text(encoding="utf-8")))
    assert named <= runs, named - runs


@pytest.mark.parametrize("file", DOCS)
def test_every_option_that_a_command_sets_exists(file):
    options = {name for stage in STAGES for name in options_class(stage).model_fields} | {"run_cfg", "stage"}
    text = (REPO / file).read_text(encoding="utf-8")
    commands = re.findall(r"launch(?:_mono)?\.sh (.*)", text) + re.findall(r"`(\w+=[^`]*)`", text)
    named = {name for command in commands for name in re.findall(r"(?<![\w=./,{<-])(\w+)=", command)}
    named = {name for name in named if not name.isupper()} - {
        "num_generation"
    }  # the environment; a mistake that is shown
    assert named <= options, named - options


def test_no_placeholder_is_left():
    assert not re.search(r"RUN_MINUTES|RESULT_TABLE|TODO|FIXME", README)
