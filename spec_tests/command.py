"""`lora-ref check [IMPL ...]`: requirements tried on implementations, shown as a matrix, and as JSON or HTML.

Exit codes: 0 all that is claimed holds or is a known deviation, 1 something fails, 2 wrong usage.
"""

from __future__ import annotations

import builtins
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from . import page, parallel, report
from .contract import Implementation
from .engine import Result, find, run
from .registry import Requirement, load

IN_PEERS = ("peft", "transformers", "loralib")  # what the extra "peers" brings
COLOURS = {"PASS": "green", "FAIL": "bold red", "UNSUPPORTED": "dim", "KNOWN": "yellow", "ERROR": "bold magenta"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The command's options."""

    implementations: Sequence[str] = ("lora_ref",)
    report: Path | None = None
    html: Path | None = None
    only: Sequence[str] = ()
    profile: str = "default"
    seed: int | None = None
    list: bool = False
    jobs: int | None = None  # processes; None: as many as there are cores


def check(options: Options) -> int:
    """Do what the options say, and return the exit code."""
    out, err = Console(highlight=False, markup=False), Console(stderr=True, highlight=False, markup=False)
    requirements = load()
    areas = list(dict.fromkeys(requirement.area for requirement in requirements.values()))
    if unknown := [name for name in options.only if name not in areas and name not in requirements]:
        return _wrong(f"--only {unknown[0]}: there is no such area; there are {', '.join(areas)}")

    def chosen(requirement: Requirement) -> bool:
        return not options.only or requirement.area in options.only or requirement.id in options.only

    picked = [requirement for requirement in requirements.values() if chosen(requirement)]
    if options.list:
        for requirement in picked:
            needs = ", ".join(sorted(requirement.needs)) or "nothing"
            out.print(f"{requirement.id}  {requirement.sentence}", soft_wrap=True)
            out.print(f"    needs {needs}; source: {requirement.source}", style="dim", soft_wrap=True)
        return 0
    found: list[tuple[str, Implementation]] = []
    for name in dict.fromkeys(options.implementations):
        try:
            found.append(find(name))
        except (ValueError, ImportError) as error:
            extra = isinstance(error, ModuleNotFoundError) and error.name in IN_PEERS
            return _wrong(f"{name}: {error}" + (": pip install 'lora_ref[peers]'" if extra else ""))
    reports, broken = [], False
    for name, implementation in found:
        watched = report.Watched(implementation)
        try:
            results = _examined(name, watched, options, [requirement.id for requirement in picked], err)
        except (TypeError, ValueError) as error:  # the adapter class or the list of known deviations is wrong
            _say(str(error))
            broken = True
            continue
        reports.append(report.make(implementation, results, options.profile, options.seed, watched.covered))
    if reports:
        show(reports, out)
        if options.report:
            report.write(options.report, reports)
        if options.html:
            options.html.parent.mkdir(parents=True, exist_ok=True)
            options.html.write_text(page.page(reports), encoding="utf-8")
    failed = any(made["footer"]["counts"][outcome] for made in reports for outcome in ("FAIL", "ERROR"))
    return int(broken or failed)


def _examined(
    name: str, watched: report.Watched, options: Options, ids: Sequence[str], err: Console
) -> builtins.list[Result]:
    """All results of one implementation, with a bar on standard error if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task(name, total=len(ids))
        jobs = options.jobs or parallel.cores()
        if min(jobs, len(ids)) < 2:
            each = run(name, watched, lambda requirement: requirement.id in ids, options.profile, options.seed)
            found: Iterator[tuple[Result, report.Covered]] = ((result, watched.covered) for result in each)
        else:
            found = parallel.run(name, watched, ids, options.profile, options.seed, jobs)
        for result, covered in found:
            watched.covered |= covered
            results.append(result)
            progress.update(task, advance=1, description=f"{name} {result.id}")
    return results


def show(reports: Sequence[report.Report], out: Console) -> None:
    """The matrix, a line for each area; every failure; the headlines, with the claims for which nothing was tried."""
    names = report.titles(reports)
    table = Table("area", *names, pad_edge=False, box=None)
    for area in report.areas(reports):
        cells = []
        for made in reports:
            rows = [result for result in made["results"] if report.area_of(result["id"]) == area]
            cells.append(_cell(report.counts_of(rows)))
        table.add_row(area, *cells)
    out.print(table)
    for name, made in zip(names, reports, strict=True):
        for result in made["results"]:
            if result["outcome"] in ("FAIL", "ERROR", "KNOWN"):
                _failure(name, result, out)
    out.print()
    for name, made in zip(names, reports, strict=True):
        footer = made["footer"]
        covered = f"{footer['covered']['options']} options with {footer['covered']['values']} values tried"
        out.print(f"{name}: {footer['headline']}; {covered}", soft_wrap=True)
        for claim, why in footer.get("untried", {}).items():
            out.print(f"  {claim}: nothing tried, {report.printable(why)}", style="yellow", soft_wrap=True)


def _cell(counts: dict[str, int]) -> Text:
    claimed = sum(counts.values()) - counts["UNSUPPORTED"]
    if not claimed:
        return Text("unsupported", style="dim")
    text = Text(f"{counts['PASS']} of {claimed}", style="green" if counts["PASS"] == claimed else "")
    for outcome in ("FAIL", "ERROR", "KNOWN"):
        if counts[outcome]:
            text.append(f"  {counts[outcome]} {outcome}", style=COLOURS[outcome])
    return text


def _failure(name: str, result: dict[str, object], out: Console) -> None:
    outcome = str(result["outcome"])
    out.print()
    out.print(f"{name}: {outcome} {result['id']}: {result['sentence']}", style=COLOURS[outcome], soft_wrap=True)
    for label in ("message", "reason", "link"):
        if text := report.printable(str(result[label])):
            out.print(f"  {text}" if label == "message" else f"  {label}: {text}", soft_wrap=True)
    if outcome == "KNOWN":
        return
    if result["repro"]:
        out.print("  the smallest example found, as a script:\n", style="dim")
        out.print(str(result["repro"]), soft_wrap=True)


def _say(message: str) -> None:
    print(f"lora-ref: error: {' '.join(report.printable(message).split())}", file=sys.stderr)


def _wrong(message: str) -> int:
    _say(message)
    return 2
