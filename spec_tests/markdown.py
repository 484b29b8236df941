"""CONFORMANCE.md: the reports as Markdown. The same reports always give the same text.

`python -c "from spec_tests import peers; peers.write()"` writes it anew from the committed reports.

python -m spec_tests.markdown CONFORMANCE.md REPORT.json ...
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .causes import DECISION, DEVIATIONS, Cause, causes, decided, order, share
from .contract import CLAIMS, CONVENTIONS
from .engine import OUTCOMES
from .lives import lives, older, said
from .report import Report, area_of, areas, example, merge, printable, read, titles

HERE = Path(__file__).parent
#: Its reports on older releases are in reports/releases, and each cause of its known deviations has a script.
FOLLOWED = "peft"


def plain(text: str) -> str:
    """Text in one line, that Markdown shows as it is.

    >>> print(plain("s * B @ A | x_1\\n<b>"))
    s \\* B @ A \\| x\\_1 &lt;b>
    """
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def code(text: str) -> str:
    """A fenced block, with a fence that the text does not contain."""
    text = printable(text).strip("\n")
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}python\n{text}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table of Markdown; the columns but the first are aligned to the right where they hold numbers."""
    lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def claims_table() -> str:
    """The claims, as the guide shows them."""
    return table(("claim", "what it says"), ([f"`{claim}`", plain(words)] for claim, words in CLAIMS.items()), False)


def conventions_table() -> str:
    """The conventions, likewise."""
    rows = ([f"`{name}`", plain(words)] for name, words in CONVENTIONS.items())
    return table(("convention", "what it says"), rows, False)


def page(reports: Sequence[Report]) -> str:
    """The whole document."""
    reports = order(merge(reports))
    names = titles(reports)
    parts = [
        "# Conformance",
        "How implementations of LoRA do in the requirements of `spec_tests`. Made by `python -m spec_tests.markdown` "
        "from the reports of `lora-ref check`; do not edit it.",
        "## Areas",
        "The share kept of what is promised, and how many requirements were tried; a dash where nothing is promised.",
        table(("area", "requirements", *map(plain, names)), _areas(reports)),
        "## Deviations by cause",
        *_by_cause(reports, names),
        "## Summary",
        table(
            ("implementation", "version", "claims", "passes", *(o for o in OUTCOMES if o != "PASS"), "profile"),
            (_summary(name, report) for name, report in zip(names, reports, strict=True)),
        ),
        "FAIL: what is promised does not hold. KNOWN: neither, and it is listed with a reason. UNSUPPORTED: not "
        "promised, and not tried. ERROR: the implementation, or its adapter class, crashed.",
        *_decisions(reports),
        *_releases(reports),
        "## Requirements that do not hold",
    ]
    for name, report in zip(names, reports, strict=True):
        if found := _deviations(report):
            parts += [f"### {plain(name)}: each requirement", *found]
    return "\n\n".join(parts) + "\n"


def _by_cause(reports: Sequence[Report], names: Sequence[str]) -> Iterable[str]:
    without = []
    for name, report in zip(names, reports, strict=True):
        if found := causes(report):
            yield f"### {plain(name)}"
            yield "\n".join(map(_cause, found))
        else:
            without.append(plain(name))
    if without:
        yield f"No deviation: {', '.join(without)}."


def _cause(cause: Cause) -> str:
    ids = ", ".join(result["id"] for result in cause.results)
    line = f"- {cause.outcome}, {ids}: {plain(cause.reason or cause.results[0]['message'])}."
    if cause.script:
        line += f" Script: [`{cause.script}`](spec_tests/known/{cause.script})."
    return line + (f" Link: <{cause.link}>." if _is_link(cause.link) else "")


def _is_link(address: str) -> bool:
    return bool(re.fullmatch(r"https?://[^\s<>]+", address))


def _decisions(reports: Sequence[Report]) -> list[str]:
    """Which requirements no other document states; nothing where there is none."""
    found = sorted({result["id"] for report in reports for result in report["results"] if decided(result)})
    said = f"Their source is {DECISION}, and no other document says it: {', '.join(found)}."
    return [said] if found else []


def _summary(name: str, report: Report) -> list[str]:
    footer = report["footer"]
    counts = footer["counts"]
    total = sum(counts.values())
    claimed = total - counts["UNSUPPORTED"]
    others = [str(counts[outcome]) for outcome in OUTCOMES if outcome != "PASS"]
    claims, passes = f"{claimed} of {total}", f"{counts['PASS']} of {claimed}"
    return [plain(name), plain(report["implementation"]["version"]), claims, passes, *others, footer["profile"]]


def _releases(reports: Sequence[Report]) -> list[str]:
    """The known deviations of PEFT by their causes, and its older releases; nothing where no report is on PEFT."""
    now = next((report for report in reports if report["implementation"]["name"] == FOLLOWED), None)
    if now is None:
        return []
    scripts, known = len([*(HERE / "known" / FOLLOWED).glob("*.py")]), now["footer"]["counts"]["KNOWN"]
    outcomes = {result["id"]: result["outcome"] for result in now["results"]}
    before, rows = older(), []
    for report in before:
        found = [(result["outcome"], outcomes.get(result["id"])) for result in report["results"]]
        claimed = sum(outcome != "UNSUPPORTED" for outcome, _ in found)
        rows.append([_release(report), str(claimed), str(found.count(("FAIL", "PASS")))])
    lived = lives([*before, now])
    return [
        f"The {known} known deviations of {_release(now)} have {scripts} causes. For each of them a script in "
        f"[`spec_tests/known/{FOLLOWED}`](spec_tests/known/{FOLLOWED}) shows it with PEFT alone.",
        "## Older releases",
        f"The same requirements on older releases of PEFT (`make peers ARGS=--releases`). The last column counts those "
        f"that the older release fails and {_release(now)} passes. PEFT 0.16 and 0.17 are left out: they cannot be "
        "imported beside the transformers of `constraints.txt`.",
        table(("release", "claimed", "fails, and is kept today"), rows),
        f"{len(lived)} requirements are kept by one of these releases and not by another:",
        table(
            ("requirement", "what it says", "releases"),
            ([life.id, plain(life.sentence), said(life)] for life in lived),
            False,
        ),
    ]


def _release(report: Report) -> str:
    """The version without what it ran on: "peft 0.21.2"."""
    return plain(report["implementation"]["version"].split(", ")[0])


def _areas(reports: Sequence[Report]) -> Iterable[list[str]]:
    for area, rows in areas(reports).items():
        line = [area, str(len(rows))]
        for report in reports:
            part = share([result for result in report["results"] if area_of(result["id"]) == area], len(rows))
            line.append(f"{part.percent} %, {part.kept} of {part.tried}" if part.tried else "-")
        yield line


def _deviations(report: Report) -> list[str]:
    return [_deviation(result) for result in report["results"] if result["outcome"] in DEVIATIONS]


def _deviation(result: Mapping[str, Any]) -> str:
    lines = [
        f"**{result['id']}, {result['outcome']}.** {plain(result['sentence'])}",
        f"Source: {plain(result['source'])}. It does: {plain(result['message'])}",
    ]
    if result["reason"]:
        lines.append(f"Reason: {plain(result['reason'])}")
    if _is_link(result["link"]):
        lines.append(f"Link: <{result['link']}>")
    if example(result):
        lines.append(code(result["repro"]))
    return "\n\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print("usage: python -m spec_tests.markdown CONFORMANCE.md REPORT.json ...", file=sys.stderr)
        return 2
    to, *files = map(Path, arguments)
    to.write_text(page([report for file in files for report in read(file)]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
