"""The figure of `lora-ref inspect --figure`: how much of its rank each update uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .inspect import Update, printable


def draw(modules: Sequence[Update], path: Path) -> None:
    """One row a module: its singular values, as shares of its largest; their size, ‖sBA‖, stands beside the name.

    Raises:
        ImportError: matplotlib is not installed. ValueError: there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError(f"--figure needs {error.name}: pip install 'lora_ref[demo]'") from None
    if not modules:
        raise ValueError("the folder has no adapted module, so there are no singular values to draw")
    longest = max(len(update.singular_values) for update in modules)
    values = np.full((len(modules), longest), np.nan)  # white where a module has no such component
    for row, update in zip(values, modules, strict=True):
        largest = update.singular_values[0] or 1.0  # 0 for an update that is still zero
        row[: len(update.singular_values)] = [value / largest for value in update.singular_values]

    height = min(1.6 + 0.3 * len(modules), 60)
    figure = Figure(figsize=(8, height), layout="constrained", facecolor="white")
    axis = figure.subplots()
    # cividis looks alike to colour-blind readers and falls evenly in grey; reversed, so that large is dark
    image = axis.imshow(values, aspect="auto", cmap="cividis_r", vmin=0, vmax=1, interpolation="nearest")
    # Names come from a file: a "$" in one is a dollar sign, not a formula.
    names = [f"{printable(update.module)}   ‖sBA‖ = {update.frobenius_norm:.3g}" for update in modules]
    axis.set_yticks(range(len(modules)), names, fontsize=9, parse_math=False)
    axis.set_xticks(sorted({*range(0, longest, -(-longest // 16)), longest - 1}))
    axis.set_xticklabels([str(int(tick) + 1) for tick in axis.get_xticks()])
    axis.set(xlabel="singular value of s·B·A, in falling order")
    figure.suptitle("How much of its rank each update uses", fontweight="bold")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, label="share of the largest", pad=0.02)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
