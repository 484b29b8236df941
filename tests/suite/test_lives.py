"""The life of a deviation, from release to release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spec_tests import lives, page, peers, report
from spec_tests.engine import OUTCOMES


def about(number: str, **outcomes: str) -> report.Report:
    """A report on a release, with an outcome for each of these requirements."""
    results = [
        {"id": f"{name}-001", "outcome": outcome, "sentence": f"{name} holds.", "source": "a paper"}
        for name, outcome in outcomes.items()
    ]
    return {"implementation": {"name": "peft", "version": f"peft {number}, torch 2.13.0"}, "results": results}


RELEASES = [
    about("0.3.0", A="PASS", B="UNSUPPORTED", C="FAIL", D="PASS"),
    about("0.9.0", A="FAIL", B="FAIL", C="KNOWN", D="PASS"),
    about("0.10.1", A="ERROR", B="PASS", C="FAIL", D="PASS", E="PASS"),
    about("0.21.2", A="PASS", B="PASS", C="KNOWN", D="PASS", E="KNOWN"),
]


def test_a_life_is_what_was_kept_and_failed_from_release_to_release() -> None:
    assert {life.id: lives.said(life) for life in lives.lives(RELEASES)} == {
        "A-001": "kept 0.3.0, fails 0.9.0 to 0.10.1, kept 0.21.2",
        "B-001": "not promised 0.3.0, fails 0.9.0, kept 0.10.1 to 0.21.2",
        "E-001": "not promised 0.3.0 to 0.9.0, kept 0.10.1, fails 0.21.2",
    }


@given(st.lists(st.sampled_from(OUTCOMES), min_size=1, max_size=8))
def test_the_spans_hold_each_release_once_and_neighbours_differ(outcomes: list[str]) -> None:
    numbers = [f"0.{n}.0" for n in range(len(outcomes))]
    found = lives.lives([about(n, A=outcome) for n, outcome in zip(numbers, outcomes, strict=True)])
    changes = {"PASS"} < set(outcomes) and set(outcomes) - {"PASS", "UNSUPPORTED"} != set()
    assert len(found) == changes
    for life in found:
        places = [(numbers.index(span.first), numbers.index(span.last)) for span in life.spans]
        assert [n for first, last in places for n in range(first, last + 1)] == list(range(len(numbers)))
        assert all(a.state != b.state for a, b in zip(life.spans, life.spans[1:], strict=False))


def test_reports_are_read_in_the_order_of_their_releases(tmp_path: Path) -> None:
    for made in reversed(RELEASES):
        (tmp_path / f"{lives.number(made)}.json").write_text(json.dumps(made))
    with pytest.raises(ValueError):  # a report that is not whole is refused
        lives.older(tmp_path)
    assert [lives.number(made) for made in lives.older()] == list(peers.RELEASES)


def test_the_page_shows_each_life_and_nothing_where_there_are_no_releases() -> None:
    shown = page.page([], RELEASES)
    assert 'id="releases"' in shown and "kept 0.3.0, fails 0.9.0 to 0.10.1, kept 0.21.2" in shown
    assert 'aria-label="0.10.1: fails"' in shown and "C holds." not in shown
    assert 'id="releases"' not in page.page([])
