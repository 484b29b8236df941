"""What a run found, as JSON: written, read, validated, and several put together.

A report is one JSON object; a file holds one, or a list of them:

    {"implementation": {"name", "version", "claims", "conventions"},
     "results": [{"id", "outcome", "sentence", "source", "examples", "max_error_u", "message", "repro", "reason",
                  "link"}, ...],
     "footer": {"counts", "profile", "seed", "covered", "untried", "headline"}}

`seed` is null where the cases are the same in every run. `covered` counts the options that were tried, and the
different values of each. `untried` names the claims for which nothing was tried, and says why: {claim: reason}.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .contract import Implementation, Layer, LayerSpec, Model, ModelSpec, has_layers
from .engine import OUTCOMES, PROFILES, Result
from .generate import DTYPES, MERGEABLE
from .registry import load

Report = dict[str, Any]
Covered = set[tuple[str, str]]  # (option, value)

DRAWN = frozenset((*MERGEABLE, *DTYPES))  # what requirements draw where it is claimed, without needing it
LARGEST = 1e300  # JSON has neither infinity nor NaN
TEXTS = ("sentence", "source", "message", "repro", "reason", "link")
ID = re.compile(r"[A-Z][A-Z0-9_]*-\d{3,}")


class Watched(Implementation):
    """Another implementation, that notes which options and values its layers and models are made with."""

    def __init__(self, implementation: Implementation) -> None:
        self.implementation = implementation
        self.name, self.claims = implementation.name, frozenset(implementation.claims)
        self.conventions, self.has_layers = implementation.conventions, has_layers(implementation)
        self.covered: Covered = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.implementation, name)

    def version(self) -> str:
        return self.implementation.version()

    def layer(self, spec: LayerSpec) -> Layer:
        for field in dataclasses.fields(spec):
            value = getattr(spec, field.name)
            if field.name == "W":
                self.covered.add(("shape", str(value.shape)))
            elif field.name == "b":
                self.covered.add(("bias of the base", str(value is not None)))
            elif field.name == "init_options":
                self.covered |= {(k, str(v)) for k, v in value.items() if not _has_arrays(v)}
            elif field.name != "seed":
                self.covered.add((field.name, str(value)))
        return self.implementation.layer(spec)

    def model(self, spec: ModelSpec) -> Model:
        self.covered |= {(option, str(value)) for option, value in spec.config.items() if not _has_arrays(value)}
        self._note_modules(spec)
        return self.implementation.model(spec)

    def _note_modules(self, spec: ModelSpec) -> None:
        self.covered.add(("dtype", spec.dtype))
        self.covered |= {("kind", module.kind) for module in spec.modules.values() if module.kind in self.claims}

    def load(self, spec: ModelSpec, folder: Path) -> Model:
        self._note_modules(spec)
        return self.implementation.load(spec, folder)

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return self.implementation.load_own(spec, folder)


def _has_arrays(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_arrays, value.values()))
    return isinstance(value, np.ndarray) or (isinstance(value, list | tuple) and any(map(_has_arrays, value)))


def counts_of(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """{outcome: how many}, of all five outcomes."""
    found = [result["outcome"] for result in results]
    return {outcome: found.count(outcome) for outcome in OUTCOMES}


def headline(counts: Mapping[str, int]) -> str:
    """The one line that says how an implementation does.

    >>> headline({"PASS": 40, "FAIL": 1, "UNSUPPORTED": 17, "KNOWN": 0, "ERROR": 0})
    'claims 41 of 58, passes 40 of 41'
    """
    total = sum(counts.values())
    claimed = total - counts["UNSUPPORTED"]
    return f"claims {claimed} of {total}, passes {counts['PASS']} of {claimed}"


def untried(claims: Iterable[str], results: Iterable[Mapping[str, Any]], covered: Covered) -> dict[str, str]:
    """{claim: why nothing was tried for it}: of all requirements that need the claim, none was tried.

    The reason is the most frequent one among the requirements that lack the fewest further claims. Claims that no
    requirement of the results needs are left out, and kinds of layers and dtypes with which anything was tried.
    """
    requirements, claims = load(), frozenset(claims)
    drawn = {value for option, value in covered if option in ("kind", "dtype")}
    found: dict[str, list[tuple[int, str]]] = {}
    tried: set[str] = set()
    for result in results:
        if (requirement := requirements.get(result["id"])) is None:
            continue
        needed = requirement.needs & claims
        if result["outcome"] != "UNSUPPORTED":
            tried |= needed
        for claim in needed:
            missing = sorted(requirement.needs - claims)
            why = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not claimed"
            found.setdefault(claim, []).append((len(missing), why if missing else result["message"]))
    left = sorted(found.keys() - tried - drawn)
    nearest = {claim: [why for n, why in found[claim] if n == min(found[claim])[0]] for claim in left}
    return {claim: max(sorted(set(reasons)), key=reasons.count) for claim, reasons in nearest.items()}


def make(
    implementation: Implementation,
    results: Iterable[Result],
    profile: str = "default",
    seed: int | None = None,
    covered: Covered = frozenset(),  # type: ignore[assignment]
) -> Report:
    """The report of a run."""
    rows = [dataclasses.asdict(result) for result in sorted(results, key=lambda result: result.id)]
    for row in rows:
        u = row["max_error_u"]
        row["max_error_u"] = round(min(float(u), LARGEST), 3) if not math.isnan(u) else LARGEST
    counts = counts_of(rows)
    by_option: dict[str, int] = {}
    for option, _ in sorted(covered):
        by_option[option] = by_option.get(option, 0) + 1
    return {
        "implementation": {
            "name": implementation.name,
            "version": implementation.version(),
            "claims": sorted(implementation.claims),
            "conventions": dict(implementation.conventions),
        },
        "results": rows,
        "footer": {
            "counts": counts,
            "profile": profile,
            "seed": seed,
            "covered": {"options": len(by_option), "values": sum(by_option.values()), "by_option": by_option},
            "untried": untried(implementation.claims, rows, covered),
            "headline": headline(counts),
        },
    }


def write(path: Path, reports: Sequence[Report]) -> None:
    """One report as an object, several as a list."""
    for report in reports:
        validate(report)
    document = reports[0] if len(reports) == 1 else list(reports)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> list[Report]:
    """The reports of a file.

    Raises:
        ValueError: it is no JSON, or not a report; the message says where.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON: {error}") from None
    reports = document if isinstance(document, list) else [document]
    for report in reports:
        try:
            validate(report)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return reports


def merge(parts: Iterable[Report]) -> list[Report]:
    """One report for each implementation and version, sorted by name; parts of one run are put together.

    Raises:
        ValueError: two reports on the same version of the same implementation share a requirement.
    """
    found: dict[tuple[str, str], Report] = {}
    for part in parts:
        key = (part["implementation"]["name"], part["implementation"]["version"])
        if key not in found:
            found[key] = part
            continue
        results = found[key]["results"] + part["results"]
        ids = [result["id"] for result in results]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"{' '.join(key).strip()} is reported on twice: {', '.join(twice[:3])}")
        first, second = found[key]["footer"], part["footer"]
        same = {name: first[name] if first[name] == second[name] else None for name in ("profile", "seed")}
        by_option = {  # the larger of two counts: which values they were is not kept
            option: max(first["covered"]["by_option"].get(option, 0), second["covered"]["by_option"].get(option, 0))
            for option in sorted({*first["covered"]["by_option"], *second["covered"]["by_option"]})
        }
        counts = counts_of(results)
        left = untried(found[key]["implementation"]["claims"], results, frozenset())  # type: ignore[arg-type]
        both = (
            first.get("untried", {}).keys() & second.get("untried", {}).keys()
        )  # kinds and dtypes may be drawn in one
        found[key] = {
            "implementation": found[key]["implementation"],
            "results": sorted(results, key=lambda result: result["id"]),
            "footer": {
                "counts": counts,
                "profile": same["profile"] or "mixed",
                "seed": same["seed"],
                "covered": {"options": len(by_option), "values": sum(by_option.values()), "by_option": by_option},
                "untried": {claim: why for claim, why in left.items() if claim in both or claim not in DRAWN},
                "headline": headline(counts),
            },
        }
    return [found[key] for key in sorted(found)]


def validate(report: Any) -> None:
    """Raise ValueError, with the place, if this is not a report or if its numbers do not add up."""
    _shape(report, "the report", {"implementation": dict, "results": list, "footer": dict})
    about = report["implementation"]
    _shape(about, "implementation", {"name": str, "version": str, "claims": list, "conventions": dict})
    seen = set()
    for number, result in enumerate(report["results"]):
        where = f"results[{number}]"
        texts = dict.fromkeys(TEXTS, str)
        _shape(result, where, {"id": str, "outcome": str, "examples": int, "max_error_u": (int, float), **texts})
        if not ID.fullmatch(result["id"]):
            raise ValueError(f"{where}: {result['id']!r} is no id of a requirement")
        if result["id"] in seen:
            raise ValueError(f"{where}: {result['id']} is there twice")
        seen.add(result["id"])
        if result["outcome"] not in OUTCOMES:
            raise ValueError(f"{where}: outcome {result['outcome']!r} is none of {', '.join(OUTCOMES)}")
    footer = report["footer"]
    _shape(footer, "footer", {"counts": dict, "profile": str, "covered": dict, "headline": str})
    _shape(footer["covered"], "footer.covered", {"options": int, "values": int, "by_option": dict})
    if footer["profile"] not in (*PROFILES, "mixed"):
        raise ValueError(f"footer: profile {footer['profile']!r} is none of {', '.join(PROFILES)}")
    if "seed" not in footer or not isinstance(footer["seed"], int | None):
        raise ValueError("footer: seed must be an integer or null")
    _shape(footer.get("untried", {}), "footer.untried", dict.fromkeys(footer.get("untried", {}), str))
    if footer["counts"] != counts_of(report["results"]):
        raise ValueError(f"footer: counts are {footer['counts']}, the results say {counts_of(report['results'])}")
    if footer["headline"] != headline(footer["counts"]):
        raise ValueError(f"footer: headline is {footer['headline']!r}, the counts say {headline(footer['counts'])!r}")


def _shape(value: Any, where: str, keys: Mapping[str, Any]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, it is {type(value).__name__}")
    for key, kind in keys.items():
        if key not in value:
            raise ValueError(f"{where} has no {key!r}")
        if not isinstance(value[key], kind) or isinstance(value[key], bool):
            raise ValueError(f"{where}: {key} is {value[key]!r}")


def area_of(id: str) -> str:
    """The area of a requirement: SCALE of SCALE-001."""
    return id.split("-")[0]


def areas(reports: Iterable[Report]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """{area: {id: a result}}, of all requirements that any of the reports has, sorted."""
    rows = {result["id"]: result for report in reports for result in report["results"]}
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for id in sorted(rows):
        found.setdefault(area_of(id), {})[id] = rows[id]
    return found


def titles(reports: Sequence[Report]) -> list[str]:
    """A heading for each report: its name, and where two have the same name the version too."""
    names = [report["implementation"]["name"] for report in reports]
    return [
        name if names.count(name) == 1 else f"{name} ({report['implementation']['version']})"
        for name, report in zip(names, reports, strict=True)
    ]


def example(result: Mapping[str, Any]) -> str:
    """The shrunk case alone, taken out of the script; "" if there is none."""
    try:
        last = ast.parse(result["repro"]).body[-1]
    except (SyntaxError, IndexError, ValueError):
        return ""
    if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call) and len(last.value.args) == 3:
        return ast.get_source_segment(result["repro"], last.value.args[2]) or ""
    return ""


def printable(text: str) -> str:
    """Without control characters: messages come from foreign code."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)
