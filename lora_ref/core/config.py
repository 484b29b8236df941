"""LoraConfig: what a user asks for. Options have PEFT's names, defaults and meaning."""

import dataclasses
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, ClassVar

from .inits import METHODS, method_of
from .scaling import check_alpha, check_rank


class TaskType(StrEnum):
    """What the base model does. SEQ_CLS and TOKEN_CLS train and save the classification head."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """ValueError that says what was given and what is allowed, unless ok."""
    if not ok:
        shown = repr(value)
        raise ValueError(f"{name}={shown[:80]}{'...' if len(shown) > 80 else ''}: must be {allowed}")


class Pattern:
    """A regular expression of an option, with `re`'s methods; ValueError if it cannot be compiled.

    >>> Pattern(r".*\\.(q|v)_proj").fullmatch("layers.0.q_proj") is not None
    True
    """

    def __init__(self, text: str, option: str = "pattern", template: str = "{}") -> None:
        self.text, self.option = text, option
        try:
            re.compile(text)  # by itself: its brackets must not close those of the template
            self.compiled = re.compile(template.replace("{}", text))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{option}: {text[:80]!r} is not a usable regular expression: {error}") from error

    def match(self, name: str) -> Any:
        return self.compiled.match(name)

    def fullmatch(self, name: str) -> Any:
        return self.compiled.fullmatch(name)

    @classmethod
    def compile_all(cls, texts: Iterable[str], option: str, template: str = "{}") -> list["Pattern"]:
        """The patterns of one option."""
        return [cls(text, option, template) for text in texts]


@dataclasses.dataclass(repr=False)
class LoraConfig:
    """How to adapt a model. Every option is checked when the object is made.

    Attributes:
        r: rank of the update, an int > 0. A (r, in), B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r; any finite number.
        use_rslora: s = lora_alpha / sqrt(r) instead.
        target_modules: a list of names or dotted ends of names ("q_proj", "self_attn.q_proj"); a string is one regular
            expression that must match the whole name; "all-linear"; [] for none (with target_parameters); None to
            choose by architecture.
        exclude_modules: the same forms; wins over target_modules.
        layers_to_transform, layers_pattern: only these layer indices (with a list of targets), of this layer list.
        rank_pattern, alpha_pattern: {regular expression: value}; it must reach the end of a module's name and may
            start at any dot; the first that matches wins.
        target_parameters: raw parameters to adapt, "experts.gate_up_proj"; 2-D or 3-D.
        modules_to_save: modules trained in full, a copy for each adapter.
        lora_dropout: probability in [0, 1] on the input of A, in training only.
        bias: "none", "all" or "lora_only": which biases of the BASE model train as well.
        fan_in_fan_out: recorded only; how a layer stores its weight is read off the layer.
        init_lora_weights: True, False, or one of "gaussian", "orthogonal", ...
        task_type: see TaskType. inference_mode: create the adapter frozen.
        eva_config, loftq_config, corda_config, lora_ga_config: options of the inits of these names.
        base_model_name_or_path, revision: notes for the reader of the adapter file.

    Numbers are plain Python numbers, not NumPy's.
    Raises: ValueError for a value outside of what is allowed, TypeError for an unknown option.

    Source: PEFT's LoraConfig. Differs from PEFT: bad values are errors (there `lora_dropout=-1`, `bias="al"` or
    `init_lora_weights="gausian"` are found late or never); `get_peft_model` does not change a user's object.

    >>> LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={r"layers\\.0\\..*": 8})
    LoraConfig(r=4, target_modules=['q_proj'], rank_pattern={'layers\\\\.0\\\\..*': 8})
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    task_type: TaskType | str | None = None
    inference_mode: bool = False
    eva_config: Any = None  # lora_ref.EvaConfig, a dict or None; the next three likewise
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
