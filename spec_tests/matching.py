"""Which modules are adapted, with which r, lora_alpha and s: the rules of names, as plainly as they can be written.

Everything is decided from a mapping {name: kind of module} and a configuration; no model is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

ADAPTABLE = ("linear", "transposed", "embedding")
LINEAR = ("linear", "transposed")
NOTHING = "nothing is matched"


class Refusal(Exception):
    """The configuration has to be refused on this model."""


class Target(NamedTuple):
    """What one module gets."""

    r: int
    lora_alpha: float
    scaling: float


def ends_at_dot(name: str, item: str) -> bool:
    """Is `item` the name, or what follows one of its dots?"""
    return name == item or name.endswith("." + item)


def containers(names: Iterable[str]) -> list[str]:
    """The names above these: "a.b" and "a" of "a.b.c"."""
    found = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts)):
            found[".".join(parts[:length])] = None
    return list(found)


def matches(rule: Iterable[str] | str | None, name: str) -> bool:
    """N2, N3: a list holds names and ends of names, a string is a regular expression for the whole name."""
    if rule is None:
        return False
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(ends_at_dot(name, item) for item in rule)


def layer_index(name: str, layers_pattern: Iterable[str] | str | None) -> int | None:
    """N7: the number of the layer that a module lies in: the first that follows a list's name."""
    lists = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    parts = name.split(".")
    if not lists:  # any list: a segment before the number, something behind it
        for at in range(1, len(parts) - 1):
            if parts[at].isdigit():
                return int(parts[at])
        return None
    for pattern in lists:
        found = re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def in_layers(name: str, config: Mapping[str, Any]) -> bool:
    """N7: does layers_to_transform let this module pass?"""
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    index = layer_index(name, config.get("layers_pattern"))
    return index is not None and index in ([wanted] if isinstance(wanted, int) else wanted)


def looked_up(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """N8: the value of the first key that reaches the end of the name, from its start or from one of its dots."""
    starts = [0] + [at + 1 for at, letter in enumerate(name) if letter == "."]
    for key, value in (pattern or {}).items():
        if key.startswith("^"):
            if re.fullmatch(key[1:], name):
                return value
        elif any(re.fullmatch(key, name[start:]) for start in starts):
            return value
    return default


def target(name: str, config: Mapping[str, Any]) -> Target:
    """S1, S2: r, lora_alpha and s of a module that is adapted."""
    r = looked_up(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = looked_up(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return Target(r, alpha, alpha / (r**0.5 if config.get("use_rslora") else r))


def saved(kinds: Mapping[str, str], config: Mapping[str, Any]) -> set[str]:
    """N10: the modules that modules_to_save names."""
    rule = config.get("modules_to_save") or []
    return {name for name in [*kinds, *containers(kinds)] if any(ends_at_dot(name, item) for item in rule)}


def targets(kinds: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Target]:
    """N1: exclude_modules, then modules_to_save, then target_modules; {module: what it gets}.

    Raises:
        Refusal: N5, N9: nothing is matched, or something that cannot be adapted.
    """
    rule, whole, found = config.get("target_modules"), saved(kinds, config), {}
    everything = isinstance(rule, str) and rule.lower() == "all-linear"
    for name in [*kinds, *containers(kinds)]:
        kind = kinds.get(name, "container")
        if matches(config.get("exclude_modules") or None, name):
            continue
        if any(name == above or name.startswith(above + ".") for above in whole):
            continue
        if everything:
            if kind in LINEAR:
                found[name] = target(name, config)
            continue
        if not matches(rule, name) or (not isinstance(rule, str) and not in_layers(name, config)):
            continue
        if kind not in ADAPTABLE:
            raise Refusal(f"{name} is a {kind}")
        found[name] = target(name, config)
    for name, kind in kinds.items():  # N11
        parameters = ["weight"] if kind in ADAPTABLE else []
        excluded = any(matches(config.get("exclude_modules") or None, x) for x in (name, f"{name}.weight"))
        if excluded or not in_layers(f"{name}.weight", config):
            continue
        if any(ends_at_dot(f"{name}.{p}", item) for p in parameters for item in config.get("target_parameters") or []):
            found[name] = target(f"{name}.weight", config)
    if not found:
        raise Refusal(NOTHING)
    return found
