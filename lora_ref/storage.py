"""The adapter folder, in PEFT's format: adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight (r, in)    base_model.model.<module>.lora_B.weight (out, r)

The scaling is not stored: it follows from the configuration. Files are written under other names
and renamed when complete; what is read is checked whole before anything changes. Only safetensors
is read: unpickling a file runs whatever program it holds.
"""

import dataclasses
import os
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import config_file
from .atomic import transaction
from .bias import biases
from .config import LoraConfig
from .decomposition import Factors
from .layers import Init, LoraLayer
from .model import LoraModel
from .wrappers import ModulesToSave

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."


class Slot(NamedTuple):
    """Where a tensor of the file lives in the model."""

    owner: nn.Module
    attribute: str
    tensor: Tensor  # what is there now; a base weight as it was before any merge
    device: torch.device


def slots(model: LoraModel, adapter_name: str) -> dict[str, Slot]:
    """{key in the file: its place in the model} of all that belongs to one adapter."""
    found = {}
    for name, module in model.model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.adapters():
            device = module.base_weight.device
            for part in ("lora_A", "lora_B"):
                if adapter_name in (layers := getattr(module, part)):
                    linear = layers[adapter_name]
                    found[f"{PREFIX}{name}.{part}.weight"] = Slot(linear, "weight", linear.weight, device)
            for part in ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding" else ():
                table = getattr(module, part)
                found[f"{PREFIX}{name}.{part}"] = Slot(table, adapter_name, table[adapter_name], device)
        elif isinstance(module, ModulesToSave) and adapter_name in module.adapters():
            found |= _all_of(module.modules_to_save[adapter_name], f"{PREFIX}{name}")
    for name, bias in biases(model.model, model.peft_config[adapter_name].bias, adapter_name).items():
        owner = model.model.get_submodule(name.rpartition(".")[0])
        found[PREFIX + name] = Slot(owner, "bias", bias, bias.device)
    return found


def embedding_slots(model: LoraModel) -> dict[str, Slot]:
    """The base weights of a transformers model's input and output embeddings: a file may carry them."""
    getters = (getattr(model.model, f"get_{which}_embeddings", None) for which in ("input", "output"))
    ends = [end for get in getters if callable(get) and (end := get()) is not None]
    found = {}
    for name, module in model.model.named_modules():
        if any(module is end or (isinstance(end, LoraLayer) and module is end.base_layer) for end in ends):
            if isinstance(module, LoraLayer):
                continue  # its base layer comes by its own name
            for key, slot in _all_of(module, PREFIX + name).items():
                layer = next((end for end in ends if isinstance(end, LoraLayer) and end.base_layer is module), None)
                merged = layer is not None and slot.attribute == layer.weight_name
                found[key] = slot._replace(tensor=layer.original_weight) if merged and layer else slot
    return found


def _all_of(module: nn.Module, prefix: str) -> dict[str, Slot]:
    kept = module.state_dict(keep_vars=True)
    owners = dict(module.named_modules(remove_duplicate=False))
    return {
        f"{prefix}.{key}": Slot(owners[key.rpartition(".")[0]], key.rpartition(".")[2], tensor, tensor.device)
        for key, tensor in kept.items()
        if isinstance(tensor, Tensor)
    }


# -- writing -----------------------------------------------------------------------------------


def save_adapter(
    model: LoraModel, adapter_name: str, directory: Path, save_embedding_layers: bool | str = "auto"
) -> None:
    """Write one adapter's folder. PEFT loads it with equal outputs.

    Raises:
        ValueError: a value of save_embedding_layers that is not True, False or "auto"; OSError: the disk.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers={save_embedding_layers!r}: must be True, False or 'auto'")
    found = slots(model, adapter_name)
    ends = embedding_slots(model)
    if save_embedding_layers is True or (save_embedding_layers == "auto" and _targets_embeddings(model, adapter_name)):
        found |= ends
    tensors = {key: slot.tensor.detach().cpu().contiguous().clone() for key, slot in found.items()}
    broken = [key for key, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        warnings.warn(
            f"adapter {adapter_name!r} holds NaN or infinite numbers ({', '.join(broken[:3])}"
            f"{', ...' if len(broken) > 3 else ''}): it is written, but cannot be read back",
            stacklevel=4,
        )
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    write_folder(directory, config, tensors)


def _targets_embeddings(model: LoraModel, adapter_name: str) -> bool:
    """PEFT's rule: the list names embed_tokens or lm_head by themselves, or the regex reached them."""
    targets = model.peft_config[adapter_name].target_modules
    ends = ("embed_tokens", "lm_head")
    if isinstance(targets, str):
        layers = model.layers().items()
        return any(name.rpartition(".")[2] in ends for name, layer in layers if adapter_name in layer.adapters())
    return any(end in (targets or []) for end in ends)


def write_folder(directory: Path, config: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files completely under other names, then rename them into place."""
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: an adapter needs a folder")
    directory.mkdir(parents=True, exist_ok=True)
    mark = f".{uuid.uuid4().hex}.tmp"
    parts = [directory / WEIGHTS, directory / CONFIG]
    try:
        safetensors.torch.save_file(tensors, f"{parts[0]}{mark}", metadata={"format": "pt"})
        Path(f"{parts[1]}{mark}").write_text(config_file.dumps(config), encoding="utf-8")
        for part in parts:
            _flush(Path(f"{part}{mark}"))
        for part in parts:
            os.replace(f"{part}{mark}", part)
        _flush(directory)
    except safetensors.SafetensorError as error:  # a full disk, a folder without permission
        raise OSError(f"{directory / WEIGHTS}: could not be written: {error}") from error
    finally:
        for part in parts:
            Path(f"{part}{mark}").unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until the disk has it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- reading -----------------------------------------------------------------------------------


def read_adapter(directory: str | Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter folder, checked as far as that goes without a model.

    Raises:
        FileNotFoundError: no such folder or file; ValueError: anything else that is wrong with it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no folder {directory}; adapters are read from local folders only")
    config = config_file.read(directory / CONFIG)
    path = directory / WEIGHTS
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise ValueError(
                f"{directory} holds adapter_model.bin, a pickle, which can run code when it is read. If you trust it, "
                "convert it once: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
                f"'{WEIGHTS}')"
            )
        raise FileNotFoundError(f"there is no {WEIGHTS} in {directory}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (it is no dict)
    except (safetensors.SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    problems = [f"{key}: does not begin with '{PREFIX}'" for key in tensors if not key.startswith(PREFIX)]
    problems += [f"{key}: holds NaN or infinite numbers" for key, t in tensors.items() if not _is_finite(t)]
    if problems:
        raise ValueError(f"{path}: {_some(problems)}")
    return config, tensors


def load_adapter(
    model: LoraModel,
    directory: str | Path,
    adapter_name: str,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Add an adapter from a folder, inactive and frozen; or change nothing.

    Raises:
        FileNotFoundError, ValueError: see `read_adapter`; or the folder does not fit the model; all that does not
            fit is listed.
    """
    config, tensors = read_adapter(directory)
    changes_base = ("pissa", "olora", "corda", "loftq", "lora_ga")
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(changes_base):
        raise ValueError(
            f"{directory}: saved with init_lora_weights={config.init_lora_weights!r} and not converted: its update belongs "
            "to a base weight that the init had changed, so on the original base it would be wrong. Save it again, "
            "converted (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    config.inference_mode = not is_trainable
    with transaction(model):
        try:
            model.add_adapter(adapter_name, config, autocast_adapter_dtype, init=_blank)
            assign(model, adapter_name, tensors)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error


def assign(model: LoraModel, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Put tensors by their file keys into an adapter: all of them, or none.

    Raises:
        ValueError: lists what is missing, what is not expected, and every wrong shape, dtype or value.
    """
    expected, optional = slots(model, adapter_name), embedding_slots(model)
    if model.peft_config[adapter_name].bias == "all":
        # PEFT writes the biases of modules_to_save two times more
        tensors = {key: t for key, t in tensors.items() if key in expected or not _is_redundant(key, model)}
    problems = [f"{key}: is missing" for key in expected if key not in tensors]
    problems += [f"{key}: is not expected" for key in tensors if key not in expected and key not in optional]
    places = {key: expected.get(key) or optional[key] for key in tensors if key in expected or key in optional}
    ready = []
    for key, slot in places.items():
        tensor, now = tensors[key], slot.tensor
        if tensor.shape != now.shape:
            problems.append(f"{key}: has shape {tuple(tensor.shape)}, the model needs {tuple(now.shape)}")
        elif tensor.is_floating_point() is not now.is_floating_point():
            problems.append(f"{key}: is {tensor.dtype}, the model needs {now.dtype}")
        else:
            device = torch.device("cpu") if slot.device.type == "meta" else slot.device
            ready.append((key, slot, tensor.to(device, now.dtype, copy=True)))
    problems += [f"{key}: is out of range for {tensor.dtype}" for key, _, tensor in ready if not _is_finite(tensor)]
    if problems:
        raise ValueError(f"the adapter does not fit the model: {_some(problems)}")
    if any(key not in expected for key in places):
        model.unmerge_adapter()  # base weights are about to be replaced
    with transaction(model):
        for _, slot, tensor in ready:
            parameter = slot.owner._parameters.get(slot.attribute)
            if parameter is None:
                slot.owner._buffers[slot.attribute] = tensor
            elif parameter.is_meta:
                setattr(slot.owner, slot.attribute, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
            else:
                parameter.data = tensor


def _is_redundant(key: str, model: LoraModel) -> bool:
    whole = (f"{PREFIX}{name}." for name, m in model.model.named_modules() if isinstance(m, ModulesToSave))
    return key.endswith(".bias") and any(
        key.startswith((f"{prefix}original_module.", f"{prefix}modules_to_save.")) for prefix in whole
    )


def _blank(name: str) -> Init:
    """An initialisation that allocates nothing: the numbers come from the file once its shapes are checked."""

    def init(weight: Tensor, r: int, scaling: float) -> Factors:
        *batch, n_out, n_in = weight.shape
        if r * max(n_out, n_in) > 1 << 48:
            raise ValueError(f"{name}: r={r} is beyond any memory")
        shapes = (*batch, r, n_in), (*batch, n_out, r)
        return Factors(*(torch.empty(shape, device="meta") for shape in shapes))

    return init


def _is_finite(tensor: Tensor) -> bool:
    return tensor.is_meta or not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _some(problems: list[str]) -> str:
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def adapter_folders(model: LoraModel, directory: Path) -> Iterator[tuple[str, Path]]:
    """(adapter, its folder): "default" lies at the root, others in folders of their names."""
    for name in model.peft_config:
        yield name, directory if name == "default" else directory / name
