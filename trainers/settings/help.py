"""`python train.py --help`: every option, from its one declaration."""

import textwrap

from pydantic.fields import FieldInfo

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


def _kind(field: FieldInfo) -> str:
    """The type of an option, and its range."""
    kind = str(field.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
    found = [(sign, getattr(limit, name, None)) for limit in field.metadata for name, sign in LIMITS.items()]
    return ", ".join([kind, *(f"{sign} {value:g}" for sign, value in found if value is not None)])


def print_help(usage: str) -> None:
    """Print usage, runs and options."""
    print(usage.strip())
    print("\nRuns (cfgs/run_cfg):")
    for path in sorted((CONFIG_DIR / "run_cfg").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        print(f"  {path.stem:26} {lines[1].removeprefix('# ')}")
    shown: set[str] = set()
    for title, cls in SECTIONS:
        print(f"\nOptions of {title}:")
        for name, field in cls.model_fields.items():
            if name not in shown:
                shown.add(name)
                print(f"  {name} = {field.default!r}  ({_kind(field)})")
                print(textwrap.fill(field.description, 110, initial_indent="      ", subsequent_indent="      "))
    trl = (("grpo", RLOptions, "GRPOConfig (stage=rl)"), ("sft", SFTOptions, "SFTConfig (stage=sft)"))
    for kind, cls, title in trl:
        names = sorted(set(trl_options(kind)) - set(cls.model_fields) - set(DERIVED))
        auto = {name: " (or auto)" for name in TRL_AUTO}
        listed = ", ".join(f"{name}={trl_options(kind)[name].default}{auto.get(name, '')}" for name in names)
        print(f"\nOptions of TRL's {title}, with TRL's defaults (TRL documents them):")
        print(textwrap.fill(listed, 116, initial_indent="  ", subsequent_indent="  "))
