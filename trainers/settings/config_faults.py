"""What a user reads about options that do not exist, and about values that an option does not take."""

import difflib
import re
from typing import Any

from pydantic import ValidationError

from trainers.errors import Fault
from trainers.masking import masked
from trainers.options import STAGES, options_class
from trainers.settings.trl_choices import DERIVED, RENAMED
from trainers.settings.trl_options import trl_options


def unknown_fault(key: str, value: Any, stage: str) -> Fault:
    if key in DERIVED and key in set(trl_options("grpo")) | set(trl_options("sft")):
        return Fault(key, value, "this project sets it itself", DERIVED[key])
    if others := [other for other in STAGES if key in options_class(other).model_fields]:
        cause = f"used by {' and '.join(f'stage={other}' for other in others)} only, this run is stage={stage}"
        return Fault(key, value, cause, "leave it out")
    if key in RENAMED:
        return Fault(key, value, "unknown under this name", f"use {RENAMED[key]}")
    near = difflib.get_close_matches(key, options_class(stage).model_fields, n=2, cutoff=0.7)
    remedy = f"did you mean {' or '.join(near)}?" if near else "./launch_mono.sh --help lists every option"
    return Fault(key, value, "unknown", remedy)


def invalid_faults(error: ValidationError) -> list[Fault]:
    """One fault per option; a union reports each of its members, of which the first says enough."""
    first: dict[str, Any] = {}
    for e in error.errors():
        first.setdefault(str(e["loc"][0]), e)
    faults = []
    for key, e in first.items():
        expected = " ".join(o["ctx"].get("expected", "") for o in error.errors() if o["loc"][0] == key and "ctx" in o)
        near = difflib.get_close_matches(str(e["input"]), re.findall(r"'([^']+)'", expected))
        remedy = f"did you mean {near[0]}?" if near else "./launch_mono.sh --help tells what it takes"
        if e["type"] == "list_type":
            remedy = f"{key}=[{masked(e['input'], key)}]"
        elif (limit := _nearest(e)) is not None:
            remedy = f"{key}={limit:g}"
        faults.append(Fault(key, e["input"], e["msg"][0].lower() + e["msg"][1:], remedy))
    return faults


def _nearest(e: Any) -> float | None:
    """The legal value nearest to one beyond a limit that is legal itself; None for what is wrong otherwise."""
    is_its_own = not any(isinstance(part, int) for part in e["loc"])  # no element of a list
    limits = {"greater_than_equal": "ge", "less_than_equal": "le"}
    return e["ctx"][limits[e["type"]]] if is_its_own and e["type"] in limits else None
