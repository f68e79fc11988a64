"""What was sampled: its type, its seeds, and keeping it on disk to train on it again."""

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pandas as pd

from trainers.errors import ConfigError, Fault

Ended = Literal["eos", "closing_tag", "length"]


@dataclass(frozen=True)
class Rollout:
    """Sampled completions, in the order of the prompts.

    Attributes:
        prompt_ids: Tokens that each completion continues.
        completion_ids: Sampled tokens of each completion, those that ended it included.
        logprobs: Log-probability of each sampled token, at the sampling temperature.
        given_logprobs: The same for the last tokens of each prompt, where the reward asks for them (`padding_in_kl`).
        ended: What ended each completion; `length`: it was cut off.
    """

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    given_logprobs: list[list[float]]
    ended: list[Ended]


def request_seed(run_seed: int, number: int, prompt_ids: tuple[int, ...]) -> int:
    """Return the seed of a prompt's first completion, a number below 2^62; the n-th after it has this plus n."""
    text = f"{run_seed},{number}:{','.join(map(str, prompt_ids))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


class RolloutFiles:
    """One parquet file for each call that samples: `train-00000.parquet`, `eval-00000.parquet`, in order.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._counts = {"train": 0, "eval": 0}

    def _next(self, mode: str) -> Path:
        path = self.folder / f"{mode}-{self._counts[mode]:05d}.parquet"
        self._counts[mode] += 1
        return path

    def write(self, rollout: Rollout, temperature: float, step: int, mode: str) -> None:
        """Keep the rollout of one call, the temperature of its log-probabilities, and how many optimizer steps the
        weights that wrote it had taken."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._next(mode)
        partial = path.with_suffix(".partial")
        pd.DataFrame(asdict(rollout) | {"temperature": temperature, "step": step}).to_parquet(partial)
        partial.replace(path)

    def read(
        self, prompt_ids: list[list[int]], given: int, temperature: float, longest: int, step: int, mode: str
    ) -> Rollout:
        """Return the rollout of the next call.

        Args:
            prompt_ids: What this run would sample from.
            given: How many tokens at the end of each prompt this run needs the log-probabilities of.
            temperature: At which this run would sample.
            longest: Most tokens of a completion in this run.
            step: Optimizer steps that this run has taken. Held-out prompts are the same at every evaluation: nothing
                else tells which one a file is of.

        Raises:
            ConfigError: If there is none left, or it was sampled in another way.
        """
        path = self._next(mode)
        key, value = "replay_rollouts", str(self.folder)
        if not path.is_file():
            count = self._counts[mode] - 1
            cause = f"{count} {mode} rollouts were recorded, and this run asks for one more ({path.name})"
            raise ConfigError(Fault(key, value, cause, "fewer steps or evaluations, or a longer recording"))
        table = pd.read_parquet(path)
        rollout = Rollout(**{f.name: _lists(table[f.name]) for f in fields(Rollout)})
        if rollout.prompt_ids != prompt_ids:
            cause = f"{path.name} was sampled from other prompts than this run's"
            remedy = "the recording run's data, seed, tokenizer, templates and batch sizes"
            raise ConfigError(Fault(key, value, cause, remedy))
        if fault := self._other_step(path.name, table, step, mode):
            raise ConfigError(fault)
        if table["temperature"][0] != temperature:
            recorded = table["temperature"][0]
            cause = f"it was sampled at temperature {recorded}, this run's is {temperature}"
            raise ConfigError(Fault(key, value, cause, f"temperature={recorded}"))
        if (length := max(map(len, rollout.completion_ids))) > longest:
            cause = f"{path.name} holds a completion of {length} tokens, and this run's are up to {longest}"
            raise ConfigError(Fault(key, value, cause, "the recording run's max_completion_length"))
        if len(rollout.given_logprobs[0]) != given:
            cause = f"the padding's log-probabilities are {'missing from' if given else 'part of'} the recording"
            raise ConfigError(Fault(key, value, cause, f"padding_in_kl={'false' if given else 'true'}"))
        return rollout

    def _other_step(self, name: str, table: pd.DataFrame, step: int, mode: str) -> Fault | None:
        key, value = "replay_rollouts", str(self.folder)
        if "step" not in table:
            cause = f"{name} does not tell after which optimizer step it was sampled: an earlier version wrote it"
            return Fault(key, value, cause, "a new recording (record_rollouts)")
        if (recorded := table["step"][0]) == step:
            return None
        cause = f"{name} was sampled after optimizer step {recorded}, and this run is at step {step}"
        if mode == "eval":
            remedy = "the recording run's evaluations (eval_strategy, eval_steps, report_before_after)"
        else:
            remedy = "the recording run's train_batch_size, generation_aggregation_steps and num_iterations"
        return Fault(key, value, cause, remedy)


def _lists(column: pd.Series) -> list:
    return [value.tolist() if hasattr(value, "tolist") else value for value in column]
