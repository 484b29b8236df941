"""The Rosetta page's tables are what the libraries say: those that are here are asked again."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("jupytext") is None:
    pytest.skip("needs pip install 'lora_ref[tutorials]'", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tutorials"))
from book import rosetta, rosetta_probe  # noqa: E402

SAID = json.loads(rosetta.FILE.read_text(encoding="utf-8"))
HERE = [name for name, (_, environment) in rosetta.NAMES.items() if environment is None]
ELSEWHERE = {name: environment for name, (_, environment) in rosetta.NAMES.items() if environment}


def test_every_library_has_a_probe_and_an_answer():
    assert SAID.keys() == rosetta.NAMES.keys() == rosetta_probe.PROBES.keys()


@pytest.mark.parametrize("name", HERE)
def test_the_libraries_of_this_environment_still_say_so(name):
    assert rosetta.ask(name) == SAID[name], "python tutorials/book/rosetta.py"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_others_were_asked_in_the_versions_that_the_suite_tries(name):
    wanted = (ROOT / "spec_tests" / "environments" / f"{ELSEWHERE[name]}.txt").read_text()
    assert SAID[name]["version"] in re.findall(r"==(\S+)", wanted)


@pytest.mark.parametrize("name", SAID)
def test_shapes_scalings_and_defaults_are_of_the_layer_that_was_asked_for(name):
    said = SAID[name]
    shapes = {letter: sorted(said[letter][1]) for letter in "ABW"}
    assert shapes == {"A": [2, 5], "B": [2, 3], "W": [3, 5]}
    assert said["scale"][1] == rosetta_probe.ALPHA / rosetta_probe.R
    assert said["zero"] == "B" and said["merge"] and said["keys"]


def test_an_orientation_that_fits_neither_way_is_no_cell():
    cell = rosetta.orientation("A", (2, 5), ("r", "in"))
    assert cell({"A": ["a", [2, 5]]}) == "(r, in)" and cell({"A": ["a", [5, 2]]}) == "(in, r)"
    with pytest.raises(AssertionError):
        cell({"A": ["a", [2, 3]]})


def test_a_library_that_is_not_there_is_said_so():
    with pytest.raises(RuntimeError, match="nothing"):
        rosetta.ask("nothing")
