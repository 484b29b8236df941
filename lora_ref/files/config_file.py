"""adapter_config.json: a LoraConfig in PEFT's format. The file is not trusted.

Options of PEFT that this library does not have are accepted when they are off. When they are on, they are an error:
without them the model would be another one.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

from ..core import config as core
from ..core.inits import METHODS
from ..safe import regexes
from ..safe.strict import check_options, did_you_mean, prefix_errors, strict

MAX_BYTES = 10_000_000  # of JSON; real files have a few thousand

# keys of PEFT that do not change the mathematics
NOTES = ("auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size")


@strict
@dataclasses.dataclass(repr=False)
class LoraConfig(core.LoraConfig):
    """How to adapt a model. Every option is checked when the object is made.

    s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. A is (r, in), B (out, r). Numbers are Python's.

    Attributes:
        target_modules, exclude_modules: a list of names or of dotted ends of names ("q_proj", "self_attn.q_proj"). A
            string is one regular expression for a name in full. "all-linear". [] for none (with target_parameters).
            None to choose by architecture. exclude_modules wins.
        layers_to_transform, layers_pattern: only these indices, in layer lists of these names (for a list of targets).
        rank_pattern, alpha_pattern: {regular expression: value}. It must reach the end of a module's name and may
            start at any dot. The first that matches wins.
        target_parameters: raw parameters to adapt, "experts.gate_up_proj", with 2 or 3 dimensions.
        modules_to_save: modules trained in full, a copy for each adapter.
        lora_dropout: a probability in [0, 1], for the input of A in training.
        bias: "none", "all" or "lora_only": which biases of the base model train as well.
        init_lora_weights: True, False, or a key of `lora_ref.init.METHODS`. Some have options: eva_config and so on.
        fan_in_fan_out, base_model_name_or_path, revision: notes for the reader of the adapter file.

    Raises: ValueError: a value outside of what is allowed; TypeError: an unknown option name.
    Source: PEFT's LoraConfig.
    Differs from PEFT: bad values are errors at once (`lora_dropout=-1`). `get_peft_model` does not change the object.

    >>> LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={r"layers\\.0\\..*": 8})
    LoraConfig(r=4, target_modules=['q_proj'], rank_pattern={'layers\\\\.0\\\\..*': 8})
    >>> LoraConfig(lora_alhpa=16)
    Traceback (most recent call last):
    ...
    TypeError: LoraConfig has no option 'lora_alhpa'; did you mean 'lora_alpha'?
    """

    pattern_type = regexes.Pattern
    check_options = check_options

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types with PEFT's keys."""
        return dataclasses.asdict(self)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "LoraConfig":
        """Read the adapter_config.json of a folder; ValueError or OSError if there is no valid one."""
        return read(Path(directory) / "adapter_config.json")

    def save_pretrained(self, directory: str | Path) -> None:
        """Write adapter_config.json into a folder."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "adapter_config.json").write_text(dumps(self), encoding="utf-8")


def from_dict(data: dict[str, Any]) -> LoraConfig:
    """The inverse of `LoraConfig.to_dict`. It also reads the files of PEFT.

    Raises: ValueError: not a LoRA configuration, a bad value, or an unknown option that is on.

    >>> data = LoraConfig(r=4, target_modules=["q"]).to_dict()
    >>> data["peft_type"], data["r"], from_dict(data) == LoraConfig(r=4, target_modules=["q"])
    ('LORA', 4, True)
    """
    if not isinstance(data, dict) or data.get("peft_type") != "LORA":
        kind = data.get("peft_type") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"peft_type is {kind!r}: only 'LORA' adapters can be read")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    for key, value in data.items():
        if key in known or key in NOTES:
            continue
        if value:
            hint = "" if key in OFF_IN_PEFT else did_you_mean(key[:80], known)
            raise ValueError(f"the option {key[:80]}={str(value)[:80]!r} is not supported{hint}")
        if key not in OFF_IN_PEFT:
            note = f"unknown option {key[:80]}={value!r} in the adapter's configuration: it is off, and ignored"
            warnings.warn(note, stacklevel=3)
    options = {key: value for key, value in data.items() if key in known}
    for name, method in METHODS.items():
        key = f"{name}_config"
        if method.config and isinstance(options.get(key), dict):  # PEFT has more fields, for the computation only
            fields = {f.name for f in dataclasses.fields(method.config)}
            options[key] = {k: v for k, v in options[key].items() if k in fields}
    try:
        return LoraConfig(**options)
    except TypeError as error:  # such as a string for a list: a bad value too
        raise ValueError(str(error)) from error


# options of PEFT that are refused when they are on
OFF_IN_PEFT = (
    *("alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication"),
    *("lora_bias", "megatron_config", "monteclora_config", "trainable_token_indices"),
    *("use_bdlora", "use_dora", "use_qalora", "velora_config"),
)


def dumps(config: core.LoraConfig) -> str:
    """The text of adapter_config.json. Options are sorted. Patterns are not, because the first match counts."""
    return json.dumps(dict(sorted(dataclasses.asdict(config).items())), indent=2, allow_nan=False) + "\n"


def read(path: Path) -> LoraConfig:
    """Read and check adapter_config.json.

    Raises: FileNotFoundError: there is no file. ValueError: it is too large, not JSON, or not a valid configuration.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}; is it an adapter folder?")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes, which no adapter configuration is")
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    with prefix_errors(path):
        return from_dict(data)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return data


def _no_constants(text: str) -> float:
    raise ValueError(f"{text} is not a number that JSON knows")
