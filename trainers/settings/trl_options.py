"""The options that TRL and transformers declare, read from their installed source without importing them.

Importing `trl.GRPOConfig` costs several seconds (torch, transformers); a typo on the command line should not. Their
dataclasses are plain `name: type = field(default=...)` statements, so the standard `ast` module reads what is needed
to check a value: the name, the type and the default. A test compares the result with the imported dataclasses.
"""

import ast
import importlib.util
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Where each configuration class and its parents are declared, most derived first.
SOURCES = {
    "grpo": (
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ),
    "sft": (
        ("trl", "trainer/sft_config.py", "SFTConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("transformers", "training_args.py", "TrainingArguments"),
    ),
}


@dataclass(frozen=True)
class TrlOption:
    """One field of a TRL configuration class. `default` is None where the source computes it."""

    annotation: Any
    default: Any


def _annotation(node: ast.expr) -> Any:
    """Evaluate a type such as `int | None` or `list[str]`; a type of transformers' own becomes `Any`."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    known = {"int", "float", "str", "bool", "dict", "list", "None"} | set(typing.__all__)
    text = ast.unparse(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    if not names <= known:
        return Any
    return eval(text, dict(vars(typing)))  # noqa: S307 - the text is a type in TRL's own source


def _default(call: ast.expr | None) -> Any:
    """The literal in `field(default=...)` or a bare value; None where it is no literal."""
    if isinstance(call, ast.Call):
        call = next((k.value for k in call.keywords if k.arg == "default"), None)
    try:
        return ast.literal_eval(call) if call is not None else None
    except ValueError:  # an enum member or an expression: only the type is known here
        return None


def _is_init_false(call: ast.expr | None) -> bool:
    keywords = call.keywords if isinstance(call, ast.Call) else []
    return any(k.arg == "init" and getattr(k.value, "value", True) is False for k in keywords)


def class_body(package: str, file: str, class_name: str) -> list[ast.stmt]:
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"{package} is not installed; run ./launch_mono.sh once, it sets up .venv")
    tree = ast.parse(Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8"))
    return next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)


@cache
def enum_values(file: str, class_name: str) -> tuple[str, ...]:
    """The values of one of transformers' enumerations of strings."""
    body = class_body("transformers", file, class_name)
    return tuple(ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign))


@cache
def trl_options(kind: str) -> dict[str, TrlOption]:
    """Return every constructor argument of TRL's configuration class, by name.

    Args:
        kind: `"grpo"` for `trl.GRPOConfig` or `"sft"` for `trl.SFTConfig`.
    """
    options: dict[str, TrlOption] = {}
    for package, file, class_name in SOURCES[kind]:
        body = class_body(package, file, class_name)
        for node in body:
            if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_") or _is_init_false(node.value):
                continue
            options.setdefault(node.target.id, TrlOption(_annotation(node.annotation), _default(node.value)))
    return options
