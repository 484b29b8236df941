"""The tests with the oldest, the pinned and the newest of what lora_ref needs: `python tests/compat/compatibility.py`.

For each Python of pyproject.toml's classifiers that is here, and each constraints file: an environment in .compat/ with
the wheel, without extras, and pytest, hypothesis and beartype beside it; there, the tests that need nothing else, and
the requirements of spec_tests, which the wheel brings along.
Deprecation warnings from lora_ref's lines are errors, as pyproject.toml has it. results.json says what came of it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))

from stamp import bare  # noqa: E402

PLACE = ROOT / ".compat"
RESULTS = HERE / "results.json"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
FILES = {"lowest": "constraints-lowest.txt", "pinned": "constraints.txt", "highest": "constraints-highest.txt"}
LIST = "import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"
TOOLS = ("pytest", "hypothesis", "beartype")
SUITE = "spec_tests.test_requirements"
# about the pages, the reports and the suite rather than about lora_ref, or run by something that is not installed
ABOUT_OTHERS = (
    *("book/", "project/", "suite/"),
    *("distributed/test_distributed", "tools/test_demo"),
)


def needed() -> list[str]:
    """The names of lora_ref's own dependencies."""
    return list(dict.fromkeys(Requirement(line).name for line in PROJECT["dependencies"]))


def pins(which: str, python: str) -> dict[str, str]:
    """What a constraints file says on this Python, such as "3.12"."""
    lines = (ROOT / FILES[which]).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    return {f.name: str(f.specifier)[2:] for f in found if f.marker is None or f.marker.evaluate(here)}


def stamps() -> dict[str, str]:
    """Of each module of lora_ref; they change with its code, not with its comments and docstrings."""
    paths = sorted((ROOT / "lora_ref").rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): code_of(p) for p in paths}


def code_of(path: Path) -> str:
    return hashlib.sha256(bare(path.read_text(encoding="utf-8")).encode()).hexdigest()[:16]


def stale(results: dict[str, Any]) -> list[str]:
    """The modules that have changed since."""
    now = stamps()
    return sorted(name for name in now.keys() | results["modules"] if now.get(name) != results["modules"].get(name))


def selection() -> tuple[list[str], dict[str, str]]:
    """The test files that need lora_ref's dependencies and the tools only; and the others, with the reason."""
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    allowed = {*sys.stdlib_module_names, *needed(), *TOOLS, *own, "lora_ref", "spec_tests"}
    picked, others = [], {}
    for path in sorted((ROOT / "tests").glob("*/test_*.py")):
        name, imported = path.relative_to(ROOT / "tests").as_posix(), set()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # within a test: pytest.importorskip
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
        if name.startswith(ABOUT_OTHERS):
            others[name] = "is not about lora_ref alone"
        elif imported - allowed:
            others[name] = f"needs {', '.join(sorted(imported - allowed))}"
        else:
            picked.append(name)
    return picked, others


def interpreter(python: str) -> Path | None:
    """Where this Python is: on the PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for place in (shutil.which(f"python{python}"), *sorted(pyenv.glob(f"{python}.*/bin/python"))):
        says = "import sys; print('%d.%d' % sys.version_info[:2])"
        if place and subprocess.run([place, "-c", says], capture_output=True, text=True).stdout.strip() == python:
            return Path(place)
    return None


def run(line: list[str | Path], **options: Any) -> str:
    """A command that must succeed: its output. What it said is in the exception, if it does not."""
    done = subprocess.run([str(word) for word in line], text=True, stdout=-1, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise OSError(f"{Path(line[0]).name} {line[1]} {line[2]}: {done.stdout.strip()[-2000:]}")
    return done.stdout


def wheel() -> Path:
    """The wheel, built anew."""
    shutil.rmtree(PLACE / "wheel", ignore_errors=True)
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", PLACE / "wheel", ROOT])
    (built,) = (PLACE / "wheel").glob("*.whl")
    return built


def installed(python: Path, which: str, built: Path, place: Path) -> dict[str, str]:
    """Make the environment: what is in it, by name."""
    shutil.rmtree(place, ignore_errors=True)
    run([python, "-m", "venv", place])
    inside = place / "bin" / "python"
    pip = [inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    run([*pip, "--only-binary", ":all:", "-c", ROOT / FILES[which], built, *TOOLS])
    found = dict(json.loads(run([inside, "-c", LIST])))
    extras = PROJECT["optional-dependencies"]
    if unwanted := found.keys() & {Requirement(line).name for line in (*extras["demo"], *extras["peers"])}:
        raise OSError(f"the environment is not without extras: {', '.join(sorted(unwanted))}")
    return found


def tested(place: Path, files: list[str]) -> dict[str, Any]:
    """Run the tests in an environment: how many passed, and the names of those that did not."""
    # PYTHONSAFEPATH: lora_ref is the installed one, not the folder in the current directory
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "HYPOTHESIS_PROFILE": "quick", "PYTHONPATH": ""}
    says = run([place / "bin" / "python", "-c", "import lora_ref; print(lora_ref.__file__)"], cwd=ROOT, env=environment)
    if not Path(says.strip()).is_relative_to(place):
        raise OSError(f"lora_ref is not that of the wheel, but {says.strip()}")
    report = place / "report.xml"
    line = [place / "bin" / "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    line += ["-c", "pyproject.toml", "--pyargs", SUITE, "--lora-impl", "lora_ref", "--lora-profile", "quick"]
    with (PLACE / f"{place.name}.log").open("w") as log:
        subprocess.run([*line, *(f"tests/{name}" for name in files)], cwd=ROOT, env=environment, stdout=log, stderr=log)
    if not report.exists():
        raise OSError(f"pytest has not ended: .compat/{place.name}.log")
    cases = list(ET.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skipped),
        "skipped": len(skipped),
        "failed": len(bad),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "skips": sorted({str(case.get("message")) for case in skipped if case is not None}),
    }


def one(python: str, which: str, built: Path, files: list[str], keep: bool, say: Any) -> dict[str, Any]:
    """One line of the report."""
    made: dict[str, Any] = {"python": python, "with": which}
    where = interpreter(python)
    if where is None:
        return {**made, "not_run": f"there is no Python {python} here"}
    place = PLACE / f"{python}-{which}"
    try:
        say(f"Python {python}, {which}: installing")
        found = installed(where, which, built, place)
        versions = {name: found[name].partition("+")[0] for name in (*needed(), *TOOLS)}
        say(f"Python {python}, {which}: testing, torch {versions['torch']}, numpy {versions['numpy']}")
        return {**made, "versions": versions, **tested(place, files)}
    except OSError as error:
        print(error, file=sys.stderr)
        return {**made, "not_run": str(error).splitlines()[0].replace(str(ROOT), ".")[:200]}
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def table(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    shown = ("torch", "numpy", "scipy")
    lines = [
        f"| Python | versions | {' | '.join(shown)} | passed | skipped | failed |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for made in results["runs"]:
        cells = [made["python"], f"[{made['with']}]({FILES[made['with']]})"]
        if "not_run" in made:
            cells += ["not run: " + made["not_run"], "", "", "", "", ""]
        else:
            cells += [made["versions"][name] for name in shown]
            cells += [str(made[name]) for name in ("passed", "skipped", "failed")]
        lines.append(f"| {' | '.join(cells)} |")
    for made in results["runs"]:  # written by hand, once a failure was understood; the next run leaves it out
        for test, why in made.get("mended", {}).items():
            test = test.partition("::")[2]
            lines += ["", f"The failure on {made['python']}, {made['with']}: `{test}`; {why}. Mended, not run again."]
    return "\n".join(lines)


def main() -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--python", nargs="+", choices=PYTHONS, default=PYTHONS, help="only these")
    options.add_argument("--with", nargs="+", choices=FILES, default=list(FILES), dest="which", help="only these")
    options.add_argument("--jobs", type=int, default=1, help="so many at once (default 1: a core and 2 GB each)")
    options.add_argument("--check", action="store_true", help="leave results.json as it is")
    options.add_argument("--keep", action="store_true", help="keep the environments (gigabytes each)")
    given = options.parse_args()

    files, others = selection()
    console = Console(stderr=True)
    console.print(f"{len(files)} files of tests run, {len(others)} are left out; logs are in .compat/")
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    now = stamps()
    runs = {(made["python"], made["with"]): made for made in old.get("runs", []) if old["modules"] == now}
    wanted = [(python, which) for python in given.python for which in given.which]
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("building the wheel", total=len(wanted))

        def say(text: str) -> None:
            progress.update(bar, description=text)
            if not console.is_terminal:
                console.print(text)

        built = wheel()
        with ThreadPoolExecutor(given.jobs) as pool:
            for made in pool.map(lambda asked: one(*asked, built, files, given.keep, say), wanted):
                runs[made["python"], made["with"]] = made
                progress.advance(bar)
                left = {"not_run": "not asked for"}
                each = [runs.get((p, w), {"python": p, "with": w, **left}) for p in PYTHONS for w in FILES]
                results = {"modules": now, "files": [SUITE, *files], "left_out": others, "runs": each}
                if not given.check:
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    for made in (runs[asked] for asked in wanted):
        for test in made.get("failures", []):
            print(f"failed, see .compat/{made['python']}-{made['with']}.log: {test}")
    total = {key: sum(runs[asked].get(key, 0) for asked in wanted) for key in ("passed", "failed", "skipped")}
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(any(runs[asked].get("failed") or "not_run" in runs[asked] for asked in wanted))


if __name__ == "__main__":
    sys.exit(main())
