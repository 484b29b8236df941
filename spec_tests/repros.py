"""Cases as Python source: exact, to be run after `IMPORTS`, in lines that can be read."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .contract import is_default

LINE = 110  # columns of a line before the brackets that close after it: with them it is below 120
IN_A_ROW = 64  # numbers of an array that are not yet written row by row
IMPORTS = """\
from numpy import array, inf, nan
from spec_tests import LayerSpec, LayerState, ModelSpec, ModuleSpec, reproduce
"""


def script(name: str, id: str, sentence: str, case: Any) -> str:
    """A script that tries this requirement on this case again."""
    said = textwrap.fill(f"{id}: {sentence}", LINE, initial_indent="# ", subsequent_indent="# ")
    return f"{said}\n{IMPORTS}\nreproduce({name!r}, {id!r}, {source(case, before=len(name) + len(id) + 20)})\n"


def source(value: Any, indent: float = 0, before: int = 0) -> str:
    """The value as an expression, on a line that is indented so far and has so many characters before it.

    >>> print(source({"r": 2, "A": np.arange(3.0)}))
    {'r': 2, 'A': array([0.0, 1.0, 2.0])}
    """
    if isinstance(value, np.ndarray):
        return _array(value, indent, before)
    if isinstance(value, np.generic):
        return source(value.item())
    opened, parts, closed = _parts(value)
    if not parts:
        return opened + closed
    if not math.isinf(indent):
        line = source(value, -math.inf)
        if "\n" not in line and indent + before + len(line) <= LINE:
            return line
    inner = indent + 4
    texts = [label + source(part, inner, len(label)) for label, part in parts]
    if math.isinf(indent):
        one = "," if opened == "(" and len(parts) == 1 else ""
        return f"{opened}{', '.join(texts)}{one}{closed}"
    return _broken(opened, texts, closed, int(indent))


def _parts(value: Any) -> tuple[str, list[tuple[str, Any]], str]:
    """What opens it, its parts with what stands before each, and what closes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = [f.name for f in dataclasses.fields(value) if not is_default(f, getattr(value, f.name))]
        return f"{type(value).__name__}(", [(f"{name}=", getattr(value, name)) for name in changed], ")"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}(", [(f"{name}=", getattr(value, name)) for name in value._fields], ")"
    if isinstance(value, Mapping):
        return "{", [(f"{key!r}: ", part) for key, part in value.items()], "}"
    if isinstance(value, list):
        return "[", [("", part) for part in value], "]"
    if isinstance(value, tuple):
        return "(", [("", part) for part in value], ")"
    return repr(value), [], ""


def _array(value: np.ndarray, indent: float, before: int) -> str:
    kind = "" if value.dtype == np.float64 else f", {value.dtype.name!r}"
    if not value.size:
        return f"array([]{kind}).reshape({value.shape!r})"
    if math.isinf(indent):
        return f"array({value.tolist()!r}{kind})" + ("\n" if value.size > IN_A_ROW else "")
    return f"array({_numbers(value.tolist(), int(indent), before + 6, value.size > IN_A_ROW)}{kind})"


def _numbers(numbers: Any, indent: int, before: int, by_row: bool) -> str:
    """The list of an array, in lists within lists."""
    line = repr(numbers)
    nested = isinstance(numbers, list) and isinstance(numbers[0], list)
    if indent + before + len(line) <= LINE and not (nested and by_row):
        return line
    if nested:
        rows = [_numbers(row, indent + 4, 0, by_row) for row in numbers]
    else:  # as many in a line as it holds; a number has no blank to break it at
        rows = textwrap.wrap(", ".join(map(repr, numbers)), LINE - indent - 4, break_on_hyphens=False)
        rows = [row.rstrip(",") for row in rows]
    return _broken("[", rows, "]", indent)


def _broken(opened: str, lines: Sequence[str], closed: str, indent: int) -> str:
    pad = " " * (indent + 4)
    return "".join([opened, "\n", *(f"{pad}{line},\n" for line in lines), " " * indent, closed])
