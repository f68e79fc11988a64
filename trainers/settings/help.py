"""`./launch_mono.sh --help`: every option, from its one declaration."""

import textwrap
from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from trainers.config import CONFIG_DIR
from trainers.options import (
    BaseOptions,
    CommonOptions,
    FormulaOptions,
    MergeOptions,
    ModelOptions,
    RescoreOptions,
    RewardOptions,
    RLOptions,
    ScoreOptions,
    SFTOptions,
    TrainOptions,
)
from trainers.settings.trl_choices import DERIVED, TRL_AUTO
from trainers.settings.trl_options import trl_options

SECTIONS = (
    ("every stage", BaseOptions),
    ("every stage that loads a model", ModelOptions),
    ("every stage that computes with models", CommonOptions),
    ("stage=sft and stage=rl", TrainOptions),
    ("stage=rl, stage=score and stage=rescore", FormulaOptions),
    ("stage=rl and stage=score", RewardOptions),
    ("stage=rl", RLOptions),
    ("stage=sft", SFTOptions),
    ("stage=score", ScoreOptions),
    ("stage=rescore", RescoreOptions),
    ("stage=merge", MergeOptions),
)


LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


def _kind(annotation: Any, metadata: Iterable[Any]) -> str:
    """A type and its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0], [limit for each in inner[1:] for limit in getattr(each, "metadata", [each])])
    if origin in (Union, UnionType):
        kind = " | ".join(_kind(each, ()) for each in inner)
    elif origin is Literal:
        kind = " | ".join(map(repr, inner))
    elif annotation is NoneType:
        kind = "None"
    elif origin is not None:
        kind = f"{origin.__name__}[{', '.join(_kind(each, ()) for each in inner)}]"
    else:
        kind = getattr(annotation, "__name__", str(annotation))
    found = [(sign, getattr(limit, name, None)) for limit in metadata for name, sign in LIMITS.items()]
    return ", ".join([kind, *(f"{sign} {value:g}" for sign, value in found if value is not None)])


def print_help(usage: str) -> None:
    """Print usage, runs and options."""
    print(usage.strip())
    print("\nRuns (cfgs/run_cfg):")
    for path in sorted((CONFIG_DIR / "run_cfg").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        print(f"  {path.stem:26} {lines[1].removeprefix('# ')}")
    print("\nDefaults are the options' own. A run of cfgs/ sets many of them: RUN --cfg job shows its values.")
    shown: set[str] = set()
    for title, cls in SECTIONS:
        print(f"\nOptions of {title}:")
        for name, field in cls.model_fields.items():
            if name not in shown:
                shown.add(name)
                print(f"  {name} = {field.default!r}  ({_kind(field.annotation, field.metadata)})")
                print(textwrap.fill(field.description, 110, initial_indent="      ", subsequent_indent="      "))
    trl = (("grpo", RLOptions, "GRPOConfig (stage=rl)"), ("sft", SFTOptions, "SFTConfig (stage=sft)"))
    for kind, cls, title in trl:
        names = sorted(set(trl_options(kind)) - set(cls.model_fields) - set(DERIVED))
        auto = {name: " (or auto)" for name in TRL_AUTO}
        listed = ", ".join(f"{name}={trl_options(kind)[name].default}{auto.get(name, '')}" for name in names)
        print(f"\nOptions of TRL's {title}, with TRL's defaults (TRL documents them):")
        print(textwrap.fill(listed, 116, initial_indent="  ", subsequent_indent="  "))
