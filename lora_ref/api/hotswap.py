"""`hotswap_adapter`: the numbers of an adapter are replaced by those of a folder, and all else stays."""

import dataclasses
from pathlib import Path
from typing import Any

from ..core.inits import METHODS, method_of
from ..files.adapter_folder import read_adapter
from ..files.adapter_tensors import assign
from ..files.config_file import HUB, check_arguments
from ..safe.atomic import transaction
from .inject import lora_model_of


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Write the tensors of a folder into an adapter that is there. It keeps its name, its parameters and its state.

    The folder must adapt the same modules with the same ranks. lora_alpha and use_rslora may differ. A compiled model
    need not be compiled again, unless the scaling is another one. `subfolder`: the adapter's folder is this one in
    the given one. `torch_device` and the arguments of `HUB` change nothing.
    Raises: FileNotFoundError, ValueError: the folder is not there, or does not fit; the model is unchanged then.
    TypeError: an unknown argument.
    Source: PEFT's function of this name.
    Differs from PEFT: other ranks, or fewer layers, are errors.
    """
    check_arguments("hotswap_adapter", kwargs, (*HUB, "subfolder"))
    base, _ = lora_model_of(model)
    base._check_known(adapter_name)
    folder = Path(model_name_or_path) / (kwargs.get("subfolder") or "")
    config, tensors = read_adapter(folder)
    base._check_not_merged([adapter_name], "replacing its numbers")
    if METHODS[method_of(config.init_lora_weights)].changes_base:
        saved = f"{folder}: saved with init_lora_weights={config.init_lora_weights!r} and not converted"
        raise ValueError(f"{saved}: its update belongs to another base weight: delete the adapter, and load the folder")
    layers: dict[str, Any] = {name: layer for name, layer in base.lora_layers().items() if adapter_name in layer.r}
    wanted: dict[str, Any] = {m.name: m for m in base.targeting(config).matches if m.action.startswith("adapt")}
    if apart := sorted(layers.keys() ^ wanted.keys()):
        which = "only the adapter" if apart[0] in layers else "only the folder"
        raise ValueError(f"{folder}: {which} has {apart[0]}: delete the adapter, and load the folder instead")
    for name, layer in layers.items():
        if layer.r[adapter_name] != wanted[name].r:
            ranks = f"r={wanted[name].r} at {name}, the adapter has r={layer.r[adapter_name]}"
            raise ValueError(f"{folder}: {ranks}: delete the adapter, and load the folder instead")
        if layer.part("lora_initial", adapter_name):
            start = f"{name}: the adapter began with an update that is not 0, which is subtracted from its output"
            raise ValueError(f"{start}: delete the adapter, and load the folder instead")
    now = base.peft_config[adapter_name]
    for option in ("bias", "modules_to_save", "lora_dropout"):
        if (getattr(now, option) or None) != (getattr(config, option) or None):
            raise ValueError(
                f"{folder}: {option}={getattr(config, option)!r}, the adapter has {getattr(now, option)!r}"
            )
    with transaction(base):
        for name, layer in layers.items():
            layer.lora_alpha[adapter_name] = wanted[name].lora_alpha
            layer.scaling[adapter_name] = layer.initial_scaling[adapter_name] = wanted[name].scaling
        base.peft_config[adapter_name] = dataclasses.replace(
            config, target_modules=now.target_modules, inference_mode=now.inference_mode
        )
        assign(base, adapter_name, tensors, finite=True)
