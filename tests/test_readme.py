"""The README tells the truth about files and runs. Run: ./run_tests.sh tests/test_readme.py"""

import re

from conftest import REPO

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


def test_every_run_named_exists():
    runs = {path.stem for path in (REPO / "cfgs/run_cfg").glob("*.yaml")}
    named = set(re.findall(r"(\w+)\.yaml", README)) - {"train", "config", "NAME"}
    assert named <= runs, named - runs


def test_no_placeholder_is_left():
    assert not re.search(r"RUN_MINUTES|RESULT_TABLE|TODO|FIXME", README)
