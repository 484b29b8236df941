"""The second section: deviations by their causes."""

from __future__ import annotations

from collections.abc import Sequence

from ..causes import Cause, causes
from ..report import Report
from .words import link, text


def deviations(reports: Sequence[Report], names: Sequence[str]) -> str:
    """A list for each implementation that deviates, and a line on the others."""
    parts, without = [], []
    for column, (name, report) in enumerate(zip(names, reports, strict=True)):
        found = causes(report)
        if not found:
            without.append(name)
            continue
        number = sum(len(cause.results) for cause in found)
        listed = "".join(_cause(cause, column) for cause in found)
        parts.append(f'<h3>{text(name)}: {number} deviations, {len(found)} causes</h3><ul class="causes">{listed}</ul>')
    if without:
        parts.append(f"<p>No deviation: {text(', '.join(without))}.</p>")
    return "\n".join(parts)


def _cause(cause: Cause, column: int) -> str:
    first = cause.results[0]
    says = cause.reason or f"{first['sentence']} It does: {first['message']}"
    buttons = "".join(
        f'<button type="button" class="mark {cause.outcome}" data-opens="{text(result["id"])}-{column}" '
        f'aria-haspopup="dialog">{text(result["id"])}</button>'
        for result in cause.results
    )
    about = [f'<span class="mark {cause.outcome}">{cause.outcome}</span> {text(says)}']
    if cause.script:
        about.append(f'<span class="source">script: <code>spec_tests/known/{text(cause.script)}</code></span>')
    if shown := link(cause.link):
        about.append(f'<span class="source">{shown}</span>')
    return f"<li>{''.join(about)}<div>{buttons}</div></li>"
