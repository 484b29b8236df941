"""The requirements: each has a permanent id, a sentence, a source, and a property that is checked."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import strategies as st

from . import sources
from .check import Check
from .contract import CLAIMS, Implementation

Strategy = st.SearchStrategy[Any]
Body = Callable[[Implementation, Any, Check], None]


class Unsupported(Exception):
    """Raised while cases are generated: the implementation claims nothing that this requirement could be tried on."""


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One thing that must hold.

    Attributes:
        id: permanent; it is never given to another requirement.
        sentence: what must hold.
        source: where that is said: the paper, or the document, and the statement's number in this project; or
            "lora_ref's decision", which needs a claim of `DECISIONS`. See `sources`.
        needs: the claims without which it says nothing about an implementation.
        given: implementation -> a Hypothesis strategy of cases.
        body: (implementation, case, check) -> None; it raises `Broken`.
        slow: how many times fewer examples than usual it gets.
    """

    id: str
    sentence: str
    source: str
    needs: frozenset[str]
    given: Callable[[Implementation], Strategy]
    body: Body
    slow: int = 1

    @property
    def area(self) -> str:
        return self.id.split("-")[0]


REQUIREMENTS: dict[str, Requirement] = {}


def requirement(
    id: str,
    sentence: str,
    source: str,
    needs: str | Iterable[str],
    given: Callable[[Implementation], Strategy] | None = None,
    slow: int = 1,
) -> Callable[[Body], Body]:
    """Register the decorated function as the body of a requirement. `needs`: claims, a set or separated by blanks."""
    claims = frozenset(needs.split() if isinstance(needs, str) else needs)
    source = sources.expanded(source)
    if unknown := claims - CLAIMS.keys():
        raise TypeError(f"{id} needs claims that do not exist: {', '.join(sorted(unknown))}")

    def register(body: Body) -> Body:
        if id in REQUIREMENTS:
            raise TypeError(f"there are two requirements {id}")
        cases = given or (lambda implementation: st.none())
        REQUIREMENTS[id] = Requirement(id, sentence, source, claims, cases, body, slow)
        return body

    return register


def load() -> dict[str, Requirement]:
    """All requirements, by id, in the order of their areas' modules."""
    from . import areas

    for module in pkgutil.iter_modules(areas.__path__):
        importlib.import_module(f"{areas.__name__}.{module.name}")
    return dict(sorted(REQUIREMENTS.items()))
