"""Mutation testing of lora_ref: which small changes of its source do the tests not notice?

    python tests/mutation/run.py                     20 mutants of each module, and their verdicts in results.json
    python tests/mutation/run.py --module scaling --sample 100 --seed 1
    python tests/mutation/run.py --suite             the requirements of spec_tests alone: see suite_alone.py

The changes are cosmic-ray's. Once, all tests run under coverage, which says what each line is run by; then each mutant
is given to the tests that run its line, the quickest first, until one fails. Every trial is a fork of a process that
has torch and the rest imported already, in a copy of the repository. Needs `pip install -e '.[mutation]'`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from stamp import bare  # noqa: E402

RESULTS = HERE / "results.json"
CACHE = ROOT / ".mutation"  # what the tests run: ignored by git
SUITE = ["--lora-impl", "lora_ref", "--lora-profile", "quick"]
PLAIN = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--no-summary"]
# about the suite, the pages and the command rather than about lora_ref, or too slow to be of use here
SKIPPED = (
    *("book/test_book", "book/test_rosetta", "book/test_tutorials", "book/test_vietnamese", "suite/", "zoo/"),
    *("project/test_benchmarks", "project/test_fuzz", "project/test_mutation"),
    *("distributed/test_distributed", "peers/test_peft_quick_guide", "tools/test_demo"),
)
BUDGET = 25.0  # seconds of tests for one mutant, by their own time


def modules() -> list[str]:
    """The modules of lora_ref, as paths in the repository; not the demo, the figures, and those without code."""
    paths = [path for path in sorted((ROOT / "lora_ref").rglob("*.py")) if ast.parse(path.read_text("utf-8")).body[1:]]
    found = [path.relative_to(ROOT).as_posix() for path in paths]
    return [name for name in found if "/demo/" not in name and not name.endswith(("_figure.py", "progress.py"))]


def stamp(module: str) -> str:
    """Changes when the code of a module does, and not with its comments, docstrings and annotations."""
    return hashlib.sha256(bare((ROOT / module).read_text(encoding="utf-8")).encode()).hexdigest()[:16]


def mutants(module: str) -> Iterator[dict[str, Any]]:
    """Every change of a module that cosmic-ray knows: {"operator", "line", "old", "new", "source"}."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    code = (ROOT / module).read_text(encoding="utf-8")
    seen = {bare(code)}
    for name in sorted(plugins.operator_names()):
        if name.rpartition("/")[2].startswith("Variable"):  # they need the names of variables
            continue
        operator = plugins.get_operator(name)()
        count = sum(1 for node in ast_nodes(get_ast(code)) for _ in operator.mutation_positions(node))
        for occurrence in range(count):
            # an operator may fail on what it does not expect, or make what Python cannot read
            with contextlib.suppress(SyntaxError, AttributeError):
                changed = mutate_code(code, operator, occurrence)
                if changed is None or (key := bare(changed)) in seen:
                    continue
                seen.add(key)
                before, after = code.split("\n"), changed.split("\n")
                line = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
                yield {"module": module, "operator": name.removeprefix("core/"), "line": line + 1,
                       "old": before[line].strip(), "new": after[line].strip(), "source": changed}  # fmt: skip


def copied(place: Path) -> Path:
    """The tracked and the new files of the repository, elsewhere."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("tutorials/", "spec_tests/reports/")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    return place


def files(root: Path) -> list[str]:
    found = [path.relative_to(root / "tests").as_posix() for path in sorted((root / "tests").glob("*/test_*.py"))]
    tests = [f"tests/{name}" for name in found if not name.startswith(SKIPPED)]
    return [*tests, "lora_ref", "spec_tests/test_requirements.py"]


class Durations:
    """A pytest plugin: how long each test takes, if it passes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = report.duration


def trace() -> None:
    """Run all tests once, and keep what each line of lora_ref is run by, and the tests' times."""
    import pytest

    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(copied(Path(folder)))
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder
        measured = Durations()
        cover = ["--cov=lora_ref", "--cov-context=test", "--cov-report=", "-n", "2"]
        pytest.main([*PLAIN, *cover, *SUITE, *files(Path(folder))], plugins=[measured])
        (CACHE / "seconds.json").write_text(json.dumps(measured.seconds))
        shutil.copy(".coverage", CACHE / "coverage.sqlite")
        os.chdir(ROOT)


def reached(module: str) -> dict[int, set[str]]:
    """{line: the tests that run it}; line 0: those that run any line in a function."""
    from coverage.numbits import numbits_to_nums

    found: dict[int, set[str]] = {0: set()}
    with sqlite3.connect(CACHE / "coverage.sqlite") as base:
        rows = base.execute(
            "select context.context, numbits from line_bits join file on file.id = file_id "
            "join context on context.id = context_id where file.path like ?", (f"%/{module}",)
        )  # fmt: skip
        for context, bits in rows:
            test, _, when = context.partition("|")
            for line in numbits_to_nums(bits) if when == "run" else ():
                found.setdefault(line, set()).add(test)
                found[0].add(test)
    return found


def statement(source: str, line: int) -> range:
    """The lines of the innermost statement of a function that this line lies in; none outside of functions."""
    found = range(0)
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            for node in ast.walk(function):
                inside = isinstance(node, ast.stmt) and node is not function
                if inside and node.lineno <= line <= (node.end_lineno or 0):
                    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                    found = lines if not found or len(lines) <= len(found) else found
    return found


def tests_of(mutant: dict[str, Any]) -> list[str]:
    """The tests that run a mutant's statement, the quickest first, as far as the budget goes."""
    seconds = json.loads((CACHE / "seconds.json").read_text())
    lines = reached(mutant["module"])
    at = statement((ROOT / mutant["module"]).read_text(encoding="utf-8"), mutant["line"])
    names = set().union(*(lines.get(line, set()) for line in at)) if at else lines[0]
    chosen, left = [], BUDGET
    for name in sorted(names & seconds.keys(), key=lambda name: seconds[name]):
        if (left := left - seconds[name]) < 0:
            break
        chosen.append(name)
    return chosen


def outcome(place: Path, mutant: dict[str, Any], tests: list[str]) -> str:
    """ "killed", "timeout" (killed, too) or "survived"."""
    if not tests:
        return "survived"
    target = place / mutant["module"]
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant["source"], encoding="utf-8")
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(place)
        sys.path.insert(0, str(place))
        sys.dont_write_bytecode = True
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
            import pytest

            suite = SUITE if any(name.startswith("spec_tests/") for name in tests) else []
            code = pytest.main([*PLAIN, "-x", "-p", "no:xdist", "-p", "no:cov", *suite, *tests])
        os._exit(int(code))
    end = time.monotonic() + 3 * BUDGET + 30
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            time.sleep(0.05)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "timeout"
    finally:
        target.write_text(original, encoding="utf-8")


def work(part: Path) -> None:
    """Try the mutants of a file of JSON lines, and add their outcomes to another as they come."""
    for name in ("torch", "scipy.linalg", "hypothesis", "pytest", "transformers", "peft", "loralib", "matplotlib"):
        __import__(name)
    sys.modules["torch"].set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, open(part.with_suffix(".done"), "a", encoding="utf-8") as done:
        place = copied(Path(folder))
        for line in part.read_text(encoding="utf-8").splitlines():
            mutant = json.loads(line)
            tests = tests_of(mutant)
            mutant["outcome"], mutant["tests"] = outcome(place, mutant, tests), len(tests)
            del mutant["source"]
            done.write(json.dumps(mutant) + "\n")
            done.flush()


def main() -> int:
    if "--suite" in sys.argv or "--handmade" in sys.argv:
        sys.path.insert(0, str(HERE))
        import suite_alone

        return int(suite_alone.main(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", help="part of a module's name; again for more; default: all")
    parser.add_argument("--sample", type=int, default=20, help="mutants of each module (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="which (default: 0)")
    parser.add_argument("--trace", action="store_true", help="only run the tests under coverage")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work)
        return 0
    if given.trace or not (CACHE / "seconds.json").exists():
        trace()
        if given.trace:
            return 0
    chosen = [name for name in modules() if not given.module or any(part in name for part in given.module)]
    drawn = []
    for module in chosen:
        there = list(mutants(module))
        drawn += sample(there, given.sample, random.Random(f"{given.seed} {module}"))
        print(f"{module}: {len(there)} mutants", flush=True)
    random.Random(given.seed).shuffle(drawn)  # whatever the run gets to is a sample of all
    parts = [CACHE / f"part{i}.jsonl" for i in range(2)]
    for i, part in enumerate(parts):
        part.with_suffix(".done").unlink(missing_ok=True)
        part.write_text("".join(json.dumps(m) + "\n" for m in drawn[i::2]), encoding="utf-8")
    started = [subprocess.Popen([sys.executable, __file__, "--work", str(part)]) for part in parts]
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("mutants", total=len(drawn))
        while any(process.poll() is None for process in started):
            time.sleep(1)
            bar.update(task, completed=len(list(finished(parts))))
    keep(list(finished(parts)), chosen)
    return 0


def sample(there: list[dict[str, Any]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """That many, of all kinds of operators in turn: replaced binary operators alone are most of all mutants."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for mutant in rng.sample(there, len(there)):
        kinds.setdefault(mutant["operator"].partition("_")[0], []).append(mutant)
    turns = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [mutant for turn in turns for mutant in turn if mutant is not None][:count]


def finished(parts: list[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        if (done := part.with_suffix(".done")).exists():
            yield from map(json.loads, done.read_text(encoding="utf-8").splitlines())


def keep(found: list[dict[str, Any]], chosen: list[str]) -> None:
    """Put these results in the place of the modules' old ones; verdicts of survivors are kept."""
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"modules": {}, "mutants": []}
    key = ("module", "operator", "old", "new")
    verdicts = {tuple(m[k] for k in key): m["verdict"] for m in old["mutants"] if "verdict" in m}
    for mutant in found:
        if mutant["outcome"] == "survived" and (verdict := verdicts.get(tuple(mutant[k] for k in key))):
            mutant["verdict"] = verdict
    rest = [m for m in old["mutants"] if m["module"] not in chosen]
    both = sorted([*rest, *found], key=lambda m: (m["module"], m["line"], m["operator"], m["new"]))
    stamps = {**old["modules"], **{module: stamp(module) for module in chosen}}
    lines = ",\n".join(json.dumps(m, ensure_ascii=False) for m in both)
    head = json.dumps(dict(sorted(stamps.items())), indent=1)
    RESULTS.write_text(f'{{"modules": {head},\n"mutants": [\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
