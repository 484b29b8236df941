"""This lora_ref against another one, for example an earlier commit: the ratio of their times in each case.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before [--only steps lifecycle ...] [--quick] [--seconds 10]

Both packages are in one process. The other one takes PEFT's place in the cases of `python -m benchmarks`, so that both
run by turns. Below 1, this one is faster.
"""

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from . import __main__, machine, measure, report, steps


def package(folder: Path) -> ModuleType:
    """The package lora_ref of another folder, under another name. It registers no operators for compilers: one can."""
    where = folder / "lora_ref"
    if not (where / "__init__.py").exists():
        raise SystemExit(f"{folder} holds no package lora_ref: give the root of a checkout")
    spec: Any = importlib.util.spec_from_file_location("another", where / "__init__.py")
    sys.modules["another"] = found = importlib.util.module_from_spec(spec)
    with patch.multiple(torch.library, define=no_op, impl=no_op, register_fake=no_op, custom_op=lambda *a, **k: no_op):
        spec.loader.exec_module(found)
        [getattr(found, name) for name in found.__all__]  # they are imported when they are looked up
    return found


def no_op(*args: Any, **options: Any) -> Any:
    """Nothing is registered."""


def compared(theme: str, options: Any) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(case and job, number of turns, median and quartiles of this one's time over the other's)."""
    for case in __main__.THEMES[theme].cases(options):
        pairs = {name: name.replace("lora_ref", "PEFT") for name in case.jobs if name.startswith("lora_ref")}
        both = {name: job for name, job in case.jobs.items() if name in pairs or name in pairs.values()}
        if len(both) < 2 * len(pairs) or "import" in str(case.about.get("what")):  # that is a process of its own
            continue
        case.jobs, case.floor = both, next(iter(pairs))
        jobs = {name: prepare() for name, prepare in both.items()}
        for job in jobs.values():
            job()
        times = measure.by_turns(case, jobs, options.seconds, options.turns, options.device)
        for ours, other in pairs.items():
            ratios = [a / b for a, b in zip(times[ours], times[other], strict=True)]
            yield f"{report.said(case.about)}: {ours}", len(ratios), measure.spread(ratios)


def main(arguments: list[str] | None = None) -> list[tuple[str, int, dict[str, float]]]:
    """Run and show; returns what is shown."""
    folder, *rest = sys.argv[1:] if arguments is None else arguments
    options = __main__.parse(rest)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    threadpool_limits(options.threads)
    options.dtypes, options.bandwidth = machine.dtypes(options), machine.bandwidth(options)
    table = Table(title=f"time here / time in {folder}")
    for title in ("case", "turns", "ratio", "quartiles"):
        table.add_column(title, justify="left" if title == "case" else "right")
    with patch.dict(steps.LIBRARIES, PEFT=package(Path(folder))):
        found = [row for theme in options.only if theme in __main__.THEMES for row in compared(theme, options)]
    for case, turns, ratio in found:
        table.add_row(case, str(turns), f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}")
    Console().print(table)
    return found


if __name__ == "__main__":
    main()
