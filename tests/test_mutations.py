"""Each small change of the rewards must fail a test of test_rewards.py. Run: ./run_tests.sh tests/test_mutations.py

A change is one operator, comparison, condition, number or reduction of `rewards/` turned into another. Its module takes
the place of the real one in test_rewards.py, whose tests then run one by one until one fails.
"""

import ast
import copy
import sys
import types
from collections.abc import Iterator

import pytest
import test_rewards
from conftest import REPO

MODULES = ("reductions", "alignment", "teacher_logprob_kl", "explanation_format")
SWAPS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And}
SWAPS |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Lt: ast.LtE}
NAMES = {"mean": "sum", "sum": "mean", "min": "max", "max": "min", "median": "mean", "exp": "log"}
NAMES |= {"clip_min": "clip_max", "clip_max": "clip_min", "teacher": "student", "student": "teacher"}

NOT_COMPUTED = ("annotation", "returns", "decorator_list", "msg", "exc")  # types and messages


def worked_by_hand() -> list[tuple]:
    """Each test of test_rewards.py with each of its parameters."""
    calls = []
    for name, function in vars(test_rewards).items():
        if name.startswith("test_"):
            (mark,) = getattr(function, "pytestmark", [None])
            calls += [(function, value) for value in mark.args[1]] if mark else [(function,)]
    return calls


def changes_of(node: ast.AST) -> list[ast.AST]:
    """What a node of the syntax tree can be changed into."""
    found: list[ast.AST] = []
    if type(node) in SWAPS:
        found.append(SWAPS[type(node)]())
    if isinstance(node, ast.UnaryOp):
        found.append(node.operand)  # without its minus or its not
    if isinstance(node, ast.If | ast.IfExp):
        found.append(_with(node, test=ast.UnaryOp(ast.Not(), node.test)))
    if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
        found.append(ast.Pass())  # without the guard
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "double":
        found.append(node.func.value)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        found.append(ast.Constant(not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        found.append(ast.Constant(node.value + 1))
    for field in ("attr", "id", "arg"):
        if (name := getattr(node, field, None)) in NAMES and not isinstance(node, ast.arg):
            found.append(_with(node, **{field: NAMES[name]}))
    return found


def _with(node: ast.AST, **fields) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def mutants(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """Yield every change, and the tree with that one change."""
    for parent in computing(tree):
        for field, value in ast.iter_fields(parent):
            if field in NOT_COMPUTED:
                continue
            for i, child in enumerate(value if isinstance(value, list) else [value]):
                for changed in changes_of(child) if isinstance(child, ast.AST) else []:
                    put(parent, field, i, changed)
                    line = getattr(child, "lineno", getattr(parent, "lineno", 0))
                    yield f"line {line}: {show(child)} -> {show(changed)}", tree
                    put(parent, field, i, child)


def computing(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that compute something."""
    yield node
    for field, value in ast.iter_fields(node):
        if field not in NOT_COMPUTED:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.Import | ast.ImportFrom):
                    yield from computing(child)


def put(parent: ast.AST, field: str, i: int, child: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[i] = child
    else:
        setattr(parent, field, child)


def show(node: ast.AST) -> str:
    shown = node.test if isinstance(node, ast.If | ast.IfExp) else node
    return ast.unparse(shown) or type(node).__name__


def is_found_out(monkeypatch, name: str, tree: ast.Module) -> bool:
    """Whether a test fails with the changed module in the place of `rewards.name`, and of all that imports it."""
    with monkeypatch.context() as patch:
        try:
            for module in MODULES[MODULES.index(name) :]:
                path = REPO / "rewards" / f"{module}.py"
                code = ast.fix_missing_locations(tree) if module == name else ast.parse(path.read_text())
                made = types.ModuleType(f"rewards.{module}")
                patch.setitem(sys.modules, made.__name__, made)
                exec(compile(code, str(path), "exec"), vars(made))
                for public in set(vars(made)) & set(vars(test_rewards)) - {"pytest", "torch", "math"}:
                    if not public.startswith("_"):
                        patch.setattr(test_rewards, public, getattr(made, public))
            for function, *arguments in worked_by_hand():
                function(*arguments)
        except (Exception, pytest.fail.Exception):  # whatever breaks, it was noticed
            return True
    return False


@pytest.mark.parametrize("name", MODULES)
def test_every_change_of_a_reward_fails_a_test(name, monkeypatch):
    tree = ast.parse((REPO / "rewards" / f"{name}.py").read_text())
    unchanged = ast.parse((REPO / "rewards" / f"{name}.py").read_text())
    assert not is_found_out(monkeypatch, name, unchanged), "the tests fail without any change"
    count, survivors = 0, []
    for change, mutant in mutants(tree):
        count += 1
        if not is_found_out(monkeypatch, name, copy.deepcopy(mutant)):
            survivors.append(change)
    assert not survivors, f"{len(survivors)} of {count} changes go unnoticed:\n" + "\n".join(survivors)
    assert count > 3
