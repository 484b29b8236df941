"""What reads or replaces the stored numbers needs plain modules: merging, saving, setting and combining.

A hook, a patched forward, a parametrisation, pruning, quantisation or offloading may compute another weight than the
one that is stored. Such a layer runs (`core` calls its modules), but its stored numbers are not its update.

FSDP2 (`fully_shard`) and tensor parallelism make a parameter a DTensor, of which each rank holds a part. An adapted
model trains as it is then, and is gathered for a file. But the engine holds references to the parameters that it has
sharded. So adapters are added, loaded and merged before the model is sharded.
"""

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..core.layer import LoraLayer, is_observed
from ..core.model import LoraModel
from .atomic import tree
from .quantized import WAY, is_quantized
from .strict import levels_to_the_caller


def check_plain(layers: Mapping[str, LoraLayer], names: Iterable[str], base: bool = True, calls: bool = True) -> None:
    """Raise ValueError for a layer whose factors (or, with `base`, weight) are not plain, and say what to do.

    calls=False: hooks are allowed, since only the stored numbers are needed.
    """
    for where, layer in layers.items():
        devices: dict[torch.device, str] = {}
        places = [place for name in names if name in layer.r for place in layer.stored_in(name).items()]
        if base:
            places.append(("the base", (layer.get_base_layer(), layer.weight_name)))
        for part, (module, attribute) in places:
            weight = _stored(module, attribute, calls and part != "the base")
            if isinstance(weight, str):
                raise ValueError(f"{where}: {part} {weight}{'' if weight.endswith(WAY) else ': undo that first'}")
            devices.setdefault(weight.device, part)
        if len(devices) > 1:
            both = ", ".join(f"{part} is on {device}" for device, part in devices.items())
            raise ValueError(f"{where}: {both}: move the model to one device first")


def warn_of_forward_hooks(layers: Mapping[str, LoraLayer]) -> None:
    """Warn of layers whose base has forward hooks: unmerged these see W x alone, merged the update too.

    A hook that scales the output then scales the update as well. A hook that only looks does no harm, so the merge is
    allowed.
    """
    bases = {where: layer.get_base_layer() for where, layer in layers.items()}
    hooked = [where for where, base in bases.items() if base._forward_hooks or base._forward_pre_hooks]
    if hooked:
        warnings.warn(
            f"{', '.join(hooked)}: the base layer has forward hooks; once the adapter is merged they act on its update "
            "as well, so that the output changes if they change what they see",
            stacklevel=levels_to_the_caller(),
        )


def _stored(module: nn.Module, attribute: str, calls: bool) -> Tensor | str:
    """The parameter that holds the numbers, or the reason why they are not those that the module computes with."""
    weight = module._parameters.get(attribute)
    kind = type(module).__name__
    if weight is None or (calls and type(weight) not in (Tensor, nn.Parameter)):
        return f"is a {kind} that does not store its weight: replaced, pruned, parametrised, sharded"
    if weight.is_meta and is_observed(module):
        return "is offloaded"
    if is_quantized(module):
        return f"is a {kind} with a quantised weight, which no update can be added to; {WAY}"
    plain = kind in ("Linear", "Conv1d", "Conv2d", "Conv3d", "FactorTable")
    if calls and (is_observed(module) or not plain or module._parameters.get("bias") is not None):
        return f"is a {kind} with hooks, a bias or a forward of its own, which its weight does not show"
    return weight


def check_merged(model: LoraModel) -> None:
    """Raise ValueError if a merged weight is offloaded, or computed from others: then it cannot be replaced."""
    for layer in [
        wrapper for wrapper in model.adapter_wrappers() if isinstance(wrapper, LoraLayer) and wrapper.set_aside
    ]:
        if isinstance(reason := _stored(layer.get_base_layer(), layer.weight_name, False), str):
            where = next(name for name, other in model.lora_layers().items() if other is layer)
            raise ValueError(f"{where}: {', '.join(layer.merged_adapters)} is merged, and the base {reason}: undo that")


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor. Every rank must call this at the same time: they exchange their parts.

    >>> gathered(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if is_sharded(type(tensor)) else tensor  # type: ignore[attr-defined]


def is_sharded(kind: type) -> bool:
    """Is it a class of DTensors? Asked without importing torch.distributed, which takes as long as all of lora_ref."""
    return hasattr(kind, "full_tensor")


def check_not_sharded(model: nn.Module, what: str, factors: bool = True) -> None:
    """Raise ValueError if a parameter of the model is sharded: the engine would never see one installed later."""
    if any(map(is_sharded, {type(p) for m in tree(model, factors=factors) for p in m._parameters.values()})):
        sharded = f"{what} is not possible once the model is sharded (fully_shard, parallelize_module)"
        raise ValueError(f"{sharded}: the engine would go on with the parameters that it has cut. Do it before")


def is_main_process() -> bool:
    """Is this rank 0, or a process by itself?"""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
