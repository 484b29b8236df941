"""Which modules, which rank, which alpha: pure functions on names.

A name is a module's dotted path in the base model, "model.layers.0.self_attn.q_proj". A list
of targets holds names or ends of names, taken literally; a string is a regular expression.
"""

import re
from collections.abc import Collection, Iterable
from typing import TypeVar

from ..safe.regexes import TIME_LIMIT, Clock, Pattern

Value = TypeVar("Value")


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
