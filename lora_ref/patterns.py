"""Which modules, which rank, which alpha: pure functions on names.

A name is a module's dotted path in the base model, "model.layers.0.self_attn.q_proj". A list
of targets holds names or ends of names, taken literally; a string is a regular expression.
"""

import math
import re
import time
from collections.abc import Collection, Iterable
from typing import TypeVar

import regex

MAX_LENGTH = 100_000  # characters of one pattern
MAX_REPEAT = 10_000  # product of its {n} counts, which the compiler unrolls;
MAX_UNROLLED = 1_000_000  # times the pattern's length, that is memory
MAX_PATTERNS, MAX_CLASSES = 5_000, 300  # keys of one option, and [...] in them: some take 10 ms to compile
TIME_LIMIT = 1.0  # seconds that a pattern may spend on all the names of a model; a dict or list of them: 3 times

ORDINARY = 1e-5  # seconds of one match that do not count

# `regex` reads more into a brace than `re`: fuzzy matches, counts with spaces in them
NO_COUNT = re.compile(r"(\\N\{[^}]*\}|\\.|\{[0-9]*,?[0-9]*\})|\{", re.DOTALL)

Value = TypeVar("Value")


class Clock:
    """The seconds that one pattern, or several together, may still spend."""

    def __init__(self, left: float):
        self.left = left


class Pattern:
    """A regular expression that cannot hang the process.

    Patterns come out of downloaded files, and `(a|aa)+$` takes time exponential in the length of
    the name. `regex` (unlike `re`) can stop a match that runs too long.

    >>> Pattern(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj")
    True
    >>> Pattern("(a|aa)+", "target_modules", clock=Clock(0.05)).fullmatch("a" * 40 + "!")
    Traceback (most recent call last):
    ...
    ValueError: target_modules: the regular expression '(a|aa)+' is too slow: it backtracks without end on \
'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!'; write it without nested repetition
    """

    def __init__(self, text: str, option: str = "pattern", template: str = "{}", clock: Clock | None = None):
        self.text, self.option, self.clock = text, option, clock or Clock(TIME_LIMIT)
        try:
            counts = [max(1, int(n)) for pair in re.findall(r"\{([0-9]*),?([0-9]*)\}", text) for n in pair if n]
            repeat = math.prod(counts)
            too_large = len(text) > MAX_LENGTH or repeat > MAX_REPEAT or len(text) * repeat > MAX_UNROLLED
            if too_large or text.count("[") > MAX_CLASSES:
                raise OverflowError("it is too large")
            re.compile(text)
            text = NO_COUNT.sub(lambda found: found[1] or r"\{", text)
            self.compiled = regex.compile(template.format(text) if template != "{}" else text)
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            raise ValueError(f"{option}: {text[:80]!r} is not a usable regular expression: {error}") from error
        # one repetition, and no group that could be repeated: such a match is ordinary, and needs no clock
        self.is_quick = "(" not in text and sum(map(text.count, "*+?{")) <= 1

    def run(self, method: str, name: str) -> "regex.Match[str] | None":
        """`re`'s method ("match", "fullmatch") of this name, within what is left of the time."""
        if self.is_quick:
            return getattr(self.compiled, method)(name)
        left = self.clock.left
        if left <= 0:
            raise ValueError(
                f"{self.option}: its regular expressions are too slow for this model; write fewer or simpler"
            )
        started = time.perf_counter()
        try:
            match = getattr(self.compiled, method)(name, timeout=TIME_LIMIT if left > TIME_LIMIT else left)
        except TimeoutError:
            raise ValueError(
                f"{self.option}: the regular expression {self.text[:80]!r} is too slow: it backtracks without end "
                f"on {name[:80]!r}; write it without nested repetition"
            ) from None
        # an ordinary match is free, however many there are: a slow machine must not refuse what a fast one takes
        spent = time.perf_counter() - started - ORDINARY
        if spent > 0:
            self.clock.left = left - spent
        return match

    def fullmatch(self, name: str) -> bool:
        """Does the pattern match the whole name?"""
        return self.run("fullmatch", name) is not None

    def index(self, name: str) -> int | None:
        """The number in the first group of a match at the start of name."""
        match = self.run("match", name)
        return int(match["lora_ref_index"]) if match else None


def check(texts: Collection[str], option: str) -> None:
    """Raise ValueError unless all texts compile as patterns, and soon."""
    classes = sum(text.count("[") for text in texts)
    if len(texts) > MAX_PATTERNS or classes > MAX_CLASSES or sum(map(len, texts)) > MAX_LENGTH:
        raise ValueError(
            f"{option}: {len(texts)} regular expressions with {classes} classes [...] are too large together"
        )
    for text in texts:
        Pattern(text, option)


def ends_at_dot(item: str, name: str) -> bool:
    """Is item the name, or a dotted end of it? The literal rule for lists.

    >>> [ends_at_dot("q_proj", name) for name in ("q_proj", "attn.q_proj", "attn.xq_proj")]
    [True, True, False]
    """
    return name == item or name.endswith("." + item)


class Rule:
    """One option of module names, a list or a string, that remembers which items were of use."""

    def __init__(self, option: str, value: Iterable[str] | str | None):
        self.option = option
        self.pattern = Pattern(value, option) if isinstance(value, str) else None
        self.items = [value] if isinstance(value, str) else list(value or [])
        self.used: set[str] = set()
        self._exact = set(self.items)

    def match(self, name: str) -> str | None:
        """The item that matches name (its full name first), or None."""
        if not self.items:
            return None
        if self.pattern:
            if not self.pattern.fullmatch(name):
                return None
            self.used.add(self.pattern.text)
            return self.pattern.text
        # the dotted ends of a name are few; the items may be hundreds
        start, first = 0, None
        while start >= 0:
            end = name[start:]
            if end in self._exact:
                self.used.add(end)
                first = first or end
            start = name.find(".", start) + 1 or -1
        return first

    def ancestor(self, name: str) -> str | None:
        """The item that matches name or a parent of it."""
        while name and self.items:
            if hit := self.match(name):
                return hit
            name = name.rpartition(".")[0]
        return None

    @property
    def unused(self) -> list[str]:
        return [item for item in self.items if item not in self.used]


def exactly(wanted: Collection[str], known: Iterable[str]) -> list[str] | str:
    """The target_modules for these names and no other known one: the list, or where that would also match
    longer names with the same end, a regular expression.

    >>> exactly(["fc"], ["fc", "act"]), exactly(["fc", "act.0"], ["fc", "act.0", "block.fc"])
    (['fc'], 'fc|act\\\\.0')
    """
    rule, names = Rule("target_modules", wanted), set(wanted)
    if any(name not in names and rule.match(name) for name in known):
        return "|".join(map(re.escape, wanted))
    return list(wanted)


def layer_index(name: str, lists: Iterable[Pattern]) -> int | None:
    """The index of the layer that a module lies in, or None; `lists` from `layer_lists`.

    >>> any_list, layers = layer_lists(None), layer_lists("layers")
    >>> layer_index("model.layers.3.experts.5.up", any_list)  # the first number counts
    3
    >>> layer_index("layers.3.up", any_list), layer_index("layers.3.up", layers)
    (None, 3)
    """
    return next((index for pattern in lists if (index := pattern.index(name)) is not None), None)


def layer_lists(layers_pattern: Iterable[str] | str | None) -> list[Pattern]:
    """What a list of layers looks like in a name, followed by the layer's index.

    Without layers_pattern: any number that follows two name segments ("model.layers.3.mlp");
    with it: the number after a segment of that name, at the root too.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    if not names:
        return [Pattern(r".*?\.[^.]*\.(?P<lora_ref_index>\d+)\.")]
    template = r"(?:^|.*?\.)(?:{})\.(?P<lora_ref_index>\d+)\."
    clock = Clock(3 * TIME_LIMIT)
    return [Pattern(p, "layers_pattern", template, clock) for p in names]


class PatternDict:
    """rank_pattern or alpha_pattern: {pattern: value}, first match wins, remembers the keys of use.

    A key must reach the end of the name and may start at any dot; "^" ties it to the start.
    """

    def __init__(self, option: str, pattern: dict[str, Value]):
        self.option, self.values = option, pattern
        clock = Clock(3 * TIME_LIMIT)
        self.patterns = {key: Pattern(key, option, r"(.*\.)?({})$", clock) for key in pattern}
        self.used: set[str] = set()

    def key(self, name: str) -> str | None:
        """The first key that matches name, or None."""
        for key, pattern in self.patterns.items():
            if pattern.run("match", name):
                self.used.add(key)
                return key
        return None

    @property
    def unused(self) -> list[str]:
        return [key for key in self.values if key not in self.used]
