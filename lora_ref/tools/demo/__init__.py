"""`lora-ref demo`: a network for handwritten digits is adapted to rotated digits.

The base network fails on rotated digits. After full fine-tuning it fails on upright digits. LoRA trains a few per
cent of the parameters and keeps the weights: with the adapter disabled the network is the base again.
`torchrun --nproc-per-node 2 --no-python lora-ref demo` trains in two processes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

RANKS, QUICK_RANKS = [1, 2, 4, 8], [2, 8]


def show_demo(out: Path, seed: int = 0, quick: bool = False, ranks: list[int] | None = None, alpha: float = 8) -> None:
    """Train, save, reload and merge. Print a table and write `demo.png`, `results.json` and `adapter/` into `out`.

    Raises:
        ImportError: matplotlib or scikit-learn is missing. ValueError: a bad rank or alpha. OSError: writing failed.
    """
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(f"the demo needs {error.name}: pip install 'lora_ref[demo]'") from None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .experiment import configurations, epochs, fixed_seed, measure, one_thread, process_group, run_experiment
    from .figure import draw_experiment

    configs = configurations(ranks or (QUICK_RANKS if quick else RANKS), alpha)
    out.mkdir(parents=True, exist_ok=True)  # before the training: a wrong path fails early

    console = Console()
    base_epochs, adapt_epochs = epochs(quick)
    total = base_epochs + adapt_epochs * (len(configs) + 1)
    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"))
    with (
        one_thread(),
        process_group() as rank,
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True, disable=rank > 0) as progress,
    ):
        bar = progress.add_task("", total=total)
        done = run_experiment(
            configs,
            seed,
            quick,
            start=lambda name: progress.update(bar, description=name),
            tick=lambda: progress.advance(bar),
        )
    if rank > 0:
        return  # all processes have the same networks: one reports
    with one_thread(), fixed_seed(seed):  # loading initialises an adapter before it fills it
        measured = measure(done, out / "adapter")
    draw_experiment(done, out / "demo.png")
    results = {
        "seed": seed,
        "epochs": {"base": base_epochs, "adaptation": adapt_epochs},
        "runs": [dataclasses.asdict(row) for row in done.runs],
        "measured": measured,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    console.print(results_table(results["runs"]))
    best = configs[-1].r
    console.print(f"The adapter of rank {best}, saved, loaded onto a fresh copy of the base, and merged:")
    done.adapted.print_trainable_parameters()
    console.print(measured_lines(measured), highlight=False)
    console.print(f"Written to {out}: demo.png, results.json, adapter/", soft_wrap=True, highlight=False)


def results_table(runs: Any) -> Any:
    """The rows of `results.json` as a rich table."""
    from rich import box
    from rich.table import Table

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    # with narrow gaps the table fits a terminal of 80 columns
    view = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        title="Accuracy on test digits, before and after adapting to rotated ones",
    )
    view.add_column("adaptation\n", no_wrap=True)
    headings = ["r", "alpha", "s", "weights\ntrained", "of all", "rotated\nbefore", "rotated\nafter"]
    for heading in [*headings, "upright\nafter", "adapter\noff"]:
        view.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        plain = [run["rank"], run["alpha"], run["scaling"]]
        view.add_row(
            run["name"],
            *("–" if value is None else f"{value:g}" for value in plain),
            f"{run['trainable']:,}",
            f"{run['percent']:.1f}%",
            *(share(run[key]) for key in ("rotated_before", "rotated_after", "upright_adapted")),
            share(run["upright_disabled"]),
        )
    return view


def measured_lines(measured: dict[str, float | int]) -> str:
    """The measured differences and file sizes, one line each."""
    largest, unit = measured["largest_logit"], 2.0**-24
    return "\n".join(
        [
            f"  max |logit difference| (float32 rounds a logit of {largest:.1f} by up to {unit * largest:.1e}):",
            f"    reloaded and trained       {measured['reloaded_vs_trained']:.1e}",
            f"    merged and adapted         {measured['merged_vs_adapted']:.1e}",
            f"    switched off and the base  {measured['disabled_vs_base']:.1e}",
            f"  file size: adapter {measured['adapter_bytes']:,} bytes, network {measured['full_bytes']:,} bytes",
        ]
    )
