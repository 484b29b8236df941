"""LoraConfig: what a user says. Everything is checked when the object is made.

Options have PEFT's names, defaults and meaning, so that configurations move both ways.
"""

import dataclasses
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..safe import regexes
from .inits import method_of
from .options import (
    SUB_CONFIGS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    check_bools,
    is_number,
    name_list,
    require,
    strict,
)
from .scaling import check_alpha, check_rank


class TaskType(StrEnum):
    """What the base model does; SEQ_CLS and TOKEN_CLS save the classification head with the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@strict
@dataclasses.dataclass(repr=False)
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
        eva_config, loftq_config, corda_config, lora_ga_config: options of the inits of these names.
        base_model_name_or_path, revision: notes for the reader of the adapter file.

    Raises:
        ValueError: a value outside of what is allowed; TypeError: an unknown option name.

    Numbers are plain Python numbers, not NumPy's.

    Source: PEFT's LoraConfig. Differs from PEFT: bad values are errors (there `lora_dropout=-1`,
    `bias="al"` or `init_lora_weights="gausian"` are found late or never); the object that a user
    passes to `get_peft_model` is not changed.

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
    lora_ga_config: LoraGAConfig | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    peft_type: str = "LORA"  # the only value there is: PEFT's files carry it

    def __post_init__(self) -> None:
        check_rank(self.r)
        check_alpha(self.lora_alpha)
        p = self.lora_dropout
        require(is_number(p) and 0 <= p <= 1, "lora_dropout", p, "a number in [0, 1]")
        require(self.bias in ("none", "all", "lora_only"), "bias", self.bias, "'none', 'all' or 'lora_only'")
        check_bools(self, "use_rslora", "fan_in_fan_out", "inference_mode")
        require(self.peft_type == "LORA", "peft_type", self.peft_type, "'LORA'")
        self._check_targets()
        self._check_init()
        if self.task_type is not None:
            require(self.task_type in list(TaskType), "task_type", self.task_type, f"one of {', '.join(TaskType)}")
        for name in ("base_model_name_or_path", "revision"):
            value = getattr(self, name)
            require(value is None or isinstance(value, str), name, value, "a string or None")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                require(value != "", name, value, "a non-empty string, a list or None")
                regexes.check([value], name)
            elif value is not None:
                setattr(self, name, name_list(name, value))
        if isinstance(self.layers_pattern, list):
            regexes.check(self.layers_pattern, "layers_pattern")
        for name in ("target_parameters", "modules_to_save"):
            if getattr(self, name) is not None:
                setattr(self, name, name_list(name, getattr(self, name)))
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [0 if indices is None else indices]:
            require(type(index) is int, "layers_to_transform", indices, "an int, a list of ints or None")
        self.layers_to_transform = list(indices) if isinstance(indices, tuple) else indices
        if indices not in (None, [], ()) and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules to be a list; put the layers into the regex")
        if self.layers_pattern and indices in (None, [], ()):
            raise ValueError("layers_pattern is given without layers_to_transform: say which layers")
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            value = {} if getattr(self, name) is None else getattr(self, name)
            require(isinstance(value, dict), name, value, "a dict {regular expression: value}")
            for key, number in value.items():
                require(isinstance(key, str), name, key, "a dict whose keys are strings")
                check(number, f"{name}[{key[:80]!r}]")
            regexes.check(value, name)
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
        method_of(init)
        for name, cls in SUB_CONFIGS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                setattr(self, name, cls(**value) if value else None)
            else:
                require(value is None or isinstance(value, cls), name, value, f"a {cls.__name__}, a dict or None")
        if self.loftq_config is not None and init != "loftq":
            warnings.warn("loftq_config is given but init_lora_weights is not 'loftq': it is ignored", stacklevel=4)
        if init == "loftq" and self.loftq_config is None:
            raise ValueError("init_lora_weights='loftq' needs a loftq_config, for example LoftQConfig(loftq_bits=4)")

    def to_dict(self) -> dict[str, Any]:
        """The configuration in JSON's types, under PEFT's keys: see `lora_ref.files.config_file`."""
        from ..files import config_file  # it reads and writes this class, so it cannot be imported above

        return config_file.to_dict(self)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LoraConfig":
        """Read the adapter_config.json of a folder; ValueError or OSError if there is no valid one."""
        from ..files import config_file

        return config_file.read(Path(directory) / "adapter_config.json")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write adapter_config.json into a folder."""
        from ..files import config_file

        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "adapter_config.json").write_text(config_file.dumps(self), encoding="utf-8")

    def __repr__(self) -> str:
        default = {f.name: f.default if f.default is not dataclasses.MISSING else {} for f in dataclasses.fields(self)}
        said = {name: value for name, value in vars(self).items() if name in default and value != default[name]}
        return f"LoraConfig({', '.join(f'{name}={value!r}' for name, value in said.items())})"
