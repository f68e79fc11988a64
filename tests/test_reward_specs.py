"""What the reward's options may say, told before anything loads. Run: ./run_tests.sh tests/test_reward_specs.py"""

import shutil
import subprocess
import sys

import pytest
from conftest import REPO

from trainers.checks import load_options
from trainers.config import CONFIG_DIR, compose_run
from trainers.errors import ConfigError
from trainers.scoring.loading import check_models


def options(*overrides):
    return load_options(compose_run("teacher_rlt_tiny", ["device=cpu", *overrides]), repo=REPO)


@pytest.mark.parametrize(
    ("words", "key", "cause", "remedy"),
    [
        (["reward_funcs=[acuracy]"], "reward_funcs", "no such reward function", "did you mean accuracy?"),
        (["reward_funcs=[my.length]"], "reward_funcs", "no such reward function", "{_target_: my.length}"),
        (["reward_funcs=accuracy"], "reward_funcs", "valid list", "reward_funcs=[accuracy]"),
        (["reward_funcs=[]"], "reward_funcs", "nothing would be rewarded", "teacher_logprob_kl"),
        (["reward_funcs=[{_target_: nowhere.f}]"], "reward_funcs", "no module nowhere", "PYTHONPATH"),
        (["reward_funcs=[{_target_: trl.rewardss.f}]"], "reward_funcs", "no module trl.rewardss", "PYTHONPATH"),
        (["reward_funcs=[{_target_: trl.__init__.x.f}]"], "reward_funcs", "no module trl.__init__.x", "PYTHONPATH"),
        (["reward_funcs=[{_target_: f}]"], "reward_funcs", "names no function", "module.function"),
        (["reward_funcs=[{scale: 2}]"], "reward_funcs", "names no function", "module.function"),
        (["reward_funcs=[{_target_: math.sqrt, solution: 1}]"], "reward_funcs", "solution is no argument", "leave"),
        (["reward_funcs=[{_target_: math.sqrt, _args_: [1]}]"], "reward_funcs", "_args_ is no argument", "leave"),
        (["reward_funcs=[format,format]"], "reward_funcs", "format comes 2 times", "once"),
        (["reward_funcs=[{_target_: math.sin},{_target_: cmath.sin}]"], "reward_funcs", "sin comes 2 times", "once"),
        (["reward_funcs=[format,length]", "reward_weights=[1]"], "reward_weights", "1 weights for 2", "[1.0, 1.0]"),
        (["reward_weights=[1e999]"], "reward_weights", "a finite number", "--help"),
        (["reward_funcs=[length]", "length_soft_cache=64"], "length_soft_cache", "length 64", "length_soft_cache=12"),
        (["reward_funcs=[format]", "keep_scores=true"], "keep_scores", "no scores", "keep_scores=false"),
        (["reward_funcs=[student_answer]", "student_model=null"], "student_model", "needs a student", "student_model="),
    ],
)
def test_each_fault_has_cause_and_remedy(words, key, cause, remedy):
    with pytest.raises(ConfigError) as error:
        options(*words)
    found = {fault.key: fault for fault in error.value.faults}
    assert cause in found[key].cause
    assert remedy in found[key].remedy


def test_without_math_verify_accuracy_is_refused(monkeypatch):
    monkeypatch.setattr("trainers.settings.reward_specs._module_is_missing", lambda module: module == "math_verify")
    with pytest.raises(ConfigError, match="pip install 'math-verify"):
        options("reward_funcs=[accuracy]")
    options("reward_funcs=[format]")


def test_faults_of_functions_import_neither_torch_nor_the_named_package():
    code = (
        "import sys; sys.path.insert(0, '.'); from trainers.checks import load_options;"
        "from trainers.config import compose_run; from trainers.errors import ConfigError\n"
        "try: load_options(compose_run('teacher_rlt_tiny', ['reward_funcs=[{_target_: trl.rewardss.f}]']))\n"
        "except ConfigError as error: print(error)\n"
        "load_options(compose_run('teacher_rlt_tiny', ['device=auto', 'reward_funcs=[{_target_: trl.rewards.f}]']))\n"
        "print({'torch', 'vllm', 'transformers', 'trl'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert "no module trl.rewardss" in done.stdout, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "set()", done.stderr


def test_a_student_that_no_reward_asks_is_neither_needed_nor_looked_at(model_dir):
    named = [f"model_name_or_path={model_dir}", "student_model=nobody/nothing"]
    check_models(options(*named, "reward_funcs=[format]"))
    with pytest.raises(ConfigError, match="nobody/nothing"):
        check_models(options(*named, "reward_funcs=[format,student_answer]"))
    assert options("student_model=null", "reward_funcs=[accuracy]").student_model is None


@pytest.mark.parametrize(
    ("written", "words", "temperature"),
    [
        ("unbias_student_log_probs_temp: 0.5", [], 0.5),
        ("unbias_student_log_probs_temp: null", [], 1.0),
        ("unbias_student_log_probs_temp: 0.5", ["unbias_student_log_probs_temp=0.9"], 0.9),
        ("unbias_student_log_probs_temp: 0.5", ["student_temperature=0.9"], 0.9),
        ("unbias_student_log_probs_temp: 0.5\nstudent_temperature: 0.5", [], None),
    ],
)
def test_a_yaml_of_one_s_own_may_name_options_as_the_reference_does(monkeypatch, tmp_path, written, words, temperature):
    shutil.copytree(CONFIG_DIR, tmp_path / "cfgs")
    (tmp_path / "cfgs/reward_cfg/own.yaml").write_text(f"# @package _global_\n{written}\n")
    monkeypatch.setattr("trainers.config.CONFIG_DIR", tmp_path / "cfgs")
    composed = compose_run("teacher_rlt_tiny", ["reward_cfg=own", *words])
    if temperature is None:  # which of the two counts could not be told
        with pytest.raises(ConfigError, match="use student_temperature, which is set beside it"):
            load_options(composed, repo=REPO)
    else:
        assert load_options(composed, repo=REPO).student_temperature == temperature
