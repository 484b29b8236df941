"""Why requirements that are never the only one to find a seeded bug are in the suite all the same.

`plain.py` is small: one line serves all kinds of layers, and one fault breaks many requirements at once. Elsewhere
each of them is kept by code of its own. The kill matrix lists beside each of these requirements which others find the
same bugs; the reason stands here, by area.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

REASONS = {
    "FORWARD SHAPE": "a library has a class for each kind of layer and a path for each dtype, `plain` has one for all",
    "SCALE": "a library computes s when an adapter is made, when it is loaded and when it is changed; `plain` once",
    "COPY": "a library copies each kind of layer in code of its own, `plain` all of them in one line",
    "MERGE": "a library merges each kind of layer and each dtype in code of its own, `plain` all of them in one line",
    "OFF": "a library switches off in each kind of layer, merged or not, `plain` in one line",
    "DROP": "a library has a dropout for each kind of layer and adapter, `plain` one line",
    "GRAD": "a library has a backward pass for each kind of layer and dtype, or leaves it to its framework",
    "INIT": "a library starts each kind of layer in code of its own, `plain` in one line",
    "PISSA PISSANITER OLORA LOFTQ MICA CORDA EVA LORAGA": (
        "the identities of a start hold or fail together in exact arithmetic; a library breaks one of them by its "
        "dtypes, its storage or its order of steps, and then it is this one that says what is wrong"
    ),
    "TARGET PATTERN": (
        "each names one form of a target or a pattern, which a library matches in code of its own; `plain` turns all "
        "of them into one expression"
    ),
    "BIAS SAVED": "each follows the trained parameters through another operation, which a library writes by itself",
    "ADAPTER BATCH WEIGHT": (
        "each looks at one operation on named adapters, whose state a library keeps in every layer and `plain` in one "
        "place"
    ),
    "MEET MEETJOIN MEETDATA MEETSTATE": (
        "each looks at one operation on adapters of different starts; a library keeps what a start took out of W in "
        "every layer and file, `plain` in one place"
    ),
    "MERGED SEVERAL CONTEXT": (
        "each looks at one operation in one state of a model, merged, partly merged, off or scaled; a library keeps "
        "that state in every layer"
    ),
    "MODEL": "each looks at one operation on a whole model, which a library writes by itself and `plain` as a loop",
    "FILE": "each looks at one property of a folder; a fault in writing or reading breaks several of them at once",
    "ERROR": "each looks at one bad value, which a library refuses in code of its own, and `plain` in one condition",
    "LAYEROPT UPDATE FUSED": (
        "each looks at one option of a base layer or at one kind of factors, which a library follows in code of its own"
    ),
    "STRUCT NAMES ENCODER": (
        "each looks at one structure or one kind of name; a library meets it in the walk through the model, in the "
        "files and in the merge, `plain` in one dictionary"
    ),
    "HALF MODELGRAD": "a library rounds and differentiates in the kernels of its framework, `plain` in one line each",
    "OWNFILE READER": "each looks at one property of a folder; a fault in reading breaks several of them at once",
    "OVERLOOK": "each was written for a mistake in `lora_ref` that the others had let through",
    "LAW STATE": (
        "a law between operations: it finds what no single requirement looks at, so a fault that one looks at is found "
        "by both"
    ),
}
OF_AREA = {area: reason for areas, reason in REASONS.items() for area in areas.split()}


def beside(rows: Mapping[str, list[str]], ids: Iterable[str]) -> dict[str, list[str]]:
    """{requirement: few others that together find all the bugs that it finds}, by the greedy cover."""
    found = {}
    for id in ids:
        left = {bug for bug, fails in rows.items() if id in fails}
        others: list[str] = []
        while left:
            finds: dict[str, set[str]] = {}
            for bug in left:
                for other in rows[bug]:
                    finds.setdefault(other, set()).add(bug)
            del finds[id]
            best = min(finds, key=lambda other: (-len(finds[other]), other))
            others.append(best)
            left -= finds[best]
        found[id] = sorted(others)
    return found
