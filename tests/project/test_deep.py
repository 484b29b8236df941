"""The committed reports of what `make test` does not run are about today's sources, and nothing in them has failed."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stamp

TESTS = Path(__file__).parents[1]


def runner(folder: str, name: str = "*") -> ModuleType:
    (path,) = (TESTS / folder).glob(f"{name}.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def results(folder: str) -> dict[str, Any]:
    return dict(json.loads((TESTS / folder / "results.json").read_text(encoding="utf-8")))


def test_every_group_of_the_deep_tests_has_run_on_these_sources_and_passed() -> None:
    deep, made = runner("deep"), results("deep")
    assert deep.stale(made) == [], "make test-all ARGS='--only' with these names renews their rows"
    assert made.keys() == deep.GROUPS.keys()
    assert [name for name, row in made.items() if row["failed"] or not row["passed"]] == []


def test_a_group_is_stale_once_its_sources_change(monkeypatch: pytest.MonkeyPatch) -> None:
    deep, made = runner("deep"), results("deep")
    now = deep.stale(made)
    monkeypatch.setattr(deep, "stamp", lambda paths, without: "another")
    assert deep.stale(made) == list(deep.GROUPS) and now != deep.stale(made)
    assert deep.stale({}) == list(deep.GROUPS)


def test_the_pages_that_take_long_are_executed_by_a_group() -> None:
    text = (TESTS.parent / "tutorials" / "book" / "pages.py").read_text(encoding="utf-8")
    (long,) = re.findall(r"^LONG = (.*)$", text, re.MULTILINE)
    deep = runner("deep")
    assert ast.literal_eval(long) == deep.LONG
    assert {f"tutorials/{name}.md" for name in deep.LONG} <= set(deep.GROUPS["pages"].sources)


def test_the_tests_have_run_with_every_kind_of_kernel() -> None:
    kernels, made = runner("kernels"), results("kernels")
    assert made["sources"] == stamp.stamp(kernels.SOURCES), "make kernels"
    assert made["settings"].keys() == kernels.SETTINGS.keys()
    for name, row in made["settings"].items():
        assert row["failures"] == [] and row["passed"] > 4000 and row["pages"], name
        assert row["bits"], f"{name} chose no other kernel: its run proves nothing"


def test_the_model_classes_were_tried_on_these_sources() -> None:
    assert results("zoo")["sources"] == runner("zoo", "outcomes").sources(), "make zoo"


def test_a_part_of_the_kernels_joins_what_was_tried_on_the_same_sources_alone() -> None:
    kernels = runner("kernels")
    before = {"sources": "a", "settings": {"sse4": {"passed": 1}, "compatible": {"passed": 2}}}
    again = {"sse4": {"passed": 3}}
    assert kernels.joined(before, "a", again)["settings"] == {"sse4": {"passed": 3}, "compatible": {"passed": 2}}
    for other in ({}, before | {"sources": "b"}):
        assert kernels.joined(other, "a", again) == {"sources": "a", "settings": again}


def test_the_settings_choose_other_kernels_of_each_library() -> None:
    """Each of these is named by some setting; a setting that is left out of SETTINGS would be missed by nobody else."""
    named = {f"{key}={value}" for setting in runner("kernels").SETTINGS.values() for key, value in setting.items()}
    assert named >= {
        *("ATEN_CPU_CAPABILITY=default", "ATEN_CPU_CAPABILITY=avx2", "MKL_CBWR=COMPATIBLE"),
        *("MKL_ENABLE_INSTRUCTIONS=SSE4_2", "MKL_ENABLE_INSTRUCTIONS=AVX2", "OMP_NUM_THREADS=1", "OMP_NUM_THREADS=2"),
    }
    assert sum(name.startswith("OPENBLAS_CORETYPE=") for name in named) == 3


def test_a_setting_leaves_nothing_of_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = runner("kernels")
    monkeypatch.setenv("MKL_CBWR", "AVX")
    assert "MKL_CBWR" not in kernels.environment("sse4")
    assert kernels.environment("compatible")["MKL_CBWR"] == "COMPATIBLE"
    assert kernels.environment("compatible")["OPENBLAS_NUM_THREADS"] == "2"


def test_the_numeric_tests_are_files_that_exist() -> None:
    kernels = runner("kernels")
    files = kernels.numeric()
    assert {
        "tests/core/test_layer_types.py",
        "tests/package/test_precision.py",
        "tests/package/test_numbers.py",
    } <= set(files)
    there = {path.relative_to(TESTS).as_posix() for path in TESTS.glob("*/test_*.py")}
    for prefix in kernels.NOT_NUMERIC:
        assert any(name.startswith(prefix) for name in there), f"no test file begins with {prefix}"


def test_a_stamp_changes_with_the_code_and_not_with_its_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text('"""Text."""\nx = 1  # one\n')
    first = stamp.stamp(["a.py"])
    (tmp_path / "a.py").write_text('"""Other text."""\nx = 1\n')
    assert stamp.stamp(["a.py"]) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    assert stamp.stamp(["a.py"]) != first
