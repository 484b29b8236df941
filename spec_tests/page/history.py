"""A section on the releases of a library: the life of each deviation."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import OUTCOMES
from ..lives import STATES, Life, lives, number, said
from ..report import Report
from .words import text


def history(releases: Sequence[Report]) -> str:
    """A row for each requirement that one release keeps and another does not; "" where there are no releases."""
    if not releases:
        return ""
    columns = "".join(f'<th scope="col">{text(number(report))}</th>' for report in releases)
    numbers = [number(report) for report in releases]
    return (
        '<h2 id="releases">Releases of PEFT</h2>\n'
        "<p>Requirements that one release keeps and another does not.</p>\n"
        '<div class="frame" role="region" aria-label="Requirements by releases" tabindex="0">\n'
        f'<table><thead><tr><th scope="col">requirement</th>{columns}</tr></thead>\n<tbody>'
        + "\n".join(_row(life, numbers) for life in lives(releases))
        + "</tbody>\n</table>\n</div>\n"
    )


def _row(life: Life, numbers: Sequence[str]) -> str:
    cells = "".join(_cell(outcome, release) for outcome, release in zip(life.outcomes, numbers, strict=True))
    return (
        f'<tr><th scope="row"><span class="id">{text(life.id)}</span>{text(life.sentence)}'
        f'<span class="source">{text(said(life))}</span></th>{cells}</tr>'
    )


def _cell(outcome: str, release: str) -> str:
    says = f"{release}: {STATES.get(outcome, 'fails')}"
    letter = "·" if outcome == "UNSUPPORTED" else outcome[0]
    kind = outcome if outcome in OUTCOMES else "none"
    return (
        f'<td><span class="mark {kind}" role="img" aria-label="{text(says)}" title="{text(says)}">{letter}</span></td>'
    )
