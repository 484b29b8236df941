"""adapter_config.json: a LoraConfig in PEFT's format. The file is not trusted.

Options of PEFT that this library does not have are accepted when they are off. When they are on, they are an error:
without them the model would be another one.
"""

import dataclasses
import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

from ..core import config as core
from ..core.inits import METHODS
from ..safe import regexes
from ..safe.strict import IGNORED, Strict, check_options, did_you_mean, levels_to_the_caller, prefix_errors

PEFT_VERSION = "0.21.2"  # the release whose format this is
MAX_BYTES = 10_000_000  # of JSON; real files have a few thousand

# keys of PEFT that do not change the mathematics, with the value that they have there
NOTES: dict[str, Any] = {"auto_mapping": None, "peft_version": PEFT_VERSION, "runtime_config": None}
NOTES |= {"megatron_core": "megatron.core", "qalora_group_size": 16}
# what PEFT passes to the hub or to accelerate. A local folder needs none of them
HUB = (
    *("revision", "token", "use_auth_token", "cache_dir", "force_download", "resume_download", "local_files_only"),
    *("proxies", "etag_timeout", "user_agent", "endpoint", "library_name", "library_version", "repo_type", "headers"),
    *("local_dir", "device_map", "max_memory", "offload_folder", "offload_dir", "offload_index"),
)


# options of PEFT that are refused when they are on
SWITCHES = ("ensure_weight_tying", "lora_bias", "use_bdlora", "use_dora", "use_qalora")
OTHERS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config"),
    *("monteclora_config", "trainable_token_indices", "velora_config"),
)
OFF_IN_PEFT: dict[str, Any] = dict.fromkeys(SWITCHES, False) | dict.fromkeys(OTHERS)


@dataclasses.dataclass(repr=False)
class LoraConfig(core.LoraConfig, Strict):
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
    options_of_peft: ClassVar[dict[str, Any]] = OFF_IN_PEFT | dict.fromkeys(NOTES, IGNORED)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON types with PEFT's keys."""
        return dataclasses.asdict(self)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> "LoraConfig":
        """Read the adapter_config.json of a folder, or of a `subfolder` in it. `kwargs` are PEFT's for the hub.

        Raises: ValueError, OSError: there is no valid one; TypeError: an unknown argument.
        """
        check_arguments("from_pretrained", kwargs, HUB)
        return read(Path(pretrained_model_name_or_path) / (subfolder or "") / "adapter_config.json")

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """The options in a file, as it has them, checked. ValueError or OSError if it is no configuration."""
        return read(Path(path_json_file)).to_dict()

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write adapter_config.json into a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "adapter_config.json").write_text(dumps(self), encoding="utf-8")


def check_arguments(function: str, kwargs: Collection[str], known: Collection[str]) -> None:
    """TypeError for a keyword argument that a function does not know."""
    if unknown := [name for name in kwargs if name not in known]:
        raise TypeError(f"{function} has no argument {unknown[0]!r}{did_you_mean(unknown[0], known)}")


for _name, _off in (OFF_IN_PEFT | NOTES | {"is_prompt_learning": False, "is_adaption_prompt": False}).items():
    # for scripts that ask for them
    setattr(LoraConfig, _name, _off)


def from_dict(data: dict[str, Any]) -> LoraConfig:
    """The inverse of `LoraConfig.to_dict`. It also reads the files of PEFT.

    Raises: ValueError: not a LoRA configuration, a bad value, or an unknown option that is on.

    >>> data = LoraConfig(r=4, target_modules=["q"]).to_dict()
    >>> str(data["peft_type"]), data["r"], from_dict(data) == LoraConfig(r=4, target_modules=["q"])
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
            warnings.warn(note, stacklevel=levels_to_the_caller())
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


def dumps(config: core.LoraConfig, base: Any = None) -> str:
    """The text of adapter_config.json. Options are sorted. Patterns are not, because the first match counts.

    Without a task_type, PEFT's AutoPeftModel finds the class of the base model in auto_mapping.
    """
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    data = {key: value for key, value in dataclasses.asdict(config).items() if key in known}
    data |= {"peft_version": PEFT_VERSION}
    if base is not None and config.task_type is None:
        data |= {"auto_mapping": {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}}
    data = dict(sorted(data.items()))
    if left := [f.name for f in dataclasses.fields(config) if f.name not in known]:
        what = f"{type(config).__name__}: {', '.join(left)} is not written, since no reader of the file knows it"
        warnings.warn(what, stacklevel=levels_to_the_caller())
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


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
