"""The kill matrix: which requirements find which seeded bug.

    python -m spec_tests.bugs.matrix            compare with kill_matrix.json, and say what has changed
    python -m spec_tests.bugs.matrix --write    compute it anew, and write it
    python -m spec_tests.bugs.matrix --write --only NAME ...    the rows of these faults, which alone have changed

Hypothesis draws its examples without randomness, so the same sources give the same matrix. A bug is tried on the
requirements that found it before and on those of its own area; on others until ENOUGH have found it; and on a
requirement that finds nothing else. So a row is long enough to see who is alone, and not all that would fail.

A requirement is tried on a bug only if, on the sound implementation, its examples run the statement that the bug
changes; otherwise both implementations do the same thing on the same examples. Failures are not shrunk, which does not
change what fails.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import engine, smoke
from ..contract import Implementation
from ..reference.plain import Plain
from ..registry import Requirement, load
from . import bad, redundant
from .harmless import VARIANTS
from .seeded import ALL, AREA, Bug, broken, compiled, source

FILE = Path(__file__).with_name("kill_matrix.json")
ENOUGH = 6  # requirements in a row
SMOKE = "SMOKE"  # the check of the adapter class found it, before any requirement


def outcome(implementation: Implementation, requirement: Requirement, profile: str) -> engine.Result:
    """As the suite has it, but the example is not shrunk."""
    return engine.examine(implementation.name, implementation, requirement, profile, shrink=False)


def fails(implementation: Implementation, requirement: Requirement, profile: str) -> bool:
    return outcome(implementation, requirement, profile).outcome in ("FAIL", "ERROR")


def row(implementation: Implementation, ids: Iterable[str], profile: str) -> list[str]:
    """Those of these requirements that fail."""
    requirements = load()
    found = [id for id in ids if fails(implementation, requirements[id], profile)]
    try:
        smoke.check(implementation)
    except TypeError:
        found.append(SMOKE)
    return sorted(found)


# -- what a requirement runs -------------------------------------------------------------------


def _bodies(tree: ast.AST) -> Iterator[tuple[list[ast.stmt], bool]]:
    """All lists of statements, and whether they stand in a function."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[list[ast.stmt], bool]]:
        inside = inside or isinstance(node, ast.FunctionDef)
        for name in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, name, None), list):
                yield statements, inside
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, False)


def _lines(old: str, new: str) -> range:
    """The lines of plain.py that this replacement changes."""
    start = source()[: source().index(old)].count("\n") + 1
    before, after = old.split("\n"), new.split("\n")
    while len(before) > 1 and after and before[0] == after[0]:
        before, after, start = before[1:], after[1:], start + 1
    while len(before) > 1 and after and before[-1] == after[-1]:
        before, after = before[:-1], after[:-1]
    return range(start, start + len(before))


def _changes() -> Iterator[tuple[str, str, str]]:
    """Everything that is ever replaced in plain.py: the name of the bug or variant, and the replacement."""
    for bug in ALL:
        yield bug.name, bug.old, bug.new
    for name, (replacements, _) in VARIANTS.items():
        for old, new in replacements:
            yield name, old, new


def probed() -> tuple[Implementation, set[str], set[str]]:
    """The sound implementation, which notes the names of the changes whose statements it runs; the notes, and the
    names of the changes that it cannot tell of."""
    tree = ast.parse(source())
    places: dict[int, tuple[list[ast.stmt], ast.stmt]] = {}  # line: the innermost statement there
    for statements, inside in _bodies(tree):
        for statement in statements if inside else ():
            for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1):
                places[line] = statements, statement  # inner lists come after the outer ones
    notes: set[str] = set()
    always: set[str] = set()
    for name, old, new in _changes():
        lines = _lines(old, new)
        if any(line not in places for line in lines):
            always.add(name)  # outside of functions: every requirement may depend on it
            continue
        for statements, statement in {id(places[line][1]): places[line] for line in lines}.values():
            probe = ast.copy_location(ast.parse(f"_notes.add({name!r})").body[0], statement)
            statements.insert(next(i for i, s in enumerate(statements) if s is statement), probe)
    made: Implementation = compiled("probed", ast.fix_missing_locations(tree), _notes=notes).Plain()
    return made, notes, always


def _reached_by(ids: list[str]) -> dict[str, list[str]]:
    implementation, notes, always = probed()
    requirements, found = load(), {}
    for id in ids:
        notes.clear()
        result = outcome(implementation, requirements[id], "quick")
        if result.outcome == "PASS":
            found[id] = sorted(notes | always)
    return found


@functools.cache
def reach() -> dict[str, list[str]]:
    """{bug or variant: the requirements whose examples run a statement that it changes}; only those that pass."""
    found: dict[str, list[str]] = {name: [] for name, _, _ in _changes()}
    for id, names in _in_processes(_reached_by, _dealt(list(load()), 8)).items():
        for name in names:
            found[name].append(id)
    return {name: sorted(ids) for name, ids in found.items()}


def row_of(bug: Bug) -> list[str]:
    """The requirements that find this bug."""
    return row(broken(bug), reach()[bug.name], bug.profile)


# -- the matrix --------------------------------------------------------------------------------


def _dealt(items: list[Any], hands: int) -> list[list[Any]]:
    return [items[start::hands] for start in range(hands)]


def _in_processes(action: Any, parts: list[Any], processes: int = 2) -> dict[Any, Any]:
    if "PYTEST_XDIST_WORKER" in os.environ:  # that has processes enough
        return {k: v for part in parts for k, v in action(part).items()}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        return {k: v for result in pool.map(action, parts) for k, v in result.items()}


def _at_home(bug: str, id: str) -> bool:
    """Is the requirement of the area that the bug was planted for?"""
    module = load()[id].body.__module__.rpartition(".")[2]
    return bug in AREA and module.split("_")[0] == AREA[bug].split("_")[0]


def _rows(work: list[tuple[str, list[str]]]) -> dict[str, list[str]]:
    bugs, before = {bug.name: bug for bug in ALL}, committed()["bugs"] if FILE.exists() else {}
    rows = {}
    for name, ids in work:
        made, profile = broken(bugs[name]), bugs[name].profile
        first = [id for id in ids if id in before.get(name, {}).get("fails", ()) or _at_home(name, id)]
        found = row(made, first, profile)
        for id in (id for id in ids if id not in first):
            if len(found) >= ENOUGH:
                break
            found += [id] if fails(made, load()[id], profile) else []
        rows[name] = sorted(found)
    return rows


def _first_of(work: list[tuple[str, list[str]]]) -> dict[str, str]:
    """{requirement: a bug that it finds}, of requirements with the bugs that they are to be tried on."""
    bugs, found = {bug.name: bug for bug in ALL}, {}
    for id, names in work:
        for name in names:
            if fails(broken(bugs[name]), load()[id], bugs[name].profile):
                found[id] = name
                break
    return found


def _counts(names: list[str]) -> dict[str, dict[str, int]]:
    return {kind.__name__: bad.counts(kind) for kind in bad.COUNTED if kind.__name__ in names}


def compute(only: Iterable[str] = ()) -> dict[str, Any]:
    """The matrix: {"bugs": {name: {"link", "fails"}}, "bad": {class: counts}, and what follows for requirements}.

    only: faults, whose rows are computed; the other rows, and what they have proved, are those of the file.
    """
    names = set(only) or {bug.name for bug in ALL}
    before = committed() if only else {"bugs": {}}
    reached = [(bug.name, reach()[bug.name]) for bug in ALL if bug.name in names]
    rows = {name: about["fails"] for name, about in before["bugs"].items()} | _in_processes(
        _rows, _dealt(sorted(reached, key=lambda item: len(item[1])), 16)
    )
    left = {id: sorted((name for name, ids in reached if id in ids), key=lambda n: len(rows[n])) for id in idle(rows)}
    for id, name in _in_processes(_first_of, _dealt(list(left.items()), 8)).items():
        rows[name] = sorted([*rows[name], id])
    rows = {bug.name: rows[bug.name] for bug in ALL}
    alone = only_killers(rows)
    return {
        "bugs": {bug.name: {"link": bug.url, "fails": rows[bug.name]} for bug in ALL},
        "bad": before.get("bad") or _in_processes(_counts, [[kind.__name__] for kind in bad.COUNTED]),
        "only": alone,
        "redundant": redundant.beside(rows, never_alone(alone)),
        "idle": idle(rows),
        "unproven": _unproven(rows, before.get("unproven")),
    }


def _unproven(rows: dict[str, list[str]], before: Mapping[str, list[int]] | None = None) -> dict[str, list[int]]:
    """{area's module: which of its `check` calls can be taken out without any bug getting through}, of those of
    `before`, or of all."""
    from . import removal

    found: dict[str, list[int]] = {}
    tried = [call for call in removal.calls() if before is None or call.number in before.get(call.module, ())]
    parts = [(calls, rows) for calls in _dealt(tried, 8)]
    for call, unseen in sorted(_in_processes(removal.unproven, parts).items()):
        if unseen:
            found.setdefault(call.module, []).append(call.number)
    return found


def only_killers(rows: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """{requirement: the bugs that it alone finds}."""
    found: dict[str, list[str]] = {}
    for name, ids in rows.items():
        if len(ids) == 1:
            found.setdefault(ids[0], []).append(name)
    return {id: sorted(names) for id, names in sorted(found.items())}


def never_alone(only: Mapping[str, list[str]]) -> list[str]:
    """The requirements that are the only ones to find no bug: see `redundant`."""
    return [id for id in load() if id not in only]


def idle(rows: Mapping[str, list[str]]) -> list[str]:
    """The requirements that find no bug at all."""
    busy = {id for ids in rows.values() for id in ids}
    return [id for id in load() if id not in busy]


def committed() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for name in {**old["bugs"], **new["bugs"]}:
        was, now = (set(m["bugs"].get(name, {}).get("fails", ())) for m in (old, new))
        if was != now:
            found.append(f"{name}: now fails {sorted(now - was)}, no longer {sorted(was - now)}")
    found += [f"{key} differs" for key in ("bad", "only", "redundant", "idle", "unproven") if old[key] != new[key]]
    return found


def text(matrix: Mapping[str, Any]) -> str:
    """JSON, one bug a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(about)}" for name, about in matrix["bugs"].items()]
    rest = {key: value for key, value in matrix.items() if key != "bugs"}
    return '{"bugs": {\n' + ",\n".join(lines) + "\n},\n" + json.dumps(rest, indent=1)[1:].lstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.bugs.matrix", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write kill_matrix.json instead of comparing with it")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[bug.name for bug in ALL])
    given = parser.parse_args(arguments)
    write = given.write
    unsound = [result for result in engine.run("plain", Plain(), profile="quick") if result.outcome != "PASS"]
    for result in unsound:
        print(f"LEFT OUT, for the sound implementation does not pass it: {result.id} {result.outcome} {result.message}")
    matrix = compute(given.only)
    alive = [name for name, about in matrix["bugs"].items() if not about["fails"]]
    print(f"{len(matrix['bugs'])} bugs, {len(matrix['bugs']) - len(alive)} found by {len(load())} requirements")
    if alive:
        print(f"not found: {', '.join(alive)}")
    print(f"the only one to find a bug: {len(matrix['only'])} requirements")
    print(f"find no bug: {len(matrix['idle'])}: {', '.join(matrix['idle'])}")
    print(f"checks that can be taken out unseen: {sum(map(len, matrix['unproven'].values()))}")
    print(f"never alone, with a reason: {len(matrix['redundant'])}")
    if write:
        FILE.write_text(text(matrix), encoding="utf-8")
        return 1 if unsound else 0
    with contextlib.suppress(FileNotFoundError):
        changed = differences(committed(), matrix)
        print("\n".join(changed) or "as committed")
        return 1 if changed or unsound else 0
    print("there is no kill_matrix.json: run with --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
