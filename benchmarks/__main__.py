"""What lora_ref costs beside PEFT, loralib, full fine-tuning and the frozen model, as ratios.

    python -m benchmarks [--quick] [--device cuda] [--threads 1] [--only THEME ...] [--out FOLDER]

Everything is run by turns in one process; a ratio is of two jobs of the same turn. Absolute times depend
on the machine and are not written. `--only init` runs benchmarks/init.py, which has options of its own.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from threadpoolctl import threadpool_limits

from . import init, lifecycle, machine, measure, mixed, models, report, steps

THEMES: dict[str, ModuleType] = {"steps": steps, "models": models, "mixed": mixed, "lifecycle": lifecycle}
# comes first, while the allocator is as every process finds it: what is done once finds no memory that others freed
ONCE = "lifecycle"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and smaller sizes, fewer turns: about a minute")
    parser.add_argument("--tiny", action="store_true", help="sizes at which nothing is measured: a trial in seconds")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="the steps compiled, too (half an hour)")
    parser.add_argument("--threads", type=int, default=1, help="of torch and BLAS (default: 1)")
    parser.add_argument("--trim", action="store_true", help="leave the allocator as it is: it returns memory at will")
    parser.add_argument(
        "--only", nargs="+", choices=[*THEMES, "init"], default=list(THEMES), help="init: benchmarks/init.py"
    )
    parser.add_argument(
        "--seconds", type=float, help="begin no turn of a case after so many, beyond the fewest allowed"
    )
    parser.add_argument("--out", type=Path, help="write JSON, a page and a figure into this folder")
    options = parser.parse_args(arguments)
    options.quick |= options.tiny
    options.cuda = options.device == "cuda"
    if options.cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    options.turns = 2 if options.tiny else 5 if options.quick else 41
    if options.seconds is None:
        options.seconds = 1 if options.quick else 5
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, show and write; returns the results."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.only == ["init"]:
        out = ["--out", str(options.out)] if options.out else []
        init.main([*["--quick"] * options.quick, *out])
        return {}
    options.only = [theme for theme in options.only if theme != "init"]
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    keeps = not options.cuda and not options.trim and machine.can_keep_freed_memory()
    options.allocator = "keeps freed memory, but not in what is done once" if keeps else "default"
    options.dtypes = machine.dtypes(options)
    options.bandwidth = machine.bandwidth(options)
    results: dict[str, Any] = {"machines": [machine.describe(options)], "quick": options.quick, "rows": []}
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for theme in sorted(options.only, key=ONCE.__ne__):
            if keeps and theme != ONCE:
                machine.keep_freed_memory()
            task = progress.add_task(theme, total=None)
            made = list(THEMES[theme].cases(options)) if options.tiny else THEMES[theme].cases(options)
            for case in made:  # made one by one: the large weights are not all there at once
                said = ", ".join(f"{value}" for value in case.about.values())
                progress.update(task, description=f"{theme}: {said}", advance=0)
                row = measure.run(case, options.seconds, options.turns, options.device)
                results["rows"].append({"of": theme, "machine": 0} | row)
                progress.advance(task)
            progress.update(task, total=progress.tasks[task].completed, description=theme)
    results["rows"].sort(key=lambda row: list(THEMES).index(row["of"]))
    report.show(results, Console())
    if options.out:
        write(results, options)
    return results


def write(results: dict[str, Any], options: argparse.Namespace) -> None:
    """JSON, page and figure. What was not measured stays as it was, with the machine it is of: with --only the
    other themes, and always the precisions that this machine does not compute in."""
    name = "bench" + "-cuda" * options.cuda + "-quick" * options.quick
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{name}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    measured = {None, *(str(dtype).removeprefix("torch.") for dtype in options.dtypes)}
    for row in earlier["rows"]:
        if row["of"] not in options.only or row["about"].get("dtype") not in measured:
            its = earlier["machines"][row["machine"]]
            if its not in results["machines"]:
                results["machines"].append(its)
            results["rows"].append(row | {"machine": results["machines"].index(its)})
    results["rows"].sort(key=lambda row: list(THEMES).index(row["of"]))
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.markdown(results, f"{name}.png"), encoding="utf-8")
    report.draw(results, path.with_suffix(".png"))
    print(f"written: {name}.json, {name}.md and {name}.png in {options.out}")


if __name__ == "__main__":
    main()
