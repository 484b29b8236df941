"""The committed results of mutation testing: about the present sources, and no survivor without a verdict."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "mutation"
RESULTS = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
SURVIVORS = [mutant for mutant in RESULTS["mutants"] if mutant["outcome"] == "survived"]
VERDICTS = ("equivalent", "wording", "tested since", "open")


def runner():
    spec = importlib.util.spec_from_file_location("mutation_run", HERE / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_results_are_about_the_sources_as_they_are():
    """Of a third of the modules they may be older: a run takes most of an hour."""
    run = runner()
    stale = [name for name in run.modules() if RESULTS["modules"].get(name) != run.stamp(name)]
    assert len(stale) <= len(run.modules()) / 3, f"run tests/mutation/run.py again for {', '.join(stale)}"


def test_every_survivor_has_a_verdict_with_its_reason():
    for mutant in SURVIVORS:
        kind, colon, reason = mutant.get("verdict", "").partition(": ")
        where = f"{mutant['module']}:{mutant['line']} {mutant['old']} -> {mutant['new']}"
        assert kind in VERDICTS and colon and len(reason) > 10, f"no verdict: {where}"


def test_at_least_95_of_100_are_killed_or_change_nothing():
    assert len(RESULTS["mutants"]) >= 400
    seen = Counter(m.get("verdict", m["outcome"]).partition(":")[0] for m in RESULTS["mutants"])
    assert (seen["killed"] + seen["timeout"] + seen["equivalent"] + seen["wording"] + seen["tested since"]) >= (
        0.95 * len(RESULTS["mutants"])
    )


def test_every_module_is_tried():
    tried = {mutant["module"] for mutant in RESULTS["mutants"]}
    run = runner()
    # of names and of a table no mutant is made
    assert set(run.modules()) - tried <= {"lora_ref/numerics/__init__.py", "lora_ref/api/default_targets.py"}


@pytest.mark.parametrize(
    ("source", "changed", "same"),
    [
        ("def f(a: int) -> int:\n    'one'\n    return a", "def f(a):\n    'two'\n    return a  # a", True),
        ("def f(a):\n    return a", "def f(a):\n    return -a", False),
        ("x: int = 1", "x: float = 1", True),
        ("x = 1", "x = 2", False),
    ],
)
def test_comments_docstrings_and_annotations_are_no_change(source, changed, same):
    bare = runner().bare
    assert (bare(source) == bare(changed)) == same
