"""Which modules, with which rank and alpha: pure functions on names.

    modules_to_save  ->  exclude_modules  ->  target_modules        the first that matches wins

A name is a module's dotted path in the base model, "model.layers.0.self_attn.q_proj". A list of targets holds names
or ends of names, taken literally. A string is a regular expression.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .config import LoraConfig, Pattern, TaskType
from .scaling import scaling


class Rule:
    """One option of names. It records which of its items matched.

    A list matches literally: an item is a name, or a dotted end of one ("q_proj" of "attn.q_proj"). A string is one
    regular expression for the whole name. The keys of a dict are regular expressions, the first that matches wins. A
    key must reach the end of the name and may start at any dot; "^" ties it to the start.

    >>> [Rule("target_modules", ["q_proj"]).match(name) for name in ("q_proj", "attn.q_proj", "attn.xq_proj")]
    ['q_proj', 'q_proj', None]
    >>> Rule("rank_pattern", {"q_proj": 4}).match("attn.q_proj")
    'q_proj'
    """

    def __init__(self, option: str, value: Any, pattern_type: type[Pattern] = Pattern):
        self.option, self.used = option, set[str]()
        self.items = [value] if isinstance(value, str) else list(value or ())
        self.literal, self.exact = not isinstance(value, str | dict), set(self.items)
        template = r"(.*\.)?({})" if isinstance(value, dict) else "{}"
        self.patterns = [] if self.literal or not value else pattern_type.compile_all(self.items, option, template)

    def match(self, name: str) -> str | None:
        """The item that matches the name (in a list the longest one), or None."""
        if not self.literal:
            found = next((pattern.text for pattern in self.patterns if pattern.fullmatch(name)), None)
            self.used |= {found} if found is not None else set()
            return found
        # the dotted ends of a name are few; the items may be hundreds
        ends = [name[start:] for start in [0, *(i + 1 for i, c in enumerate(name) if c == ".")]]
        hits = [end for end in ends if end in self.exact]
        self.used.update(hits)
        return hits[0] if hits else None

    def ancestor(self, name: str) -> str | None:
        """The item that matches the name or a parent of it."""
        while name:
            if hit := self.match(name):
                return hit
            name = name.rpartition(".")[0]
        return None


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


def layer_index(name: str, patterns: Iterable[Pattern]) -> int | None:
    """The index of the layer that a module is in, or None. `patterns` come from `layer_lists`.

    >>> any_list, layers = layer_lists(None), layer_lists("layers")
    >>> layer_index("model.layers.3.experts.5.up", any_list)  # the first number counts
    3
    >>> layer_index("layers.3.up", any_list), layer_index("layers.3.up", layers)
    (None, 3)
    """
    found = (match for pattern in patterns if (match := pattern.match(name)))
    return next((int(match["lora_ref_index"]) for match in found), None)


def layer_lists(names: list[str] | str | None, pattern_type: type[Pattern] = Pattern) -> list[Pattern]:
    """Patterns of a list of layers in a name, followed by the layer's index.

    Without layers_pattern: any number that follows two name segments ("model.layers.3.mlp"). With it: the number
    after a segment of that name, at the root too.
    """
    if not names:
        return [Pattern(r".*?\.[^.]*\.(?P<lora_ref_index>\d+)\.")]
    texts = [names] if isinstance(names, str) else names
    return pattern_type.compile_all(texts, "layers_pattern", r"(?:^|.*?\.)(?:{})\.(?P<lora_ref_index>\d+)\.")


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


# the names of the heads of transformers' classifiers, which a task trains in full
HEADS: dict[str, list[str]] = {task: ["classifier", "score"] for task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)}


def resolve(names: ModelNames, config: LoraConfig, defaults: Mapping[str, list[str] | str] | None = None) -> Targeting:
    """Decide for every module whether it is adapted, saved or left, by which rule, with which r, alpha and s.

    `defaults` are the target_modules of each architecture, for target_modules=None.

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
    targets, pattern_type = _targets(names, config, defaults or {}), config.pattern_type
    heads = HEADS.get(config.task_type or "", [])
    target = Rule("target_modules", targets, pattern_type)
    exclude = Rule("exclude_modules", config.exclude_modules, pattern_type)
    save = Rule("modules_to_save", [*(config.modules_to_save or []), *heads])
    parameter = Rule("target_parameters", config.target_parameters)
    ranks = Rule("rank_pattern", config.rank_pattern, pattern_type)
    alphas = Rule("alpha_pattern", config.alpha_pattern, pattern_type)
    indices = config.layers_to_transform
    indices = [indices] if isinstance(indices, int) else indices
    lists = layer_lists(config.layers_pattern, pattern_type) if indices else []

    def adapted(name: str, action: str, rule: str) -> Match:
        rank_key, alpha_key = ranks.match(name), alphas.match(name)
        r = config.r if rank_key is None else config.rank_pattern[rank_key]
        alpha = config.lora_alpha if alpha_key is None else config.alpha_pattern[alpha_key]
        for option, key in (("rank_pattern", rank_key), ("alpha_pattern", alpha_key)):
            rule += f", {option} '{key}'" if key is not None else ""
        return Match(name, action, rule, r, alpha, scaling(r, alpha, config.use_rslora))

    def decide(name: str) -> Match:
        excluded = exclude.match(name)  # from being adapted; a module that is saved is still saved
        if save.items:
            hit = save.match(name)
            if hit is not None and save.ancestor(name.rpartition(".")[0]) is None:
                return Match(name, "save", f"modules_to_save '{hit}'")
        if excluded is not None:
            return Match(name, "", f"exclude_modules '{excluded}'")
        if save.items and (hit := save.ancestor(name)) is not None:
            return Match(name, "", f"inside modules_to_save '{hit}'")
        if (hit := target.match(name)) is None:
            return Match(name, "", "no target matches")
        if indices and hit != name and isinstance(targets, list):
            index = layer_index(name, lists)
            if index not in indices:
                where = "not in a numbered layer" if index is None else f"layer {index} is not in layers_to_transform"
                return Match(name, "", f"target_modules '{hit}', but {where}")
        return adapted(name, "adapt", f"target_modules '{hit}'")

    matches = [decide(name) for name in names.kinds]
    for name in names.parameters:
        if (hit := parameter.match(name)) is not None:
            matches.append(adapted(name, "adapt parameter", f"target_parameters '{hit}'"))
    # targets that the user did not write need no warning
    rules = [target] * (targets is config.target_modules) + [exclude, save, parameter, ranks, alphas]
    unused = {r.option: [x for x in r.items if x not in r.used and not (r is save and x in heads)] for r in rules}
    return Targeting(matches, targets, {option: items for option, items in unused.items() if items})


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
