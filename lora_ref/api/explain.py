"""`explain(model, config)`: what a configuration adapts, as a table, before anything is adapted."""

from dataclasses import asdict
from typing import Any

from torch import nn

from ..core import names as targeting
from ..core.config import LoraConfig
from ..core.model import describe
from ..core.names import Targeting
from .default_targets import ARCHITECTURES


class Explanation(Targeting):
    """A `Targeting` that prints itself as a table."""

    def to_dict(self) -> dict[str, Any]:
        """{"modules": {name: {action, rule, r, lora_alpha, scaling}}, "unused": {option: items}}."""
        rows = [asdict(match) for match in self.matches]
        return {"modules": {row.pop("name"): row for row in rows}, "unused": self.unused}

    def table(self) -> Any:
        """A `rich` table of the decisions, and a line for each rule that matched nothing."""
        from rich.table import Table
        from rich.text import Text

        unused = [f"{option} '{item}' matched nothing" for option, items in self.unused.items() for item in items]
        caption = Text("\n".join(unused)) if unused else None
        table = Table(title="What is adapted, and why", caption=caption, caption_justify="left")
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


def explain(model: nn.Module, config: LoraConfig) -> Explanation:
    """For every module: is it adapted, by which rule, with which r, alpha, s; and which rules matched nothing.

    The model is not changed. `print(explain(...))` is a table, `.to_dict()` the same for code.
    Raises: ValueError: target_modules is None and the architecture is not known, or a pattern is too slow.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> explain(net, LoraConfig(target_modules=["0"], exclude_modules=["2"])).to_dict()["modules"]["2"]["rule"]
    "exclude_modules '2'"
    """
    base = getattr(model, "get_base_model", lambda: model)()
    return Explanation(**vars(targeting.resolve(describe(base), config, ARCHITECTURES)))
