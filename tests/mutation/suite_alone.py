"""The suite alone: which changes of lora_ref's source do the requirements not notice?

    python tests/mutation/run.py --suite                                   all of core, init, api and files
    python tests/mutation/run.py --suite --modules core/layer --sample 20  a part
    python tests/mutation/run.py --handmade                        the changes of handmade.py

Once, each requirement is run on lora_ref, and the lines that it runs are kept. A mutant is then given to the
requirements that run its line, the quickest first, at the quick profile and, if it survives, at the default one; the
first that fails ends it. No test of tests/ is run. The results are in suite.json. A survivor needs a verdict there, by
hand.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import run

ROOMS = ("lora_ref/core/", "lora_ref/init/", "lora_ref/api/", "lora_ref/files/")
RESULTS = run.HERE / "suite.json"
TRACE = run.CACHE / "suite_trace.json"  # kept from run to run
REACHED = run.CACHE / "suite_reached.json"  # of this run
COLUMN = "lora_ref"
QUICK, DEFAULT = 25.0, 25.0  # seconds of requirements for one mutant in each profile, by their own time
TIMES = 4  # how much longer a requirement takes at the default profile
KEY = ("module", "old", "new", "occurrence")


def modules() -> list[str]:
    """The modules of the four rooms that have code."""
    return [name for name in run.modules() if name.startswith(ROOMS)]


# -- which requirement runs which line -------------------------------------------------------------


def lines_of(action: Callable[[], object], within: str) -> dict[str, list[int]]:
    """{file: the lines that the action runs} of the files below a folder; the paths are relative to its parent."""
    import coverage

    measured = coverage.Coverage(data_file=None, include=[f"{within}/*"], config_file=False)
    measured.start()
    try:
        action()
    finally:
        measured.stop()
    data = measured.get_data()
    start = len(str(Path(within).parent)) + 1
    return {file[start:]: sorted(data.lines(file) or ()) for file in data.measured_files()}


def traced(id: str) -> tuple[str, float, dict[str, list[int]]]:
    """One requirement on a few examples: its seconds at the quick profile, about, and the lines that it runs."""
    from spec_tests import engine
    from spec_tests.registry import load

    sys.modules["torch"].set_num_threads(1)
    requirement, (name, implementation) = load()[id], engine.find(COLUMN)
    engine.PROFILES["trace"] = 5
    results: list[engine.Result] = []
    begun = time.process_time()
    lines = lines_of(
        lambda: results.append(engine.examine(name, implementation, requirement, "trace", shrink=False)),
        f"{run.ROOT}/lora_ref",
    )
    examples = max(engine.PROFILES["quick"] // requirement.slow, 5)
    seconds = round((time.process_time() - begun) * examples / 5, 3)
    return id, seconds, lines if results[0].outcome == "PASS" else {}


def trace(only: Sequence[str] = ()) -> dict[str, Any]:
    """{"seconds": {id: s}, "lines": {module: {line: [ids]}}} of the requirements.

    What each runs is kept: only requirements of an area whose file has changed run again, or all if lora_ref has.
    """
    for name in ("torch", "safetensors.torch", "scipy.linalg"):
        __import__(name)  # once, before the forks
    from spec_tests.engine import find
    from spec_tests.registry import load

    find(COLUMN)
    shared = source_stamp()
    kept = json.loads(TRACE.read_text(encoding="utf-8")) if TRACE.exists() else {}
    known = kept.get("requirements", {}) if kept.get("source") == shared else {}
    wanted = {
        id: run.hashlib.sha256(Path(sys.modules[requirement.body.__module__].__file__ or "").read_bytes()).hexdigest()
        for id, requirement in load().items()
        if not only or requirement.area in only
    }
    if not wanted:
        raise SystemExit(f"--only {' '.join(only)}: no requirement is of these areas")
    missing = [id for id, stamp in wanted.items() if known.get(id, {}).get("stamp") != stamp]
    if missing:
        print(f"tracing {len(missing)} requirements", flush=True)
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
            for done, (id, seconds, files) in enumerate(pool.map(traced, missing)):
                if done % 50 == 0:
                    print(f"  {done}", flush=True)
                known[id] = {"stamp": wanted[id], "seconds": seconds, "files": files}
        run.CACHE.mkdir(exist_ok=True)
        TRACE.write_text(json.dumps({"source": shared, "requirements": known}), encoding="utf-8")
    found: dict[str, Any] = {"seconds": {}, "lines": {}}
    for id in wanted:
        found["seconds"][id] = known[id]["seconds"]
        for file, numbers in known[id]["files"].items():
            for number in numbers:
                found["lines"].setdefault(file, {}).setdefault(str(number), []).append(id)
    REACHED.write_text(json.dumps(found), encoding="utf-8")
    return found


def source_stamp() -> str:
    """Changes when a line of lora_ref does, or of its class in spec_tests."""
    paths = [*sorted((run.ROOT / "lora_ref").rglob("*.py")), *sorted((run.ROOT / "spec_tests/adapters").glob("*.py"))]
    return run.hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def reaching(found: dict[str, Any], mutant: dict[str, Any]) -> list[str]:
    """The requirements that run the mutant's statement, the quickest first.

    Of a line that runs when the module is imported: those that run any line of the module.
    """
    lines = found["lines"].get(mutant["module"], {})
    at = run.statement((run.ROOT / mutant["module"]).read_text(encoding="utf-8"), mutant["line"])
    numbers: Iterable[str] = [str(line) for line in at] if at else lines
    ids = {id for number in numbers for id in lines.get(number, ())}
    return sorted(ids, key=lambda id: (found["seconds"][id], id))


def within_budget(ids: Sequence[str], seconds: dict[str, float], budget: float) -> list[str]:
    chosen = []
    for id in ids:
        if (budget := budget - seconds[id]) < 0:
            break
        chosen.append(id)
    return chosen


# -- one mutant ------------------------------------------------------------------------------------


def judge(plan: Sequence[tuple[str, Sequence[str]]], answer: Path) -> None:
    """In a fork: run the requirements until one fails, and write which."""
    by = "import"
    try:
        from spec_tests import smoke
        from spec_tests.engine import examine, find
        from spec_tests.registry import load

        name, implementation = find(COLUMN)
        by = "smoke"
        smoke.check(implementation)
        requirements = load()
        for profile, ids in plan:
            for id in ids:
                by = id
                outcome = examine(name, implementation, requirements[id], profile, shrink=False).outcome
                if outcome not in ("PASS", "UNSUPPORTED"):
                    answer.write_text(json.dumps({"outcome": "killed", "by": id, "profile": profile}))
                    return
        answer.write_text(json.dumps({"outcome": "survived"}))
    except BaseException as error:  # a mutant may raise anything, SystemExit too
        answer.write_text(json.dumps({"outcome": "killed", "by": by, "profile": type(error).__name__}))


Plan = Sequence[tuple[str, Sequence[str]]]  # (profile, the requirements)


def outcome(place: Path, mutant: dict[str, Any], plan: Plan, limit: float) -> dict[str, str]:
    """{"outcome": "killed", "timeout" or "survived", "by": the requirement, "profile"}."""
    if not any(ids for _, ids in plan):
        return {"outcome": "survived"}
    target, answer = place / mutant["module"], place / "answer.json"
    original = target.read_text(encoding="utf-8")
    answer.unlink(missing_ok=True)
    target.write_text(mutant["source"], encoding="utf-8")
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        judge(plan, answer)
        os._exit(0)
    end = time.monotonic() + limit
    try:
        while time.monotonic() < end:
            if os.waitpid(child, os.WNOHANG)[0]:
                if answer.exists():
                    return dict(json.loads(answer.read_text()))
                return {"outcome": "killed", "by": "crash"}
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return {"outcome": "timeout"}
    finally:
        target.write_text(original, encoding="utf-8")


def work(part: Path) -> None:
    """Try the mutants of a file of JSON lines, and add their outcomes to another as they come."""
    found = json.loads(REACHED.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, open(part.with_suffix(".done"), "a", encoding="utf-8") as done:
        place = run.copied(Path(folder))
        sys.path[:] = [str(place), *(path for path in sys.path if Path(path or ".").resolve() != run.ROOT)]
        os.chdir(place)
        sys.dont_write_bytecode = True
        for name in ("torch", "scipy.linalg", "hypothesis", "safetensors.torch", "jaxtyping"):
            __import__(name)
        from spec_tests import registry

        registry.load()
        already = [name for name in sys.modules if name.partition(".")[0] == "lora_ref"]
        assert not already, f"{already[0]} is imported before it is mutated"
        sys.modules["torch"].set_num_threads(1)
        for line in part.read_text(encoding="utf-8").splitlines():
            mutant = json.loads(line)
            ids = reaching(found, mutant)
            budgets = (("quick", QUICK), ("default", DEFAULT / TIMES))
            plan = [(profile, within_budget(ids, found["seconds"], budget)) for profile, budget in budgets]
            limit = 60 + 4 * (QUICK + DEFAULT)
            mutant |= outcome(place, mutant, plan, limit)
            mutant["reached_by"] = len(ids)
            del mutant["source"]
            done.write(json.dumps(mutant) + "\n")
            done.flush()


# -- all of them -----------------------------------------------------------------------------------


def handmade() -> list[dict[str, Any]]:
    """The changes of handmade.py as mutants."""
    from handmade import HANDMADE

    found = []
    for change in HANDMADE:
        code = (run.ROOT / change.file).read_text(encoding="utf-8")
        if code.count(change.old) != 1:
            raise ValueError(f"{change.file}: {change.old!r} stands there {code.count(change.old)} times, not once")
        line = (code[: code.index(change.old)] + change.old.rstrip()).count("\n") + 1
        found.append({"module": change.file, "operator": "handmade", "line": line, "old": change.old,
                      "new": change.new, "shows": change.shows,
                      "source": code.replace(change.old, change.new)})  # fmt: skip
    return found


def numbered(mutants: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the number of each among those of the same module, old and new text: a key that a change elsewhere keeps."""
    counts: dict[tuple[str, ...], int] = {}
    found = []
    for mutant in mutants:
        key = tuple(mutant[name] for name in KEY[:3])
        found.append({**mutant, "occurrence": counts.setdefault(key, 0)})
        counts[key] += 1
    return found


def keep(
    found: list[dict[str, Any]], chosen: Sequence[str], kind: str, path: Path = RESULTS, again: bool = False
) -> None:
    """Put results in the place of the old ones of these modules and kind ("made" or "hand"); verdicts are kept.

    again: results of the same mutants only.
    """
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"mutants": []}
    verdicts = {tuple(m[k] for k in KEY): m["verdict"] for m in old["mutants"] if m.get("verdict")}
    for mutant in found:
        mutant["kind"] = kind
        if mutant["outcome"] == "survived":
            mutant["verdict"] = verdicts.get(tuple(mutant[k] for k in KEY), "")
    tried = {tuple(m[k] for k in KEY) for m in found}
    rest = [
        m
        for m in old["mutants"]
        if m["kind"] != kind or m["module"] not in chosen or (again and tuple(m[k] for k in KEY) not in tried)
    ]
    both = sorted([*rest, *found], key=lambda m: (m["module"], m["kind"], m["line"], m["new"], m["occurrence"]))
    lines = ",\n".join(json.dumps(m, ensure_ascii=False) for m in both)
    head = json.dumps(counts(both), indent=1)
    path.write_text(f'{{"modules": {head},\n"mutants": [\n{lines}\n]}}\n', encoding="utf-8")


def counts(mutants: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """{module: {"mutants", "survived", "without verdict"}}."""
    found: dict[str, dict[str, int]] = {}
    for mutant in mutants:
        row = found.setdefault(mutant["module"], {"mutants": 0, "survived": 0, "without verdict": 0})
        row["mutants"] += 1
        row["survived"] += mutant["outcome"] == "survived"
        row["without verdict"] += mutant["outcome"] == "survived" and not mutant["verdict"]
    return found


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", action="store_true", help="this, and not the tests of tests/")
    parser.add_argument("--handmade", action="store_true", help="the changes of handmade.py, in place of cosmic-ray's")
    parser.add_argument("--modules", nargs="+", default=[], help="parts of the modules' names; default: all")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each module; default: all")
    parser.add_argument("--seed", type=int, default=0, help="which (default: 0)")
    parser.add_argument("--only", nargs="+", default=[], help="areas of requirements, as LORAGA; default: all")
    parser.add_argument("--again", action="store_true", help="only those that survived the last time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to (default: suite.json)")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(run.ROOT))
    if given.part:
        work(given.part)
        return 0
    known = sorted({mutant["module"] for mutant in handmade()}) if given.handmade else modules()
    chosen = [name for name in known if not given.modules or any(part in name for part in given.modules)]
    if not chosen:
        parser.error(f"--modules {' '.join(given.modules)}: no module of {', '.join(ROOMS)} is called so")
    trace(given.only)
    if given.handmade:
        drawn = [mutant for mutant in numbered(handmade()) if mutant["module"] in chosen]
        if given.sample:
            drawn = random.Random(given.seed).sample(drawn, min(given.sample, len(drawn)))
    else:
        drawn = []
        for module in chosen:
            there = numbered(run.mutants(module))
            drawn += run.sample(there, given.sample or len(there), random.Random(f"{given.seed} {module}"))
    if given.again:
        last = json.loads(given.out.read_text(encoding="utf-8"))["mutants"]
        survivors = {tuple(m[k] for k in KEY) for m in last if m["outcome"] == "survived"}
        drawn = [mutant for mutant in drawn if tuple(mutant[k] for k in KEY) in survivors]
    random.Random(given.seed).shuffle(drawn)
    parts = [run.CACHE / f"suite{i}.jsonl" for i in range(2)]
    for i, part in enumerate(parts):
        part.with_suffix(".done").unlink(missing_ok=True)
        part.write_text("".join(json.dumps(m) + "\n" for m in drawn[i::2]), encoding="utf-8")
    command = [sys.executable, str(run.HERE / "run.py"), "--suite", "--part"]
    started = [subprocess.Popen([*command, str(part)]) for part in parts]
    failed = [process for process in started if process.wait()]
    results = list(run.finished(parts))
    keep(results, chosen, "hand" if given.handmade else "made", given.out, given.again)
    for mutant in results:
        if mutant["outcome"] == "survived":
            print(f"survived: {mutant['module']}:{mutant['line']} {mutant['old']} -> {mutant['new']}")
    survived = sum(mutant["outcome"] == "survived" for mutant in results)
    print(f"{len(results)} mutants, {survived} survived")
    return int(bool(failed) or len(results) != len(drawn))
