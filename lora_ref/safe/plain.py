"""What reads the factors' numbers needs plain modules: merging, saving, setting and combining.

A hook, a patched forward, a parametrisation, pruning, quantisation or offloading may compute another weight than the
one that is stored. Such a layer runs (`core` calls its modules), but its stored numbers are not its update.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..core.layer import LoraLayer, is_observed
from ..core.model import LoraModel


def check_plain(layers: Mapping[str, LoraLayer], names: Iterable[str], base: bool = True, calls: bool = True) -> None:
    """Raise ValueError for a layer whose factors (or, with `base`, whose weight) are not plain, and say what to do.

    calls=False: hooks are allowed, since the stored numbers are what is asked for.
    """
    for where, layer in layers.items():
        parts: list[tuple[str, nn.Module, str]] = []
        for name in [name for name in names if name in layer.r]:
            if layer.kind == "embedding":
                parts += [("A", layer.lora_embedding_A, name), ("B", layer.lora_embedding_B, name)]
            else:
                parts += [("A", layer.lora_A[name], "weight"), ("B", layer.lora_B[name], "weight")]
        found = [_stored(module, attribute, calls) for _, module, attribute in parts]
        if base:
            parts.append(("the base", layer.get_base_layer(), layer.weight_name))
            found.append(_stored(*parts[-1][1:], False))
        for (part, _, _), weight in zip(parts, found, strict=True):
            if isinstance(weight, str):
                raise ValueError(f"{where}: {part} {weight}: undo that first")
            if weight.device != found[0].device:  # type: ignore[union-attr]
                devices = f"{part} is on {weight.device}, {parts[0][0]} on {found[0].device}"  # type: ignore[union-attr]
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


def check_merged(model: LoraModel) -> None:
    """Raise ValueError if a merged weight is offloaded, or computed from others: then it cannot be replaced."""
    for layer in [wrapper for wrapper in model.wrappers() if isinstance(wrapper, LoraLayer) and wrapper.set_aside]:
        if isinstance(reason := _stored(layer.get_base_layer(), layer.weight_name, False), str):
            where = next(name for name, other in model.layers().items() if other is layer)
            raise ValueError(f"{where}: {', '.join(layer.merged_adapters)} is merged, and the base {reason}: undo that")
