"""Where each requirement is said: `sources.toml` names, for every statement of `statements.md`, a document and what it
says.

A requirement's source names a document itself, or statements ("D5, U1"); or it says "lora_ref's decision".
"""

from __future__ import annotations

import re
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

DECISION = "lora_ref's decision"


class Source(NamedTuple):
    """What a document says.

    Attributes:
        document: its name, and the part of it.
        link: where it is.
        says: in a few words of one's own, or quoted.
    """

    document: str
    link: str
    says: str

    def __str__(self) -> str:
        return f"{self.document}: {self.says}"


@cache
def listed() -> dict[str, tuple[Source, ...]]:
    """{statement: the documents that say it}; a statement that is a decision alone has none."""
    text = (Path(__file__).parent / "sources.toml").read_text(encoding="utf-8")
    read = tomllib.loads(text)
    documents = {key: (entry["document"], entry["link"]) for key, entry in read["documents"].items()}
    found: dict[str, list[Source]] = {}
    for entry in read["source"]:
        document, link = documents[entry["in"]]
        part = entry.get("part", "")
        made = Source(f"{document}, {part}" if part else document, link, entry["says"])
        for statement in entry["for"].split():
            found.setdefault(statement, []).append(made)
    return {statement: tuple(sources) for statement, sources in found.items()}


@cache
def names() -> re.Pattern[str]:
    """What a source that names a document of its own has in it."""
    return re.compile(
        r"arXiv \d{4}\.\d{5}|PEFT's|microsoft/LoRA|loralib|torch's|Python's library|torch\.|transformers|safetensors|LoraConfig|https://"
    )


def statements(source: str) -> list[str]:
    """The statements that a source names."""
    return re.findall(r"\b[BD-IK-VXZ]\d{1,2}\b", source)


def outside(source: str) -> list[Source]:
    """The documents of the statements that a source names."""
    return [found for statement in statements(source) for found in listed().get(statement, ())]


def decided(source: str) -> bool:
    return source.startswith(DECISION)


def expanded(source: str) -> str:
    """The source, with a document before it where it names statements only."""
    if decided(source) or names().search(source):
        return source
    found = outside(source)
    if not found:
        return source
    said = str(found[0])
    numbers = source if re.fullmatch(r"[A-Z]\d+(, [A-Z]\d+| to [A-Z]\d+)*", source) else ""
    return f"{said} ({numbers})" if numbers else f"{said}; {source}"
