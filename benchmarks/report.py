"""The results as tables and as a figure: first what must hold, then each theme."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from rich.table import Table

# Okabe and Ito's colours, which colour-blind readers tell apart; each readable on white and on black
COLOURS = {"lora_ref": "#0072B2", "PEFT": "#E69F00", "loralib": "#CC79A7", "full": "#009E73"}
MARKERS = {"lora_ref": "o", "PEFT": "s", "loralib": "^", "full": "D"}


def bars(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, each once: the worst of its cases, how many keep it, and of how many it is above the floor."""
    found: dict[str, dict[str, Any]] = {}
    for row in results["rows"]:
        for bar in row["bars"]:
            line = found.setdefault(
                bar["text"], bar | {"cases": 0, "keep": 0, "beyond": 0, "worst": -float("inf"), "where": ""}
            )
            line["cases"] += 1
            line["keep"] += bar["kept"]
            line["beyond"] += not bar["kept"] and bar.get("floor", 0.0) > bar["at_most"]
            if bar["value"] > line["worst"]:
                floor = f"{bar['floor']:.2f}" if "floor" in bar else ""
                line |= {"worst": bar["value"], "floor there": floor, "where": said(row["about"])}
    return list(found.values())


def said(about: dict[str, Any]) -> str:
    return ", ".join(str(v) if isinstance(v, str) else f"{k} {v}" for k, v in about.items())


def themes(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each theme."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault(row["theme"], []).append(row)
    return found


def lines(row: dict[str, Any]) -> list[list[str]]:
    """One line a job: its ratio with the quartiles, the best that is possible, bytes saved and peak."""
    made = []
    for name, ratio in row["ratios"].items():
        best = next((f"{value:.2f}" for key, value in row["computed"].items() if name.endswith(key)), "")
        shown = f"{number(ratio['median'])} ({number(ratio['low'])} to {number(ratio['high'])})"
        bytes_of = [size(row[key][name]) if key in row else "" for key in ("saved", "peak")]
        made.append([name, "1" if name == row["floor"] else shown, best, *bytes_of])
    return made


def number(value: float) -> str:
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.3g}"
        if value >= 10
        else f"{value:.2f}"
        if value > 0.1
        else f"{value:.2g}"
    )


def size(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f}"


def counted(bar: dict[str, Any]) -> list[str]:
    kept, beyond = f"{bar['keep']} of {bar['cases']}", str(bar["beyond"] or "")
    return [f"{bar['worst']:.2f}", f"{bar['at_most']:g}", kept, beyond, bar["floor there"]]


BARS = ["what", "worst", "at most", "kept", "floor above it", "floor at the worst", "worst at"]
HEAD = ["job", "ratio (quartiles)", "computed floor", "saved, MiB", "peak, MiB"]


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table without the columns that are empty."""
    full = [i for i in range(len(head)) if any(line[i] for line in body)]
    rows = [[line[i] for i in full] for line in (head, ["---"] + ["---:"] * (len(head) - 1), *body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in rows)


def markdown(results: dict[str, Any], figure: str = "bench.png") -> str:
    """The page that is committed."""
    several = len(results["machines"]) > 1
    page = [
        "# What things cost",
        "Written by `make bench`.",
        *(f"Machine {i + 1}: {machine(m)}" if several else machine(m) for i, m in enumerate(results["machines"])),
        "A ratio is of a job's time over that of the first job of its table, run by turns: the median, with quartiles. "
        "*Computed floor*: what the ratio could be at the frozen layer's FLOP/s and the memory's speed. *Saved*: bytes "
        "kept for the backward pass beyond parameters and the layer's input. *Peak*: the most that new tensors held. "
        "*bare*: the products of a step in their fastest form, in one autograd function: the measured floor (of a "
        "merge the sums, with a copy or a look at every weight). "
        "*Floor above it*: so many cases do not keep the aim, nor does their floor. *Allocator*: a step finds the "
        "memory that the last one has freed, if that is kept; what a process does once (adapt, load, merge) gets its "
        "memory from the system.",
        f"![The ratios of all tables, each with its quartiles]({figure})",
        "## What must hold",
        table(
            BARS,
            [[b["text"], *counted(b), b["where"]] for b in bars(results)],
        ),
    ]
    for theme, rows in themes(results).items():
        page.append(f"## {theme}")
        for row in rows:
            on = f", machine {row['machine'] + 1}" if several else ""
            page.append(f"**{said(row['about'])}** ({row['turns']} turns{on})")
            page.append(table(HEAD, lines(row)))
    return "\n\n".join(page) + "\n"


def machine(m: dict[str, Any]) -> str:
    threads = f"{m['threads']} thread{'s' * (m['threads'] != 1)}"
    what = f"{m['device']}: {m['cpu']}, {m['vectors']}, {m['cores']} cores, {threads}; {m['blas']}"
    versions = ", ".join(f"{name} {m[name]}" for name in ("python", "torch", "peft", "loralib", "transformers"))
    return f"{what}; allocator: {m['allocator']}. {versions}."


def show(results: dict[str, Any], console: Console) -> None:
    """The same on the terminal, shorter."""
    for theme, rows in themes(results).items():
        shown = Table(title=theme)
        for title in ["case", *HEAD]:
            shown.add_column(title, justify="left" if title in ("case", "job") else "right")
        for row in rows:
            for i, line in enumerate(lines(row)):
                shown.add_row("" if i else said(row["about"]), *line, end_section=i + 1 == len(row["ratios"]))
        console.print(shown)
    shown = Table(title="What must hold")
    for title in BARS:
        shown.add_column(title, justify="left" if title in ("what", "worst at") else "right")
    for b in bars(results):
        colour = "green" if b["keep"] == b["cases"] or results["quick"] else "red"
        worst, *others = counted(b)
        shown.add_row(b["text"], f"[{colour}]{worst}[/]", *others, b["where"])
    console.print(shown)


def draw(results: dict[str, Any], path: Path) -> None:
    """Each job's ratio as a dot with its quartiles, one panel a theme, on a logarithmic axis."""
    parts = {theme: rows for theme, rows in themes(results).items()}
    heights = [sum(len(lanes(row)) for row in rows) + 1 for rows in parts.values()]
    figure = Figure(figsize=(9, 0.24 * sum(heights) + 1.1 * len(parts)), layout="constrained", facecolor="white")
    panels = figure.subplots(len(parts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    known: dict[str, Any] = {}
    for panel, (theme, rows) in zip(panels, parts.items(), strict=True):
        names: list[str] = []
        for row in rows:
            for setting, jobs in lanes(row).items():
                for job, library in jobs.items():
                    ratio, at = row["ratios"][job], len(names)
                    style = {"color": COLOURS.get(library, "0.4"), "marker": MARKERS.get(library, "x")}
                    panel.plot([ratio["low"], ratio["high"]], [at, at], color=style["color"], linewidth=1)
                    panel.plot(ratio["median"], at, linestyle="none", label=library, markersize=5, **style)
                names.append(f"{said(row['about'])}{', ' * bool(setting)}{setting}")
        panel.axvline(1, color="0.4", linewidth=1)
        panel.set(xscale="log", title=theme, xlabel=f"time / {rows[0]['floor']}")
        panel.set_yticks(range(len(names)), names, fontsize=7)
        panel.invert_yaxis()
        panel.grid(axis="x", which="both", color="0.9", linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
        low, high = panel.get_xlim()
        panel.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]) if high < 5 * low else LogLocator())
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        known |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(known.values(), known, ncols=len(known), fontsize=8, frameon=False, loc="outside upper center")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def lanes(row: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{setting: {job: library}}: the jobs that are to be compared on one line of the figure."""
    found: dict[str, dict[str, str]] = {}
    for job in row["ratios"]:
        library, _, setting = job.partition(" ")
        if job != row["floor"]:
            found.setdefault(setting, {})[job] = library
    return found
