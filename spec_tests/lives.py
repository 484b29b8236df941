"""The life of a deviation: which releases of PEFT keep a requirement, and which do not."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .report import Report, read

RELEASES = Path(__file__).parent / "reports" / "releases"
STATES = {"PASS": "kept", "UNSUPPORTED": "not promised"}  # every other outcome: "fails"


class Span(NamedTuple):
    """Releases one after the other, with the same outcome."""

    state: str
    first: str
    last: str


class Life(NamedTuple):
    """A requirement, its outcome in each release, and the same in spans."""

    id: str
    sentence: str
    outcomes: Sequence[str]
    spans: Sequence[Span]


def number(report: Report) -> str:
    """The release that a report is about: "0.21.2" of "peft 0.21.2, torch 2.13.0"."""
    return str(report["implementation"]["version"]).split(", ")[0].rpartition(" ")[2]


def older(folder: Path = RELEASES) -> list[Report]:
    """The reports on older releases, the oldest first."""
    found = [made for path in folder.glob("*.json") for made in read(path)]
    return sorted(found, key=lambda report: [int(part) for part in re.findall(r"\d+", number(report))])


def lives(reports: Sequence[Report]) -> list[Life]:
    """Of each requirement that one of these releases keeps and another does not.

    Args:
        reports: one of each release, the oldest first. What a report does not have is not promised.
    """
    numbers = [number(report) for report in reports]
    tables = [{result["id"]: result for result in report["results"]} for report in reports]
    found = []
    for id in sorted(set().union(*tables)):
        here = [table.get(id) for table in tables]
        outcomes = [result["outcome"] if result else "UNSUPPORTED" for result in here]
        states = [STATES.get(outcome, "fails") for outcome in outcomes]
        if not {"kept", "fails"} <= set(states):
            continue
        spans = []
        for state, run in itertools.groupby(zip(states, numbers, strict=True), lambda pair: pair[0]):
            listed = [release for _, release in run]
            spans.append(Span(state, listed[0], listed[-1]))
        sentence = next(result["sentence"] for result in reversed(here) if result)
        found.append(Life(id, sentence, outcomes, spans))
    return found


def said(life: Life) -> str:
    """The spans in words.

    >>> said(Life("A-001", "It holds.", [], [Span("kept", "0.3.0", "0.4.0"), Span("fails", "0.5.0", "0.21.2")]))
    'kept 0.3.0 to 0.4.0, fails 0.5.0 to 0.21.2'
    """
    return ", ".join(f"{s.state} {s.first}" + (f" to {s.last}" if s.last != s.first else "") for s in life.spans)
