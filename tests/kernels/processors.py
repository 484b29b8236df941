"""The tests that compare numbers, and the pages, as other processors would run them.

    python tests/kernels/processors.py                             these tests, then the pages; writes results.json
    python tests/kernels/processors.py --only haswell --numeric    one setting, and no pages

A setting chooses the kernels of torch (ATen), of MKL and of NumPy's OpenBLAS, and a number of threads. Another kernel
sums in another order, so every sum is rounded differently. Not every variable has an effect on every processor: MKL
obeys MKL_ENABLE_INSTRUCTIONS on Intel's alone. So the report says which products came out with other bits here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from stamp import stamp  # noqa: E402

LOGS = ROOT / ".kernels"
RESULTS = HERE / "results.json"
SOURCES = ("lora_ref", "spec_tests", "tests")
PYTEST = ("-m", "pytest", "-q", "-n", "2", "--dist", "worksteal", "--tb=short", "-p", "no:cacheprovider")

#: An old Intel processor, one of Intel or AMD with AVX2, and MKL's most portable code with two threads.
SETTINGS = {
    "sse4": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OPENBLAS_CORETYPE": "Nehalem",
        "OMP_NUM_THREADS": "1",
    },
    "haswell": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "MKL_CBWR": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "OMP_NUM_THREADS": "1",
    },
    "compatible": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
        "OMP_NUM_THREADS": "2",
    },
}

#: Tests that are about files, texts, pages, processes, and the suite's own machinery, rather than about numbers.
NOT_NUMERIC = (
    *("book/", "project/", "suite/test_spec_"),
    *("core/test_config", "core/test_names", "files/test_hostile_folders", "safe/test_atomic"),
    *("tools/test_cli", "tools/test_demo"),
)

#: These read the reports, which are written afterwards.
ABOUT_REPORTS = (
    *(f"--ignore=tests/project/test_{name}.py" for name in ("deep", "mutation", "compatibility")),
    "--deselect=tests/book/test_readme.py::test_generated_tables_are_up_to_date[tests/README.md]",
)

#: Products, sums and decompositions of the same numbers, by library: their bits tell the kernels apart.
FINGERPRINT = """
import hashlib, json, numpy, os, torch
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
x = torch.randn(1200, 700, generator=torch.Generator().manual_seed(0))
found = {
    "torch's sums": [x.sum(), x.sum(1), x.softmax(1)],
    "torch's products": [x @ x.T, x.flatten() @ x.flatten(), x.double() @ x.double().T, torch.linalg.svdvals(x[:99])],
    "NumPy's products": [x.numpy() @ x.numpy().T, numpy.linalg.svd(x.numpy()[:99], compute_uv=False)],
}
bits = {name: hashlib.sha256(b"".join(bytes(memoryview(numpy.asarray(a)).cast("B")) for a in arrays)).hexdigest()[:16]
        for name, arrays in found.items()}
print(json.dumps(bits))
"""


def environment(name: str) -> dict[str, str]:
    """This process's environment with the variables of a setting, and nothing left of another one."""
    known = {variable for setting in SETTINGS.values() for variable in setting} | {"MKL_NUM_THREADS"}
    known |= {name for name in os.environ if name.startswith(("LORA_REF_", "HYPOTHESIS_"))}
    threads = SETTINGS.get(name, {}).get("OMP_NUM_THREADS", "1")
    rest = {key: value for key, value in os.environ.items() if key not in known}
    return {**rest, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, **SETTINGS.get(name, {})}


def fingerprint(name: str) -> dict[str, str]:
    """{kind of result: its bits} under a setting."""
    line = [sys.executable, "-c", FINGERPRINT]
    done = subprocess.run(line, env=environment(name), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


SHORT_PAGES = "tests/book/test_tutorials.py"  # the pages that `make test` executes


def numeric() -> list[str]:
    """The files of the tests that compare computed numbers."""
    found = [path.relative_to(ROOT / "tests").as_posix() for path in sorted((ROOT / "tests").glob("*/test_*.py"))]
    return [f"tests/{name}" for name in found if not name.startswith(NOT_NUMERIC)]


def counted(report: Path) -> dict[str, Any]:
    """What a JUnit report says: how many passed, were skipped and failed, and the names of the last."""
    cases = list(ET.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [case.find("skipped") for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(bad) - len(skips),
        "skipped": len(skips),
        "failed": len(bad),
        "failures": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "reasons": sorted({str(skip.get("message")) for skip in skips if skip is not None}),
    }


def tests(name: str, files: list[str], further: list[str]) -> dict[str, Any]:
    """Run pytest under a setting; its output goes to the terminal as it comes."""
    report = LOGS / f"{name}.xml"
    report.unlink(missing_ok=True)  # that of another run would be taken for this one's
    line = [sys.executable, *PYTEST, f"--junitxml={report}", *ABOUT_REPORTS, *files, *further]
    code = subprocess.run(line, cwd=ROOT, env=environment(name)).returncode
    if code not in (0, 1) or not report.exists():  # 1: a test has failed
        raise OSError(f"pytest ended with {code} and has tried nothing: see above")
    found = counted(report)
    return {**found, "failed": max(found["failed"], code)}


def pages(name: str) -> bool:
    """Execute the pages that the tests do not execute, and compare what they print and plot with what is committed."""
    sys.path.insert(0, str(ROOT / "tutorials"))
    from book.pages import LONG

    line = [sys.executable, "tutorials/book/run.py", *LONG]
    return subprocess.run(line, cwd=ROOT, env=environment(name)).returncode == 0


def table(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    rows = ["| setting | variables | other bits in | passed | skipped | failed | long pages |"]
    rows.append("| --- | --- | --- | ---: | ---: | ---: | --- |")
    for name, made in results["settings"].items():
        variables = ", ".join(f"`{key}={value}`" for key, value in SETTINGS[name].items())
        counts = [str(made[key]) for key in ("passed", "skipped", "failed")]
        said = {True: "all pass", False: "some fail", None: "not run"}[made["pages"]]
        rows.append(f"| {' | '.join([name, variables, ', '.join(made['bits']) or 'nothing', *counts, said])} |")
    return "\n".join(rows)


def joined(before: dict[str, Any], sources: str, made: dict[str, Any]) -> dict[str, Any]:
    """A report of what was made now, and of the other settings if they were tried on the same sources."""
    settings = (before["settings"] if before.get("sources") == sources else {}) | made
    return {"sources": sources, "settings": {name: settings[name] for name in SETTINGS if name in settings}}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="only these settings")
    options.add_argument("--numeric", action="store_true", help="no pages")
    options.add_argument("--check", action="store_true", help="leave results.json as it is")
    given, further = options.parse_known_args()

    LOGS.mkdir(exist_ok=True)
    plain, made, sources = fingerprint(""), {}, stamp(SOURCES)  # what is edited during the run has not been tried
    for name in given.only:
        bits = [kind for kind, now in fingerprint(name).items() if now != plain[kind]]
        variables = " ".join(f"{key}={value}" for key, value in SETTINGS[name].items())
        print(f"==> {name}: {variables}", flush=True)
        print(f"    other bits than without it in: {', '.join(bits) or 'nothing'}", flush=True)
        began = time.monotonic()
        found = tests(name, [*numeric(), *[SHORT_PAGES] * (not given.numeric)], further)
        found["pages"] = None if given.numeric else pages(name)
        made[name] = {"bits": bits, **found, "minutes": round((time.monotonic() - began) / 60, 1)}
    before = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results = joined(before, sources, made)
    if not (given.check or given.numeric or further):
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    failed = [f"{name}: {test}" for name, each in made.items() for test in each["failures"]]
    print("\n".join(failed))
    if not given.check:
        print("make readme renews the table of tests/README.md")
    total = {key: sum(each[key] for each in made.values()) for key in ("passed", "failed", "skipped")}
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return int(bool(failed) or any(each["pages"] is False for each in made.values()))


if __name__ == "__main__":
    sys.exit(main())
