"""The bounds of pyproject.toml are what the tests ran with: constraints files, and the report of `make compat`."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

COMPAT = Path(__file__).parents[1] / "compat"
RESULTS = json.loads((COMPAT / "results.json").read_text(encoding="utf-8"))


def script() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility", COMPAT / "compatibility.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compat = script()


def bounds(python: str) -> dict[str, Version]:
    """The lowest versions that pyproject.toml allows on this Python."""
    extras = compat.PROJECT["optional-dependencies"]
    found: dict[str, Version] = {}
    for line in (*compat.PROJECT["dependencies"], *extras["spec"], *extras["test"]):
        asked = Requirement(line)
        if asked.name in (*compat.needed(), *compat.TOOLS) and (
            asked.marker is None or asked.marker.evaluate({"python_version": python})
        ):
            (bound,) = asked.specifier
            assert bound.operator == ">="
            found[asked.name] = max(found.get(asked.name, Version("0")), Version(bound.version))
    return found


@pytest.mark.parametrize("python", compat.PYTHONS)
def test_the_lowest_versions_are_the_bounds(python: str) -> None:
    lowest = {name: Version(version) for name, version in compat.pins("lowest", python).items()}
    assert lowest == bounds(python) and set(lowest) == {*compat.needed(), *compat.TOOLS}


@pytest.mark.parametrize("python", compat.PYTHONS)
def test_what_is_pinned_is_between_the_lowest_and_the_highest(python: str) -> None:
    lowest, pinned, highest = (compat.pins(which, python) for which in compat.FILES)
    assert highest.keys() == lowest.keys() <= pinned.keys()
    for name in lowest:
        assert Version(lowest[name]) <= Version(pinned[name]) <= Version(highest[name]), name


def test_the_pythons_begin_with_the_oldest_that_is_allowed() -> None:
    assert compat.PROJECT["requires-python"] == f">={compat.PYTHONS[0]}"


def test_every_combination_is_reported_with_the_versions_of_its_file_and_without_failures() -> None:
    wanted = [(python, which) for python in compat.PYTHONS for which in compat.FILES]
    assert [(made["python"], made["with"]) for made in RESULTS["runs"]] == wanted
    for made in RESULTS["runs"]:
        if "not_run" in made:  # the table says so
            continue
        said = compat.pins(made["with"], made["python"])
        assert made["versions"] == {name: said[name] for name in (*compat.needed(), *compat.TOOLS)}
        assert made["failed"] == len(made["failures"]) and set(made["failures"]) == made.get("mended", {}).keys()
        assert made["passed"] > 2000 and made["skipped"] < made["passed"] / 50


def test_the_report_is_about_these_sources() -> None:
    """Some may have changed since, and are named: a run takes most of an hour."""
    if changed := compat.stale(RESULTS):
        warnings.warn(f"`make compat` has not run since these changed: {', '.join(changed)}", stacklevel=1)
    assert len(changed) <= len(RESULTS["modules"]) / 3, "run `make compat` again"


def test_the_files_that_are_tested_need_no_extra() -> None:
    picked, others = compat.selection()
    assert {"core/test_layer_types.py", "files/test_adapter_folder.py", "package/test_precision.py"} <= set(picked)
    assert "project/test_deep.py" not in picked, "it reads the report that is being made"
    assert others["peers/test_peft_files.py"] == "needs peft, transformers"
