"""Which modules, with which rank and alpha: pure functions on names.

    modules_to_save  ->  exclude_modules  ->  target_modules        the first that matches wins

A name is a module's dotted path in the base model, "model.layers.0.self_attn.q_proj".
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import LoraConfig, Pattern
from .scaling import scaling


class Rule:
    """One option of names. It records which of its items matched.

    An item of a list is a name, or a dotted end of one, taken literally. A string is one regular expression for the
    whole name. The keys of a dict are regular expressions, the first that matches wins. A key must reach the end of the
    name and may start at any dot; "^" ties it to the start.

    >>> [Rule("target_modules", ["q_proj"]).match(name) for name in ("q_proj", "attn.q_proj", "attn.xq_proj")]
    ['q_proj', 'q_proj', None]
    >>> Rule("rank_pattern", {"q_proj": 4}).match("attn.q_proj")
    'q_proj'
    """

    def __init__(self, option: str, value: Any, pattern_type: type[Pattern] = Pattern):
        self.option, self.used = option, set[str]()
        self.items = [value] if isinstance(value, str) else list(value or ())
        self.exact, self.patterns = set(self.items), list[Any]()
        if value and isinstance(value, str | dict):
            template = "{}" if isinstance(value, str) else r"(.*\.)?({})"
            self.patterns = pattern_type.compile_all(self.items, option, template)

    def match(self, name: str) -> str | None:
        """The item that matches the name (in a list the longest one), or None."""
        if self.patterns:
            pairs = zip(self.items, self.patterns, strict=True)
            first = next((item for item, pattern in pairs if pattern.fullmatch(name)), None)
            hits = [] if first is None else [first]
        else:  # the dotted ends of a name are few; the items may be hundreds
            parts = name.split(".") if self.exact else []
            hits = [end for i in range(len(parts)) if (end := ".".join(parts[i:])) in self.exact]
        self.used.update(hits)
        return hits[0] if hits else None

    def match_parent(self, name: str) -> str | None:
        """The item that matches the closest parent of the name."""
        while name := name.rpartition(".")[0]:
            if hit := self.match(name):
                return hit
        return None


def exactly(wanted: Collection[str], known: Iterable[str]) -> list[str] | str:
    """The target_modules for these names and no other known one: a regular expression where a list matches too many.

    >>> exactly(["fc"], ["fc", "act"]), exactly(["fc", "act.0"], ["fc", "act.0", "block.fc"])
    (['fc'], 'fc|act\\\\.0')
    """
    rule, names = Rule("target_modules", wanted), set(wanted)
    if any(name not in names and rule.match(name) for name in known):
        return "|".join(map(re.escape, wanted))
    return list(wanted)


def layer_index(name: str, patterns: Iterable[Any]) -> int | None:
    """The index of the layer that a module is in, or None. `patterns` come from `layer_lists`.

    >>> any_list, layers = layer_lists(None), layer_lists("layers")
    >>> layer_index("model.layers.3.experts.5.up", any_list)  # the first number counts
    3
    >>> layer_index("layers.3.up", any_list), layer_index("layers.3.up", layers)
    (3, 3)
    """
    return next((int(match["lora_ref_index"]) for pattern in patterns if (match := pattern.match(name))), None)


def layer_lists(names: list[str] | str | None, pattern_type: type[Pattern] = Pattern) -> list[Any]:
    """Patterns of a layer's index: after one of these segments of a name, or after any segment ("layers.3.mlp")."""
    if not names:
        return [re.compile(r"(?:[^.]*\.)+?(?P<lora_ref_index>\d+)\.")]
    texts = [names] if isinstance(names, str) else names
    return pattern_type.compile_all(texts, "layers_pattern", r"(?:^|.*?\.)(?:{})\.(?P<lora_ref_index>\d+)\.")


@dataclass(frozen=True)
class ModelNames:
    """What targeting knows of a model: names in order of traversal, and their kinds."""

    kinds: dict[str, str]  # module name -> its key in the table of layer types, or ""
    parameters: tuple[str, ...] = ()  # "<module>.<parameter>"
    model_type: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)  # {name: why "all-linear" leaves it out}


@dataclass(frozen=True)
class Match:
    """The decision on one module or parameter, and the rule that made it."""

    name: str
    action: str  # "adapt", "adapt parameter", "save" or "" (left as it is)
    rule: str
    r: int | None = None
    lora_alpha: float | None = None
    scaling: float | None = None

    def place(self) -> tuple[str, str]:
        """The name of the module, and that of its parameter or ""."""
        return self.name.rpartition(".")[::2] if self.action == "adapt parameter" else (self.name, "")


@dataclass
class Targeting:
    """The decisions on all modules, and the rules that matched nothing."""

    matches: list[Match]
    target_modules: list[str] | str | None  # as used: "all-linear" and None spelt out
    unused: dict[str, list[str]] = field(default_factory=dict)

    def names(self, action: str) -> list[str]:
        """The modules (or parameters) with this action."""
        return [m.name for m in self.matches if m.action == action]


# {task_type: the names of the heads of transformers' classifiers, which are trained in full}
HEADS = {key: ["classifier", "score"] for key in ("SEQ_CLS", "TOKEN_CLS")} | {"QUESTION_ANS": ["qa_outputs"]}


def resolve(names: ModelNames, config: LoraConfig, defaults: Mapping[str, list[str] | str] | None = None) -> Targeting:
    """Decide for every module whether it is adapted, saved or left, by which rule, with which r, alpha and s.

    `defaults` are each architecture's target_modules, for None. ValueError: it is not known, or a pattern is too slow.

    >>> names = ModelNames({"layers.0.q": "linear", "layers.0.up": "linear", "head": "linear"})
    >>> config = LoraConfig(target_modules=["q"], modules_to_save=["head"], rank_pattern={"q": 2})
    >>> for m in resolve(names, config).matches:
    ...     print(f"{m.name:11} {m.action:6} {m.rule} {m.r}")
    layers.0.q  adapt  target_modules 'q', rank_pattern 'q' 2
    layers.0.up        no target matches None
    head        save   modules_to_save 'head' None
    """
    targets, pattern_type, defaults = config.target_modules, config.pattern_type, defaults or {}
    exclude = Rule("exclude_modules", config.exclude_modules, pattern_type)
    why: Mapping[str, str] = {}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [name for name, kind in names.kinds.items() if kind == "linear" and name not in names.left_out]
        targets, why = exactly([n for n in linear if exclude.match(n) is None], names.kinds), names.left_out
    elif targets is None and not config.target_parameters:
        if names.model_type is None or names.model_type not in defaults:
            reason = f"it is None, and there is no default for model_type={names.model_type!r}"
            raise ValueError(f"Please specify target_modules: {reason}; for every linear layer say 'all-linear'")
        targets = defaults[names.model_type]
    targets = [] if targets is None else targets
    heads = HEADS.get(config.task_type or "", [])
    target = Rule("target_modules", targets, pattern_type)
    save = Rule("modules_to_save", [*(config.modules_to_save or []), *heads])
    parameter = Rule("target_parameters", config.target_parameters)
    ranks = Rule("rank_pattern", config.rank_pattern, pattern_type)
    alphas = Rule("alpha_pattern", config.alpha_pattern, pattern_type)
    indices = [x] if isinstance(x := config.layers_to_transform, int) else x
    lists = layer_lists(config.layers_pattern, pattern_type) if indices else []

    def adapted(name: str, action: str, rule: str) -> Match:
        if indices and (index := layer_index(name, lists)) not in indices:
            where = "not in a numbered layer" if index is None else f"layer {index} is not in layers_to_transform"
            return Match(name, "", f"{rule}, but {where}")
        r, alpha = config.r, config.lora_alpha
        if (key := ranks.match(name)) is not None:
            r, rule = config.rank_pattern[key], f"{rule}, rank_pattern '{key}'"
        if (key := alphas.match(name)) is not None:
            alpha, rule = config.alpha_pattern[key], f"{rule}, alpha_pattern '{key}'"
        return Match(name, action, rule, r, alpha, scaling(r, alpha, config.use_rslora))

    def decide(name: str) -> Match:
        saved, excluded = save.match(name), exclude.match(name)
        saved_parent = save.match_parent(name) if save.items else None
        if saved and not saved_parent:  # even a module that is excluded, from being adapted
            return Match(name, "save", f"modules_to_save '{saved}'")
        if excluded is not None:
            return Match(name, "", f"exclude_modules '{excluded}'")
        if saved_parent:
            return Match(name, "", f"inside modules_to_save '{saved or saved_parent}'")
        if (hit := target.match(name)) is None:
            return Match(name, "", why.get(name, "no target matches"))
        return adapted(name, "adapt", f"target_modules '{hit}'")

    matches = [decide(name) for name in names.kinds]
    for name in names.parameters:
        if (hit := parameter.match(name)) is not None:
            out = exclude.match(name) or exclude.match(name.rpartition(".")[0])
            rule = f"target_parameters '{hit}'" if out is None else f"exclude_modules '{out}'"
            matches.append(Match(name, "", rule) if out else adapted(name, "adapt parameter", rule))
    # targets that the user did not write need no warning
    rules = [target] * (targets is config.target_modules) + [exclude, save, parameter, ranks, alphas]
    unused = {r.option: [x for x in r.items if x not in r.used and not (r is save and x in heads)] for r in rules}
    return Targeting(matches, targets, {option: items for option, items in unused.items() if items})
