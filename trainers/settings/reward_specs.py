"""What `reward_funcs` asks for, and what is wrong with it: read without importing torch or anybody's module."""

import difflib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from trainers.errors import Fault
from trainers.options import CommonOptions, RescoreOptions, RLOptions

OF_STUDENT = ("teacher_logprob_kl", "student_answer")
BUILT_IN = (*OF_STUDENT, "accuracy", "format", "length")
# What TRL hands to every reward function, our columns included: no argument of the configuration can have these names.
GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "question",
    "solution",
    "prompt_tokens",
    "teacher_logprobs",
    "ended",
    "trainer_state",
    "log_extra",
    "log_metric",
)
OWN_FUNCTION = "{_target_: module.function, argument: value}"


def reward_name(entry: str | dict[str, Any]) -> str:
    """The name of a reward function in the metrics: the built-in's, or the last part of `_target_`."""
    return entry if isinstance(entry, str) else str(entry.get("_target_")).rpartition(".")[2]


def reward_names(options: RLOptions) -> list[str]:
    return [reward_name(entry) for entry in options.reward_funcs]


def uses_student(options: CommonOptions) -> bool:
    """Whether a student is loaded: by stage=score, and where a reward of stage=rl comes from it."""
    if options.stage != "rl":
        return options.stage == "score"
    return any(name in OF_STUDENT for name in options.reward_funcs if isinstance(name, str))


def reads_teacher(options: CommonOptions) -> bool:
    """Whether the teacher is read as a frozen model too: the reference of beta, the teacher of stage=score."""
    return options.stage == "score" or bool(options.stage == "rl" and options.beta and not options.use_peft)


def reads_teacher_logprobs(options: RLOptions) -> bool:
    """Whether a reward of stage=rl depends on how likely the teacher was to write what it wrote."""
    coefficients = options.kl_penalty_reward_coeff
    has_kl = any(coefficients) if isinstance(coefficients, list) else coefficients != 0
    return has_kl and options.include_teacher_think_entropy and "teacher_logprob_kl" in options.reward_funcs


def model_keys(options: CommonOptions) -> tuple[str, ...]:
    """The options that name the models which this run loads."""
    return ("model_name_or_path", "student_model") if uses_student(options) else ("model_name_or_path",)


def length_soft_cache(options: RLOptions) -> int:
    """Tokens below max_completion_length over which the length's punishment rises: a fifth of it unless set."""
    return options.length_soft_cache or max(1, options.max_completion_length // 5)


# Of the formula: coefficients, and the reductions that they are for.
COEFFICIENTS = (
    ("answer_log_prob_coeff", "reduction_log_prob_fn"),
    ("kl_penalty_reward_coeff", "reduction_kl_fn"),
)


def formula_faults(formula: Mapping[str, Any]) -> list[Fault]:
    """Every fault of the options of the formula together."""
    faults = []
    for coeff_key, reduction_key in COEFFICIENTS:
        coeff, reduction = formula[coeff_key], formula[reduction_key]
        num_coeff = len(coeff) if isinstance(coeff, list) else 1
        num_reduction = len(reduction) if isinstance(reduction, list) else 1
        if num_coeff != num_reduction and coeff not in (0, [0]):
            cause = f"{num_coeff} coefficients for {num_reduction} reductions ({reduction_key}={reduction})"
            faults.append(Fault(coeff_key, coeff, cause, f"give one {coeff_key} for each {reduction_key}"))
    return faults


FORMULA_FILE = "formula.json"  # beside kept scores


def kept_formula(folder: Path) -> dict[str, Any]:
    """The options of the formula that kept rewards were computed with."""
    return json.loads((folder / FORMULA_FILE).read_text(encoding="utf-8"))


def rescore_faults(options: RescoreOptions) -> list[Fault]:
    """What is wrong with a folder of kept scores, or with another formula for them."""
    remedy = "scores=<output_dir>/scores of a run with keep_scores=true"
    if options.scores is None:
        return [Fault("scores", None, "no folder is named", remedy)]
    folder = Path(options.scores).expanduser()
    if not list(folder.glob("*.safetensors")):
        return [Fault("scores", options.scores, "the folder holds no kept scores", remedy)]
    if not (folder / FORMULA_FILE).is_file():
        cause = f"the folder has no {FORMULA_FILE}: it does not tell by which formula its rewards were computed"
        return [Fault("scores", options.scores, cause, "score them again with keep_scores=true")]
    return formula_faults(changed_formula(options))


def changed_formula(options: RescoreOptions) -> dict[str, Any]:
    """The formula of kept scores, but for the options that are set."""
    kept = kept_formula(Path(options.scores).expanduser())
    return kept | {name: getattr(options, name) for name in kept.keys() & options.model_fields_set}


def reward_faults(options: RLOptions) -> list[Fault]:
    """Every fault of `reward_funcs` and of the options that go with it."""
    entries = options.reward_funcs
    if not entries:
        remedy = f"one or more of: {', '.join(BUILT_IN)}, {OWN_FUNCTION}"
        return [Fault("reward_funcs", entries, "nothing would be rewarded", remedy)]
    faults = [fault for entry in entries for fault in _entry_faults(entry)]
    for name, count in Counter(reward_names(options)).items():
        if count > 1:
            cause = f"{name} comes {count} times, and metrics are told apart by this name"
            faults.append(Fault("reward_funcs", entries, cause, "each once; reward_weights says how much it counts"))
    faults += _weight_faults(options.reward_weights, len(entries))
    if "length" in entries and length_soft_cache(options) >= options.max_completion_length:
        limit = options.max_completion_length
        cause = f"not below max_completion_length {limit}"
        remedy = f"length_soft_cache={max(1, limit // 5)}" if limit > 1 else "a longer max_completion_length"
        faults.append(Fault("length_soft_cache", length_soft_cache(options), cause, remedy))
    if "accuracy" in entries and _module_is_missing("math_verify"):
        cause = "accuracy needs the package math-verify, which is not installed"
        remedy = f"{sys.executable} -m pip install 'math-verify[antlr4_9_3]'"
        faults.append(Fault("reward_funcs", entries, cause, remedy))
    if not options.unbias_teacher_log_probs and options.temperature != 1 and reads_teacher_logprobs(options):
        cause = f"the reward reads the log-probs of the rollout, which are those at temperature {options.temperature:g}"
        remedy = "unbias_teacher_log_probs=true, or temperature=1; stage=score can do without"
        faults.append(Fault("unbias_teacher_log_probs", False, cause, remedy))
    if options.keep_scores and not uses_student(options):
        cause = "no reward function asks the student, so there are no scores to keep"
        faults.append(Fault("keep_scores", True, cause, "keep_scores=false, or add teacher_logprob_kl to reward_funcs"))
    return faults


def _weight_faults(weights: list[float] | None, count: int) -> list[Fault]:
    remedy = f"reward_weights=[{', '.join(['1.0'] * count)}], or leave it out"
    if weights is None:
        return []
    if len(weights) != count:
        plural = "" if count == 1 else "s"
        cause = f"{len(weights)} weights for {count} reward function{plural}"
        return [Fault("reward_weights", weights, cause, remedy)]
    return []


def _entry_faults(entry: str | dict[str, Any]) -> list[Fault]:
    if isinstance(entry, str):
        return [] if entry in BUILT_IN else [_unknown_name(entry)]
    target = entry.get("_target_")
    if not isinstance(target, str) or "." not in target.strip("."):
        return [Fault("reward_funcs", entry, "names no function", f"write it as {OWN_FUNCTION}")]
    faults = []
    module = target.rpartition(".")[0]
    if _module_is_missing(module):
        cause = f"there is no module {module}"
        remedy = f"put the folder it lies in on the path: PYTHONPATH=<folder> ./launch_mono.sh ..., as {OWN_FUNCTION}"
        faults.append(Fault("reward_funcs", entry, cause, remedy))
    for key in entry:
        if key != "_target_" and (key in GIVEN or key.startswith("_")):
            cause = f"{key} is no argument that can be set here"
            faults.append(Fault("reward_funcs", entry, cause, f"leave {key} out, or give the argument another name"))
    return faults


def _unknown_name(name: str) -> Fault:
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"one of: {', '.join(BUILT_IN)}; your own: {OWN_FUNCTION}"
    if "." in name:
        remedy = f"your own function is named by a mapping: {{_target_: {name}}}"
    return Fault("reward_funcs", name, "there is no such reward function", remedy)


def _module_is_missing(module: str) -> bool:
    """Whether a module cannot be found. Unlike `importlib.util.find_spec` it imports no parent package."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # an empty name, or a module that was made at run time
        return True
    name = top
    for part in inner:
        if spec is None or spec.submodule_search_locations is None:
            return True
        name = f"{name}.{part}"
        spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
    return spec is None
