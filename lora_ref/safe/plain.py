"""What reads the factors' numbers needs plain modules: merging, saving, setting and combining.

A hook, a patched forward, a parametrisation, pruning, quantisation or offloading may compute another weight than the
one that is stored. Such a layer runs (`core` calls its modules), but its stored numbers are not its update.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.layer import LoraLayer, is_observed


def check_plain(layers: Mapping[str, LoraLayer], names: Iterable[str], base: bool = True, calls: bool = True) -> None:
    """Raise ValueError for a layer whose factors (or, with `base`, whose weight) are not plain, and say what to do.

    calls=False: hooks are allowed, since the stored numbers are what is asked for.
    """
    for where, layer in layers.items():
        found: dict[str, Any] = {}
        for name in [name for name in names if name in layer.r]:
            for part in ("A", "B"):
                if layer.kind == "embedding":
                    module, attribute = getattr(layer, f"lora_embedding_{part}"), name
                else:
                    module, attribute = getattr(layer, f"lora_{part}")[name], "weight"
                found[f"lora_{part} of {name}"] = _stored(module, attribute, calls)
        if base:
            found["the base"] = _stored(layer.get_base_layer(), layer.weight_name, False)
        for part, weight in found.items():
            if isinstance(weight, str):
                raise ValueError(f"{where}: {part} {weight}: undo that first")
        if len({weight.device for weight in found.values()}) > 1:
            devices = ", ".join(f"{part} on {weight.device}" for part, weight in found.items())
            raise ValueError(f"{where}: {devices}: move the model to one device first")


def _stored(module: nn.Module, attribute: str, calls: bool) -> Tensor | str:
    """The parameter that holds the numbers, or the reason why they are not those that the module computes with."""
    weight = module._parameters.get(attribute)
    if weight is None or (calls and type(weight) not in (Tensor, nn.Parameter)):
        return f"is a {type(module).__name__} that does not store its weight: replaced, pruned, parametrised, sharded"
    if weight.is_meta and is_observed(module):
        return "is offloaded"
    plain = type(module).__name__ in ("Linear", "Conv1d", "Conv2d", "Conv3d", "FactorTable")
    if calls and (is_observed(module) or not plain or module._parameters.get("bias") is not None):
        hidden = "hooks, a bias or a forward of its own"
        return f"is a {type(module).__name__} with {hidden}, which its weight does not show"
    return weight
