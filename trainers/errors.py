"""Faults in what the user asked for, told all at once."""

from dataclasses import dataclass
from typing import Any

from trainers.masking import masked


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the configuration: the key and its value, the cause, and what to do about it."""

    key: str
    value: Any
    cause: str
    remedy: str

    def __str__(self) -> str:
        shown = "" if self.value is ... else f"={masked(self.value, self.key)!r}"
        return f"{self.key}{shown}: {self.cause}\n    -> {self.remedy}"


class OutOfMemory(RuntimeError):
    """The device ran out of memory: what a run ends with that was planned to fit."""


class ConfigError(ValueError):
    """Raised before anything is loaded, with every fault that was found."""

    def __init__(self, faults: list[Fault] | Fault) -> None:
        self.faults = [faults] if isinstance(faults, Fault) else list(faults)
        count = len(self.faults)
        head = "1 problem with this configuration:" if count == 1 else f"{count} problems with this configuration:"
        super().__init__("\n".join([head, *(f"  {i}. {fault}" for i, fault in enumerate(self.faults, 1))]))
