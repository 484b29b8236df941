"""The demo's figure: ten digits before and after, and the learning curve of every run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from .digits import logits
from .experiment import Experiment, Run

# Okabe and Ito's colours, for colour-blind readers. Line styles differ too, for prints in grey.
RIGHT, WRONG, FULL = "#0072B2", "#D55E00", "#000000"
RANK_COLOURS = ["#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#0072B2", "#D55E00"]
RANK_STYLES: list[Any] = [(0, (1, 1)), (0, (3, 1, 1, 1)), (0, (5, 2)), "-"]


def draw_experiment(done: Experiment, path: Path) -> None:
    """Write the figure to `path` as PNG, on white, so that it is readable on dark pages too."""
    figure = Figure(figsize=(9, 8), layout="constrained", facecolor="white")
    best = [run for run in done.runs if run.rank is not None][-1]
    figure.suptitle(title(best), fontsize=13, fontweight="bold", x=0.02, ha="left")
    areas: Any = figure.subfigures(2, 1, height_ratios=[1.0, 1.15])
    draw_digits(done, best, areas[0])
    draw_curves(done.runs, areas[1])
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def title(best: Run) -> str:
    """The result in numbers of this run."""
    return (
        f"Turned by 90°, {best.rotated_before:.0%} of the digits are read rightly. An adapter of rank {best.rank},\n"
        f"{best.percent:.0f}% of the network's size, makes that {best.rotated_after:.0%}; "
        "the network itself stays as it was."
    )


def draw_digits(done: Experiment, best: Run, area: SubFigure) -> None:
    """Three rows: upright and rotated digits with the base network, rotated digits with the adapter."""
    labels = done.upright.test_labels
    # the first test digit of each class, whatever its prediction
    chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    rows = [
        ("upright,\nbase network", done.upright.test[chosen], done.base),
        ("rotated,\nbase network", done.rotated.test[chosen], done.base),
        (f"rotated,\nwith LoRA r = {best.rank}", done.rotated.test[chosen], done.adapted),
    ]
    grid = area.subplots(3, 10)
    for (name, images, model), axes in zip(rows, grid, strict=True):
        predictions = logits(model, images).argmax(dim=1)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8)
        for axis, image, truth, prediction in zip(axes, images, labels[chosen], predictions, strict=True):
            draw_digit(axis, image, right=bool(truth == prediction), prediction=int(prediction))


def draw_digit(axis: Any, image: Tensor, right: bool, prediction: int) -> None:
    """One image and its prediction, with a tick or a cross: the colour is not needed."""
    colour = RIGHT if right else WRONG
    axis.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    weight = "normal" if right else "bold"
    axis.set_xlabel(f"{'✓' if right else '✗'} {prediction}", color=colour, fontweight=weight, labelpad=2)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=1.0 if right else 2.0)


def draw_curves(runs: list[Run], area: SubFigure) -> None:
    """Accuracy on rotated test digits by epoch of adaptation, one line a run."""
    axis = area.subplots()
    base = runs[0]
    axis.axhline(100 * base.rotated_after, color="#666666", linewidth=1.2, linestyle=(0, (1, 3)))
    lora = [run for run in runs if run.rank is not None]
    for number, run in enumerate(lora):
        # the highest rank has the solid line
        style = RANK_STYLES[max(0, len(RANK_STYLES) - len(lora) + number)]
        colour = RANK_COLOURS[number % len(RANK_COLOURS)]
        draw_curve(axis, run, f"LoRA r = {run.rank}", color=colour, linestyle=style)
    draw_curve(axis, runs[-1], "full fine-tuning", color=FULL, linestyle="-", linewidth=1.2, marker="o")
    axis.set(
        xlabel="epoch of adaptation on rotated digits",
        ylabel="accuracy on rotated test digits (%)",
        xlim=(0, len(runs[-1].curve) - 1),
        ylim=(0, 100),
    )
    words = f"no adaptation: {base.rotated_after:.1%}"
    axis.text(0.99, base.rotated_after + 0.01, words, ha="right", color="#444444", transform=axis.transAxes)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, base.rotated_after + 0.05), framealpha=1, edgecolor="white")


def draw_curve(axis: Any, run: Run, name: str, **style: Any) -> None:
    label = f"{name}: {run.trainable:,} parameters trained, {run.rotated_after:.1%}"
    style = {"linewidth": 2.2, "markersize": 3, **style}
    axis.plot([100 * share for share in run.curve], label=label, **style)
