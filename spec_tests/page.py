"""The matrix of several reports as one HTML page, that loads nothing from anywhere.

python -m spec_tests.page matrix.html REPORT.json ...
"""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .engine import OUTCOMES
from .report import Report, area_of, areas, counts_of, example, merge, printable, read, titles

MEANING = {
    "PASS": "holds on every case tried",
    "FAIL": "is claimed and does not hold",
    "UNSUPPORTED": "is not claimed",
    "KNOWN": "does not hold, and is listed with a reason",
    "ERROR": "the implementation or its adapter class crashed",
}
OPENS = ("FAIL", "KNOWN", "ERROR")

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #59636e; --line: #d1d9e0; --band: #f3f5f7;
  --PASS: #cdeed5; --FAIL: #b3201f; --UNSUPPORTED: #eceff2; --KNOWN: #ffe08a; --ERROR: #7a2a9e; --on: #12361c; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1317; --text: #e6eaee; --soft: #9aa6b2; --line: #353d46;
  --band: #1a2027; --PASS: #17492a; --FAIL: #d13b36; --UNSUPPORTED: #232a31; --KNOWN: #7a5c00; --ERROR: #9a4cc0;
  --on: #d6f5df; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--page); color: var(--text); font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
p, ul { margin: 0 0 .75rem; max-width: 70rem; }
.heads { padding: 0; list-style: none; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1rem; padding: 0; list-style: none; font-size: .9rem; }
.mark { display: inline-block; min-width: 1.9rem; padding: .1rem .4rem; border-radius: .3rem; text-align: center;
  font: 700 .9rem/1.4 ui-monospace, monospace; border: 1px solid transparent; }
.PASS { background: var(--PASS); color: var(--on); }
.FAIL { background: var(--FAIL); color: #fff; }
.ERROR { background: var(--ERROR); color: #fff; }
.KNOWN { background: var(--KNOWN); color: var(--text); }
.UNSUPPORTED, .none { background: var(--UNSUPPORTED); color: var(--soft); }
.none { background: none; }
button.mark { cursor: pointer; text-decoration: underline; min-height: 1.9rem; }
:focus-visible { outline: 3px solid #2f81f7; outline-offset: 2px; }
fieldset { display: flex; flex-wrap: wrap; gap: .25rem .9rem; margin: 0 0 .75rem; padding: .4rem .8rem;
  border: 1px solid var(--line); border-radius: .4rem; }
label { display: inline-flex; gap: .35rem; align-items: center; min-height: 1.9rem; }
.frame { overflow: auto; max-height: calc(100vh - 1rem); max-height: calc(100dvh - 1rem);
  border: 1px solid var(--line); border-radius: .4rem; }
table { border-collapse: separate; border-spacing: 0; width: 100%; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td { text-align: center; width: 5.5rem; }
thead th { position: sticky; top: 0; z-index: 2; background: var(--band); vertical-align: bottom; text-align: center; }
thead th small { display: block; font-weight: 400; color: var(--soft); }
th:first-child { position: sticky; left: 0; background: var(--page); text-align: left; font-weight: 400; z-index: 1; }
thead th:first-child { z-index: 3; background: var(--band); font-weight: 700; }
tr.area th, tr.area td { background: var(--band); font-weight: 700; }
.id { font: 700 .85rem ui-monospace, monospace; white-space: nowrap; margin-right: .5rem; }
.source { display: block; font-size: .8rem; color: var(--soft); }
[hidden] { display: none !important; }
dialog { width: min(56rem, calc(100vw - 1rem)); max-height: calc(100vh - 2rem); border: 1px solid var(--line);
  border-radius: .5rem; padding: 1rem; background: var(--page); color: var(--text); }
dialog::backdrop { background: rgb(0 0 0 / .5); }
dialog h2 { font-size: 1.1rem; margin: 0 2.5rem .5rem 0; }
dialog h3 { font-size: .95rem; margin: .75rem 0 .25rem; }
pre { margin: 0; padding: .6rem; overflow: auto; max-height: 22rem; background: var(--band); border-radius: .3rem;
  font: .82rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
dialog button { min-height: 2.2rem; padding: .2rem .8rem; border: 1px solid var(--line); border-radius: .3rem;
  background: var(--band); color: var(--text); font: inherit; cursor: pointer; margin: .5rem .5rem 0 0; }
@media (max-width: 40rem) {
  body { padding: .5rem; }
  th, td { padding: .3rem .35rem; }
  td { width: 2.6rem; }
  tbody th:first-child { min-width: 11rem; font-size: .85rem; }
  thead th:not(:first-child) { writing-mode: vertical-rl; rotate: 180deg; text-align: left; max-height: 11rem;
    font-size: .85rem; border-bottom: 0; border-top: 1px solid var(--line); }
  tr.area td { font-size: .75rem; white-space: nowrap; }
  .source { display: none; }
}
@media print { .frame { max-height: none; overflow: visible; } fieldset { display: none; } }
"""

SCRIPT = """
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
all('button[data-opens]').forEach(button => button.addEventListener('click',
  () => document.getElementById(button.dataset.opens).showModal()));
all('dialog').forEach(dialog => dialog.addEventListener('click',
  event => { if (event.target === dialog) dialog.close(); }));
all('button[data-copies]').forEach(button => button.addEventListener('click', async () => {
  const source = document.getElementById(button.dataset.copies);
  const status = button.nextElementSibling;
  try {
    await navigator.clipboard.writeText(source.textContent);
    status.textContent = 'Copied.';
  } catch {
    getSelection().selectAllChildren(source);
    status.textContent = document.execCommand('copy') ? 'Copied.' : 'Selected: copy it with the keyboard.';
  }
}));
const count = document.getElementById('count');
const filter = wanted => {
  let shown = 0;
  all('tr[data-outcomes]').forEach(row => {
    row.hidden = wanted !== 'all' && !row.dataset.outcomes.split(' ').includes(wanted);
    shown += !row.hidden;
  });
  all('tbody').forEach(body => { body.hidden = all('tr[data-outcomes]', body).every(row => row.hidden); });
  count.textContent = shown + ' of ' + all('tr[data-outcomes]').length + ' requirements';
};
all('input[name=outcome]').forEach(input => input.addEventListener('change', () => filter(input.value)));
filter(document.querySelector('input[name=outcome]:checked').value);
"""


def text(value: Any) -> str:
    """Anything as text of HTML, in an attribute too."""
    return escape(printable(str(value)), quote=True)


def page(reports: Sequence[Report]) -> str:
    """The whole page. The same reports always give the same text."""
    reports = merge(reports)
    names = titles(reports)
    by_id = [{result["id"]: result for result in report["results"]} for report in reports]
    bodies, dialogs = [], []
    for area, rows in areas(reports).items():
        bodies.append(f"<tbody>{_area(area, len(rows), reports)}")
        for id, requirement in rows.items():
            cells = []
            for column, (name, results) in enumerate(zip(names, by_id, strict=True)):
                key = f"{id}-{column}"
                cells.append(_cell(results.get(id), name, id, key))
                if id in results and results[id]["outcome"] in OPENS:
                    dialogs.append(_dialog(results[id], name, key))
            outcomes = " ".join(o for o in OUTCOMES if any(r.get(id, {}).get("outcome") == o for r in by_id))
            bodies.append(
                f'<tr data-outcomes="{outcomes}"><th scope="row"><span class="id">{text(id)}</span>'
                f'{text(requirement["sentence"])}<span class="source">{text(requirement["source"])}</span></th>'
                f"{''.join(cells)}</tr>"
            )
        bodies.append("</tbody>")
    heads = "".join(
        f"<li><strong>{text(name)}</strong> {text(report['footer']['headline'])}</li>"
        for name, report in zip(names, reports, strict=True)
    )
    columns = "".join(
        f'<th scope="col">{text(name)}<small>{text(report["implementation"]["version"])}</small></th>'
        for name, report in zip(names, reports, strict=True)
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    legend = "".join(f'<li><span class="mark {o}">{o[0]}</span> {o}: {MEANING[o]}</li>' for o in OUTCOMES)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>LoRA conformance</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        "<h1>LoRA conformance</h1>\n"
        f'<ul class="heads">{heads}</ul>\n<ul class="legend" aria-label="Outcomes">{legend}</ul>\n'
        f"<fieldset><legend>Show requirements with the outcome</legend>{_filters()}"
        '<span id="count" role="status"></span></fieldset>\n'
        '<div class="frame" role="region" aria-label="Requirements by implementation" tabindex="0">\n'
        f'<table><thead><tr><th scope="col">requirement</th>{columns}</tr></thead>\n'
        + "\n".join(bodies)
        + "\n</table>\n"
        "</div>\n</main>\n" + "\n".join(dialogs) + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


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
    if outcome in OPENS:
        return (
            f'<td><button type="button" class="mark {outcome}" data-opens="{text(key)}" '
            f'aria-haspopup="dialog" aria-label="{text(f"{says}, {id}: details")}">{outcome[0]}</button></td>'
        )
    if outcome == "PASS":
        title = f"{says}, {result['examples']} examples, largest error {result['max_error_u']:.3g} roundings"
    else:
        title = f"{says}, {result['message']}"
    return f'<td><span class="mark {outcome}" role="img" aria-label="{text(title)}" title="{text(title)}">{outcome[0]}</span></td>'  # noqa: E501


def _dialog(result: Mapping[str, Any], name: str, key: str) -> str:
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
    if re.fullmatch(r"https?://[^\s]+", result["link"]):  # no javascript: from a foreign report
        link = text(result["link"])
        parts.append(f'<p><a href="{link}" rel="noopener noreferrer">{link}</a></p>')
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


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print("usage: python -m spec_tests.page matrix.html REPORT.json ...", file=sys.stderr)
        return 2
    to, *files = map(Path, arguments)
    to.write_text(page([report for file in files for report in read(file)]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
