"""Which tensors belong to an adapter: their keys in the adapter file, and their places in the model.

    base_model.model.<module>.lora_A.weight (r, in)    base_model.model.<module>.lora_B.weight (out, r)
    base_model.model.<embedding>.lora_embedding_A (r, V)    ....lora_embedding_B (d, r)
    base_model.model.<module>.<parameter>              a module saved whole
    base_model.model.<module>.base_layer.bias          a trained bias of an adapted module

The name of the adapter is not part of the key.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import numerics
from ..core.adapter_modules import AdapterModule, ModulesToSave
from ..core.layer import LoraLayer
from ..core.model import LoraModel, biases
from ..safe.atomic import transaction
from ..safe.plain import check_plain
from ..safe.strict import levels_to_the_caller

PREFIX = "base_model.model."
# what torch.compile and torch's checkpoint wrapper put into a module's path: no part of the file's keys
ENGINES = ("_orig_mod", "_checkpoint_wrapped_module")


class TensorPlace(NamedTuple):
    """Where a tensor of the file lives in the model."""

    owner: nn.Module
    attribute: str
    tensor: Tensor  # what is there now; a base weight as it was before any merge
    device: torch.device


def adapter_tensors(model: LoraModel, adapter_name: str) -> dict[str, TensorPlace]:
    """{key in the file: its place in the model} of all that belongs to one adapter."""
    found, modules = {}, list(modules_in_file(model, adapter_name))
    check_plain({name: m for name, m in modules if isinstance(m, LoraLayer)}, [adapter_name], base=False, calls=False)
    trained = {id(bias) for bias in biases(model.model, model.peft_config[adapter_name].bias, adapter_name).values()}
    for name, module in modules:
        for own, bias in module._parameters.items():
            if id(bias) in trained and bias is not None:
                found[PREFIX + f"{name}.{own}".lstrip(".")] = TensorPlace(module, own, bias, bias.device)
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            device = module.base_weight.device
            for part, (owner, attribute) in module.stored_in(adapter_name).items():
                found[f"{PREFIX}{name}.{part}"] = TensorPlace(owner, attribute, getattr(owner, attribute), device)
        elif isinstance(module, ModulesToSave) and adapter_name in module.adapters():
            found |= _all_of(module.modules_to_save[adapter_name], f"{PREFIX}{name}")
    return found


def modules_in_file(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
    """(name in the file, module) of all modules but those that hold factors.

    The file has no other adapter: the parts of a name that others' wrappers or `ENGINES` inserted are left out.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model.model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        inner = [("base_layer", module.base_layer)] if isinstance(module, LoraLayer) else list(module._modules.items())
        hidden = isinstance(module, AdapterModule) and adapter_name not in module.adapters()
        for attribute, child in reversed(inner):
            if child is not None:
                skipped = (*ENGINES, "base_layer", "original_module") if hidden else ENGINES
                own = "" if attribute in skipped else attribute
                waiting.append((f"{name}.{own}" if name and own else name or own, child))


def layers_in_file(model: LoraModel, adapter_name: str) -> dict[str, LoraLayer]:
    """{name in the file: layer} of the layers that an adapter adapts."""
    found = modules_in_file(model, adapter_name)
    return {name: module for name, module in found if isinstance(module, LoraLayer) and adapter_name in module.r}


def without_engines(path: str) -> str:
    """A path without the wrappers of engines: "0._orig_mod.up" is "0.up"."""
    return ".".join(part for part in path.split(".") if part not in ENGINES)


def ends_of(model: nn.Module) -> list[Any]:
    """The input and the output embeddings of a transformers model, as far as it has them."""
    found: list[Any] = []
    for which in ("input", "output"):
        with suppress(Exception):  # transformers' methods raise in some models, and others have none
            found += [getattr(model, f"get_{which}_embeddings")()]
    return [end for end in found if end is not None]


def embedding_tensors(model: LoraModel) -> dict[str, TensorPlace]:
    """The base weights of a transformers model's input and output embeddings: a file may carry them."""
    ends = ends_of(model.model)
    ends = [end for end in ends if not isinstance(end, ModulesToSave)]  # the adapter has a copy of those
    bases = {id(end.base_layer if isinstance(end, LoraLayer) else end): end for end in ends}
    found: dict[str, TensorPlace] = {}
    for name, module in model.model.named_modules() if ends else ():
        for key, slot in _all_of(module, PREFIX + without_engines(name)).items() if id(module) in bases else ():
            layer = bases[id(module)]
            is_weight = isinstance(layer, LoraLayer) and slot.attribute == layer.weight_name
            found[key] = slot._replace(tensor=layer.unmerged_weight) if is_weight else slot
    return found


def of_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], places: Mapping[str, TensorPlace], before: str = ""
) -> dict[str, Tensor]:
    """{key in the file: tensor} out of the state dict of a model, in which `before` stands before the model's names.

    Raises: ValueError: it lacks a tensor.
    """
    owners = {id(module): name for name, module in model.named_modules()}
    names = {key: f"{before}{owners[id(slot.owner)]}.{slot.attribute}" for key, slot in places.items()}
    names = {key: name.replace("_fsdp_wrapped_module.", "") for key, name in names.items()}  # FSDP's keys lack it
    if missing := [name for name in names.values() if name not in state_dict]:
        raise ValueError(f"state_dict holds no {missing[0]} ({len(missing)} tensors of the adapter are missing)")
    return {key: state_dict[name] for key, name in names.items()}


def _all_of(module: nn.Module, prefix: str) -> dict[str, TensorPlace]:
    owners, found = dict(module.named_modules(remove_duplicate=False)), {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        owner, _, attribute = key.rpartition(".")
        if isinstance(tensor, Tensor):
            found[f"{prefix}.{without_engines(key)}"] = TensorPlace(owners[owner], attribute, tensor, tensor.device)
    return found


def assign(
    model: LoraModel,
    adapter_name: str,
    tensors: dict[str, Tensor],
    finite: bool = False,
    skip_other_shapes: bool = False,
) -> None:
    """Put tensors by their file keys into an adapter: all of them, or none. (`finite`: they are known to be.)

    With `skip_other_shapes` those of another shape are left out, with a warning.
    Raises: ValueError: lists what is missing, what is not expected, and every wrong shape, dtype or value.
    """
    expected, optional = adapter_tensors(model, adapter_name), embedding_tensors(model)
    not_in_pefts: set[str] = set()
    if model.peft_config[adapter_name].bias == "all":
        # PEFT trains and writes only those biases that are called "bias"
        trained = {id(bias) for bias in biases(model.model, "all", adapter_name).values()}
        further = {key for key, slot in expected.items() if slot.attribute != "bias" and id(slot.tensor) in trained}
        not_in_pefts = set() if further & tensors.keys() else further
        # PEFT writes the biases of modules_to_save two times more
        tensors = {key: t for key, t in tensors.items() if key in expected or not _is_redundant(key, model)}
    problems = [f"{key}: is missing" for key in expected if key not in tensors and key not in not_in_pefts]
    problems += [f"{key}: is not expected" for key in tensors if key not in expected and key not in optional]
    places = {key: expected.get(key) or optional[key] for key in tensors if key in expected or key in optional}
    if skip_other_shapes:
        others = [key for key, slot in places.items() if tensors[key].shape != slot.tensor.shape]
        places = {key: slot for key, slot in places.items() if key not in others}
        if others:
            what = f"{len(others)} tensors have another shape than the model's and are ignored: {first_few(others)}"
            warnings.warn(what, stacklevel=levels_to_the_caller())
    wrapped = model.adapter_wrappers() if optional else []
    bound = {id(m.base_layer) for m in wrapped if isinstance(m, LoraLayer) and m._modules.get("lora_initial")}
    needed = [key for key in places if key not in expected and id(optional[key].owner) in bound]
    problems += [f"{key}: is a base weight from which an adapter subtracts its initial update" for key in needed]
    ready = []
    for key, slot in places.items():
        tensor, now = tensors[key], slot.tensor
        if tensor.shape != now.shape:
            problems.append(f"{key}: has shape {tuple(tensor.shape)}, the model needs {tuple(now.shape)}")
        elif tensor.is_floating_point() is not now.is_floating_point():
            problems.append(f"{key}: is {tensor.dtype}, the model needs {now.dtype}")
        else:
            device = torch.device("cpu") if slot.device.type == "meta" else slot.device
            own = tensor.to(device, now.dtype, copy=True)
            if not ((finite and own.dtype == tensor.dtype) or numerics.is_finite(own)):
                problems.append(f"{key}: is out of range for {own.dtype}")
            ready.append((slot, own))
    if problems:
        resized = any(key in optional and t.shape != optional[key].tensor.shape for key, t in tensors.items())
        way = "; if the vocabulary was resized, resize the base model's embeddings first" if resized else ""
        raise ValueError(f"the adapter does not fit the model: {first_few(problems)}{way}")
    if any(key not in expected for key in places):
        model.unmerge_adapter()  # base weights are about to be replaced
    with transaction(model):
        for slot, tensor in ready:
            parameter = slot.owner._parameters.get(slot.attribute)
            if parameter is None:
                slot.owner._buffers[slot.attribute] = tensor
            elif parameter.is_meta:
                slot.owner._parameters[slot.attribute] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            else:
                parameter.data = tensor


def _is_redundant(key: str, model: LoraModel) -> bool:
    saved = [without_engines(name) for name, m in model.model.named_modules() if isinstance(m, ModulesToSave)]
    starts = [f"{PREFIX}{name}.{part}." for name in saved for part in ("original_module", "modules_to_save")]
    return key.endswith(".bias") and key.startswith(tuple(starts))


def first_few(problems: list[str]) -> str:
    """The first few of a list of problems."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
