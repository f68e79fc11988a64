"""The reward functions of a run, as TRL calls them: `reward_funcs` in the order of `reward_weights`."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from torch import Tensor
from trl.rewards import accuracy_reward, get_soft_overlong_punishment
from trl.trainer.utils import is_async_callable

from data.explanation import Explanation, sampled_explanation
from data.render import Renderer
from rewards.explanation_format import explanation_format
from trainers.errors import ConfigError, Fault
from trainers.options import RLOptions
from trainers.rollout.overlap import ScoreAhead
from trainers.scoring.explanation_scorer import ExplanationScorer, Scored
from trainers.settings.reward_specs import GIVEN, OF_STUDENT, OWN_FUNCTION, length_soft_cache, reward_name

RewardFunction = Callable[..., list[float | None]]
MAX = torch.finfo(torch.float32).max  # TRL keeps rewards in this type


def make_reward_funcs(
    options: RLOptions, teacher: Renderer, student: "StudentReward | None", own: dict[str, RewardFunction]
) -> list[RewardFunction]:
    """Return one function for each entry of `reward_funcs`, each guarded against numbers that are not finite.

    Args:
        teacher: The teacher's tokenizer and tags.
        student: What asks the student; None where no entry needs it.
        own: The user's functions, as `own_functions` returns them.
    """
    limit = options.max_completion_length
    functions: list[RewardFunction] = []
    for entry in options.reward_funcs:
        name = reward_name(entry)
        match entry:
            case "teacher_logprob_kl":
                function = student
            case "student_answer":
                function = student.answers
            case "accuracy":
                function = accuracy_function(teacher)
            case "format":
                function = format_function(teacher)
            case "length":
                function = get_soft_overlong_punishment(limit, length_soft_cache(options))
            case _:
                function = own[name]
        functions.append(guarded(function, name, is_own=not isinstance(entry, str)))
    return functions


class StudentReward:
    """The scorer as a TRL reward function: completions in, one reward each out, the parts as metrics.

    Two reward functions come from one look of the student: this object itself is teacher_logprob_kl, `answers` is
    student_answer. The student is asked, and the metrics are logged, by whichever TRL calls first.

    Args:
        scorer: The scorer.
        overlap_on: The device on which groups are scored while others are still written; None to score whole batches.

    Attributes:
        ahead: Scores such groups.
        results: Of the batch that was scored last: of each completion its score, or why it has none.
        metrics: Names of what was logged as a mean of the completions that could be scored.
    """

    __name__ = "teacher_logprob_kl"

    def __init__(self, scorer: ExplanationScorer, overlap_on: torch.device | None = None) -> None:
        self.scorer = scorer
        self.ahead = None if overlap_on is None else ScoreAhead(self.score, overlap_on)
        self._batch: list[list[int]] | None = None  # TRL hands the same object to each function of a batch
        self.results: list[Scored | str] = []
        self.metrics: set[str] = set()

    def __call__(self, **batch: Any) -> list[float | None]:
        """Return the student's reward of each completion, None for one that cannot be scored."""
        return [r.reward if isinstance(r, Scored) else None for r in self.ask(**batch)]

    def score(
        self,
        completion_ids: list[list[int]],
        question: list[str],
        solution: list[str],
        teacher_logprobs: list[list[float]],
    ) -> list[tuple[Scored | str, Explanation]]:
        """Read the explanations out of completions and score them; the arguments are those of `ask`, which keeps what
        is to be kept of a whole batch."""
        padding = len(self.scorer.teacher.padding_ids) if self.scorer.padding_in_kl else 0
        explanations = [sampled_explanation(self.scorer.teacher, ids) for ids in completion_ids]
        pairs = zip(teacher_logprobs, explanations, strict=True)
        logprobs = [torch.tensor(values[: padding + len(e.ids)]) for values, e in pairs]
        results = self.scorer.score(question, explanations, solution, logprobs, keep=False)
        return list(zip(results, explanations, strict=True))

    def answers(self, **batch: Any) -> list[float | None]:
        """Return 1.0 where the student, decoding greedily, writes the solution; None where it cannot be asked."""
        return [float(r.solves) if isinstance(r, Scored) else None for r in self.ask(**batch)]

    def ask(
        self,
        completion_ids: list[list[int]],
        question: list[str],
        solution: list[str],
        teacher_logprobs: list[list[float]],
        log_metric: Any,
        log_extra: Any,
        **_: Any,
    ) -> list[Scored | str]:
        """Score a batch, once: for the same `completion_ids` object the results are those at hand.

        Args:
            completion_ids: Sampled tokens of each completion.
            question, solution: Of each completion.
            teacher_logprobs: Log-probability of each token that was sampled, with `padding_in_kl` after those of the
                padding, at the sampling temperature.
            log_metric, log_extra: TRL's loggers.
        """
        if completion_ids is self._batch:
            return self.results
        found = self.ahead.take() if self.ahead is not None else None
        if found is None:
            found = self.score(completion_ids, question, solution, teacher_logprobs)
        results = [result for result, _ in found]
        self.scorer.keep(results)
        scored = [(r, e) for r, e in found if isinstance(r, Scored)]
        values = [r.parts | {"student_accuracy": r.solves, "explanation_length": len(e.ids)} for r, e in scored]
        for name in values[0] if values else ():
            log_metric(name, sum(each[name] for each in values) / len(values))
            self.metrics.add(name)
        log_metric("unscorable_fraction", 1 - len(scored) / len(results))
        log_extra("student_solves", [r.solves if isinstance(r, Scored) else None for r in results])
        self._batch, self.results = completion_ids, results
        return results


def without_unscored(
    rewards: Tensor, entries: list[str | dict[str, Any]], weights: Tensor, num_generations: int
) -> Tensor:
    """Take every reward from the rows that the student was to score and could not, and from those that another function
    skipped while it gave a number to others of their group.

    TRL counts one function's None as 0 where another gives a number, and next to log-probabilities 0 is the best of a
    group; a row without any reward it leaves out. A function that skips a whole group does not concern its question.

    Args:
        rewards: `[completions, functions]`, NaN where a function gave none.
        entries: `reward_funcs`, in the order of the functions.
        weights: `[functions]`; one that counts nothing takes nothing.
        num_generations: Completions of a group; they follow each other.
    """
    missing = rewards.isnan() & (weights.to(rewards.device) != 0)
    asked = torch.tensor([entry in OF_STUDENT for entry in entries], device=rewards.device)
    unscored = (missing & asked).any(1, keepdim=True)
    by_group = (missing | unscored).view(-1, num_generations, len(entries))
    concerns_none = by_group.all(1, keepdim=True).expand_as(by_group).reshape(missing.shape)
    skipped = (missing & ~concerns_none).any(1, keepdim=True)
    return rewards.masked_fill(unscored | skipped, torch.nan)


def _written(teacher: Renderer, ids: list[int]) -> tuple[str, bool]:
    """The text before the end of turn, and whether that end is there, as the last token."""
    end = next((i for i, token in enumerate(ids) if token in teacher.end_ids), None)
    return teacher.tokenizer.decode(ids[:end], skip_special_tokens=False), end == len(ids) - 1


def accuracy_function(teacher: Renderer) -> RewardFunction:
    """1.0 where the explanation's final answer equals the solution, by TRL's accuracy_reward (math-verify)."""

    def accuracy(completion_ids: list[list[int]], solution: list[str], log_extra: Any, **_: Any) -> list[float | None]:
        texts = [_written(teacher, ids)[0].partition(teacher.tags.explanation[1])[0] for ids in completion_ids]
        return accuracy_reward([[{"role": "assistant", "content": text}] for text in texts], solution, log_extra)

    return accuracy


def format_function(teacher: Renderer) -> RewardFunction:
    """1.0 where a completion is an explanation, its closing tag and the end of turn."""
    tags = teacher.tags.every_tag

    def explanation_forms(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        written = [_written(teacher, ids) for ids in completion_ids]
        return [explanation_format(text, ended, teacher.tags.explanation[1], tags) for text, ended in written]

    return explanation_forms


def guarded(function: RewardFunction, name: str, is_own: bool = True) -> RewardFunction:
    """The same function under the name it has in metrics; it stops the step at a reward that is not finite.

    Args:
        is_own: Whether it is the user's: then it is named where it fails.
    """
    if is_async_callable(function):

        async def reward(**batch: Any) -> list[float | None]:
            with _named(name) if is_own else nullcontext():
                rewards = await function(**batch)
            return _checked(name, rewards, batch)

    else:

        def reward(**batch: Any) -> list[float | None]:
            with _named(name) if is_own else nullcontext():
                rewards = function(**batch)
            return _checked(name, rewards, batch)

    reward.__name__ = name
    return reward


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say which function has failed."""
    try:
        yield
    except Exception as error:
        cause = f"the reward function {name} fails with {type(error).__name__}: {error}"
        raise RuntimeError(f"{cause}\n  -> completions come to it as text, their tokens as completion_ids") from error


def _checked(name: str, rewards: Any, batch: dict[str, Any]) -> list[float | None]:
    try:
        if isinstance(rewards, Mapping):
            raise TypeError("a mapping gives its keys")
        numbers = [None if reward is None else float(reward) for reward in rewards]
    except (TypeError, ValueError) as error:
        cause = f"the reward function {name} must return a list with a number or None for each completion"
        raise TypeError(f"{cause}, not {rewards!r:.200}") from error
    # TRL itself tells of a wrong number of rewards.
    for i, (number, text) in enumerate(zip(numbers, batch["completions"], strict=False)):
        if number is not None and not (math.isfinite(number) and abs(number) <= MAX):
            raise FloatingPointError(
                f"the reward function {name} gives {number} for sample {i}\n  question: {batch['question'][i]!r}\n"
                f"  completion: {text!r}\n  -> return a finite number, or None to leave a completion out"
            )
    return numbers


def own_functions(options: RLOptions) -> dict[str, RewardFunction]:
    """Import and build the user's functions, by name; this is the first thing a run does.

    Raises:
        ConfigError: With the fault of each that cannot be had or called as TRL calls reward functions.
    """
    functions, faults = {}, []
    for entry in options.reward_funcs:
        if not isinstance(entry, str):
            try:
                functions[reward_name(entry)] = _own_function(entry)
            except ConfigError as error:
                faults += error.faults
    if faults:
        raise ConfigError(faults)
    return functions


def _own_function(entry: dict[str, Any]) -> RewardFunction:
    """A function with **kwargs is the reward function; a class, or a function without, is called to make it."""
    target, arguments = entry["_target_"], {key for key in entry if key != "_target_"}
    try:
        found = get_object(target)
    except Exception as error:  # importing it runs the user's code, which may raise anything
        raise _fault(entry, f"cannot be imported: {error}", f"name a function: {OWN_FUNCTION}") from error
    if not callable(found):
        raise _fault(entry, f"{target} is a {type(found).__name__}, no function", f"name a function: {OWN_FUNCTION}")
    if _is_reward_function(found):
        _check_arguments(entry, found, arguments)
        return instantiate({**entry, "_partial_": True, "_convert_": "all"}) if arguments else found
    if not inspect.isclass(found) and {"prompts", "completions", "completion_ids"} & set(_parameters(found)):
        cause = f"{target}{inspect.signature(found)} does not take all that TRL hands to a reward function"
        raise _fault(entry, cause, "add **kwargs to its arguments")
    try:
        made = instantiate({**entry, "_convert_": "all"})
    except (HydraException, TypeError, ValueError) as error:
        raise _fault(entry, f"cannot be made: {error}", "correct its arguments") from error
    if not callable(made) or not _is_reward_function(made):
        cause = f"{target} makes a {type(made).__name__}, which cannot be called as a reward function"
        raise _fault(entry, cause, "it must take completions, completion_ids, the columns and **kwargs")
    _check_arguments(entry, made, set())
    return made


def _check_arguments(entry: dict[str, Any], function: Any, arguments: set[str]) -> None:
    """See that each argument set exists, and that each one needed is set or comes from TRL."""
    parameters = _parameters(function)
    unknown = arguments - set(parameters)
    if unknown:
        cause = f"{entry['_target_']} has no argument {', '.join(sorted(unknown))}"
        raise _fault(entry, cause, f"its arguments: {inspect.signature(function)}")
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind not in optional}
    missing = needed - arguments - set(GIVEN)
    if missing:
        cause = f"{entry['_target_']} needs {', '.join(sorted(missing))}, which nothing gives it"
        raise _fault(entry, cause, f"set it beside _target_; what every reward function is given: {', '.join(GIVEN)}")


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:  # some built-in functions tell nothing
        return {}


def _is_reward_function(function: Any) -> bool:
    """TRL passes every column by name: a reward function takes those it does not use as **kwargs."""
    kinds = [parameter.kind for parameter in _parameters(function).values()]
    return not inspect.isclass(function) and inspect.Parameter.VAR_KEYWORD in kinds


def _fault(entry: dict[str, Any], cause: str, remedy: str) -> ConfigError:
    return ConfigError(Fault("reward_funcs", entry, cause, remedy))
