"""Every comparison of computed floats has a bound that is derived: `spec_tests.rounding`, or an expression with u.

This looks through the sources of the tests, of the suite, of the pages' cells and of the doctests for the other kind:
a tolerance that somebody typed in, which holds on the machine at hand.
"""

from __future__ import annotations

import ast
import doctest
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: These have tolerances of their own, fixed ones.
FIXED = {"allclose", "isclose", "assert_close", "assert_allclose", "assert_almost_equal", "approx"}
FIXED |= {"assertAlmostEqual", "assert_array_almost_equal", "assert_array_almost_equal_nulp"}
#: Functions that compare, with a number for an argument.
ORDERED = {"lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"}
#: What a tolerance is called, as a variable, an argument or a default.
NAMED = re.compile(r"^_?(tol|tolerance|rtol|atol|rel_tol|abs_tol)$", re.IGNORECASE)
#: The exponents of the unit roundoffs and of the spacings at 1, of bfloat16, float16, float32 and float64; and of the
#: spacing of float16's subnormal numbers.
ROUNDOFFS = (-7, -8, -10, -11, -23, -24, -25, -52, -53)
#: A tolerance that is the subject: what `torch.allclose` would let through.
SUBJECTS = {("tutorials/12_test_your_lora.md", "rtol = 1e-05")}
#: From here on a tolerance is about what is measured or stated, not about roundings: "4.2 %, to a tenth of it".
MEASURED = 1e-3
CELL = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def typed_in(source: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each comparison with a tolerance that is typed in.

    >>> list(typed_in("assert abs(a - b).max() < 1e-6"))
    [(1, 'abs(a - b).max() < 1e-06')]
    >>> list(typed_in("assert torch.allclose(a, b)"))
    [(1, 'torch.allclose(a, b)')]
    >>> list(typed_in("TOL = 1e-6")), list(typed_in("same(a, b, tol=2**-20)")), list(typed_in("assert d < 1 / 10**7"))
    ([(1, 'TOL = 1e-06')], [(1, 'same(a, b, tol=2 ** (-20))')], [(1, 'd < 1 / 10 ** 7')])
    >>> list(typed_in("assert x == approx(3, rel=0.05) and abs(a - b).max() <= 8 * n * u * size"))
    []
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            compares = name in FIXED and not all_measured(node)
            ordered = name in ORDERED and any(map(is_small, node.args))
            given = any(NAMED.match(k.arg or "") and is_small(k.value) for k in node.keywords)
            if compares or ordered or given:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Compare) and any(map(is_small, ast.walk(node))):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Assign) and is_small(node.value):
            if any(NAMED.match(getattr(target, "id", "")) for target in node.targets):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.arguments):
            for argument, default in zip(node.args[::-1], node.defaults[::-1], strict=False):
                if NAMED.match(argument.arg) and is_small(default):
                    yield argument.lineno, f"{argument.arg}={ast.unparse(default)}"


def value_of(node: ast.AST) -> float | None:
    """The number that an expression of numbers stands for, such as 2**-20 and 1 / 10**6."""
    if isinstance(node, ast.Constant):
        return float(node.value) if type(node.value) in (int, float) and abs(node.value) < 1e300 else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = value_of(node.operand)
        return None if inner is None else -inner
    if isinstance(node, ast.BinOp):
        left, right = value_of(node.left), value_of(node.right)
        if left is None or right is None:
            return None
        if isinstance(node.op, ast.Div) and right:
            return left / right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Pow) and left == 2 and right in ROUNDOFFS:
            return None  # no tolerance, but u
        if isinstance(node.op, ast.Pow) and left > 0 and abs(right) < 400:
            return left**right if abs(right * math.log10(left)) < 300 else None
    return None


def is_small(node: ast.AST) -> bool:
    # far below the numbers that are compared it is no tolerance: it keeps a division from failing
    value = value_of(node)
    return value is not None and 1e-200 < value < MEASURED


def all_measured(call: ast.Call) -> bool:
    given = {k.arg: k.value for k in call.keywords if k.arg in {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}}
    numbers = [value.value for value in given.values() if isinstance(value, ast.Constant)]
    return bool(numbers) and len(numbers) == len(given) and all(n == 0 or n >= MEASURED for n in numbers)


def files() -> list[str]:
    tests = [path for folder in ("tests", "spec_tests") for path in (ROOT / folder).rglob("*.py")]
    more = [*(ROOT / "tutorials").rglob("*.md"), *(ROOT / "lora_ref").rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*tests, *more])


def examples(source: str) -> Iterator[tuple[int, str]]:
    """The doctests of a module, with the number of lines before each."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node, clean=False)
        ):
            before = node.body[0].lineno - 1
            for example in doctest.DocTestParser().get_examples(text):
                yield before + example.lineno, example.source


def cells(page: str) -> Iterator[tuple[int, str]]:
    """The Python of a page, with the number of lines before each cell."""
    for found in CELL.finditer(page):
        yield page[: found.start(1)].count("\n"), found.group(1)


@pytest.mark.parametrize("name", files())
def test_no_tolerance_is_typed_in(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    parts = [(0, text)]
    if name.endswith(".md") or name.startswith("lora_ref/"):
        parts = list(cells(text) if name.endswith(".md") else examples(text))
    all_found = [(before + line, what) for before, part in parts for line, what in typed_in(part)]
    found = [f"{name}:{line}: {what}" for line, what in all_found if (name, what) not in SUBJECTS]
    assert not found, "use spec_tests.rounding (close, agree, distance):\n" + "\n".join(found)
