"""Other libraries, each in an environment of its own: `python -m spec_tests.peers [NAME ...]` (`make peers`).

Makes an environment for each from `environments/NAME.txt`, runs the suite there in a process of its own, and writes
`reports/NAME.json`. Libraries that this environment has are run in it. Then CONFORMANCE.md is written anew.
`python -m spec_tests.peers --releases [VERSION ...]` tries older releases of PEFT, each installed alone into a folder
before the environment's own, and writes `reports/releases/peft-VERSION.json`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import command, lives, markdown, page, report

HERE = Path(__file__).parent
ROOT = HERE.parent
PLACE = ROOT / ".peers"
HEAVY = sorted(path.stem for path in (HERE / "environments").glob("*.txt"))
RELEASES = (  # 0.16 and 0.17 do not run: they import from transformers what is gone from it
    *("0.3.0", "0.4.0", "0.5.0", "0.6.2", "0.7.1", "0.8.2", "0.9.0", "0.10.0", "0.11.1", "0.12.0"),
    *("0.13.2", "0.14.0", "0.15.2", "0.18.1", "0.19.0", "0.20.0"),
)
LIGHT = ("lora_ref", "lora_ref_numpy", "peft", "loralib", "parametrized", "transformers", "javascript")


def python_of(name: str) -> Path:
    """The Python of a library's environment, which is made if it is not there."""
    place, wanted = PLACE / name, HERE / "environments" / f"{name}.txt"
    python = place / "bin" / "python"
    done = place / "installed.txt"
    if not done.exists() or done.read_text() != wanted.read_text():
        print(f"==> {name}: making {place.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if torch := [line for line in wanted.read_text().splitlines() if line.startswith("torch==")]:
            subprocess.run([*pip, *torch], check=True)
        subprocess.run([*pip, "-r", str(wanted)], check=True)
        done.write_text(wanted.read_text())
    return python


def releases(versions: Sequence[str]) -> int:
    """The reports on older releases of PEFT, and the pages that show them."""
    for version in versions or RELEASES:
        place = PLACE / f"peft-{version}"
        if not (place / "peft").exists():
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
            subprocess.run([*pip, "--no-deps", "--target", str(place), f"peft=={version}"], check=True)
        print(f"==> peft {version}", flush=True)
        inside("peft", Path(sys.executable), HERE / "reports" / "releases" / f"peft-{version}.json", str(place))
    return write()


def inside(name: str, python: Path, where: Path, *folders: str) -> None:
    """Run one implementation in a process of its own, with these folders before all others."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, str(ROOT)])}
    line = [str(python), "-W", "ignore", "-m", "spec_tests.peers", "--inside", name, str(where)]
    subprocess.run(line, check=True, env=environment, cwd=ROOT)


def main(names: Sequence[str]) -> int:
    if names[:1] == ["--inside"]:  # in the library's environment; failures are what the report is for
        command.check(command.Options([names[1]], report=Path(names[2])))
        return 0
    if names[:1] == ["--releases"]:
        return releases(names[1:])
    if unknown := [name for name in names if name not in (*HEAVY, *LIGHT)]:
        print(f"{unknown[0]}: there are {', '.join((*LIGHT, *HEAVY))}", file=sys.stderr)
        return 2
    for name in names or (*LIGHT, *HEAVY):
        if name == "javascript" and shutil.which("node") is None:
            print("==> javascript: there is no Node.js here, so its report stays as it is", flush=True)
            continue
        python = python_of(name) if name in HEAVY else Path(sys.executable)
        print(f"==> {name}", flush=True)
        inside(name, python, HERE / "reports" / f"{name}.json")
    return write()


def write() -> int:
    """CONFORMANCE.md and the matrix as a page, from the reports that there are."""
    reports = [made for path in sorted((HERE / "reports").glob("*.json")) for made in report.read(path)]
    (ROOT / "CONFORMANCE.md").write_text(markdown.page(reports), encoding="utf-8")
    followed = [made for made in reports if made["implementation"]["name"] == markdown.FOLLOWED]
    releases = [*lives.older(), *followed]
    (HERE / "reports" / "matrix.html").write_text(page.page(reports, releases), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
