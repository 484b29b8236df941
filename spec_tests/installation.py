"""`install(globals(), MyAdapter)`: the whole suite as tests of an adopter's own repository."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .contract import Implementation
from .engine import examine, known_deviations, with_known
from .registry import Requirement, load


def install(
    namespace: dict[str, Any], implementation: type[Implementation], profile: str = "default", known: str = ""
) -> None:
    """Put a test function for every requirement into a module's namespace, named after its id.

    `known`: a name in `spec_tests/known`, or the path of a TOML file (without .toml) of known deviations.
    """
    import pytest

    requirements = load()
    made = implementation()
    listed = known_deviations(known, requirements, made.version()) if known else {}
    name = f"{implementation.__module__}:{implementation.__qualname__}"

    def test_of(requirement: Requirement) -> Callable[[], None]:
        def test() -> None:
            result = with_known(examine(name, made, requirement, profile), listed.get(requirement.id), profile)
            if result.outcome == "UNSUPPORTED":
                pytest.skip(result.message)
            if result.outcome == "KNOWN":
                pytest.xfail(result.reason)
            if result.outcome != "PASS":
                pytest.fail(f"{result.id}: {result.sentence}\n{result.message}\n\n{result.repro}", pytrace=False)

        test.__doc__ = requirement.sentence
        return test

    for requirement in requirements.values():
        namespace[f"test_{requirement.id.replace('-', '_')}"] = test_of(requirement)
