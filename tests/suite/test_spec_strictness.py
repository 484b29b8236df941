"""The conformance suite is strict: seeded bugs fail what the kill matrix says, and harmless variants fail nothing.

After a new requirement or a new bug: `python -m spec_tests.bugs.matrix --write`. All bugs against all requirements are
the work of `make test-all`. `make test` takes a sample, and sees that the committed matrix follows from its rows.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings

import spec_tests.contract
from spec_tests import smoke
from spec_tests.bugs import bad, harmless, matrix, redundant, removal, seeded
from spec_tests.engine import find, run
from spec_tests.generate import DTYPES, MERGEABLE, layers
from spec_tests.reference.plain import Plain
from spec_tests.registry import load

COMMITTED = matrix.committed()
ROWS = {name: about["fails"] for name, about in COMMITTED["bugs"].items()}
FOUND = [bug for bug in seeded.ALL if ROWS.get(bug.name)]


# -- bugs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bug", FOUND[::8], ids=lambda bug: bug.name)
def test_a_seeded_bug_fails_the_first_that_the_matrix_names(bug):
    first = ROWS[bug.name][0]
    assert matrix.row(seeded.broken(bug), [] if first == matrix.SMOKE else [first], bug.profile)[:1] == [first]


def test_every_seeded_bug_is_found_but_those_that_are_listed():
    assert {name for name, row in ROWS.items() if not row} == seeded.NOT_FOUND


def test_the_matrix_has_the_bugs_that_there_are():
    assert list(ROWS) == [bug.name for bug in seeded.ALL]


def test_public_bugs_have_links_to_where_they_were_reported():
    assert len(seeded.BUGS) >= 60
    for bug in seeded.BUGS:
        assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", bug.url), bug.name


def test_what_the_matrix_says_of_requirements_follows_from_its_rows():
    assert COMMITTED["only"] == matrix.only_killers(ROWS)
    assert COMMITTED["redundant"] == redundant.beside(ROWS, matrix.never_alone(COMMITTED["only"]))
    assert COMMITTED["idle"] == matrix.idle(ROWS)


def test_a_requirement_that_is_never_the_only_one_to_find_a_bug_says_why_it_is_there():
    assert set(load()) == COMMITTED["only"].keys() | COMMITTED["redundant"].keys()
    assert {id.split("-")[0] for id in COMMITTED["redundant"]} <= redundant.OF_AREA.keys()


def test_what_finds_the_same_bugs_is_found_by_the_greedy_cover():
    rows = {"a": ["X", "Y"], "b": ["X", "Z"], "c": ["X", "Y", "W"], "d": ["W"]}
    assert redundant.beside(rows, ["X", "Y"]) == {"X": ["Y", "Z"], "Y": ["X"]}


def test_every_requirement_finds_a_bug():
    assert COMMITTED["idle"] == [], "plant a bug for each of these (seeded.MUTANTS)"


@pytest.mark.deep
@pytest.mark.parametrize("bug", FOUND[:: len(FOUND) // 4], ids=lambda bug: bug.name)
def test_a_requirement_that_does_not_reach_a_bug_is_not_failed_by_it(bug):
    rest = sorted(set(load()) - set(matrix.reach()[bug.name]))
    assert set(matrix.row(seeded.broken(bug), rest[:20], bug.profile)) <= {matrix.SMOKE}


# -- what is right must pass -------------------------------------------------------------------


def test_the_sound_implementation_passes_everything():
    assert type(find("plain")[1]) is Plain and Plain.claims == spec_tests.contract.CLAIMS.keys()
    assert [(result.id, result.outcome) for result in run("plain", profile="quick")] == [(id, "PASS") for id in load()]


def test_the_sound_implementation_shares_no_code_with_what_the_suite_tests():
    code = "import sys; from spec_tests import find; find('plain'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(done.stdout.split())
    assert "spec_tests.reference.plain" in names and not names & {"lora_ref", "torch"}


@pytest.mark.deep
@pytest.mark.parametrize("name", harmless.VARIANTS)
def test_a_harmless_variant_passes(name):
    made = harmless.variant(name)
    smoke.check(made)
    reached = matrix.reach()[name]
    assert reached
    results = [matrix.outcome(made, load()[id], "quick") for id in reached]
    assert [(r.id, r.message) for r in results if r.outcome not in ("PASS", "UNSUPPORTED")] == []


# -- what is bad must be seen to be bad --------------------------------------------------------


@pytest.mark.parametrize(("kind", "why"), bad.REFUSED.items(), ids=lambda x: getattr(x, "__name__", None))
def test_a_bad_adapter_class_is_refused_before_any_requirement(kind, why):
    with pytest.raises(TypeError, match=why):
        next(run("bad", kind(), profile="quick"))


# these two fail or crash at every requirement: each example of each is tried
SLOW = {"Crashing", "OverClaiming"}


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.deep] * (kind.__name__ in SLOW), id=kind.__name__) for kind in bad.COUNTED],
)
def test_a_bad_implementation_has_its_outcomes(kind):
    assert COMMITTED["bad"][kind.__name__] == bad.counts(kind)


def test_an_over_claim_fails_rather_than_crashes():
    assert set(COMMITTED["bad"]["OverClaiming"]) == {"PASS", "FAIL"}
    assert set(COMMITTED["bad"]["Crashing"]) == {"PASS", "ERROR"}


# -- the cases ---------------------------------------------------------------------------------


def drawn(count, **options):
    """That many layers, the same on every run."""
    found = []
    test = hypothesis.given(layers(Plain(), MERGEABLE, DTYPES, **options))(lambda spec: found.append(spec))
    settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )(test)()
    return found


def rank_relation(spec):
    out, n_in = spec.W.shape[1:] if spec.kind == "experts" else spec.W.shape[:2]
    return "below" if spec.r < min(out, n_in) else "equal" if spec.r == min(out, n_in) else "above"


def shape_relation(spec):
    out, n_in = spec.W.shape[1:] if spec.kind == "experts" else spec.W.shape[:2]
    return "square" if out == n_in else "wide" if out < n_in else "tall"


def scaling_kind(spec):
    a = spec.lora_alpha
    sign = "zero" if a == 0 else "negative" if a < 0 else "fraction" if a != int(a) else "plain"
    return ("rslora" if spec.use_rslora else "lora"), sign


def test_cases_have_every_kind_with_every_dtype_and_every_relation_of_rank_and_scaling():
    specs = drawn(5000)  # the rarest cell has one case in 1,500
    for relation, count in ((rank_relation, 3), (shape_relation, 3), (scaling_kind, 8)):
        cells = {(spec.kind, spec.dtype) for spec in specs}
        assert len(cells) == len(MERGEABLE) * len(DTYPES)
        found = Counter((spec.kind, relation(spec)) for spec in specs)
        assert len(found) == len(MERGEABLE) * count, f"{relation.__name__}: {sorted(found)}"
        found = Counter((spec.dtype, relation(spec)) for spec in specs)
        assert len(found) == len(DTYPES) * count, f"{relation.__name__}: {sorted(found)}"
    assert {spec.b is None for spec in specs if spec.kind == "linear"} == {True, False}
    assert {(spec.stride, spec.padding) for spec in specs if spec.kind == "conv2d"} == {
        (stride, padding) for stride in (1, 2) for padding in (0, 1, 2)
    }


def test_most_cases_can_tell_s_from_1():
    specs = drawn(300)
    assert sum(spec.scaling == 1 for spec in specs) < len(specs) / 5


def test_exact_cases_are_exact():
    for spec in drawn(300, exact=True):
        assert (spec.W.astype(int) == spec.W).all()
        s = Fraction(spec.scaling)
        assert s in (Fraction(1, 2), 1, 2)


# -- no check is there for nothing -------------------------------------------------------------

CALLS = removal.calls()
SAMPLE = [call for call in CALLS if call.number % 7 == 3 and not removal.is_idle(call, COMMITTED)]


def test_no_check_can_be_taken_out_unseen():
    """By the committed matrix; the sample below does it again."""
    assert COMMITTED["unproven"] == {}, "plant a bug that only this check sees (seeded.MUTANTS), or take it out"


@pytest.mark.deep
@pytest.mark.parametrize("call", SAMPLE, ids=lambda call: f"{call.module}-{call.number}")
def test_without_a_check_a_bug_gets_through(call):
    assert removal.lets_through(call, ROWS) is not None
