"""LoraConfig: what a user asks for. Options have PEFT's names, defaults and meaning."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, ClassVar

from .inits import METHODS, method_of
from .scaling import check_alpha, check_rank


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """ValueError that says what was given and what is allowed, unless ok."""
    if not ok:
        shown = repr(value)
        raise ValueError(f"{name}={shown[:80]}{'...' if len(shown) > 80 else ''}: must be {allowed}")


class Pattern:
    """The regular expressions of an option. `safe.regexes` has one whose matches end in time."""

    @classmethod
    def compile_all(cls, texts: Iterable[str], option: str, template: str = "{}") -> list[Any]:
        """One object for each text, with the methods `match` and `fullmatch` of `re`."""
        return [re.compile(template.replace("{}", text)) for text in texts]


@dataclasses.dataclass(repr=False)
class LoraConfig:
    """How to adapt a model. `lora_ref.LoraConfig` has further checks, and explains the options in full."""

    r: int = 8  # A (r, in), B (out, r)
    lora_alpha: float = 8  # s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    target_modules: list[str] | str | None = None  # names or ends of names, one regular expression, or "all-linear"
    exclude_modules: list[str] | str | None = None  # wins over target_modules
    layers_to_transform: list[int] | int | None = None  # the only indices, in a list of layers of this name:
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)  # {regular expression: r}
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: list[str] | None = None  # raw parameters, "experts.gate_up_proj"
    modules_to_save: list[str] | None = None  # trained in full, a copy for each adapter
    lora_dropout: float = 0.0  # the probability to drop an input of A, in training
    bias: str = "none"  # which biases of the base model train as well
    use_rslora: bool = False
    fan_in_fan_out: bool = False  # recorded only: how a layer stores its weight is read off the layer
    init_lora_weights: bool | str = True  # a key of `inits.METHODS`
    task_type: str | None = None  # a key of `names.HEADS` trains and saves the classification head
    inference_mode: bool = False  # create the adapter frozen
    eva_config: Any = None  # the options of the init "eva", and so on
    loftq_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: str = "LORA"  # the only value there is: PEFT's files carry it

    pattern_type: ClassVar[type[Pattern]] = Pattern

    def __post_init__(self) -> None:
        self.check_options()
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        p = self.lora_dropout
        require(type(p) in (int, float) and 0 <= p <= 1, "lora_dropout", p, "a number in [0, 1]")
        require(self.bias in ("none", "all", "lora_only"), "bias", self.bias, "'none', 'all' or 'lora_only'")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            setattr(self, name, dict(getattr(self, name) or {}))
            for key, value in getattr(self, name).items():
                check(value, f"{name}[{key[:80]!r}]")
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        method_of(self.init_lora_weights)
        for option, cls in [(f"{name}_config", method.config) for name, method in METHODS.items() if method.config]:
            value = getattr(self, option)
            if isinstance(value, dict):
                setattr(self, option, cls(**value) if value else None)
            else:
                require(value is None or isinstance(value, cls), option, value, f"a {cls.__name__}, a dict or None")

    def check_options(self) -> None:
        """The class of users refuses wrong types and combinations here: `safe.strict.check_options`."""

    def __repr__(self) -> str:
        default = {f.name: {} if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(self)}
        shown = [f"{name}={value!r}" for name, value in vars(self).items() if value != default.get(name, value)]
        return f"{type(self).__name__}({', '.join(shown)})"
