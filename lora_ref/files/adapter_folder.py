"""The adapter folder, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, in)    base_model.model.<module>.lora_B.weight (out, r)

The scaling is not stored: it follows from the configuration. All that is read is checked before anything changes. Only
safetensors is read: unpickling a file runs the program that it holds.
"""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .. import numerics
from ..core.config import LoraConfig
from ..core.inits import METHODS, method_of
from ..core.layer import InitialUpdate
from ..core.model import LoraModel, describe
from ..core.names import exactly
from ..core.update import Factors, at_least_float32
from ..safe.atomic import transaction
from ..safe.plain import gathered, is_main_process
from ..safe.strict import levels_to_the_caller, prefix_errors
from . import config_file, conversion
from . import file_pair as folder
from .adapter_tensors import (
    PREFIX,
    adapter_tensors,
    assign,
    embedding_tensors,
    first_few,
    layers_in_file,
    of_state_dict,
    without_engines,
)
from .file_pair import WEIGHTS
from .losses import check_as_configured, ends_to_save, warn_of_losses
from .model_card import write_card


def save_adapter(
    model: LoraModel,
    adapter_name: str,
    directory: Path,
    embeddings: bool | str,
    convert: bool,
    writes: bool | None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write one adapter's folder. PEFT loads it on the original base model with equal outputs.

    With convert=False an adapter whose initialisation changed the base weight is written as it is: right
    only on the changed base weight. Of several processes one writes, by default that of rank 0. Of a `state_dict` of
    the PeftModel its tensors are written.
    Raises: ValueError: a value of save_embedding_layers that is not True, False or "auto", or `state_dict` lacks a
    tensor; OSError: the disk.
    """
    config, found = model.peft_config[adapter_name], adapter_tensors(model, adapter_name)
    check_as_configured(model, adapter_name)
    found |= ends_to_save(model, adapter_name, embeddings)
    warn_of_losses(model, found, adapter_name, embeddings)
    live = {key: slot.tensor.detach() for key, slot in found.items()}
    if state_dict is not None:
        live = of_state_dict(model, state_dict, found, "base_model.")
    if convert:
        config, live = conversion.convert(model, adapter_name, live)
    else:  # of a targeted embedding, too, the residual
        for name, layer in layers_in_file(model, adapter_name).items():
            key = f"{PREFIX}{name}.base_layer.weight"
            if key in live and layer.part("lora_initial", adapter_name):
                live[key] = layer.stored(layer.residual(adapter_name))
    tensors = {key: gathered(tensor).cpu().contiguous().clone() for key, tensor in live.items()}
    if not (is_main_process() if writes is None else writes):
        return
    broken = [key for key, tensor in tensors.items() if not numerics.is_finite(tensor)]
    if broken:
        named = ", ".join(broken[:3] + ["..."] * (len(broken) > 3))
        text = f"adapter {adapter_name!r} holds NaN or infinite numbers ({named}): written, but it cannot be read back"
        warnings.warn(text, stacklevel=levels_to_the_caller())
    write_folder(directory, dataclasses.replace(config, inference_mode=True), tensors, model.model)
    write_card(directory, config, model.model)


def write_folder(directory: Path, config: LoraConfig, tensors: dict[str, Tensor], base: Any = None) -> None:
    """Replace both files of the folder: the old pair or the new one is there, never a part (see `folder`)."""

    def write(path: Path) -> None:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

    try:
        folder.replace(directory, write, config_file.dumps(config, base))
    except safetensors.SafetensorError as error:  # a full disk, a folder without permission
        raise OSError(f"{directory / WEIGHTS}: could not be written: {error}") from error


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder, checked as far as that goes without a model.

    Raises: FileNotFoundError: no such folder or file; ValueError: anything else that is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        what = "a file, not a folder" if directory.exists() else "not there"
        raise FileNotFoundError(f"the folder {directory} is {what}; adapters are read from local folders only")
    with folder.reading(directory) as config_path:
        return config_file.read(config_path), _read_tensors(directory / WEIGHTS)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    directory = path.parent
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            convert = f"safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), '{WEIGHTS}')"
            pickle = "a pickle, which can run code when it is read. If you trust it, convert it once"
            raise ValueError(f"{directory} holds adapter_model.bin, {pickle}: {convert}")
        raise FileNotFoundError(f"there is no {WEIGHTS} in {directory}")
    try:
        # the header says where the file ends, or nothing is read; at once takes half the time that one by one does
        with path.open("rb") as file, safetensors.safe_open(path, framework="pt"):
            tensors = safetensors.torch.load(file.read())
        # a 4-bit type: RuntimeError
        infinite = [key for key, tensor in tensors.items() if not numerics.is_finite(tensor)]
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    problems = [f"{key}: does not begin with '{PREFIX}'" for key in tensors if not key.startswith(PREFIX)]
    problems += [f"{key}: holds NaN or infinite numbers" for key in infinite]
    if problems:
        raise ValueError(f"{path}: {first_few(problems)}")
    return tensors


def load_adapter(
    model: LoraModel,
    directory: str | Path,
    adapter_name: str,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
    replacement: LoraConfig | None = None,
    key_mapping: dict[str, str] | None = None,
    skip_other_shapes: bool = False,
) -> None:
    """Add an adapter from a folder, inactive and frozen; or change nothing.

    `replacement` takes the place of the file's configuration. `key_mapping` renames tensors, see `renamed`.
    Raises: FileNotFoundError, ValueError: as `read_adapter`; or a list of all that does not fit the model.
    """
    config, tensors = read_adapter(directory)
    config = dataclasses.replace(replacement) if replacement else config
    tensors = renamed(tensors, key_mapping or {})
    again = config.init_lora_weights in ("pissa", "olora")  # not converted, but the weight alone decides on them
    if METHODS[method_of(config.init_lora_weights)].changes_base and not again:
        saved = f"{directory}: saved with init_lora_weights={config.init_lora_weights!r} and not converted"
        wrong = "its update belongs to a base weight that the init had changed. On the original base it would be wrong"
        save = "Save it again, converted (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        raise ValueError(f"{saved}: {wrong}. {save}")
    refuse_single_experts(model, tensors, directory)
    config.inference_mode = not is_trainable
    with transaction(model), prefix_errors(directory):
        init = None if again or skip_other_shapes else lambda name: allocate_nothing
        named = by_tensors(model, config, tensors)
        model.add_adapter(adapter_name, named, autocast_adapter_dtype=autocast_adapter_dtype, init=init)
        tensors = _put_base_weights(model, adapter_name, tensors)
        assign(model, adapter_name, tensors, finite=True, skip_other_shapes=skip_other_shapes)


def refuse_single_experts(model: LoraModel, tensors: dict[str, Tensor], directory: str | Path) -> None:
    """ValueError if the file has factors of single experts, and the model has fused them into raw parameters."""
    single = re.compile(r"\.experts\.\d+\.")
    found = [key for key in tensors if single.search(key)]
    if found and not any(single.search(f"{name}.") for name in describe(model.model).kinds):
        what = (
            f"{directory}: {min(found)} belongs to one expert, and this model has its experts fused into raw parameters"
        )
        way = "Load the folder with PEFT 0.21 and save it again, which converts it; or load it on transformers 4"
        raise ValueError(f"{what}. {way}")


def renamed(tensors: dict[str, Tensor], mapping: dict[str, str]) -> dict[str, Tensor]:
    """The tensors under the names that `mapping` {regular expression: replacement} gives. The first match counts.

    Raises: ValueError: two tensors would have one name, or a pattern is not valid.

    >>> list(renamed({"base_model.model.old.lora_A.weight": torch.ones(1)}, {"^old": "new"}))
    ['base_model.model.new.lora_A.weight']
    """
    found = {}
    try:
        patterns = [(re.compile(pattern), to) for pattern, to in mapping.items()]
    except re.error as error:
        raise ValueError(f"key_mapping={mapping!r}: {error.pattern!r} is no regular expression: {error}") from error
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        changed = (pattern.subn(to, name) for pattern, to in patterns)
        name = next((new for new, count in changed if count), name)
        if f"{PREFIX}{name}" in found:
            raise ValueError(f"key_mapping={mapping!r}: two tensors would be called {name}")
        found[f"{PREFIX}{name}"] = tensor
    return found


def by_tensors(model: LoraModel, config: LoraConfig, tensors: dict[str, Tensor]) -> LoraConfig:
    """The configuration, but layers_to_transform selects nothing where the file says which layers it has.

    PEFT adapts a module whose name is written out in full, whatever layers_to_transform says. Its files hold both.
    """
    if not config.layers_to_transform or not isinstance(config.target_modules, list):
        return config
    every = dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
    inside = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    matches = model.targeting(every).names("adapt")
    chosen = [name for name in matches if without_engines(name) in inside]
    if set(chosen) == set(model.targeting(config).names("adapt")):
        return config
    return dataclasses.replace(every, target_modules=exactly(chosen, describe(model.model).kinds))


def _put_base_weights(model: LoraModel, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give linear layers the base weights that an adapter brings along (LoftQ's), and return the other tensors."""
    if not any(key.endswith(".base_layer.weight") for key in tensors):
        return tensors
    ends, left = embedding_tensors(model), dict(tensors)
    found = layers_in_file(model, adapter_name).items()
    layers = {f"{PREFIX}{name}.base_layer.weight": layer for name, layer in found if layer.kind == "linear"}
    brought = [key for key in layers if key in left]
    if all(key in ends for key in brought):  # the embeddings of the model itself: see `assign`
        return left
    for key in brought:
        W, layer = left.pop(key), layers[key]
        if W.shape != layer.base_weight.shape or not W.is_floating_point():
            needed = f"{tuple(layer.base_weight.shape)} of floating point"
            raise ValueError(f"{key}: has shape {tuple(W.shape)} of {W.dtype}, the model needs {needed}")
        Q = W.to(layer.base_weight)
        if not numerics.is_finite(Q):
            raise ValueError(f"{key}: is not finite in {Q.dtype}")
        D = at_least_float32(layer.logical_weight()) - at_least_float32(layer.logical(Q))
        layer.lora_initial[adapter_name] = InitialUpdate(D=D)
    return left


def allocate_nothing(weight: Tensor, r: int, scaling: float) -> Factors:
    """An initialisation whose numbers come from the file once its shapes are checked."""
    *batch, n_out, n_in = weight.shape
    if r * max(n_out, n_in) > 1 << 48:
        raise ValueError(f"r={r} is beyond any memory")
    A, B = (torch.empty(shape, device="meta") for shape in ((*batch, r, n_in), (*batch, n_out, r)))
    return Factors(A, B)
