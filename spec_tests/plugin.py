"""The pytest plugin: `pytest --pyargs spec_tests --lora-impl package.module:Class`. Else it does nothing.

--lora-profile quick|default|deep, --lora-report FILE.json, --lora-known FILE.toml. It works under pytest-xdist.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .engine import Result

HERE = Path(__file__).parent
OPTIONS = ("--lora-profile", "--lora-report", "--lora-known")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora", "conformance of an implementation of LoRA (spec_tests)")
    group.addoption("--lora-impl", metavar="IMPL", help="package.module:Class, or a bundled one: lora_ref, peft, ...")
    group.addoption("--lora-profile", choices=("quick", "default", "deep"), help="how many examples each gets")
    group.addoption("--lora-report", metavar="FILE", type=Path, help="write a JSON report")
    group.addoption("--lora-known", metavar="FILE", type=Path, help="known deviations, a TOML file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lora-impl"):
        config.pluginmanager.register(Suite(config), "lora-suite")
    elif given := [option for option in OPTIONS if config.getoption(option)]:
        raise pytest.UsageError(f"{given[0]} says nothing without --lora-impl")


@pytest.fixture(scope="session")
def lora_suite(pytestconfig: pytest.Config) -> Suite:
    """The implementation under test."""
    suite = pytestconfig.pluginmanager.get_plugin("lora-suite")
    return suite or pytest.skip("needs --lora-impl")


class Suite:
    """What is under test, and what has been found so far."""

    def __init__(self, config: pytest.Config) -> None:
        from . import smoke
        from .contract import check_claims
        from .engine import find, known_deviations
        from .registry import load

        self.config = config
        self.profile: str = config.getoption("--lora-profile") or "default"
        self.results: list[Result] = []
        self.covered: set[tuple[str, str]] = set()
        self.requirements = load()
        known: Path | None = config.getoption("--lora-known")
        try:
            self.name, self.implementation = find(config.getoption("--lora-impl"))
            if known is not None and not known.exists():
                raise ValueError(f"--lora-known: there is no file {known}")
            listed = self.name if known is None else str(known.resolve().with_suffix(""))
            self.known = known_deviations(listed, self.requirements, self.implementation.version())
            check_claims(self.implementation)
            smoke.check(self.implementation)
        except (ValueError, TypeError, ImportError) as error:
            raise pytest.UsageError(str(error)) from None

    def examine(self, id: str, node: pytest.Item) -> None:
        """Try one requirement; its outcome becomes the test's."""
        from .engine import examine, with_known
        from .report import Watched

        watched = Watched(self.implementation)
        result = examine(self.name, watched, self.requirements[id], self.profile)
        result = with_known(result, self.known.get(id), self.profile)
        # properties of a test are what pytest-xdist brings back from its workers
        node.user_properties += [("lora_result", dataclasses.asdict(result)), ("lora_covered", sorted(watched.covered))]
        judge(result)

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Of this package only the requirements are tests: --doctest-modules must not import every adapter class."""
        if HERE in collection_path.parents and collection_path.suffix == ".py":
            return collection_path.name not in ("test_requirements.py", "__init__.py") or None
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from .engine import Result

        found: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and "lora_result" in found:
            self.results.append(Result(**found["lora_result"]))
            self.covered |= {(option, value) for option, value in found["lora_covered"]}

    def pytest_sessionfinish(self) -> None:
        path: Path | None = self.config.getoption("--lora-report")
        if path is not None and self.results and not hasattr(self.config, "workerinput"):
            from . import report

            report.write(path, [self.report()])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.results:
            about = self.report()
            name, version = about["implementation"]["name"], about["implementation"]["version"]
            terminalreporter.write_sep("-", f"{name} {version}".strip())
            terminalreporter.write_line(about["footer"]["headline"])
            for claim, why in about["footer"]["untried"].items():
                terminalreporter.write_line(f"{claim}: nothing tried, {why}")

    def report(self) -> dict[str, Any]:
        from . import report

        return report.make(self.implementation, self.results, self.profile, None, self.covered)


def judge(result: Result) -> None:
    """The outcome of a requirement as that of a test."""
    if result.outcome == "UNSUPPORTED":
        pytest.skip(result.message)
    if result.outcome == "KNOWN":
        pytest.xfail(result.reason)
    if result.outcome != "PASS":
        pytest.fail(
            f"{result.outcome} {result.id}: {result.sentence}\n{result.message}\n\n{result.repro}", pytrace=False
        )
