"""Every known deviation has a script that shows it with the library alone."""

from __future__ import annotations

import runpy
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import spec_tests

KNOWN = Path(spec_tests.__file__).parent / "known"
LISTS = sorted(KNOWN.glob("*.toml"))


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_deviation_has_a_reason_and_a_script(path: Path) -> None:
    causes = tomllib.loads(path.read_text())["cause"]
    for cause in causes:
        assert cause["ids"] == sorted(set(cause["ids"])) and cause["says"] and all(map(str.strip, cause["says"])), cause
    assert {id for cause in causes for id in cause["ids"]} <= spec_tests.load().keys()
    assert len({(cause["reason"], cause["script"]) for cause in causes}) == len(causes)
    named = {cause["script"] for cause in causes}
    assert named == {f"{path.stem}/{script.name}" for script in (KNOWN / path.stem).glob("*.py")}


HERE = ("peft", "transformers", "loralib")  # what this environment has


@pytest.mark.parametrize(
    "script",
    [script for name in HERE for script in sorted((KNOWN / name).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
@pytest.mark.filterwarnings("ignore")
def test_the_script_shows_it(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = script.read_text()
    assert "lora_ref" not in text and "spec_tests" not in text
    name = script.parent.name
    about = tomllib.loads((KNOWN / f"{name}.toml").read_text())["version"]
    if about != f"{name} {version(name)}":
        pytest.skip(f"the list is about {about}")
    runpy.run_path(str(script))
    assert capsys.readouterr().out
