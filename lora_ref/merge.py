"""Merging: the update is added to the stored weight, and the adapter costs nothing any more.

    W <- W + s * B @ A         summed in at least float32, rounded once to W's dtype

Subtracting the update again would not give W back (rounding: relative 4e-8 in float32, 3e-3 in
bfloat16), so the original weight is kept while an adapter is merged: unmerging is exact, and
costs one copy of each merged weight.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .layer import LoraLayer


def merged_weight(layer: LoraLayer, names: Sequence[str]) -> Tensor:
    """W + sum of s * B @ A over the named adapters, in W's dtype and storage.

    Differs from PEFT: one rounding for the sum, where each update was rounded to W's dtype first.
    """
    W = layer.base_weight.detach()
    total = W.to(torch.promote_types(W.dtype, torch.float32))
    for name in names:
        total = total + layer.delta(name).to(total.dtype)
    return total.to(W.dtype)


def merge(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> None:
    """Merge the named adapters into all layers, or into none.

    Args:
        layers: name -> layer; the name is for the error message.
        names: adapters, in this order; those that are merged already are left alone.

    Raises:
        ValueError: adapters are disabled, a layer cannot be merged (a grouped convolution), or a
            merged weight would not be finite.
    """
    merged = []
    for where, layer in layers.items():
        todo = [name for name in names if name in layer.adapters() and name not in layer.merged_adapters]
        if not todo:
            continue
        if layer.disable_adapters:
            raise ValueError("the adapters are disabled: enable them before merging")
        if layer.groups > 1:
            raise ValueError(
                f"{where}: the update of a convolution with groups={layer.groups} cannot be merged: "
                "it connects all input channels to all outputs, which the grouped kernel has no room for"
            )
        weight = merged_weight(layer, todo)
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{where}: merging {', '.join(todo)} gives weights that are not finite; nothing was merged"
            )
        merged.append((layer, todo, weight))
    for layer, todo, weight in merged:
        layer.spare = layer.spare or [layer.base_weight]
        layer.put_weight(weight)
        layer.merged_adapters = layer.merged_adapters + todo


def unmerge(layers: Iterable[LoraLayer]) -> None:
    """Give every layer the weight that it had before merging, bit for bit."""
    for layer in layers:
        layer.unmerge()
