"""Scripts that are started with a Python without packages. Run: ./run_tests.sh tests/test_own_python.py"""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO

BARE = [sys.executable, "-S", "-E"]  # -S: what is installed is not found


@pytest.fixture
def copy(tmp_path):
    """What is run before anything is imported that needs a package, in a folder of its own without .venv."""
    (tmp_path / "trainers").mkdir()
    for name in ("train.py", "test_config_85gb.py", "trainers/__init__.py", "trainers/own_python.py"):
        shutil.copy(REPO / name, tmp_path / name)
    return tmp_path


def run(*command, cwd):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, timeout=60)


def put_python(folder, script, name=".venv"):
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/usr/bin/env bash\n{script}\n")
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("script", ["train.py", "test_config_85gb.py"])
def test_without_packages_and_without_an_environment_a_line_says_what_to_do(script, copy):
    done = run(*BARE, copy / script, "--help", cwd="/")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: {sys.executable} has no hydra, ") and "rich" in line
    assert "./launch_mono.sh --check sets up .venv" in line


@pytest.mark.parametrize("script", ["train.py", "test_config_85gb.py"])
def test_without_packages_the_python_of_the_environment_takes_over(script, copy):
    own = put_python(copy, 'printf "%s|" "$0" "$@"; exit 7')
    done = run(*BARE, script, "--config", "a b", "key=[1, 2]", cwd=copy)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == "|".join([str(own), script, "--config", "a b", "key=[1, 2]", ""])


@pytest.mark.parametrize("script", ["train.py", "test_config_85gb.py"])
def test_an_environment_without_packages_does_not_start_itself_again(script, copy):
    put_python(copy, f'echo started; exec {" ".join(BARE)} "$@"')
    done = run(*BARE, script, cwd=copy)
    assert (done.returncode, done.stdout) == (1, "started\n")
    assert "rm -r .venv, then ./launch_mono.sh --check sets up .venv anew" in done.stderr


def test_where_only_the_cpu_packages_are_they_are_taken(copy):
    put_python(copy, "exit 7", ".venv-cpu")
    assert run(*BARE, "train.py", cwd=copy).returncode == 7


def test_with_packages_nothing_is_started_over(copy):
    put_python(copy, "echo another")
    code = "import os; from trainers.own_python import use_own_python as use; use(); print(*sorted(os.environ))"
    environment = os.environ | {"RLT_STARTED_OVER": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=copy, env=environment)
    assert done.returncode == 0, done.stderr
    assert "PATH" in done.stdout.split() and "RLT_STARTED_OVER" not in done.stdout.split()
