"""Every comparison of computed floats has a bound that is derived: `spec_tests.rounding`, or an expression with u.

This looks through the sources of the tests, of the suite and of the pages' cells for the other kind: a tolerance that
somebody typed in, which holds on the machine at hand.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: These have tolerances of their own, fixed ones.
FIXED = {"allclose", "isclose", "assert_close", "assert_allclose", "assert_almost_equal", "approx"}
#: From here on a tolerance is about what is measured or stated, not about roundings: "4.2 %, to a tenth of it".
MEASURED = 1e-3
CELL = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def typed_in(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each comparison with a tolerance that is typed in.

    >>> list(typed_in("assert abs(a - b).max() < 1e-6"))
    [(1, 'abs(a - b).max() < 1e-06')]
    >>> list(typed_in("assert torch.allclose(a, b)"))
    [(1, 'torch.allclose(a, b)')]
    >>> list(typed_in("assert x == approx(3, rel=0.05) and abs(a - b).max() <= 8 * n * u * size"))
    []
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in FIXED and not all_measured(node):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Compare) and any(map(is_small, ast.walk(node))):
            yield node.lineno, ast.unparse(node)


def is_small(node: ast.AST) -> bool:
    # far below the numbers that are compared it is no tolerance: it keeps a division from failing
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and 1e-200 < node.value < MEASURED


def all_measured(call: ast.Call) -> bool:
    given = {k.arg: k.value for k in call.keywords if k.arg in {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}}
    numbers = [value.value for value in given.values() if isinstance(value, ast.Constant)]
    return bool(numbers) and len(numbers) == len(given) and all(n == 0 or n >= MEASURED for n in numbers)


def files() -> list[str]:
    tests = [path for folder in ("tests", "spec_tests") for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*tests, *(ROOT / "tutorials").rglob("*.md")])


def cells(page: str) -> Iterator[tuple[int, str]]:
    """The Python of a page, with the number of lines before each cell."""
    for found in CELL.finditer(page):
        yield page[: found.start(1)].count("\n"), found.group(1)


@pytest.mark.parametrize("name", files())
def test_no_tolerance_is_typed_in(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    parts = list(cells(text)) if name.endswith(".md") else [(0, text)]
    found = [f"{name}:{before + line}: {what}" for before, part in parts for line, what in typed_in(part)]
    assert not found, "use spec_tests.rounding (close, agree, distance):\n" + "\n".join(found)
