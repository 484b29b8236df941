"""What proves depth rather than function, and takes longer than `make test` may: `python tests/deep/groups.py`.

    python tests/deep/groups.py                   all groups, and results.json
    python tests/deep/groups.py --only matrix     one group; the others keep their rows in results.json
    python tests/deep/groups.py --check           leave results.json as it is

Each group is a command that ends in a count. Its row in results.json carries a stamp of the sources that it is about.
`make test` fails where a stamp is old or a group has failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from stamp import stamp  # noqa: E402

RESULTS = HERE / "results.json"
PYTEST = ("-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "--tb=short")


@dataclass(frozen=True)
class Group:
    """A command, what it shows, and the files and folders whose change makes its result old; none for `make test`."""

    what: str
    command: tuple[str, ...]
    sources: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)
    writes: str = ""  # the report that it renews itself, with `--write`

    def stamp(self, with_report: bool = True) -> str:
        return stamp((*self.sources, *[self.writes] * bool(self.writes and with_report)), without=BESIDE_THE_SUITE)


#: These read the reports, which are written afterwards.
ABOUT_REPORTS = (
    *(f"--ignore=tests/project/test_{name}.py" for name in ("deep", "mutation", "compatibility")),
    "--deselect=tests/book/test_readme.py::test_generated_tables_are_up_to_date[tests/README.md]",
)
SUITE = ("lora_ref", "spec_tests")
#: The tests compare numbers by the first; the suite takes nothing from it but the unit roundoffs. The others show what
#: the suite has found, or help to write a requirement: no result depends on them.
SHOWN_BY = ("causes", "clauses", "command", "coverage", "lives", "markdown", "new", "peers")
BESIDE_THE_SUITE = (
    "spec_tests/rounding.py",
    *(f"spec_tests/{name}.py" for name in SHOWN_BY),
    *sorted((ROOT / "spec_tests" / "page").glob("*.py")),
)
MATRIX = "spec_tests/bugs/kill_matrix.json"
LONG = (
    "02_scaling",
    "10_fine_tune",
    "11_claims",
    "12_test_your_lora",
    "15_trainer",
    "16_past_one_device",
)  # as tutorials/book/pages.py has it
STRICTNESS = ("tests/suite/test_spec_strictness.py", "tests/suite/test_spec_needs.py")
PYTHON = "{}.{}".format(*sys.version_info)
GROUPS = {
    "tests": Group("the tests of every function, as `make test` runs them", (*PYTEST, *ABOUT_REPORTS), ()),
    "matrix": Group(
        "the kill matrix: every seeded fault against requirements that reach it, until enough have found it",
        ("-m", "spec_tests.bugs.matrix"),
        ("spec_tests",),
        writes=MATRIX,
    ),
    "strictness": Group(
        "the suite against its seeded faults, harmless variants, missing checks and missing claims",
        (*PYTEST, "-m", "deep", *STRICTNESS),
        ("spec_tests", MATRIX, *STRICTNESS),
    ),
    "suite": Group(
        "all requirements with their full number of examples, on torch and on NumPy alone",
        (*PYTEST, "tests/suite/test_spec.py"),
        (*SUITE, "tests/suite/test_spec.py"),
        {"LORA_REF_PROFILE": "default"},
    ),
    "machine": Group(
        "the state machine: 1,000 random sequences of operations against its model in NumPy",
        (*PYTEST, "tests/package/test_state_machine.py"),
        ("lora_ref", "tests/package/test_state_machine.py"),
        {"LORA_REF_SEQUENCES": "1000"},
    ),
    "pages": Group(
        "the pages of the book that train models or try a suite, executed from scratch",
        (*PYTEST, "-m", "deep", "tests/book/test_tutorials.py"),
        (*SUITE, "tutorials/book", *(f"tutorials/{name}.md" for name in LONG)),
    ),
    "fuzz": Group(
        "a minute of fuzzing for each reader of adapter folders",
        (*PYTEST, "tests/project/test_fuzz.py"),
        ("lora_ref", "tests/fuzz/fuzzing.py", "tests/project/test_fuzz.py"),
        {"LORA_REF_FUZZ": "60"},
    ),
    "compat": Group(
        "the tests with the oldest and the newest versions of what lora_ref needs, on this Python",
        ("tests/compat/compatibility.py", "--jobs", "2", "--with", "lowest", "highest", "--python", PYTHON),
        (*SUITE, "constraints-lowest.txt", "constraints-highest.txt", "pyproject.toml"),
    ),
}


def result_of(name: str, check: bool = False) -> dict[str, Any]:
    """Run a group: {"passed", "failed", "minutes", "sources"}; its output goes to the terminal as it comes.

    The groups "compat" and "matrix" also write their own reports, unless `check`.
    """
    group = GROUPS[name]
    began, said, sources = time.monotonic(), "", group.stamp(with_report=False)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LORA_REF_", "HYPOTHESIS_"))}
    process = subprocess.Popen(
        [
            *(sys.executable, *group.command),
            *["--check"] * (check and name == "compat"),
            *["--write"] * (not check and bool(group.writes)),
        ],
        cwd=ROOT,
        env={**clean, **group.variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        said += line
    code = process.wait()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|bugs)\b", said)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    passed = counts.get("passed", counts.get("bugs", 0))
    if sources == group.stamp(with_report=False):  # with the report that it has written
        sources = group.stamp()
    return {
        "passed": passed,
        "failed": failed or int(code != 0 or not passed),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "sources": sources,  # of before the run: what is edited in the meantime has not been tried
    }


def stale(results: dict[str, Any]) -> list[str]:
    """The groups that have no result, or one about other sources than today's."""
    return [name for name, group in GROUPS.items() if results.get(name, {}).get("sources") != group.stamp()]


def table(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = ["| group | what it shows | passed | failed | minutes |", "| --- | --- | ---: | ---: | ---: |"]
    for name, made in results.items():
        rows.append(f"| {name} | {GROUPS[name].what} | {made['passed']} | {made['failed']} | {made['minutes']:g} |")
    return "\n".join(rows)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="only these groups")
    options.add_argument("--check", action="store_true", help="leave results.json as it is")
    given = options.parse_args()
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    made = {}
    for name in given.only:
        print(f"==> {name}: {GROUPS[name].what}", flush=True)
        made[name] = result_of(name, given.check)
        if not given.check:
            kept = {**old, **made}
            rows = {key: kept[key] for key in GROUPS if key in kept}
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(made))
    passed, failed = (sum(row[key] for row in made.values()) for key in ("passed", "failed"))
    if not given.check:
        print("make readme renews the table of tests/README.md")
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
