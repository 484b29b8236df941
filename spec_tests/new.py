"""The mechanical steps of adding a requirement.

    python -m spec_tests.new SCALE "s of a layer is finite." --needs "alpha" --source "LoRA, section 4.1: s = alpha / r"

It gives the next free id, writes a body at the end of the area's file (or a new file) and a fault in
bugs/faults_<area>.py, and prints the steps that are left. Both fail until they are written. Wrong input changes
nothing.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .causes import DECISION
from .contract import CLAIMS

HERE = Path(__file__).parent
WORDS = 25  # of a sentence, at most

AREA = '''"""{title}."""

from __future__ import annotations

from typing import Any

from ..check import Check
from ..contract import Implementation
from ..generate import {cases}
from ..registry import requirement
'''

BODY = """

@requirement(
    "{id}",
    {sentence},
    {source},
    "{needs}",
    lambda i: {cases}(i),
)
def {name}(implementation: Implementation, spec: Any, check: Check) -> None:
    check.that(False, "{id} is not written yet: implementation.{made}(spec) makes what it looks at")
"""

FAULTS = '''"""Faults that the requirements of areas/{area}.py find."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = ()
'''

FAULT = '    Bug("{name}_is_broken", "{id}: a line of plain.py", "what it becomes"),\n'


class Refused(ValueError):
    """What was given makes no requirement; nothing was written."""


def add(
    prefix: str, sentence: str, needs: str, source: str, area: str = "", root: Path = HERE
) -> tuple[str, list[Path]]:
    """The new id, and the two files that were written.

    Raises:
        Refused: the message says what is wrong with what was given.
    """
    if not re.fullmatch(r"[A-Z][A-Z0-9_]*", prefix):
        raise Refused(f"{prefix!r}: a prefix has capital letters, such as SCALE")
    claims = _checked(sentence, needs, source)
    files = {path: path.read_text(encoding="utf-8") for path in sorted((root / "areas").glob("*.py"))}
    for path, text in files.items():
        if sentence in text:
            raise Refused(f"{path.name} has this sentence already: {sentence!r}")
    target = _file_of(prefix, area, files, root)
    id = f"{prefix}-{_next(prefix, root):03d}"
    name = id.lower().replace("-", "_")
    cases, made = ("models", "model") if "model" in claims else ("layers", "layer")
    shown = {"id": id, "name": name, "cases": cases, "made": made, "needs": " ".join(claims)}
    shown |= {"sentence": _quoted(sentence), "source": _quoted(source)}
    body = files.get(target, AREA.format(title=f"Requirements {prefix}", cases=cases))
    bugs = root / "bugs" / f"faults_{target.stem}.py"
    faults = bugs.read_text(encoding="utf-8") if bugs.exists() else FAULTS.format(area=target.stem)
    body = _with_imports(body, cases) + BODY.format(**shown)
    faults = _with_fault(faults, FAULT.format(**shown), bugs.name)
    for text in (body, faults):
        ast.parse(text)
    target.write_text(body, encoding="utf-8")
    bugs.write_text(faults, encoding="utf-8")
    return id, [target, bugs]


def _checked(sentence: str, needs: str, source: str) -> list[str]:
    """The claims, where the three texts are such as a requirement has."""
    for what, text in (("sentence", sentence), ("source", source)):
        if not text.isprintable() or text != text.strip():
            raise Refused(f"the {what} must be one line without blanks around it")
    if not re.fullmatch(r"\S.*\S\.", sentence) or len(sentence.split()) > WORDS:
        raise Refused(f"the sentence must end in a full stop and have at most {WORDS} words: {sentence!r}")
    claims = list(dict.fromkeys(needs.split()))
    if not claims:
        raise Refused("--needs names no claim: see the table of claims in spec_tests/README.md")
    if unknown := [claim for claim in claims if claim not in CLAIMS]:
        raise Refused(f"--needs: there is no claim {', '.join(unknown)}; there are {', '.join(CLAIMS)}")
    if source.startswith(DECISION):
        if not any(claim.startswith("decision:") for claim in claims):
            raise Refused(f"a source that begins with {DECISION!r} needs a claim decision:<name> of its own")
    elif not re.search(r"\S: \S", source):
        raise Refused(f"--source names a document and, after a colon, what it says; {DECISION!r} where none says it")
    return claims


def _file_of(prefix: str, area: str, files: Iterable[Path], root: Path) -> Path:
    """The file of the prefix, or the new one."""
    holding = [path for path in files if re.search(rf'"{prefix}-\d+"', path.read_text(encoding="utf-8"))]
    if area:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", area):
            raise Refused(f"--area {area!r}: the name of a file in areas/, without .py, in small letters")
        target = root / "areas" / f"{area}.py"
        if holding and target not in holding:
            raise Refused(f"--area {area}: the requirements {prefix} are in {', '.join(p.name for p in holding)}")
        return target
    if len(holding) > 1:
        raise Refused(f"{prefix} is in {', '.join(p.name for p in holding)}: say --area")
    target = holding[0] if holding else root / "areas" / f"{prefix.lower()}.py"
    if not holding and target.exists():
        raise Refused(f"{target.name} exists and has no requirement {prefix}: say --area {target.stem}, or another")
    return target


def _next(prefix: str, root: Path) -> int:
    """One more than any number that the prefix was ever given in the suite's files."""
    numbers = [0]
    for folder in ("areas", "bugs", "known", "reports"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".toml", ".json"):
                found = re.findall(rf"\b{prefix}-(\d{{3,}})\b", path.read_text(encoding="utf-8"))
                numbers += map(int, found)
    return max(numbers) + 1


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _with_imports(text: str, cases: str) -> str:
    """The source with an import of each name that the body uses and the source does not have."""
    tree = ast.parse(text)
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    there = {alias.asname or alias.name for node in imports for alias in node.names}
    there |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    homes = {"Any": "typing", "Check": "..check", "Implementation": "..contract", cases: "..generate"}
    homes["requirement"] = "..registry"
    missing = [f"from {home} import {name}" for name, home in homes.items() if name not in there]
    lines = text.rstrip("\n").split("\n")
    at = max((node.end_lineno or 0 for node in imports), default=0)
    return "\n".join([*lines[:at], *missing, *lines[at:]]) + "\n"


def _with_fault(text: str, fault: str, name: str) -> str:
    """The source with one more entry in the tuple MUTANTS."""
    for node in ast.parse(text).body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if node.target.id == "MUTANTS" and isinstance(node.value, ast.Tuple):
            lines = text.split("\n")
            last = (node.value.end_lineno or 0) - 1
            before = lines[last][: (node.value.end_col_offset or 0) - 1]
            begun = (
                before
                if before.strip() == ""
                else before.rstrip().removesuffix(",") + ("" if not node.value.elts else ",")
            )
            middle = [begun] if begun.strip() else []
            return "\n".join([*lines[:last], *middle, fault.rstrip("\n"), ")", *lines[last + 1 :]])
    raise Refused(f"bugs/{name} has no tuple MUTANTS: (Bug, ...) that an entry could be added to")


STEPS = """{id}: 1. the id, 2. the skeleton in {area} and 3. that of its fault in {bugs} are there. What is left:
4. Write the body of {name} in {area}, and make its cases: spec_tests/generate.py.
5. Let spec_tests/reference/plain.py and the adapter classes keep it: lora-ref check plain lora_ref --only {id}
6. Make the fault real: `old` stands in plain.py once; name it after what it does. Check that each `check` is needed.
7. python -m spec_tests.bugs.matrix --write, make peers, make readme, and ruff format."""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m spec_tests.new", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("prefix", help="of the id: SCALE")
    parser.add_argument("sentence", help="what must hold, ending in a full stop")
    parser.add_argument("--needs", required=True, help="every claim that the body uses, separated by blanks")
    parser.add_argument("--source", required=True, help="a document and, after a colon, what it says")
    parser.add_argument("--area", default="", help="the file in areas/, where the prefix is new or in several")
    given = parser.parse_args(arguments)
    try:
        id, (area, bugs) = add(given.prefix, given.sentence, given.needs, given.source, given.area)
    except Refused as why:
        print(f"spec_tests.new: error: {why}", file=sys.stderr)
        return 2
    name = id.lower().replace("-", "_")
    print(STEPS.format(id=id, name=name, area=area.relative_to(HERE), bugs=bugs.relative_to(HERE)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
