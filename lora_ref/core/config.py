"""LoraConfig: what a user asks for. Options have PEFT's names, defaults and meaning."""

import dataclasses
import re
import warnings
from collections.abc import Iterable
from enum import StrEnum
from typing import Any, ClassVar

from .inits import METHODS, method_of
from .scaling import check_alpha, check_rank


class TaskType(StrEnum):
    """What the base model does. SEQ_CLS and TOKEN_CLS save the classification head with the adapter."""

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
    """A regular expression of an option. `safe.regexes` has one that ends in time.

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
        """`re.match`: from the start of the name."""
        return self.compiled.match(name)

    def fullmatch(self, name: str) -> Any:
        """`re.fullmatch`: the whole name."""
        return self.compiled.fullmatch(name)

    @classmethod
    def compile_all(cls, texts: Iterable[str], option: str, template: str = "{}") -> list["Pattern"]:
        """The patterns of one option; ValueError for one that cannot be compiled."""
        return [cls(text, option, template) for text in texts]


@dataclasses.dataclass(repr=False)
class LoraConfig:
    """How to adapt a model. Every option is checked when the object is made.

    Attributes:
        r: rank of the update, an int > 0. A (r, in), B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r; any finite number.
        use_rslora: s = lora_alpha / sqrt(r) instead.
        target_modules: a list of names or dotted ends of names ("q_proj", "self_attn.q_proj"); a
            string is one regular expression that must match the whole name; "all-linear"; [] for none
            (with target_parameters); None to choose by architecture.
        exclude_modules: the same forms; wins over target_modules.
        layers_to_transform: only these layer indices (with a list of targets).
        layers_pattern: name(s) of the layer list the index belongs to.
        rank_pattern, alpha_pattern: {regular expression: value}; it must reach the end of a module's
            name and may start at any dot; the first that matches wins.
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

    Raises:
        ValueError: a value outside of what is allowed; TypeError: an unknown option name.

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
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        p, task_type = self.lora_dropout, self.task_type
        require(type(p) in (int, float) and 0 <= p <= 1, "lora_dropout", p, "a number in [0, 1]")
        require(self.bias in ("none", "all", "lora_only"), "bias", self.bias, "'none', 'all' or 'lora_only'")
        require(self.peft_type == "LORA", "peft_type", self.peft_type, "'LORA'")
        allowed = f"one of {', '.join(TaskType)}"
        require(task_type is None or task_type in list(TaskType), "task_type", task_type, allowed)
        for name in ("use_rslora", "fan_in_fan_out", "inference_mode"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            require(value is None or isinstance(value, str), name, value, "a string or None")
        self._check_targets()
        if isinstance(self.init_lora_weights, str):
            self.init_lora_weights = self.init_lora_weights.lower()
        chosen = method_of(self.init_lora_weights)
        for option, cls in [(f"{name}_config", method.config) for name, method in METHODS.items() if method.config]:
            value = getattr(self, option)
            if isinstance(value, dict):
                setattr(self, option, cls(**value) if value else None)
            else:
                require(value is None or isinstance(value, cls), option, value, f"a {cls.__name__}, a dict or None")
        if self.loftq_config is not None and chosen != "loftq":
            warnings.warn("loftq_config is given but init_lora_weights is not 'loftq': it is ignored", stacklevel=3)
        if chosen == "loftq" and self.loftq_config is None:
            raise ValueError("init_lora_weights='loftq' needs a loftq_config, for example LoftQConfig(loftq_bits=4)")

    def _check_targets(self) -> None:
        regular = ("target_modules", "exclude_modules", "layers_pattern")
        for name in (*regular, "target_parameters", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, str) and name in regular:
                require(value != "", name, value, "a non-empty string, a list or None")
                self.pattern_type.compile_all([value], name)
            elif isinstance(value, str):
                raise TypeError(f"{name}={value!r}: must be a list of names; write [{value!r}]")
            elif value is not None:
                ok = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(x, str) and x for x in value)
                require(ok, name, value, "a list of non-empty strings")
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        if isinstance(self.layers_pattern, list):
            self.pattern_type.compile_all(self.layers_pattern, "layers_pattern")
        given = self.layers_to_transform
        indices = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
        ok = all(type(index) is int for index in indices)
        require(ok, "layers_to_transform", given, "an int, a list of ints or None")
        if isinstance(given, tuple):
            self.layers_to_transform = indices
        if indices and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list; put the layers into the regex")
        if self.layers_pattern and not indices:
            raise ValueError("layers_pattern is given without layers_to_transform: say which layers")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            value = {} if getattr(self, name) is None else getattr(self, name)
            ok = isinstance(value, dict) and all(isinstance(key, str) for key in value)
            require(ok, name, value, "a dict {regular expression: value}")
            for key, number in value.items():
                check(number, f"{name}[{key[:80]!r}]")
            if value:
                self.pattern_type.compile_all(value, name)
            setattr(self, name, dict(value))
        if self.target_parameters and (self.lora_dropout or self.fan_in_fan_out):
            raise ValueError(
                "target_parameters works with lora_dropout=0 and fan_in_fan_out=False only: the update is added "
                "to the parameter itself, so there is no input of A to drop"
            )

    def __repr__(self) -> str:
        default = {f.name: f.default if f.default is not dataclasses.MISSING else {} for f in dataclasses.fields(self)}
        said = {name: value for name, value in vars(self).items() if name in default and value != default[name]}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in said.items())})"
