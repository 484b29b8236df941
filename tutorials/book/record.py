"""In a page's kernel: each figure that the page saves leaves what it plots as numbers, beside its picture.

Pictures differ by a few pixels from machine to machine; the numbers can be compared.
"""

import json
import pathlib

import numpy as np
from matplotlib import collections
from matplotlib.category import StrCategoryFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FuncFormatter

POINTS = 400  # of a longer line, as many are kept
PIXELS = 32  # of a larger image, as many are kept each way
saved: list[str] = []


def start() -> None:
    """From now on, `fig.savefig("figures/NN_name.png")` writes figures/NN_name.json, too."""
    plain = Figure.savefig

    def savefig(self, target, *args, **kwargs):
        plain(self, target, *args, **kwargs)
        if isinstance(target, str | pathlib.Path):
            text = json.dumps({"axes": [data_of(ax) for ax in self.axes]}, indent=0, ensure_ascii=False)
            pathlib.Path(target).with_suffix(".json").write_text(compact(text) + "\n", encoding="utf-8")
            saved.append(pathlib.Path(target).as_posix())

    Figure.savefig = savefig


def data_of(ax) -> dict:
    """What a reader sees in these axes: labels, scales, limits, and the numbers of all that is drawn."""
    lines = [[rounded(v) for v in thinned(line.get_xdata(), line.get_ydata())] for line in ax.lines]
    data = {
        "title": ax.get_title(),
        "xlabel": ax.get_xlabel(),
        "ylabel": ax.get_ylabel(),
        "xscale": ax.get_xscale(),
        "yscale": ax.get_yscale(),
        "xlim": rounded(ax.get_xlim()),
        "ylim": rounded(ax.get_ylim()),
        "ticks": [named_ticks(axis) for axis in (ax.xaxis, ax.yaxis)],
        "legend": [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else [],
        "texts": [t.get_text() for t in ax.texts],
        "lines": [{"x": x, "y": y} for x, y in lines],
        "bars": [rounded([*b.get_xy(), b.get_width(), b.get_height()]) for b in ax.patches if hasattr(b, "get_width")],
        "images": [rounded(shrunk(image.get_array())) for image in ax.images],
        "collections": [collection_of(c) for c in ax.collections],
    }
    return {key: value for key, value in data.items() if value not in ([], "", [[], []])}


def named_ticks(axis) -> list[str]:
    """The labels that the page gave to the ticks; those that matplotlib makes follow from the limits."""
    named = isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter | StrCategoryFormatter)
    return [tick.get_text() for tick in axis.get_ticklabels()] if named else []


def collection_of(collection) -> dict:
    """Scatters, error bars and filled areas; the cells of a mesh."""
    if isinstance(collection, collections.PathCollection):
        x, y = np.asarray(collection.get_offsets(), float).reshape(-1, 2).T
    elif isinstance(collection, collections.QuadMesh):
        return {"mesh": rounded(shrunk(collection.get_array()))}
    else:
        paths = [path.vertices for path in collection.get_paths()]
        x, y = np.concatenate(paths).T if paths else ([], [])
    x, y = thinned(x, y)
    return {"x": rounded(x), "y": rounded(y)}


def thinned(*columns) -> list[np.ndarray]:
    """Some POINTS of each column, evenly spread, the first and the last among them."""
    arrays = [np.asarray(column, float).ravel() for column in columns]
    n = min(array.size for array in arrays)
    chosen = np.unique(np.linspace(0, n - 1, POINTS).round().astype(int)) if n > POINTS else np.arange(n)
    return [array[chosen] for array in arrays]


def shrunk(image) -> np.ndarray:
    """Block means of an image, at most PIXELS each way."""
    array = np.ma.filled(np.ma.asarray(image, float), np.nan)
    for axis in (0, 1)[: array.ndim]:
        if array.shape[axis] > PIXELS:
            blocks = np.array_split(array, PIXELS, axis=axis)
            array = np.stack([block.mean(axis=axis) for block in blocks], axis=axis)
    return array


def rounded(values) -> list:
    """To six digits, as (nested) lists."""
    array = np.asarray(values, float)
    if array.ndim > 1:
        return [rounded(row) for row in array]
    return [float(f"{value:.6g}") for value in array]


def compact(text: str) -> str:
    """One line for each list of numbers, so that a change is a short diff."""
    joined = text.replace("\n", "")
    for key in ('{"title', '{"xlabel', '"lines"', '"bars"', '"images"', '"collections"', '{"x"', '"y"', '{"mesh"'):
        joined = joined.replace(key, "\n" + key)
    return joined.strip()
