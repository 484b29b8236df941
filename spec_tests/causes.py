"""What a report's deviations come from: requirements that fail for the same reason are one cause."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .engine import OUTCOMES
from .report import Report, counts_of

DEVIATIONS = ("FAIL", "ERROR", "KNOWN")  # in the order in which they are shown
DECISION = "lora_ref's decision"  # a source begins with it where no other document says it
KNOWN = Path(__file__).parent / "known"


class Cause(NamedTuple):
    """One reason, and the results that it explains; a failure that is not listed is a cause of its own."""

    outcome: str
    reason: str
    link: str
    script: str  # a path in spec_tests/known, or ""
    results: Sequence[Mapping[str, Any]]


def causes(report: Report) -> list[Cause]:
    """The causes of a report's deviations: what is not listed first, then what explains most."""
    listed = scripts(report["implementation"]["name"])
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in report["results"]:
        if result["outcome"] in DEVIATIONS:
            groups.setdefault((result["outcome"], result["reason"] or result["id"]), []).append(result)
    found = []
    for (outcome, _), results in groups.items():
        first = results[0]
        link = next((result["link"] for result in results if result["link"]), "")
        script = next((result["script"] for result in results if result.get("script")), "")
        script = script if re.fullmatch(r"[\w./-]+", str(script)) else listed.get(first["reason"], "")
        found.append(Cause(outcome, first["reason"], link, script, results))
    return sorted(found, key=lambda c: (DEVIATIONS.index(c.outcome), -len(c.results), c.results[0]["id"]))


def scripts(name: str) -> dict[str, str]:
    """{reason: script} of an implementation's list of known deviations; {} where it has none."""
    listed = {path.stem: path for path in KNOWN.glob("*.toml")}  # a name of a foreign report is no path
    if name not in listed:
        return {}
    entries = tomllib.loads(listed[name].read_text(encoding="utf-8"))
    both = [*entries.get("cause", ()), *entries.get("deviation", ())]
    return {entry["reason"]: entry["script"] for entry in both if entry.get("script")}


class Share(NamedTuple):
    """How much of what was tried is kept, and how much of what there is was tried."""

    kept: int
    tried: int
    there: int

    @property
    def percent(self) -> int:
        """Rounded down: only what is kept as a whole is 100."""
        return 100 * self.kept // self.tried if self.tried else 0


def share(results: Sequence[Mapping[str, Any]], there: int) -> Share:
    """The share of these results, where there are `there` requirements.

    >>> share([{"outcome": "PASS"}, {"outcome": "KNOWN"}, {"outcome": "UNSUPPORTED"}], 4)
    Share(kept=1, tried=2, there=4)
    """
    counts = counts_of(results)
    return Share(counts["PASS"], sum(counts[outcome] for outcome in OUTCOMES if outcome != "UNSUPPORTED"), there)


def decided(result: Mapping[str, Any]) -> bool:
    """Is the requirement one that no other document states?"""
    return str(result["source"]).startswith(DECISION)


def order(reports: Sequence[Report]) -> list[Report]:
    """Those that were tried on most requirements first."""
    return sorted(reports, key=lambda made: made["footer"]["counts"]["UNSUPPORTED"] - len(made["results"]))
