"""The tensors of one adapter, or of the base model, out of an adapted model and into it, under their own keys."""

from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.adapter_modules import AdapterModule
from ..core.layer import LoraLayer
from ..files.adapter_folder import read_adapter
from ..files.adapter_tensors import adapter_tensors, assign, first_few, of_state_dict, without_engines
from ..files.config_file import HUB, check_arguments
from ..files.losses import ends_to_save
from .inject import lora_model_of
from .model import LoraModel
from .peft_model import LoadResult


def get_peft_model_state_dict(
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """{key as in the adapter file: live tensor} of one adapter. Of a `state_dict` of the model: its tensors.

    An injected model's keys have no "base_model.model.". `save_embedding_layers` is as in `save_pretrained`. Of a model
    in FullyShardedDataParallel they are the gathered tensors: every rank has to call this.
    `unwrap_compiled` is for PEFT's scripts: it is always done.
    Raises: ValueError: an unknown adapter; `state_dict` lacks a tensor of it.
    """
    base, prefix = lora_model_of(model)
    base._check_known(adapter_name)
    model = model._modules.get("_orig_mod", model)  # as torch.compile wraps it
    places = adapter_tensors(base, adapter_name) | ends_to_save(base, adapter_name, save_embedding_layers)
    flat = [name for name, module in model.named_modules() if hasattr(module, "_fsdp_wrapped_module")]
    if state_dict is None and flat:  # its parameters are parts of a flat one
        state_dict = model.state_dict()
    if state_dict is None:
        return {key.removeprefix(prefix): slot.tensor.detach() for key, slot in places.items()}
    found = of_state_dict(model, state_dict, places)
    return {key.removeprefix(prefix): tensor for key, tensor in found.items()}


def set_peft_model_state_dict(
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """The inverse of `get_peft_model_state_dict`: all tensors are checked before the first is written.

    With `ignore_mismatched_sizes` a tensor of another shape is left out, with a warning.
    Raises: ValueError: lists the keys that are missing or not expected, and the wrong shapes.
    Differs from PEFT: there missing and unexpected keys are returned. `low_cpu_mem_usage` changes no result.
    """
    base, prefix = lora_model_of(model)
    base._check_known(adapter_name)
    tensors = {key if key.startswith(prefix) else prefix + key: x for key, x in peft_model_state_dict.items()}
    assign(base, adapter_name, tensors, skip_other_shapes=ignore_mismatched_sizes)
    return LoadResult([], [])


def load_peft_weights(
    model_id: str | Path, device: str | None = None, key_mapping: dict[str, str] | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """{key: tensor} of an adapter folder, on the CPU or on `device`. `subfolder` is one in it; others are for the hub.

    Raises: FileNotFoundError: there is no such folder. ValueError: it is broken; `key_mapping` (see `load_adapter`).
    TypeError: an unknown argument.
    Source: PEFT's function of this name.
    """
    check_arguments("load_peft_weights", kwargs, (*HUB, "subfolder"))
    if key_mapping:
        raise ValueError("key_mapping is not supported here: give it to PeftModel.load_adapter")
    _, tensors = read_adapter(Path(model_id) / (kwargs.get("subfolder") or ""))
    return {key: tensor.to(device) for key, tensor in tensors.items()}


def base_keys(base: LoraModel) -> dict[str, tuple[str, Tensor]]:
    """{key in the state dict of the base model without adapters: (its key now, the tensor as it was before a merge)}.

    A module that is saved whole counts as the original.
    """
    own: dict[str, str | None] = {"": ""}  # {path now: path without adapters; None: a part of an adapter}
    modules = dict(base.model.named_modules(remove_duplicate=False))
    for path in modules:
        above, _, last = path.rpartition(".")
        before, parent = own[above], modules[above]
        if path and isinstance(parent, AdapterModule):
            own[path] = before if last == parent.base_attribute else None
        elif path:
            own[path] = None if before is None else f"{before}.{last}".lstrip(".")
    found: dict[str, tuple[str, Tensor]] = {}
    for key, tensor in base.model.state_dict().items():
        path, _, attribute = key.rpartition(".")
        if (before := own.get(path, path)) is not None:
            found[without_engines(f"{before}.{attribute}".lstrip("."))] = (key, tensor)
    for path, module in modules.items():
        if isinstance(module, LoraLayer) and module.set_aside:
            key = without_engines(f"{own[path]}.{module.weight_name}")
            found[key] = (found[key][0], module.unmerged_weight.detach())
    return found


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict of the base model under the keys that it has without adapters. Merged weights are the originals.

    Raises: ValueError: the model has no adapters.
    Source: PEFT's function of this name.
    Differs from PEFT: there a merged weight is the merged one.

    >>> from torch import nn
    >>> from lora_ref import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    >>> list(get_base_model_state_dict(model))
    ['0.weight', '0.bias']
    """
    base, _ = lora_model_of(model)
    return {key: tensor for key, (_, tensor) in base_keys(base).items()}


def set_base_model_state_dict(model: Any, state_dict: dict[str, Tensor], strict: bool = True) -> LoadResult:
    """The inverse of `get_base_model_state_dict`. Without `strict` it returns the keys that are missing or unexpected.

    Raises: ValueError: the model has no adapters, or one is merged; RuntimeError: keys with `strict`, or a wrong shape.
    All is checked before the first weight is written.
    Source: PEFT's function of this name.
    """
    base, _ = lora_model_of(model)
    base._check_not_merged(list(base.peft_config), "replacing base weights")
    known = base_keys(base)
    result = LoadResult(
        [key for key in known if key not in state_dict], [key for key in state_dict if key not in known]
    )
    problems = [f"Missing key {key}" for key in result.missing_keys if strict]
    problems += [f"Unexpected key {key}" for key in result.unexpected_keys if strict]
    given = {key: x for key, x in state_dict.items() if key in known}
    shapes = {key: (tuple(x.shape), tuple(known[key][1].shape)) for key, x in given.items() if isinstance(x, Tensor)}
    problems += [
        f"{key}: has shape {one}, the model needs {other}" for key, (one, other) in shapes.items() if one != other
    ]
    if problems:
        raise RuntimeError(f"the state dict does not fit the base model: {first_few(problems)}")
    base.model.load_state_dict({known[key][0]: x for key, x in given.items()}, strict=False)
    return result
