"""Which statements have a requirement, and why some have none."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .registry import load

STATEMENTS = Path(__file__).with_name("statements.md")
WITHOUT = {
    "Z1 Z3 Z4 U10": "options that lora_ref refuses by name",
    "X6": "looks at methods that only a transformers model has",
    "E2": "needs two layers that are given the same tensor, and the models of the contract are chains",
    "E4": "how soon EVA may stop reading is left open; what it must find is not",
    "V4": "how PEFT's script names folders; V2, V3 and V5 say what has to come out",
    "X7": "which keys a configuration has beyond those that are read",
}


def statements() -> list[str]:
    """The numbers of all statements: D1, D2, ..."""
    return re.findall(r"^\s*- \*\*([A-Z]\d+)\*\*", STATEMENTS.read_text(encoding="utf-8"), re.MULTILINE)


def named(source: str) -> Iterator[str]:
    """The statements that a requirement's source names; "K1 to K4" names four."""
    for letter, first, _, last in re.findall(r"\b([A-Z])(\d{1,2})\b(?: to ([A-Z])(\d{1,2})\b)?", source):
        yield from (f"{letter}{n}" for n in range(int(first), int(last or first) + 1))


def cited() -> dict[str, list[str]]:
    """{statement: the requirements whose source names it}."""
    found: dict[str, list[str]] = {number: [] for number in statements()}
    for requirement in load().values():
        for number in named(requirement.source):
            if number in found:
                found[number].append(requirement.id)
    return found
