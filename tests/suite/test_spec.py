"""lora_ref keeps every requirement of the suite, and the committed reports are about the suite as it is.

A few examples of each requirement; LORA_REF_PROFILE=default, as `make test-all` sets it, tries as many as a report.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import spec_tests
from spec_tests import clauses, coverage, markdown, peers, report
from spec_tests.adapters.lora_ref_core import ELSEWHERE
from spec_tests.adapters.lora_ref_torch import NOT_OFFERED
from spec_tests.contract import CLAIMS
from spec_tests.engine import examine, find

REQUIREMENTS = spec_tests.load()
PROFILE = os.environ.get("LORA_REF_PROFILE", "quick")
REPORTS = {path.stem: report.read(path) for path in sorted((peers.HERE / "reports").glob("*.json"))}


@pytest.mark.parametrize("id", [r.id for r in REQUIREMENTS.values() if r.needs <= find("lora_ref")[1].claims])
def test_lora_ref_keeps(id: str) -> None:
    result = examine(*find("lora_ref"), REQUIREMENTS[id], PROFILE)
    assert result.outcome == "PASS", f"{result.message}\n\n{result.repro}"


@pytest.mark.parametrize("id", [r.id for r in REQUIREMENTS.values() if r.needs <= find("lora_ref_numpy")[1].claims])
def test_lora_ref_keeps_without_torch(id: str) -> None:
    result = examine(*find("lora_ref_numpy"), REQUIREMENTS[id], PROFILE)
    assert result.outcome in ("PASS", "UNSUPPORTED"), f"{result.message}\n\n{result.repro}"


@pytest.mark.parametrize("id", [r.id for r in REQUIREMENTS.values() if r.needs <= find("lora_ref_core")[1].claims])
def test_lora_ref_keeps_with_its_core_alone(id: str) -> None:
    result = examine(*find("lora_ref_core"), REQUIREMENTS[id], PROFILE)
    assert result.outcome == "PASS", f"{result.message}\n\n{result.repro}"


def test_the_core_claims_most_requirements_and_the_others_name_a_room() -> None:
    claims = find("lora_ref_core")[1].claims
    assert sum(requirement.needs <= claims for requirement in REQUIREMENTS.values()) >= 350
    assert all(find_spec(room) for room in ELSEWHERE.values())


def test_the_core_runs_without_the_rooms_around_it() -> None:
    """Of the others, `import lora_ref` loads the inits, and what LoraConfig checks and reads."""
    code = "import sys; from spec_tests import find; find('lora_ref_core'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = [name for name in done.stdout.split() if name.startswith("lora_ref.")]
    assert not {name.split(".")[1] for name in names} & {"fast", "api", "calibration", "tools"}
    of_safe_and_files = {name for name in names if name.startswith(("lora_ref.safe.", "lora_ref.files."))}
    assert of_safe_and_files == {"lora_ref.safe.regexes", "lora_ref.safe.strict", "lora_ref.files.config_file"}


def test_lora_ref_claims_everything_but_what_it_does_not_offer() -> None:
    assert find("lora_ref")[1].claims == CLAIMS.keys() - NOT_OFFERED
    assert not (peers.HERE / "known" / "lora_ref.toml").exists()


def test_there_are_requirements_with_sentences_and_sources() -> None:
    assert len(REQUIREMENTS) >= 150
    for requirement in REQUIREMENTS.values():
        assert requirement.sentence.endswith(".") and requirement.source


def test_older_releases_of_peft_are_tried_from_0_3_on_in_order() -> None:
    numbers = [tuple(map(int, release.split("."))) for release in peers.RELEASES]
    assert len(numbers) >= 10 and numbers == sorted(set(numbers)) and numbers[0] == (0, 3, 0)
    reported = {path.stem.removeprefix("peft-") for path in peers.HERE.glob("reports/releases/peft-*.json")}
    assert reported <= set(peers.RELEASES)


def test_every_id_is_written_out_where_its_requirement_is() -> None:
    written = "".join(path.read_text(encoding="utf-8") for path in Path(spec_tests.__file__).parent.glob("areas/*.py"))
    assert [id for id in REQUIREMENTS if f'"{id}"' not in written] == []


def test_there_is_a_report_on_every_library() -> None:
    assert sorted(REPORTS) == sorted((*peers.LIGHT, *peers.HEAVY))


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_about_these_requirements_and_nothing_in_it_is_unexplained(name: str) -> None:
    (made,) = REPORTS[name]
    assert {r["id"]: r["sentence"] for r in made["results"]} == {r.id: r.sentence for r in REQUIREMENTS.values()}, (
        f"make it anew: python -m spec_tests.peers {name}"
    )
    assert [r["id"] for r in made["results"] if r["outcome"] in ("FAIL", "ERROR")] == []


@pytest.mark.parametrize("name", peers.HEAVY)
def test_the_report_is_about_the_version_that_is_pinned(name: str) -> None:
    pins = (peers.HERE / "environments" / f"{name}.txt").read_text().split()
    shown = REPORTS[name][0]["implementation"]["version"].split(", ")[0].replace(" ", "==").replace("-", "_")
    assert shown in [pin.replace("-", "_") for pin in pins]


def test_the_report_on_peft_is_about_the_installed_one_and_so_is_its_list() -> None:
    installed = f"peft {version('peft')}"
    listed = tomllib.loads((peers.HERE / "known" / "peft.toml").read_text())["version"]
    assert REPORTS["peft"][0]["implementation"]["version"].split(", ")[0] == listed
    if installed != listed:
        pytest.skip(f"{installed} is installed")


def test_conformance_is_what_the_reports_say() -> None:
    reports = [made for name in sorted(REPORTS) for made in REPORTS[name]]
    assert (Path(peers.ROOT) / "CONFORMANCE.md").read_text() == markdown.page(reports)


def test_every_statement_has_a_requirement_or_a_reason_for_none():
    found = coverage.cited()
    without = {number for numbers in coverage.WITHOUT for number in numbers.split()}
    assert {number for number, ids in found.items() if not ids} == without


def test_every_clause_of_a_statement_has_a_requirement_or_a_reason_for_none():
    found = list(clauses.clauses())
    assert {id for clause in found for id in clause.ids} <= REQUIREMENTS.keys()
    assert {clause.statement for clause in found} <= set(coverage.statements())
    assert all(bool(clause.ids) != bool(clause.reason) for clause in found)
    assert len({(clause.statement, clause.text) for clause in found}) == len(found)


def test_the_statements_about_embeddings_and_convolutions_are_counted_by_clause():
    counted = {number: [c for c in clauses.clauses() if c.statement == number] for number in ("D4", "D5")}
    assert all(clause.ids for clause in counted["D4"])
    assert sum(bool(clause.ids) for clause in counted["D5"]) > len(counted["D5"]) / 2
    assert not clauses.statements_of_one_clause() & {"D4", "D5"}


def test_a_source_may_name_a_range_of_statements():
    assert list(coverage.named("CorDA, arXiv 2406.05223 (K1 to K3, S3)")) == ["K1", "K2", "K3", "S3"]
