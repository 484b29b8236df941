"""What becomes of every module: the decision that injection follows and `explain` prints.

    modules_to_save  ->  exclude_modules  ->  target_modules        the first that matches wins

Pure functions on names: what is known of the model comes in as a `ModelNames`.
"""

import difflib
from dataclasses import asdict, dataclass, field
from typing import Any

from ..api.default_targets import ARCHITECTURES
from . import patterns
from .config import LoraConfig, TaskType
from .scaling import scaling


@dataclass(frozen=True)
class ModelNames:
    """All that targeting knows of a model: names in order of traversal, and what stands behind them."""

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

    def table(self) -> Any:
        """A `rich` table of the decisions, and a line for each rule that matched nothing."""
        from rich.table import Table
        from rich.text import Text

        unused = [f"{option} '{item}' matched nothing" for option, items in self.unused.items() for item in items]
        table = Table(
            title="What is adapted, and why",
            caption=Text("\n".join(unused)) if unused else None,
            caption_justify="left",
        )
        for heading in ("module", "", "rule"):
            table.add_column(heading, overflow="fold")
        for heading in ("r", "alpha", "s"):
            table.add_column(heading, justify="right")
        for m in self.matches:
            numbers = ("", "", "") if m.r is None else (str(m.r), f"{m.lora_alpha:g}", f"{m.scaling:.4g}")
            table.add_row(Text(m.name), m.action, Text(m.rule), *numbers, style=None if m.action else "dim")
        return table

    __rich__ = table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def resolve(names: ModelNames, config: LoraConfig) -> Targeting:
    """Decide for every module whether it is adapted, saved whole or left, by which rule, with which r, alpha, s.

    Never fails because of a match: errors are `check`'s.

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
    targets = _targets(names, config)
    target, exclude = patterns.Rule("target_modules", targets), patterns.Rule("exclude_modules", config.exclude_modules)
    heads = saved_heads(config)
    save = patterns.Rule("modules_to_save", [*(config.modules_to_save or []), *heads])
    parameter = patterns.Rule("target_parameters", config.target_parameters)
    ranks = patterns.PatternDict("rank_pattern", config.rank_pattern)
    alphas = patterns.PatternDict("alpha_pattern", config.alpha_pattern)
    lists = patterns.layer_lists(config.layers_pattern)
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
            index = patterns.layer_index(name, lists)
            if index not in wanted:
                where = "not in a numbered layer" if index is None else f"layer {index} is not in layers_to_transform"
                return Match(name, "", f"target_modules '{hit}', but {where}")
        return adapted(name, "adapt", f"target_modules '{hit}'")

    matches = [decide(name) for name in names.kinds]
    for name in names.parameters:
        if (hit := parameter.match(name)) is not None:
            matches.append(adapted(name, "adapt parameter", f"target_parameters '{hit}'"))
    # what the user did not spell out needs no warning
    rules: list[patterns.Rule | patterns.PatternDict] = [exclude, save, parameter, ranks, alphas]
    if targets is config.target_modules:
        rules.insert(0, target)
    unused = {rule.option: [x for x in rule.unused if not (rule is save and x in heads)] for rule in rules}
    return Targeting(matches, targets, {option: items for option, items in unused.items() if items})


def saved_heads(config: LoraConfig) -> list[str]:
    """The names under which transformers' classifiers keep the head that a task needs trained."""
    return ["classifier", "score"] if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) else []


def _targets(names: ModelNames, config: LoraConfig) -> list[str] | str:
    """target_modules with "all-linear" and None spelt out."""
    targets = config.target_modules
    if targets is None and config.target_parameters:
        return []
    if targets is None:
        if names.model_type not in ARCHITECTURES:
            raise ValueError(
                f"Please specify target_modules: it is None, and there is no default for model_type="
                f"{names.model_type!r}; for every linear layer say target_modules='all-linear'"
            )
        return ARCHITECTURES[names.model_type]
    if isinstance(targets, str) and targets.lower() == "all-linear":
        linear = [name for name, kind in names.kinds.items() if kind == "linear" and name not in names.heads]
        return patterns.exactly(linear, names.kinds)
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
