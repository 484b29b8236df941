"""Every requirement as a test: `pytest --pyargs spec_tests --lora-impl package.module:Class`."""

from __future__ import annotations

import pytest

from spec_tests.plugin import Suite
from spec_tests.registry import load


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Nothing to test without an implementation: then one skipped test, not one for each requirement."""
    metafunc.parametrize("id", load() if metafunc.config.getoption("lora_impl", None) else [])


def test_requirement(id: str, lora_suite: Suite, request: pytest.FixtureRequest) -> None:
    lora_suite.examine(id, request.node)
