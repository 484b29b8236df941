"""`explain(model, config)`: what a configuration adapts, as a table, before anything is adapted."""

from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..core import names as targeting
from ..core.config import LoraConfig
from ..core.names import Targeting
from ..safe.unreached import describe
from .default_targets import ARCHITECTURES
from .inject import lora_model_of
from .model import LoraModel


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


def explain(model: Any, config: LoraConfig | str | None = None) -> Explanation:
    """For every module: is it adapted, by which rule, with which r, alpha, s; and which rules matched nothing.

    The model is not changed. `print(explain(...))` is a table, `.to_dict()` the same for code. Of an adapted model,
    `config` may be an adapter's name, or None for the (first) active adapter.
    Raises: ValueError: target_modules is None and the architecture is not known, a pattern is too slow, or there is no
    such adapter.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> explain(net, LoraConfig(target_modules=["0"], exclude_modules=["2"])).to_dict()["modules"]["2"]["rule"]
    "exclude_modules '2'"
    """
    adapted: LoraModel | None = None
    with suppress(ValueError):  # no adapters
        adapted, _ = lora_model_of(model)
    base = adapted.model if adapted is not None else model
    if not isinstance(config, LoraConfig):
        if adapted is None or not adapted.peft_config:
            raise ValueError(f"config={config!r}: the model has no adapter to explain; give a LoraConfig")
        name = config or (adapted.active_adapters or list(adapted.peft_config))[0]
        adapted._check_known(name)
        config = adapted.peft_config[name]
        assert isinstance(config, LoraConfig)
    return Explanation(**vars(targeting.resolve(describe(base), config, ARCHITECTURES)))
