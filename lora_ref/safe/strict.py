"""Options are checked: their names, their types, and those that do not go together."""

import dataclasses
import difflib
import inspect
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from ..core.config import LoraConfig, require
from ..core.inits import METHODS


class PeftError(Exception):
    """What PEFT's own errors have in common."""


class NoMatchingPeftModuleError(PeftError, ValueError):
    """The configuration matches no module of the model."""


class PeftType(StrEnum):
    """The kind of an adapter: LoRA is the only one here."""

    LORA = "LORA"


class TaskType(StrEnum):
    """What the base model does. SEQ_CLS, TOKEN_CLS and QUESTION_ANS save the head with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The hint for a misspelt name: '; did you mean ...?', or nothing.

    >>> did_you_mean("lora_alhpa", ["lora_alpha", "r"])
    "; did you mean 'lora_alpha'?"
    """
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


@contextmanager
def prefix_errors(what: object) -> Iterator[None]:
    """A `with` block that puts what it is about before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


IGNORED = object()  # the off value of an option of PEFT that changes nothing


def levels_to_the_caller() -> int:
    """The stacklevel with which the function that calls this warns at the first line outside of lora_ref and torch."""
    frame, levels, packages = sys._getframe(1), 1, (__name__.partition(".")[0], "torch")
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] in packages:
        frame, levels = frame.f_back, levels + 1
    return levels


class Options(type):
    """The class of `Strict`: the options of a new object are looked at before `__init__` gets them."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in [name for name in kwargs if name not in known]:
            if not cls.is_off(name, kwargs.pop(name)):
                raise TypeError(f"{cls.__name__} has no option {name!r}{did_you_mean(name, known)}")
        return super().__call__(*args, **kwargs)

    def is_off(cls, name: str, value: object) -> bool:
        """Is it an option that only PEFT has, and off? ValueError: it is on."""
        elsewhere = getattr(cls, "options_of_peft", {})
        if value and elsewhere.get(name, IGNORED) is not IGNORED:
            raise ValueError(f"{name}={value!r}: is not supported; {name}={elsewhere[name]!r} is accepted")
        return name in elsewhere

    @property
    def __signature__(cls) -> inspect.Signature:
        _, *rest = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
        return inspect.Signature(rest)


class Strict(metaclass=Options):
    """A dataclass that refuses an unknown option, when it is made and when it is set, and names the nearest one.

    `options_of_peft` is {option: its off value} of what PEFT has and this class does not: off, they are accepted.
    """

    def __setattr__(self, name: str, value: object) -> None:
        known = list(self.__dataclass_fields__)  # type: ignore[attr-defined]
        if name in known:
            object.__setattr__(self, name, value)
        elif not type(self).is_off(name, value):
            raise AttributeError(f"{type(self).__name__} has no option {name!r}{did_you_mean(name, known)}")


def check_options(config: LoraConfig) -> None:
    """Check the options of a LoraConfig that `core.config` takes as they are, and turn sets and tuples into lists.

    Raises: ValueError: a value of a wrong type, a regular expression that cannot be used, or options that do not go
    together; TypeError: one name where a list of names is needed.
    """
    task_type, allowed = config.task_type, f"one of {', '.join(TaskType)}"
    require(task_type is None or task_type in list(TaskType), "task_type", task_type, allowed)
    require(config.peft_type == "LORA", "peft_type", config.peft_type, "'LORA'")
    config.peft_type = PeftType.LORA
    for name in ("use_rslora", "fan_in_fan_out", "inference_mode"):
        require(isinstance(getattr(config, name), bool), name, getattr(config, name), "True or False")
    for name in ("base_model_name_or_path", "revision"):
        value = getattr(config, name)
        require(value is None or isinstance(value, str), name, value, "a string or None")
    regular = ("target_modules", "exclude_modules", "layers_pattern")
    for name in (*regular, "target_parameters", "modules_to_save"):
        value = getattr(config, name)
        if isinstance(value, str) and name in regular:
            require(value != "", name, value, "a non-empty string, a list or None")
            config.pattern_type.compile_all([value], name)
        elif isinstance(value, str):
            raise TypeError(f"{name}={value!r}: must be a list of names; write [{value!r}]")
        elif value is not None:
            ok = isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(x, str) and x for x in value)
            require(ok, name, value, "a list of non-empty strings")
            setattr(config, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
    if isinstance(config.layers_pattern, list):
        config.pattern_type.compile_all(config.layers_pattern, "layers_pattern")
    given: Any = config.layers_to_transform
    indices = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    ok = all(type(index) is int for index in indices)
    require(ok, "layers_to_transform", given, "an int, a list of ints or None")
    if isinstance(given, tuple):
        config.layers_to_transform = indices
    if indices and isinstance(config.target_modules, str):
        raise ValueError("layers_to_transform needs target_modules to be a list; put the layers into the regex")
    if config.layers_pattern and not indices:
        raise ValueError("layers_pattern is given without layers_to_transform: say which layers")
    for name in ("rank_pattern", "alpha_pattern"):
        value = getattr(config, name)
        require(value is None or isinstance(value, dict), name, value, "a dict {regular expression: value}")
        for key in value or ():
            require(isinstance(key, str), name, key, "a dict whose keys are strings")
        if value:
            config.pattern_type.compile_all(value, name)
    if config.target_parameters and (config.lora_dropout or config.fan_in_fan_out):
        why = "the update is added to the parameter itself, so there is no input of A to drop"
        raise ValueError(f"target_parameters works with lora_dropout=0 and fan_in_fan_out=False only: {why}")
    chosen = str(config.init_lora_weights).lower()
    for key in [key for key, method in METHODS.items() if method.config]:
        given = getattr(config, f"{key}_config")
        if given and chosen != key:
            what = f"{key}_config is given but init_lora_weights is not {key!r}: it is ignored"
            warnings.warn(what, stacklevel=levels_to_the_caller())
    if chosen == "loftq" and not config.loftq_config:
        raise ValueError("init_lora_weights='loftq' needs a loftq_config, for example LoftQConfig(loftq_bits=4)")
