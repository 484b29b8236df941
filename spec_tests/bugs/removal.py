"""Requirements with one `check` call taken out: what the matrix would look like then.

A call that can be taken out without any bug getting through proves nothing yet.
"""

from __future__ import annotations

import ast
import functools
import importlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from .. import areas, registry
from ..registry import Requirement, load
from .matrix import fails
from .seeded import ALL, broken

FOLDER = Path(areas.__path__[0])
METHODS = ("that", "equal", "close", "refused")


class Call(NamedTuple):
    """A `check` call: the area's module, and the how manieth it is there."""

    module: str
    number: int


def _found(tree: ast.AST) -> list[tuple[list[ast.stmt], ast.stmt]]:
    """The statements that are a `check` call, with the lists that they stand in."""
    found: list[tuple[list[ast.stmt], ast.stmt]] = []
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            statements: Any = getattr(node, name, None)
            for statement in statements if isinstance(statements, list) else ():
                call = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                    owner = call.func.value
                    if isinstance(owner, ast.Name) and owner.id == "check" and call.func.attr in METHODS:
                        found.append((statements, statement))
    return sorted(found, key=lambda pair: pair[1].lineno)


@functools.cache
def _source(module: str) -> str:
    return (FOLDER / f"{module}.py").read_text(encoding="utf-8")


def calls() -> list[Call]:
    """All of them."""
    load()
    modules = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
    return [Call(module, number) for module in modules for number in range(len(_found(ast.parse(_source(module)))))]


def without(call: Call) -> dict[str, Requirement]:
    """The requirements of that module, with this call taken out."""
    tree = ast.parse(_source(call.module))
    statements, statement = _found(tree)[call.number]
    statements[statements.index(statement)] = ast.copy_location(ast.Pass(), statement)
    name = f"{areas.__name__}.{call.module}"
    importlib.import_module(name)
    module = types.ModuleType(name)
    module.__package__ = areas.__name__
    found: dict[str, Requirement] = {}
    with mock.patch.object(registry, "REQUIREMENTS", found):
        exec(compile(tree, f"<{call.module}.py without a check>", "exec"), module.__dict__)
    return found


def lets_through(call: Call, rows: Mapping[str, list[str]]) -> tuple[str, str] | None:
    """A requirement and a bug that it finds (see the matrix), but not without this call; None if there is none."""
    before = load()
    changed = {
        id: requirement for id, requirement in without(call).items()
        if id in before and _code(requirement) != _code(before[id])
    }  # fmt: skip
    helpers = not changed  # the call is in a function that requirements use
    candidates = without(call) if helpers else changed
    for bug in sorted(ALL, key=lambda bug: len(rows[bug.name])):
        for id in rows[bug.name]:
            if id in candidates and not fails(broken(bug), candidates[id], bug.profile):
                return id, bug.name
    return None


def is_idle(call: Call, matrix: Mapping[str, Any]) -> bool:
    """Does the committed matrix list it among the calls that can be taken out unseen?"""
    return call.number in matrix["unproven"].get(call.module, ())


def unproven(part: tuple[list[Call], Mapping[str, list[str]]]) -> dict[Call, bool]:
    """For each call: can it be taken out unseen?"""
    return {call: lets_through(call, part[1]) is None for call in part[0]}


def _code(requirement: Requirement) -> bytes:
    return requirement.body.__code__.co_code
