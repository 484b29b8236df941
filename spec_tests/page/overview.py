"""The first section: areas by implementations."""

from __future__ import annotations

from collections.abc import Sequence

from ..causes import Share, share
from ..contract import CLAIMS
from ..report import Report, area_of, areas
from .words import text

LEVELS = (("whole", 100, "all kept"), ("most", 90, "90 % or more"), ("half", 50, "50 % or more"), ("few", 0, "less"))


def overview(reports: Sequence[Report], names: Sequence[str]) -> str:
    """The share kept of what is promised, and how much was tried: all areas first, then each."""
    found = areas(reports)
    heads = "".join(map(_head, names, reports))
    everything = sum(map(len, found.values()))
    whole = "".join(
        _cell(share(made["results"], everything), name, "all") for made, name in zip(reports, names, strict=True)
    )
    lines = [f'<tr class="all"><th scope="row">all <small>{everything}</small></th>{whole}</tr>']
    for area, rows in found.items():
        cells = []
        for made, name in zip(reports, names, strict=True):
            results = [result for result in made["results"] if area_of(result["id"]) == area]
            cells.append(_cell(share(results, len(rows)), name, area))
        lines.append(f'<tr><th scope="row">{text(area)} <small>{len(rows)}</small></th>{"".join(cells)}</tr>')
    return (
        f'<ul class="legend" aria-label="Shares">{_legend()}</ul>\n'
        '<div class="frame" role="region" aria-label="Areas by implementation" tabindex="0">\n'
        f'<table id="areas"><thead><tr><th scope="col">area</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table>\n</div>\n"
    )


def not_promised(reports: Sequence[Report], names: Sequence[str]) -> str:
    """What each implementation does not claim, and was not tried on."""
    items = []
    for name, made in zip(names, reports, strict=True):
        missing = [claim for claim in CLAIMS if claim not in made["implementation"]["claims"]]
        if missing:
            words = "; ".join(f"<code>{text(claim)}</code>: {text(CLAIMS[claim])}" for claim in missing)
            items.append(
                f"<details><summary>{text(name)}, {len(missing)} of {len(CLAIMS)}</summary><p>{words}</p></details>"
            )
    return "".join(items) or "<p>Nothing.</p>"


def _head(name: str, report: Report) -> str:
    version = text(report["implementation"]["version"].split(",")[0])
    return f'<th scope="col">{text(name).replace("_", "_<wbr>")}<small>{version}</small></th>'


def _legend() -> str:
    levels = "".join(f'<li><span class="mark {level}">%</span> {words}</li>' for level, _, words in LEVELS)
    return f"{levels}<li>below: how many requirements were tried</li><li>–: nothing is promised</li>"


def _cell(part: Share, name: str, area: str) -> str:
    if not part.tried:
        title = text(f"{name}, {area}: nothing is promised")
        return f'<td class="untried"><span role="img" aria-label="{title}">–</span></td>'
    level = next(level for level, least, _ in LEVELS if part.percent >= least)
    title = f"{name}, {area}: keeps {part.kept} of {part.tried} tried, of {part.there} requirements"
    width = round(100 * part.tried / part.there)
    return (
        f'<td title="{text(title)}"><span class="share {level}">{part.percent} %</span>'
        f'<span class="tried">{part.tried} of {part.there}</span>'
        f'<span class="bar"><span style="width:{width}%"></span></span></td>'
    )
