"""The tool that tries the suite alone on changed sources of lora_ref, and the changes that are made by hand."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MUTATION = ROOT / "tests" / "mutation"


@pytest.fixture(scope="module")
def tool() -> Any:
    """The modules run, handmade and suite_alone, which lie in no package."""
    made: dict[str, ModuleType] = {}
    for name in ("run", "handmade", "suite_alone"):
        spec = importlib.util.spec_from_file_location(name, MUTATION / f"{name}.py")
        assert spec is not None and spec.loader is not None
        made[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(made[name])
    yield made["suite_alone"]
    for name in made:
        del sys.modules[name]


def test_each_change_made_by_hand_stands_in_its_file_once_and_can_be_read(tool: Any) -> None:
    changes = sys.modules["handmade"].HANDMADE
    assert len(changes) >= 70 and len({change[:3] for change in changes}) == len(changes)
    for change in changes:
        code = (ROOT / change.file).read_text(encoding="utf-8")
        assert code.count(change.old) == 1, f"{change.file}: {change.old!r}"
        assert ast.dump(ast.parse(code.replace(change.old, change.new))) != ast.dump(ast.parse(code)), change
        assert len(change.shows.split()) >= 3, change
    assert len(tool.handmade()) == len(changes)


def test_the_lines_that_an_action_runs_are_those_of_the_folder(tool: Any, tmp_path: Path) -> None:
    pytest.importorskip("coverage")
    code = "def f(x):\n    if x:\n        return 1\n    return 2\n"
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(code)
    spaces: list[dict[str, Any]] = [{}, {}]
    for space, folder in zip(spaces, ("here", "there"), strict=True):
        exec(compile(code, str(tmp_path / folder / "m.py"), "exec"), space)
    found = tool.lines_of(lambda: (spaces[0]["f"](0), spaces[1]["f"](1)), str(tmp_path / "here"))
    assert found == {"here/m.py": [2, 4]}


def test_a_mutant_is_given_to_what_runs_its_line_the_quickest_first(tool: Any) -> None:
    module = "lora_ref/core/scaling.py"
    lines = (ROOT / module).read_text(encoding="utf-8").split("\n")
    line = next(i for i, text in enumerate(lines, 1) if text.startswith("    return lora_alpha / "))
    found = {"seconds": {"A-001": 2.0, "A-002": 1.0, "A-003": 0.5},
             "lines": {module: {str(line): ["A-001", "A-002"], str(line - 1): ["A-003"]}}}  # fmt: skip
    assert tool.reaching(found, {"module": module, "line": line}) == ["A-002", "A-001"]
    assert tool.reaching(found, {"module": module, "line": 3}) == ["A-003", "A-002", "A-001"]  # run by the import
    assert tool.reaching(found, {"module": "lora_ref/core/config.py", "line": 3}) == []
    assert tool.within_budget(["A-002", "A-001"], found["seconds"], 2.5) == ["A-002"]


def test_results_take_the_place_of_the_old_and_a_verdict_stays_with_its_mutant(tool: Any, tmp_path: Path) -> None:
    def mutant(new: str, outcome: str) -> dict[str, Any]:
        return {"module": "m.py", "old": "a", "new": new, "occurrence": 0, "line": 1, "outcome": outcome}

    path = tmp_path / "suite.json"
    tool.keep([mutant("b", "survived"), mutant("c", "killed")], ["m.py"], "made", path)
    written = json.loads(path.read_text())
    assert written["modules"] == {"m.py": {"mutants": 2, "survived": 1, "without verdict": 1}}
    assert [m.get("verdict") for m in written["mutants"]] == ["", None]
    path.write_text(path.read_text().replace('"verdict": ""', '"verdict": "equivalent: the same"'))
    tool.keep([mutant("b", "survived"), mutant("d", "survived")], ["m.py"], "made", path)
    again = {m["new"]: m["verdict"] for m in json.loads(path.read_text())["mutants"]}
    assert again == {"b": "equivalent: the same", "d": ""}
    tool.keep([mutant("b", "killed")], ["m.py"], "hand", path)  # the others' results stay
    assert json.loads(path.read_text())["modules"]["m.py"]["mutants"] == 3


def test_equal_changes_of_a_module_are_told_apart(tool: Any) -> None:
    made = tool.numbered([{"module": "m", "old": "a", "new": "b"}] * 2 + [{"module": "m", "old": "a", "new": "c"}])
    assert [mutant["occurrence"] for mutant in made] == [0, 1, 0]


JUDGES = """
import sys
sys.path[:0] = [{root!r}, {mutation!r}]
import torch
from pathlib import Path
import run, suite_alone
from spec_tests import registry
registry.load()
place, module = Path({place!r}), "lora_ref/core/scaling.py"
run.copied(place)
sys.path.insert(0, str(place))
source = (place / module).read_text()
half = "return lora_alpha / ("
for old, new in (("lora_ref", "lora_ref"), (half, half.replace("lora", "2 * lora")), ("import sys", "import")):
    mutant = {{"module": module, "source": source.replace(old, new)}}
    print(suite_alone.outcome(place, mutant, [("quick", ["SCALE-001"])], 100.0))
print((place / module).read_text() == source)
"""


def test_a_change_is_killed_by_the_requirement_that_it_breaks_and_taken_back(tmp_path: Path) -> None:
    code = JUDGES.format(root=str(ROOT), mutation=str(MUTATION), place=str(tmp_path))
    ran = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.splitlines() == [
        "{'outcome': 'survived'}",
        "{'outcome': 'killed', 'by': 'SCALE-001', 'profile': 'quick'}",
        "{'outcome': 'killed', 'by': 'import', 'profile': 'SyntaxError'}",
        "True",
    ], ran.stderr
