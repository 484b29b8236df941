"""The last section: a row for each requirement, and a dialog for each deviation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..causes import DEVIATIONS, decided
from ..engine import OUTCOMES
from ..report import Report, area_of, areas, counts_of, example
from .words import link, text


def rows(reports: Sequence[Report], names: Sequence[str]) -> str:
    """The filter and the table, an area after the other."""
    by_id = [{result["id"]: result for result in report["results"]} for report in reports]
    bodies = []
    for area, found in areas(reports).items():
        bodies.append(f"<tbody>{_area(area, len(found), reports)}")
        for id, requirement in found.items():
            cells = [
                _cell(r.get(id), name, id, f"{id}-{c}") for c, (name, r) in enumerate(zip(names, by_id, strict=True))
            ]
            outcomes = " ".join(o for o in OUTCOMES if any(r.get(id, {}).get("outcome") == o for r in by_id))
            badge = ' <span class="decision">own decision</span>' if decided(requirement) else ""
            bodies.append(
                f'<tr data-outcomes="{outcomes}"><th scope="row"><span class="id">{text(id)}</span>'
                f'{text(requirement["sentence"])}{badge}<span class="source">{text(requirement["source"])}</span></th>'
                f"{''.join(cells)}</tr>"
            )
        bodies.append("</tbody>")
    columns = "".join(f'<th scope="col">{text(name)}</th>' for name in names)
    return (
        f"<fieldset><legend>Show requirements with the outcome</legend>{_filters()}"
        '<span id="count" role="status"></span></fieldset>\n'
        '<div class="frame" role="region" aria-label="Requirements by implementation" tabindex="0">\n'
        f'<table id="rows"><thead><tr><th scope="col">requirement</th>{columns}</tr></thead>\n'
        + "\n".join(bodies)
        + "\n</table>\n</div>\n"
    )


def dialogs(reports: Sequence[Report], names: Sequence[str]) -> str:
    """What the buttons of deviations open."""
    found = []
    for column, (name, report) in enumerate(zip(names, reports, strict=True)):
        deviations = (result for result in report["results"] if result["outcome"] in DEVIATIONS)
        found += [dialog(result, name, f"{result['id']}-{column}") for result in deviations]
    return "\n".join(found)


def _filters() -> str:
    return "".join(
        f'<label><input type="radio" name="outcome" value="{o}"{" checked" if o == "all" else ""}> {o}</label>'
        for o in ("all", *OUTCOMES)
    )


def _area(area: str, number: int, reports: Sequence[Report]) -> str:
    cells = []
    for report in reports:
        counts = counts_of(result for result in report["results"] if area_of(result["id"]) == area)
        claimed = sum(counts.values()) - counts["UNSUPPORTED"]
        cells.append(f"<td>{counts['PASS']} of {claimed}</td>" if claimed else "<td>-</td>")
    noun = "requirement" if number == 1 else "requirements"
    return f'<tr class="area"><th scope="rowgroup">{text(area)}, {number} {noun}</th>{"".join(cells)}</tr>'


def _cell(result: Mapping[str, Any] | None, name: str, id: str, key: str) -> str:
    if result is None:
        return f'<td><span class="mark none" role="img" aria-label="{text(name)}: not tried">-</span></td>'
    outcome = result["outcome"]
    says = f"{name}: {outcome}"
    if outcome in DEVIATIONS:
        return (
            f'<td><button type="button" class="mark {outcome}" data-opens="{text(key)}" '
            f'aria-haspopup="dialog" aria-label="{text(f"{says}, {id}: details")}">{outcome[0]}</button></td>'
        )
    letter = "·" if outcome == "UNSUPPORTED" else outcome[0]
    if outcome == "PASS":
        title = f"{says}, {result['examples']} examples, largest error {result['max_error_u']:.3g} roundings"
    else:
        title = f"{name}: not promised, {result['message']}"
    return f'<td><span class="mark {outcome}" role="img" aria-label="{text(title)}" title="{text(title)}">{letter}</span></td>'  # noqa: E501


def dialog(result: Mapping[str, Any], name: str, key: str) -> str:
    outcome = result["outcome"]
    parts = [
        f'<dialog id="{text(key)}" aria-labelledby="{text(key)}-title">',
        f'<h2 id="{text(key)}-title"><span class="mark {outcome}">{outcome}</span> {text(name)}, {text(result["id"])}'
        "</h2>",
        f'<p>{text(result["sentence"])} <span class="source">{text(result["source"])}</span></p>',
        f"<h3>What it does</h3><pre>{text(result['message'])}</pre>",
    ]
    if result["reason"]:
        parts.append(f"<h3>Reason</h3><p>{text(result['reason'])}</p>")
    if shown := link(result["link"]):
        parts.append(f"<p>{shown}</p>")
    if case := example(result):
        parts.append(f"<h3>Smallest example found</h3><pre>{text(case)}</pre>")
    if result["repro"]:
        parts.append(
            f'<h3>Script</h3><pre id="{text(key)}-script">{text(result["repro"])}</pre>'
            f'<button type="button" data-copies="{text(key)}-script">Copy the script</button>'
            '<span role="status"></span>'
        )
    parts.append('<form method="dialog"><button>Close</button></form></dialog>')
    return "".join(parts)
