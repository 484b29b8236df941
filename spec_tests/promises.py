"""What each library's documentation promises: `claims/NAME.toml`, written down before any result is looked at.

An entry is a claim (or several, separated by blanks), the document, its link, and the sentence that makes the claim, in
a few words. Where a library documents a class in its source alone, that is the document.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .contract import CLAIMS, DECISIONS

HERE = Path(__file__).parent / "claims"


class Promise(NamedTuple):
    """One claim of a library, and the sentence that makes it."""

    claim: str
    document: str
    link: str
    sentence: str


@cache
def promised(name: str) -> tuple[Promise, ...]:
    """The promises of one library, in the order of its file.

    Raises:
        ValueError: an entry without a document, a link or a sentence, a claim that is unknown or stands there twice.
    """
    path = HERE / f"{name}.toml"
    found: dict[str, Promise] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]:
        for claim in entry["name"].split():
            if claim not in CLAIMS or claim in found:
                raise ValueError(
                    f"{path.name}: {claim} {'is unknown' if claim not in CLAIMS else 'stands there twice'}"
                )
            made = Promise(claim, entry["document"], entry["link"], entry["sentence"])
            if not all(made):
                raise ValueError(f"{path.name}: {claim} lacks its document, its link or its sentence")
            found[claim] = made
    return tuple(found.values())


def claims(name: str) -> frozenset[str]:
    """The claims that a library's documentation makes."""
    return frozenset(promise.claim for promise in promised(name))


def unpromised(name: str) -> list[str]:
    """What it does not promise, though others do: the contract's claims without lora_ref's decisions."""
    return [claim for claim in CLAIMS if claim not in DECISIONS and claim not in claims(name)]
