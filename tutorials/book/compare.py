"""Is what a page prints and plots today what is committed? Numbers may differ a little: machines do."""

import json
import math
import re

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?(?![\w])")
NOISE = 1e-6  # numbers that are both below it are rounding errors, or as good as zero


def texts(old: str, new: str, tolerance: float) -> str | None:
    """What differs between two texts (None: nothing): words and whole numbers exactly, other numbers relatively."""
    if old == new:
        return None
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        # a number that needs a digit more moves the columns of a table
        if squeezed(NUMBER.sub("#", before)) != squeezed(NUMBER.sub("#", after)):
            return f"committed {before!r}, now {after!r}"
        for x, y in zip(NUMBER.findall(before), NUMBER.findall(after), strict=True):
            if not same_number(x, y, tolerance):
                return f"{x} is committed, now it is {y}, in {after!r}"
    if len(old.splitlines()) != len(new.splitlines()):
        return f"{len(old.splitlines())} lines are committed, now there are {len(new.splitlines())}"
    return None


def squeezed(line: str) -> str:
    return re.sub(r"[\s─━-]+", " ", line).strip()


def same_number(old: str, new: str, tolerance: float) -> bool:
    """Whole numbers exactly; others within `tolerance` of their size, or one in the last place that is shown."""
    if old == new:
        return True
    if not re.search(r"[.eE]", old + new):
        return False
    x, y = float(old), float(new)
    if max(abs(x), abs(y)) < NOISE:
        return True
    mantissa = re.split("[eE]", old)[0]
    power = int(re.split("[eE]", old)[1]) if re.search("[eE]", old) else 0
    last_place = 10.0 ** (power - len(mantissa.partition(".")[2]))
    return abs(x - y) <= max(tolerance * max(abs(x), abs(y)), 1.001 * last_place)


def figures(old: str, new: str, tolerance: float) -> str | None:
    """What differs between the data of two figures (None: nothing): within `tolerance` of the axis' range."""
    before, after = json.loads(old)["axes"], json.loads(new)["axes"]
    if len(before) != len(after):
        return f"{len(before)} axes are committed, now there are {len(after)}"
    for number, (a, b) in enumerate(zip(before, after, strict=True)):
        for key in sorted({*a, *b}):
            said = values(a.get(key), b.get(key), key, a, tolerance)
            if said:
                return f"axes {number}, {key}: {said}"
    return None


def values(old, new, key: str, axes: dict, tolerance: float) -> str | None:
    """One entry of the axes, down to single numbers; key says which axis they are measured on."""
    if isinstance(old, str) and isinstance(new, str):
        return texts(old, new, tolerance)
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return first(values(old[k], new[k], k, axes, tolerance) for k in old)
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return f"{len(old)} entries are committed, now there are {len(new)}"
        is_bar = key == "bars" and len(old) == 4 and is_number(old[0])
        keys = ["x", "y", "width", "height"] if is_bar else [key] * len(old)
        return first(values(a, b, k, axes, tolerance) for a, b, k in zip(old, new, keys, strict=True))
    if is_number(old) and is_number(new):
        if near(old, new, key, axes, tolerance):
            return None
        return f"{old:g} is committed, now it is {new:g}"
    return f"committed {old!r}, now {new!r}"[:200]


def near(old: float, new: float, key: str, axes: dict, tolerance: float) -> bool:
    if old == new or (math.isnan(old) and math.isnan(new)):
        return True
    axis = {"x": "x", "xlim": "x", "width": "x", "y": "y", "ylim": "y", "height": "y"}.get(key)
    if axis is None:  # a pixel
        return abs(old - new) <= tolerance * max(abs(old), abs(new), 1e-3)
    low, high = axes[f"{axis}lim"]
    if axes[f"{axis}scale"] == "log" and min(old, new, low, high) > 0:
        old, new, low, high = (math.log10(v) for v in (old, new, low, high))
    return abs(old - new) <= tolerance * abs(high - low)


def first(results) -> str | None:
    return next((result for result in results if result), None)


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
