"""`python train.py --help`: every option, from its one declaration."""

import textwrap

from trainers.config import CONFIG_DIR
from trainers.options import DERIVED, CommonOptions, RLOptions, SFTOptions, own_options
from trainers.trl_options import trl_options


def print_help(usage: str) -> None:
    """Print usage, runs and options."""
    print(usage.strip())
    print("\nRuns (cfgs/run_cfg):")
    for path in sorted((CONFIG_DIR / "run_cfg").glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        print(f"  {path.stem:26} {lines[1].removeprefix('# ')}")
    common = set(CommonOptions.model_fields)
    for title, cls in (("every stage", CommonOptions), ("stage=rl", RLOptions), ("stage=sft", SFTOptions)):
        print(f"\nOptions of {title}:")
        for name, field in cls.model_fields.items():
            if cls is CommonOptions or name not in common:
                kind = str(field.annotation).replace("typing.", "").removeprefix("<class '").removesuffix("'>")
                head = f"  {name} = {field.default!r}  ({kind})"
                print(head)
                print(textwrap.fill(field.description, 110, initial_indent="      ", subsequent_indent="      "))
    for kind, title in (("grpo", "GRPOConfig (stage=rl)"), ("sft", "SFTConfig (stage=sft)")):
        names = sorted(set(trl_options(kind)) - own_options() - set(DERIVED))
        print(f"\nOptions of TRL's {title}, as TRL documents them:")
        print(textwrap.fill(", ".join(names), 116, initial_indent="  ", subsequent_indent="  "))
