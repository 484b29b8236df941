"""Regular expressions that end in time: what they match, and what is refused."""

import contextlib
import itertools
import re
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from configs import module_names, patterns
from hypothesis import given
from hypothesis import strategies as st

from lora_ref import LoraConfig
from lora_ref.core import config
from lora_ref.core.names import Rule, layer_lists
from lora_ref.safe import regexes
from lora_ref.safe.regexes import Clock, Pattern
from spec_tests import agree


@pytest.mark.parametrize("kind", [Pattern, config.Pattern])
@given(pattern=patterns, name=module_names)
def test_a_string_is_refullmatch(kind: type, pattern: str, name: str) -> None:
    (compiled,) = kind.compile_all([pattern], "option")
    assert (compiled.fullmatch(name) is None) is (re.fullmatch(pattern, name) is None)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("(?:foo){e<=2}", "fop", False),  # `regex` alone would match "almost foo"
        ("(?:foo){e<=2}", "foo{e<=2}", True),
        ("(?x)a{ 2 }", "aa", False),
        ("a{2}", "aa", True),
        ("[{]a", "{a", True),
        (r"\{a", "{a", True),
        (r"\N{LATIN SMALL LETTER A}", "a", True),
    ],
)
def test_a_brace_means_what_it_means_to_re(pattern: str, name: str, matches: bool) -> None:
    assert (Pattern(pattern).fullmatch(name) is not None) is matches is (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize("text", ["(a|aa)+", "(?:a|a?b|aa)+", "((a{1,9}){1,9}){1,9}b", "(?i)(A|AA)+"])
def test_a_slow_pattern_ends_at_its_limit_and_says_so(text: str) -> None:
    started = time.process_time()
    with pytest.raises(ValueError, match=r"target_modules: the regular expression .* is too slow"):
        Pattern(text, "target_modules", clock=Clock(0.1)).fullmatch("a" * 60 + "!")
    assert time.process_time() - started < 2


@given(began=st.floats(0, 1e6), seconds=st.lists(st.floats(0, 0.1), min_size=1, max_size=5))
def test_what_a_match_takes_is_taken_off_the_clock(began: float, seconds: list[float]) -> None:
    """Beyond an ordinary match. The times are given here, not measured."""
    ends = list(itertools.accumulate(seconds, initial=began))
    readings = iter([t for pair in itertools.pairwise(ends) for t in pair])
    pattern, wanted = Pattern("(a|aa)+", clock=Clock(100.0)), 100.0
    with mock.patch.object(regexes, "time", SimpleNamespace(perf_counter=lambda: next(readings))):
        for before, after in itertools.pairwise(ends):
            assert pattern.fullmatch("aa")
            wanted -= max(after - before - regexes.ORDINARY, 0)
            assert pattern.clock.left == wanted


def test_a_long_pattern_with_a_small_count_is_usable() -> None:
    assert Pattern(r"model\.layers\.[0-9]{1,8}\.self_attn\.q_proj").fullmatch("model.layers.12345678.self_attn.q_proj")


@pytest.mark.parametrize(
    "text",
    ["(", "a{1000000000}", "(a{1000}){1000}", "(" * 9000 + ")" * 9000, "a" * 200_000, "a{2,1}", "*",
     "(?:" + "a?" * 9000 + "){999}", "[ab]" * 400],
)  # fmt: skip
def test_what_does_not_compile_or_would_not_fit_is_a_value_error_that_names_the_option(text: str) -> None:
    with pytest.raises(ValueError, match=r"^target_modules: .* is not a usable regular expression: "):
        Pattern(text, "target_modules")


def test_keys_that_are_long_together_are_refused() -> None:
    half = regexes.MAX_LENGTH // 2
    assert len(Pattern.compile_all(["a" * half, "b" * half], "rank_pattern")) == 2
    with pytest.raises(ValueError, match=r"rank_pattern: 3 regular expressions .* are too large together"):
        Pattern.compile_all(["a" * half, "b" * half, "c"], "rank_pattern")


def test_many_keys_are_refused_together() -> None:
    with pytest.raises(ValueError, match="rank_pattern: 5001 regular expressions"):
        LoraConfig(rank_pattern={f"q{i}": 1 for i in range(5001)})
    with pytest.raises(ValueError, match="alpha_pattern: 301 regular expressions with 301 classes"):
        LoraConfig(alpha_pattern={f"[q]{i}": 1 for i in range(301)})
    assert len(LoraConfig(rank_pattern={rf"^model\.layers\.{i}\.q_proj": 1 for i in range(1000)}).rank_pattern) == 1000


@given(st.sampled_from(["", ".*", r"\.", "q", "[a-z]+", "x{2}", "l?"]), st.sampled_from(["q", r"\d+", "proj$", ".*"]))
def test_a_quick_pattern_matches_what_the_timed_one_does(head: str, tail: str) -> None:
    """One repetition, no group: no clock. Everything else keeps its time limit."""
    pattern = Pattern(head + tail)
    assert pattern.is_quick is (sum((head + tail).count(c) for c in "*+?{") <= 1)
    for name in ("q", "layers.3.q", "layers.12.xx.proj", "layers.q.proj"):
        quick = pattern.fullmatch(name) is None
        pattern.is_quick = False
        assert (pattern.fullmatch(name) is None) is quick
        pattern.is_quick = True


@pytest.mark.parametrize("text", ["(a|aa)+", "(?:a)", ".*.*", "a{2}b{2}", "(?R)"])
def test_what_could_take_long_has_a_clock(text: str) -> None:
    with contextlib.suppress(ValueError):  # not every one compiles
        assert not Pattern(text).is_quick


def test_the_keys_of_one_option_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many keys that just keep within the limit would otherwise cost a second."""
    monkeypatch.setattr(regexes, "TIME_LIMIT", 0.05)
    rule = Rule("rank_pattern", {f"(a|aa)+{i}": 1 for i in range(100)}, Pattern)
    clock = rule.patterns[0].clock
    agree(clock.left, 0.15)
    assert all(p.clock is clock for p in rule.patterns)
    clock.left = 0.0
    with pytest.raises(ValueError, match="rank_pattern: its regular expressions are too slow"):
        rule.match("a")
    lists = layer_lists(["(a|aa)+", "(b|bb)+"], Pattern)
    agree(lists[0].clock.left, 0.15)
    assert lists[1].clock is lists[0].clock
