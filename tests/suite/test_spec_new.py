"""The command that does the mechanical steps of adding a requirement, in a copy of the suite."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spec_tests import new
from spec_tests.causes import DECISION

SENTENCE = 'A layer says "yes" \\ once.'
SOURCE = "LoRA, arXiv 2106.09685, section 4.1: the branch is scaled (S1)"
GOOD = {"prefix": "SCALE", "sentence": SENTENCE, "needs": "alpha write", "source": SOURCE}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The suite, copied."""
    shutil.copytree(
        new.HERE, tmp_path / "spec_tests", ignore=shutil.ignore_patterns("__pycache__", "reports", "vectors")
    )
    return tmp_path / "spec_tests"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*.py"))}


def within(root: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, cwd=root.parent)


def highest(root: Path, prefix: str) -> int:
    texts = [path.read_text() for path in (root / "areas").glob("*.py")]
    return max(int(number) for text in texts for number in re.findall(rf'"{prefix}-(\d+)"', text))


def test_a_requirement_of_an_area_gets_the_next_id_and_fails_until_it_is_written(root: Path) -> None:
    before = highest(root, "SCALE")
    id, (area, bugs) = new.add(**GOOD, root=root)
    assert int(id.removeprefix("SCALE-")) > before == highest(root, "SCALE") - int(id[6:]) + before
    assert area.name == "scaling.py" and bugs.name == "faults_scaling.py"
    ran = within(
        root,
        "from spec_tests.registry import load\nfrom spec_tests.engine import find, examine\n"
        "from spec_tests.bugs import seeded\n"
        f"made = load()[{id!r}]; print(made.sentence == {SENTENCE!r}, made.source == {SOURCE!r}, sorted(made.needs))\n"
        "result = examine('plain', find('plain')[1], made, 'quick'); print(result.outcome, result.message)\n"
        f"print([bug.old for bug in seeded.MUTANTS if bug.old.startswith({id!r})])\n",
    )
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "True True ['alpha', 'write']"
    assert lines[1].startswith(f"FAIL {id} is not written yet")
    assert lines[2] == f"['{id}: a line of plain.py']"


def test_a_second_requirement_comes_after_the_first_in_both_files(root: Path) -> None:
    first, _ = new.add(**GOOD, root=root)
    second, (area, bugs) = new.add(**{**GOOD, "sentence": "A layer says it twice."}, root=root)
    assert int(second[6:]) == int(first[6:]) + 1
    for path in (area, bugs):
        text = path.read_text()
        assert text.index(first) < text.index(second)


def test_a_new_area_is_a_file_of_its_own_and_one_of_models_draws_models(root: Path) -> None:
    id, (area, bugs) = new.add("SAMPLE", SENTENCE, "model write", SOURCE, root=root)
    assert id == "SAMPLE-001" and area.name == "sample.py" and "lambda i: models(i)" in area.read_text()
    ran = within(
        root,
        "from spec_tests.registry import load; from spec_tests.bugs import seeded; print(load()['SAMPLE-001'].area)",
    )
    assert ran.stdout == "SAMPLE\n", ran.stderr
    assert "sample_001_is_broken" in bugs.read_text()


def test_every_list_of_faults_takes_one_more(root: Path) -> None:
    for path in sorted((root / "bugs").glob("faults_*.py")):
        text = path.read_text()
        names: dict[str, object] = {"__name__": "spec_tests.bugs.some", "__package__": "spec_tests.bugs"}
        exec(compile(new._with_fault(text, '    Bug("one_more", "a", "b"),\n', path.name), path.name, "exec"), names)
        assert names["MUTANTS"][-1].name == "one_more", path.name  # type: ignore[index]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"prefix": "scale"}, "capital letters"),
        ({"prefix": "SCALE-001"}, "capital letters"),
        ({"sentence": "It has no end"}, "full stop"),
        ({"sentence": "word " * 30 + "end."}, "at most 25 words"),
        ({"sentence": "Two\nlines."}, "one line"),
        ({"sentence": "s = lora_alpha / r."}, "has this sentence already"),
        ({"needs": " "}, "names no claim"),
        ({"needs": "write flying"}, "there is no claim flying"),
        ({"source": "S1"}, "names a document"),
        ({"source": f"{DECISION}: so"}, "needs a claim decision:"),
        ({"area": "../x"}, "name of a file"),
        ({"area": "forward"}, "are in scaling.py"),
        ({"prefix": "MERGING"}, "exists and has no requirement MERGING"),
    ],
)
def test_wrong_input_is_refused_and_changes_nothing(root: Path, changed: dict[str, str], said: str) -> None:
    before = contents(root)
    with pytest.raises(new.Refused, match=re.escape(said)):
        new.add(**{**GOOD, **changed}, root=root)
    assert contents(root) == before


def test_the_command_prints_the_steps_that_are_left_or_what_is_wrong(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(new, "HERE", root)
    monkeypatch.setattr(new.add, "__defaults__", ("", root))
    assert new.main(["SCALE", SENTENCE, "--needs", "alpha", "--source", SOURCE]) == 0
    said = capsys.readouterr().out
    assert all(f"{step}. " in said for step in range(1, 8)) and "areas/scaling.py" in said
    assert new.main(["SCALE", "No end", "--needs", "alpha", "--source", SOURCE]) == 2
    assert "full stop" in capsys.readouterr().err
