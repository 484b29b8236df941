"""Regular expressions with a time limit.

They come from downloaded files, and the time of `(a|aa)+$` is exponential in the length of the name. The package
`regex`, unlike `re`, can stop a match after a timeout.
"""

import math
import re
import time
from collections.abc import Iterable

import regex

from ..core import config

MAX_LENGTH = 100_000  # characters of one pattern
MAX_REPEAT = 10_000  # product of its {n} counts: the compiler unrolls them
MAX_UNROLLED = 1_000_000  # that product times the pattern's length: it needs this much memory
MAX_PATTERNS, MAX_CLASSES = 5_000, 300  # keys of one option, and [...] in them: a class may need 10 ms to compile
TIME_LIMIT = 1.0  # seconds for one pattern on all names of a model; for a dict or list of patterns 3 times as much

ORDINARY = 1e-5  # seconds of each match that are not counted

# in `regex` a brace has more meanings than in `re`: fuzzy matches, counts with spaces
NO_COUNT = re.compile(r"(\\N\{[^}]*\}|\\.|\{[0-9]*,?[0-9]*\})|\{", re.DOTALL)


class Clock:
    """The remaining seconds of one pattern, or of several together."""

    def __init__(self, left: float):
        self.left = left


class Pattern(config.Pattern):
    """A regular expression. A match that is too slow raises ValueError.

    >>> bool(Pattern(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj"))
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
            re.compile(text)  # by itself: its brackets must not close those of the template
            text = NO_COUNT.sub(lambda found: found[1] or r"\{", text)
            self.compiled = regex.compile(template.replace("{}", text))
        except (re.error, regex.error, RecursionError, OverflowError, ValueError) as error:
            raise ValueError(f"{option}: {text[:80]!r} is not a usable regular expression: {error}") from error
        # one repetition and no group: such a match is fast and needs no clock
        self.is_quick = "(" not in text and sum(map(text.count, "*+?{")) <= 1

    @classmethod
    def compile_all(cls, texts: Iterable[str], option: str, template: str = "{}") -> list["Pattern"]:
        """The patterns of one option, on one clock. ValueError: they are too many or too large together."""
        texts = list(texts)
        classes = sum(text.count("[") for text in texts)
        if len(texts) > MAX_PATTERNS or classes > MAX_CLASSES or sum(map(len, texts)) > MAX_LENGTH:
            both = f"{len(texts)} regular expressions with {classes} classes [...]"
            raise ValueError(f"{option}: {both} are too large together")
        clock = Clock(TIME_LIMIT if len(texts) == 1 else 3 * TIME_LIMIT)
        return [cls(text, option, template, clock) for text in texts]

    def match(self, name: str) -> "regex.Match[str] | None":
        return self.run("match", name)

    def fullmatch(self, name: str) -> "regex.Match[str] | None":
        return self.run("fullmatch", name)

    def run(self, method: str, name: str) -> "regex.Match[str] | None":
        """Call this method of `re` ("match", "fullmatch") within the remaining time."""
        if self.is_quick:
            return getattr(self.compiled, method)(name)
        left = self.clock.left
        if left <= 0:
            slow = "its regular expressions are too slow for this model"
            raise ValueError(f"{self.option}: {slow}; write fewer or simpler")
        started = time.perf_counter()
        try:
            match = getattr(self.compiled, method)(name, timeout=TIME_LIMIT if left > TIME_LIMIT else left)
        except TimeoutError:
            slow = f"the regular expression {self.text[:80]!r} is too slow: it backtracks without end on {name[:80]!r}"
            raise ValueError(f"{self.option}: {slow}; write it without nested repetition") from None
        # any number of ordinary matches is free: a slow machine must not refuse what a fast one accepts
        spent = time.perf_counter() - started - ORDINARY
        if spent > 0:
            self.clock.left = left - spent
        return match
