"""Which modules, with which rank and alpha: pure functions on names.

    modules_to_save  ->  exclude_modules  ->  target_modules        the first that matches wins

A name is a module's dotted path in the base model, "model.layers.0.self_attn.q_proj". A list of targets holds names
or ends of names, taken literally. A string is a regular expression.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .config import LoraConfig, Pattern, TaskType
from .scaling import scaling


def ends_at_dot(item: str, name: str) -> bool:
    """Is item the name, or a dotted end of it? The literal rule for lists.

    >>> [ends_at_dot("q_proj", name) for name in ("q_proj", "attn.q_proj", "attn.xq_proj")]
    [True, True, False]
    """
    return name == item or name.endswith("." + item)


class Rule:
    """One option of module names, a list or a string. It records which items matched."""

    def __init__(self, option: str, value: Iterable[str] | str | None, pattern_type: type[Pattern] = Pattern):
        self.option = option
        self.pattern = pattern_type.compile_all([value], option)[0] if isinstance(value, str) else None
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
    """The target_modules for these names and no other known one.

    It is the list, or a regular expression where the list would also match longer names with the same end.

    >>> exactly(["fc"], ["fc", "act"]), exactly(["fc", "act.0"], ["fc", "act.0", "block.fc"])
    (['fc'], 'fc|act\\\\.0')
    """
    rule, names = Rule("target_modules", wanted), set(wanted)
    if any(name not in names and rule.match(name) for name in known):
        return "|".join(map(re.escape, wanted))
    return list(wanted)


def layer_index(name: str, lists: Iterable[Pattern]) -> int | None:
    """The index of the layer that a module is in, or None. `lists` come from `layer_lists`.

    >>> any_list, layers = layer_lists(None), layer_lists("layers")
    >>> layer_index("model.layers.3.experts.5.up", any_list)  # the first number counts
    3
    >>> layer_index("layers.3.up", any_list), layer_index("layers.3.up", layers)
    (None, 3)
    """
    found = (match for pattern in lists if (match := pattern.match(name)))
    return next((int(match["lora_ref_index"]) for match in found), None)


def layer_lists(layers_pattern: Iterable[str] | str | None, pattern_type: type[Pattern] = Pattern) -> list[Pattern]:
    """Patterns of a list of layers in a name, followed by the layer's index.

    Without layers_pattern: any number that follows two name segments ("model.layers.3.mlp");
    with it: the number after a segment of that name, at the root too.
    """
    names = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or [])
    if not names:
        return [Pattern(r".*?\.[^.]*\.(?P<lora_ref_index>\d+)\.")]
    return pattern_type.compile_all(names, "layers_pattern", r"(?:^|.*?\.)(?:{})\.(?P<lora_ref_index>\d+)\.")


class PatternDict:
    """rank_pattern or alpha_pattern: {pattern: value}, the first match wins. It records which keys matched.

    A key must reach the end of the name and may start at any dot; "^" ties it to the start.
    """

    def __init__(self, option: str, values: Mapping[str, Any], pattern_type: type[Pattern] = Pattern):
        self.option, self.values = option, values
        self.patterns = pattern_type.compile_all(values, option, r"(.*\.)?({})$")
        self.used: set[str] = set()

    def key(self, name: str) -> str | None:
        """The first key that matches name, or None."""
        for pattern in self.patterns:
            if pattern.match(name):
                self.used.add(pattern.text)
                return pattern.text
        return None

    @property
    def unused(self) -> list[str]:
        return [key for key in self.values if key not in self.used]


@dataclass(frozen=True)
class ModelNames:
    """What targeting knows of a model: names in order of traversal, and their kinds."""

    kinds: dict[str, str]  # module name -> "linear", "embedding", "conv" or "" (anything else)
    parameters: tuple[str, ...] = ()  # "<module>.<parameter>"
    model_type: str | None = None
    heads: tuple[str, ...] = ()  # output layers, which "all-linear" leaves out


@dataclass(frozen=True)
class Match:
    """The decision on one module or parameter, and the rule that made it."""

    name: str
    action: str  # "adapt", "adapt parameter", "save" or "" (left as it is)
    rule: str
    r: int | None = None
    lora_alpha: float | None = None
    scaling: float | None = None


@dataclass
class Targeting:
    """The decisions on all modules, and the rules that matched nothing."""

    matches: list[Match]
    target_modules: list[str] | str | None  # as used: "all-linear" and None spelt out
    unused: dict[str, list[str]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """{"modules": {name: {action, rule, r, lora_alpha, scaling}}, "unused": {option: items}}."""
        rows = [asdict(m) for m in self.matches]
        return {"modules": {row.pop("name"): row for row in rows}, "unused": self.unused}

    def names(self, action: str) -> list[str]:
        """The modules (or parameters) that this happens to."""
        return [m.name for m in self.matches if m.action == action]


def resolve(names: ModelNames, config: LoraConfig, defaults: Mapping[str, list[str] | str] | None = None) -> Targeting:
    """Decide for every module whether it is adapted, saved or left, by which rule, with which r, alpha and s.

    `defaults` are the target_modules of each architecture, for target_modules=None. `check` raises the errors.

    Raises:
        ValueError: target_modules is None and the architecture is not known, or a pattern is too slow.

    >>> names = ModelNames({"layers.0.q": "linear", "layers.0.up": "linear", "head": "linear"})
    >>> config = LoraConfig(target_modules=["q"], modules_to_save=["head"], rank_pattern={"q": 2})
    >>> for m in resolve(names, config).matches:
    ...     print(f"{m.name:11} {m.action:6} {m.rule} {m.r}")
    layers.0.q  adapt  target_modules 'q', rank_pattern 'q' 2
    layers.0.up        no target matches None
    head        save   modules_to_save 'head' None
    """
    targets, pattern_type, heads = _targets(names, config, defaults or {}), config.pattern_type, saved_heads(config)
    target = Rule("target_modules", targets, pattern_type)
    exclude = Rule("exclude_modules", config.exclude_modules, pattern_type)
    save = Rule("modules_to_save", [*(config.modules_to_save or []), *heads])
    parameter = Rule("target_parameters", config.target_parameters)
    ranks = PatternDict("rank_pattern", config.rank_pattern, pattern_type)
    alphas = PatternDict("alpha_pattern", config.alpha_pattern, pattern_type)
    lists = layer_lists(config.layers_pattern, pattern_type)
    wanted = config.layers_to_transform
    wanted = [wanted] if isinstance(wanted, int) else wanted

    def adapted(name: str, action: str, rule: str) -> Match:
        rank_key, alpha_key = ranks.key(name), alphas.key(name)
        r = config.r if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        for option, key in (("rank_pattern", rank_key), ("alpha_pattern", alpha_key)):
            rule += f", {option} '{key}'" if key is not None else ""
        return Match(name, action, rule, r, alpha, scaling(r, alpha, config.use_rslora))

    def decide(name: str) -> Match:
        excluded = exclude.match(name)  # from being adapted; a module that is saved whole stays so
        if (hit := save.match(name)) is not None and save.ancestor(name.rpartition(".")[0]) is None:
            return Match(name, "save", f"modules_to_save '{hit}'")
        if excluded is not None:
            return Match(name, "", f"exclude_modules '{excluded}'")
        if (hit := save.ancestor(name)) is not None:
            return Match(name, "", f"inside modules_to_save '{hit}'")
        if (hit := target.match(name)) is None:
            return Match(name, "", "no target matches")
        if wanted and hit != name and isinstance(targets, list):
            index = layer_index(name, lists)
            if index not in wanted:
                where = "not in a numbered layer" if index is None else f"layer {index} is not in layers_to_transform"
                return Match(name, "", f"target_modules '{hit}', but {where}")
        return adapted(name, "adapt", f"target_modules '{hit}'")

    matches = [decide(name) for name in names.kinds]
    for name in names.parameters:
        if (hit := parameter.match(name)) is not None:
            matches.append(adapted(name, "adapt parameter", f"target_parameters '{hit}'"))
    # what the user did not spell out needs no warning
    rules: list[Rule | PatternDict] = [exclude, save, parameter, ranks, alphas]
    if targets is config.target_modules:
        rules.insert(0, target)
    unused = {rule.option: [x for x in rule.unused if not (rule is save and x in heads)] for rule in rules}
    return Targeting(matches, targets, {option: items for option, items in unused.items() if items})


def saved_heads(config: LoraConfig) -> list[str]:
    """The names of the heads of transformers' classifiers, which a task trains in full."""
    return ["classifier", "score"] if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else []


def _targets(names: ModelNames, config: LoraConfig, defaults: Mapping[str, list[str] | str]) -> list[str] | str:
    """target_modules, with "all-linear" and None replaced by names."""
    targets = config.target_modules
    if targets is None and config.target_parameters:
        return []
    if targets is None:
        if names.model_type is None or names.model_type not in defaults:
            raise ValueError(
                f"Please specify target_modules: it is None, and there is no default for model_type="
                f"{names.model_type!r}; for every linear layer say target_modules='all-linear'"
            )
        return defaults[names.model_type]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [name for name, kind in names.kinds.items() if kind == "linear" and name not in names.heads]
        return exactly(linear, names.kinds)
    return targets


def check(targeting: Targeting, config: LoraConfig) -> list[str]:
    """The warnings that a targeting deserves.

    Raises:
        ValueError: nothing is adapted; says which rule removed what, and lists near names.
    """
    if not any(m.action.startswith("adapt") for m in targeting.matches):
        removed = [m for m in targeting.matches if m.rule != "no target matches"]
        known = [m.name for m in targeting.matches]
        asked = config.target_modules or config.target_parameters or []
        ends = {name.rpartition(".")[2] for name in known}
        near = {
            y for x in ([asked] if isinstance(asked, str) else asked[:50]) for y in difflib.get_close_matches(x, ends)
        }
        raise ValueError(
            f"nothing to adapt: target_modules={_cut(repr(config.target_modules))}, target_parameters="
            f"{_cut(repr(config.target_parameters))} match none of the model's {len(known)} modules"
            + "".join(f"; {m.name}: {m.rule}" for m in removed[:5])
            + (f"; near names: {', '.join(sorted(near))}" if near else f"; the model has: {', '.join(known[:8])}")
            + ("" if known else "only itself: wrap it, as in nn.Sequential(model), and target '0'")
            + ("; a string is a regular expression for the WHOLE name" if isinstance(asked, str) else "")
        )
    notes = {
        "rank_pattern": " among the adapted modules (a key must reach the end of the name)",
        "alpha_pattern": " among the adapted modules (a key must reach the end of the name)",
    }
    return [
        f"{option}: {_cut(', '.join(map(repr, items)))} matched nothing{notes.get(option, '')}"
        for option, items in targeting.unused.items()
    ]


def _cut(text: str) -> str:
    """Lists out of a file may be long; a message should not be."""
    return text if len(text) <= 1000 else f"{text[:1000]}..."
