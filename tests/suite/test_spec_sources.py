"""Every requirement says where it is said: by a document outside, or by lora_ref alone."""

from __future__ import annotations

import re

import pytest

import spec_tests
from spec_tests import sources
from spec_tests.adapters.lora_ref_torch import NOT_OFFERED
from spec_tests.contract import CLAIMS, DECISIONS
from spec_tests.engine import HERE, find

REQUIREMENTS = spec_tests.load()


@pytest.mark.parametrize("id", REQUIREMENTS)
def test_a_requirement_has_a_document_or_is_a_decision(id: str) -> None:
    about = REQUIREMENTS[id]
    if sources.decided(about.source):
        assert about.needs & DECISIONS
    else:
        assert sources.names().search(about.source), about.source
        assert not about.needs & DECISIONS


def test_the_statements_that_sources_name_exist() -> None:
    stated = set(re.findall(r"^- \*\*([A-Z]\d+)\*\*", (HERE / "statements.md").read_text(), re.MULTILINE))
    assert set(sources.listed()) <= stated
    assert {s for r in REQUIREMENTS.values() for s in sources.statements(r.source)} <= stated


def test_what_documents_say_has_words_and_a_link() -> None:
    for found in sources.listed().values():
        for source in found:
            assert source.link.startswith("https://") and 10 < len(source.says) < 130, source


def test_a_source_of_statements_only_gets_the_document() -> None:
    assert sources.expanded("U7, U9").startswith("PEFT's documentation of PeftModel, add_adapter")
    assert sources.expanded("U7, U9").endswith("(U7, U9)")
    assert sources.expanded("the start is the logical weight's (F3)").startswith("PEFT's documentation of LoraConfig")
    assert sources.expanded("LoRA, arXiv 2106.09685 (D1)") == "LoRA, arXiv 2106.09685 (D1)"


def test_every_decision_is_asked_for_and_claimed_by_lora_ref_alone() -> None:
    assert CLAIMS.keys() > DECISIONS and {claim for claim in CLAIMS if claim.startswith("decision:")} <= DECISIONS
    assert find("lora_ref")[1].claims >= DECISIONS - NOT_OFFERED
    assert not find("peft")[1].claims & DECISIONS and not find("loralib")[1].claims & DECISIONS
