"""LoraConfig: what a user says. Everything is checked when the object is made.

Options have PEFT's names, defaults and meaning, so that configurations move both ways.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Collection
from enum import StrEnum
from typing import Any

from . import patterns
from .scaling import check_alpha, check_rank


class TaskType(StrEnum):
    """What the base model does; SEQ_CLS and TOKEN_CLS save the classification head with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "corda", "eva", "mica", "lora_ga")


def near(word: str, known: Collection[str]) -> str:
    """The hint for a misspelt name: '; did you mean ...?', or nothing.

    >>> near("lora_alhpa", ["lora_alpha", "r"])
    "; did you mean 'lora_alpha'?"
    """
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def options(cls: type) -> type:
    """A keyword-friendly dataclass whose constructor names the nearest option when one is unknown."""
    cls = dataclasses.dataclass(cls)
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        known = [f.name for f in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}{near(name, known)}")
        original(self, *args, **kwargs)

    __init__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _require(ok: bool, name: str, value: object, allowed: str) -> None:
    if not ok:
        shown = repr(value)
        raise ValueError(f"{name}={shown[:80]}{'...' if len(shown) > 80 else ''}: must be {allowed}")


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < math.inf


def _check_bools(config: object, *names: str) -> None:
    for name in names:
        _require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")


@options
class EvaConfig:
    """Options of `init_lora_weights="eva"`. Source: arXiv 2410.07170.

    rho >= 1: a layer's rank may grow to round(r * rho). 0 <= tau <= 1: the cosine between successive
    components above which they count as converged.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _require(_is_number(self.rho) and self.rho >= 1, "rho", self.rho, "a number >= 1")
        _require(_is_number(self.tau) and 0 <= self.tau <= 1, "tau", self.tau, "a number in [0, 1]")
        _require(type(self.label_mask_value) is int, "label_mask_value", self.label_mask_value, "an int")
        _check_bools(self, "use_label_mask", "whiten", "adjust_scaling_factors")


@options
class LoftQConfig:
    """Options of `init_lora_weights="loftq"`. Source: arXiv 2310.08659."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        bits, steps = self.loftq_bits, self.loftq_iter
        _require(type(bits) is int and bits in (2, 4, 8), "loftq_bits", bits, "2, 4 or 8")
        _require(type(steps) is int and steps > 0, "loftq_iter", steps, "an int > 0")


@options
class CordaConfig:
    """Options of `init_lora_weights="corda"`: "ipm" learns the task, "kpm" keeps world knowledge.

    Source: arXiv 2406.05223.
    """

    corda_method: str = "ipm"

    def __post_init__(self) -> None:
        _require(self.corda_method in ("ipm", "kpm"), "corda_method", self.corda_method, "'ipm' or 'kpm'")


SUB_CONFIGS = {"eva_config": EvaConfig, "loftq_config": LoftQConfig, "corda_config": CordaConfig}


@options
class LoraConfig:
    """How to adapt a model. Every option is checked when the object is made.

    Attributes:
        r: rank of the update, an int > 0. A (r, in), B (out, r).
        lora_alpha: numerator of the scaling s = lora_alpha / r; any finite number.
        use_rslora: s = lora_alpha / sqrt(r) instead.
        target_modules: which modules. A list of names or dotted ends of names ("q_proj",
            "self_attn.q_proj"); a string is one regular expression that must match the whole name;
            "all-linear"; [] for none (with target_parameters); None to choose by architecture.
        exclude_modules: the same forms; wins over target_modules.
        layers_to_transform: only these layer indices (with a list of targets).
        layers_pattern: name(s) of the layer list the index belongs to.
        rank_pattern, alpha_pattern: {regular expression: value}; it must reach the end of a module's
            name and may start at any dot; the first that matches wins.
        target_parameters: raw parameters to adapt, "experts.gate_up_proj"; 2-D or 3-D.
        modules_to_save: modules trained whole, a copy for each adapter.
        lora_dropout: probability in [0, 1] on the input of A, in training only.
        bias: "none", "all" or "lora_only": which biases of the BASE model train as well.
        fan_in_fan_out: recorded only; how a layer stores its weight is read off the layer.
        init_lora_weights: True, False, or one of "gaussian", "orthogonal", ...
        task_type: see TaskType. inference_mode: create the adapter frozen.
        eva_config, loftq_config, corda_config: options of the inits of these names.
        base_model_name_or_path, revision: notes for the reader of the adapter file.

    Raises:
        ValueError: a value outside of what is allowed; TypeError: an unknown option name.

    Source: PEFT's LoraConfig. Differs from PEFT: bad values are errors (there `lora_dropout=-1`,
    `bias="al"` or `init_lora_weights="gausian"` are found late or never).

    >>> LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={r"layers\\.0\\..*": 8})
    LoraConfig(r=4, target_modules=['q_proj'], rank_pattern={'layers\\\\.0\\\\..*': 8})
    >>> LoraConfig(lora_alhpa=16)
    Traceback (most recent call last):
    ...
    TypeError: LoraConfig has no option 'lora_alhpa'; did you mean 'lora_alpha'?
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
    eva_config: EvaConfig | None = None
    loftq_config: LoftQConfig | None = None
    corda_config: CordaConfig | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    peft_type = "LORA"  # a constant, not an option: PEFT's files carry it

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        p = self.lora_dropout
        _require(_is_number(p) and 0 <= p <= 1, "lora_dropout", p, "a number in [0, 1]")
        _require(self.bias in ("none", "all", "lora_only"), "bias", self.bias, "'none', 'all' or 'lora_only'")
        _check_bools(self, "use_rslora", "fan_in_fan_out", "inference_mode")
        self._check_targets()
        self._check_init()
        if self.task_type is not None:
            _require(self.task_type in list(TaskType), "task_type", self.task_type, f"one of {', '.join(TaskType)}")
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, str), name, value, "a string or None")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                _require(value != "", name, value, "a non-empty string, a list or None")
                patterns.check(value, name)
            elif value is not None:
                setattr(self, name, _names(name, value))
        for pattern in self.layers_pattern if isinstance(self.layers_pattern, list) else []:
            patterns.check(pattern, "layers_pattern")
        for name in ("target_parameters", "modules_to_save"):
            if getattr(self, name) is not None:
                setattr(self, name, _names(name, getattr(self, name)))
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [0 if indices is None else indices]:
            _require(type(index) is int, "layers_to_transform", indices, "an int, a list of ints or None")
        self.layers_to_transform = list(indices) if isinstance(indices, tuple) else indices
        if indices not in (None, [], ()) and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list; put the layers into the regex")
        if self.layers_pattern and indices in (None, [], ()):
            raise ValueError("layers_pattern is given without layers_to_transform: say which layers")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            value = {} if getattr(self, name) is None else getattr(self, name)
            _require(isinstance(value, dict), name, value, "a dict {regular expression: value}")
            for key, number in value.items():
                _require(isinstance(key, str), name, key, "a dict whose keys are strings")
                patterns.check(key, name)
                check(number, f"{name}[{key!r}]")
            setattr(self, name, dict(value))
        if self.target_parameters and (self.lora_dropout or self.fan_in_fan_out):
            raise ValueError(
                "target_parameters works with lora_dropout=0 and fan_in_fan_out=False only: the update is added "
                "to the parameter itself, so there is no input of A to drop"
            )

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if isinstance(init, str):
            self.init_lora_weights = init = init.lower()
        niter = init.removeprefix("pissa_niter_") if isinstance(init, str) else ""
        known = isinstance(init, bool) or init in INITS or (niter != init and niter.isascii() and niter.isdigit())
        allowed = f"True, False, 'pissa_niter_<n>', {', '.join(map(repr, INITS))}"
        _require(known, "init_lora_weights", init, allowed)
        for name, cls in SUB_CONFIGS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, cls(**value) if value else None)
            else:
                _require(value is None or isinstance(value, cls), name, value, f"a {cls.__name__}, a dict or None")
        if self.loftq_config is not None and init != "loftq":
            warnings.warn("loftq_config is given but init_lora_weights is not 'loftq': it is ignored", stacklevel=4)
        if init == "loftq" and self.loftq_config is None:
            raise ValueError("init_lora_weights='loftq' needs a loftq_config, for example LoftQConfig(loftq_bits=4)")

    def __repr__(self) -> str:
        default = {f.name: f.default if f.default is not dataclasses.MISSING else {} for f in dataclasses.fields(self)}
        said = {name: value for name, value in vars(self).items() if name in default and value != default[name]}
        return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in said.items())})"


def _names(option: str, value: Any) -> list[str]:
    """A list of strings from any collection of strings, sets in sorted order."""
    if isinstance(value, str):
        raise TypeError(f"{option}={value!r}: must be a list of names; write [{value!r}]")
    ok = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(x, str) and x for x in value)
    _require(ok, option, value, "a list of non-empty strings")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
