"""The matrix of several reports as one HTML page, that loads nothing from anywhere.

python -m spec_tests.page matrix.html REPORT.json ...

Areas by implementations come first, then deviations by their causes, then a row for each requirement.
"""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..causes import order
from ..engine import OUTCOMES
from ..report import Report, merge, read, titles
from .deviations import deviations
from .history import history
from .look import SCRIPT, STYLE
from .overview import not_promised, overview
from .rows import dialogs, rows

MEANING = {
    "PASS": "holds on every case tried",
    "FAIL": "is promised and does not hold",
    "UNSUPPORTED": "is not promised, and was not tried",
    "KNOWN": "does not hold, and is listed with a reason",
    "ERROR": "the implementation or its adapter class crashed",
}


def page(reports: Sequence[Report], releases: Sequence[Report] = ()) -> str:
    """The whole page. The same reports always give the same text.

    Args:
        releases: reports on releases of one library, the oldest first.
    """
    reports = order(merge(reports))
    names = titles(reports)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    letters = {outcome: "·" if outcome == "UNSUPPORTED" else outcome[0] for outcome in OUTCOMES}
    legend = "".join(f'<li><span class="mark {o}">{letters[o]}</span> {o}: {MEANING[o]}</li>' for o in OUTCOMES)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>LoRA conformance</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<h1>LoRA conformance</h1>\n"
        "<p>How much each implementation keeps of what it promises. "
        '<a href="#deviations">Deviations</a>, <a href="#requirements">requirements</a>, '
        '<a href="#promised">what is not promised</a>'
        f"{', <a href=#releases>releases of PEFT</a>' if releases else ''}.</p>\n"
        f"{overview(reports, names)}"
        f'<h2 id="deviations">Deviations by cause</h2>\n{deviations(reports, names)}\n'
        f'<h2 id="promised">Not promised</h2>\n{not_promised(reports, names)}\n'
        f"{history(releases)}"
        f'<h2 id="requirements">Requirements</h2>\n<ul class="legend" aria-label="Outcomes">{legend}</ul>\n'
        "<p>\u201cOwn decision\u201d: no other document says it; lora_ref decided so.</p>\n"
        f"{rows(reports, names)}"
        f"</main>\n{dialogs(reports, names)}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print("usage: python -m spec_tests.page matrix.html REPORT.json ...", file=sys.stderr)
        return 2
    to, *files = map(Path, arguments)
    to.write_text(page([report for file in files for report in read(file)]), encoding="utf-8")
    return 0
