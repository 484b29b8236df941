"""Merging: the update is added to the stored weight, and the adapter costs nothing any more.

    W <- W + s * B @ A         summed in at least float32, rounded once to W's dtype

Subtracting the update again would not give W back (rounding: relative 4e-8 in float32, 3e-3 in
bfloat16), so the original weight is kept while an adapter is merged: unmerging is exact, and
costs one copy of each merged weight. Where there is no way back anyway (`merge_and_unload`), the
sum is written into W's own memory.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import numerics
from ..core.adapter_modules import AdapterModule, frame
from ..core.formula import add_in_place, at_least_float32
from ..core.layer import LoraLayer, fitting
from ..safe.atomic import surely

BLOCK = 1 << 18  # numbers that are summed at a time: they stay in a processor's cache (a GPU takes more)

Update = tuple[Tensor, Tensor, float]  # A (*batch, r, in), B (*batch, out, r) and s
State = tuple[LoraLayer, nn.Parameter, list[nn.Parameter], list[str]]  # a layer, and what it is to `become`


def merged_weight(layer: LoraLayer, names: Sequence[str]) -> Tensor:
    """W + sum of s * B @ A over the named adapters, in W's dtype and storage.

    Differs from PEFT: one rounding for the sum, where each update was rounded to W's dtype first.
    """
    W = layer.logical(layer.base_weight.detach().clone())  # a view, or another copy
    for part, updates in blocks(W, updates_of(layer, names, W.dtype)):
        add(part, updates)
    return layer.stored(W)


def updates_of(layer: LoraLayer, names: Sequence[str], dtype: torch.dtype) -> list[Update]:
    """The factors of the named adapters for a weight of this dtype, themselves where they can be summed as they are."""
    dtype = torch.promote_types(dtype, torch.float32)
    factors = ((*layer.factors(name), fitting(layer.scaling[name], dtype)) for name in names)
    return [(A.detach().to(dtype), B.detach().to(dtype), s) for A, B, s in factors]


def blocks(W: Float[Tensor, "*batch out in"], updates: list[Update]) -> Iterator[tuple[Tensor, list[Update]]]:
    """Some rows of W's memory at a time (all, where no wider copy is made), with what is to be added to them."""
    if W.ndim == 3:
        for e, one in enumerate(W):
            yield from blocks(one, [(A[e], B[e], s) for A, B, s in updates])
        return
    if W.stride(0) < W.stride(1):  # stored as W^T, to which A^T B^T is added
        W, updates = W.T, [(B.T, A.T, s) for A, B, s in updates]
    if W.itemsize >= 4:  # summed where it is
        yield W, updates
        return
    most = BLOCK if W.device.type == "cpu" else 16 * BLOCK
    n_rows = max(1, min(most, W.nbytes // 5) // max(1, W.shape[1]))  # in float32 less than W's bytes
    for first in range(0, W.shape[0], n_rows):
        rows = slice(first, first + n_rows)
        yield W[rows], [(A, B[rows], s) for A, B, s in updates]


def add(W: Float[Tensor, "rows in"], updates: list[Update], sign: int = 1) -> None:
    """W += sum of s * B @ A, in W's memory; rounded once."""
    total = at_least_float32(W)  # W itself, if that is its dtype
    for A, B, s in updates:
        add_in_place(total, sign * s * B, A)  # (rows, r) @ (r, in) -> (rows, in); an s of 0 hides no NaN this way
    if total is not W:
        W.copy_(total)


def largest(W: Tensor) -> float:
    """max |W|; NaN if there is one."""
    if W.numel() == 0:
        return 0.0
    low, high = torch.aminmax(W.float() if W.itemsize == 1 else W)  # torch has it for no 8-bit type
    return max(-float(low), float(high))


def surely_finite(W: Tensor, updates: list[Update]) -> bool:
    """|W + sum s B A| <= max |W| + sum r |s| max |B| max |A| in every entry: a proof without computing the sum.

    What is multiplied by s first has to be finite as well.
    """
    quick = W.dtype in (torch.float32, torch.bfloat16)  # ||W|| takes a third of the time; what its squares lose is tiny
    bound = float(torch.linalg.vector_norm(W)) if quick else largest(W)
    for A, B, s in updates:
        a, b = largest(A), largest(B)
        bound += abs(s) * max(A.shape[-2] * a * b, a, b)
    return bound < 0.9 * torch.finfo(W.dtype).max


def to_merge(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> dict[str, list[str]]:
    """{layer: which of the named adapters are still to be merged there}, in this order; ValueError as `merge`."""
    found = {}
    for where, layer in layers.items():
        here = layer.adapters()
        todo = [name for name in names if name in here and name not in layer.merged_adapters]
        if not todo:
            continue
        if layer.disable_adapters:
            raise ValueError("the adapters are disabled: enable them before merging")
        if layer.groups > 1:
            raise ValueError(
                f"{where}: the update of a convolution with groups={layer.groups} cannot be merged: "
                "it connects all input channels to all outputs, which the grouped kernel has no room for"
            )
        found[where] = todo
    return found


def merge(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> None:
    """Merge the named adapters into all layers, or into none.

    Args:
        layers: name -> layer; the name is for the error message.
        names: adapters, in this order; those that are merged already are left alone.

    Raises:
        ValueError: adapters are disabled, a layer cannot be merged (a grouped convolution), or a
            merged weight would not be finite.
    """
    todo = to_merge(layers, names)
    weights = {where: checked_weight(where, layers[where], new) for where, new in todo.items()}
    states: list[State] = []
    for where, weight in weights.items():
        layer = layers[where]
        spare, merged = layer.spare or [layer.base_weight], layer.merged_adapters + todo[where]
        states.append((layer, layer.as_weight(weight), spare, merged))
    become(states)


def checked_weight(where: str, layer: LoraLayer, names: Sequence[str]) -> Tensor:
    """`merged_weight`; ValueError if it is not finite. Each is looked at while it is in the cache."""
    weight = merged_weight(layer, names)
    if not numerics.is_finite(weight):
        raise ValueError(f"{where}: merging {', '.join(names)} gives weights that are not finite; nothing was merged")
    return weight


def unmerge(wrappers: Iterable[AdapterModule]) -> None:
    """Give every layer among them the weight that it had before merging, bit for bit; or none."""
    layers = [layer for layer in wrappers if isinstance(layer, LoraLayer) and layer.spare]
    become([(layer, layer.as_weight(layer.unmerged_weight), [], []) for layer in layers])


def become(states: list[State]) -> None:
    """Each layer gets a weight, a spare one and a list of merged adapters; all do, or (Ctrl-C) none."""

    def put(states: list[State]) -> None:
        for layer, weight, spare, merged in states:
            layer.become(weight, spare, merged)

    before = [(layer, layer.base_weight, layer.spare, layer.merged_adapters) for layer, *_ in states]
    try:
        put(states)
    except BaseException:
        surely(lambda: put(before))
        raise


# -- without a way back ------------------------------------------------------------------------


def prepare(
    model: nn.Module, layers: Mapping[str, LoraLayer], names: Sequence[str]
) -> list[tuple[Tensor, list[Update]]]:
    """`merge` for good, but for the sums that can be written into the weights' own memory: these are for `write`.

    All that can be refused is refused here. Not in place: a weight whose memory others share, which
    would change with it, or that an initialisation has changed and that is about to be made whole.
    """
    todo, owners = to_merge(layers, names), _owners(model)
    sums: list[tuple[Tensor, list[Update]]] = []
    elsewhere: dict[str, LoraLayer] = {}
    for where, new in todo.items():
        layer = layers[where]
        W = layer.base_weight.detach()
        updates = updates_of(layer, new, W.dtype)
        if not surely_finite(W, updates):
            checked_weight(where, layer, new)
        whole = all(name in names or name in layer.merged_adapters for name in layer.lora_taken)
        if whole and owners[_memory(W)] == 1 and _is_all_of_its_memory(W, layer.logical(W)):
            sums += blocks(layer.logical(W), updates)
        else:
            elsewhere[where] = layer
    merge(elsewhere, names)
    for where in todo.keys() - elsewhere.keys():
        layers[where].merged_adapters = layers[where].merged_adapters + todo[where]
    return sums


def write(sums: list[tuple[Tensor, list[Update]]]) -> None:
    """Do the sums in place. Should one fail all the same, those done are subtracted: to rounding."""
    done = []
    try:
        for W, updates in sums:
            add(W, updates)
            done.append((W, updates))
    except BaseException:
        for W, updates in done:
            add(W, updates, sign=-1)
        raise


def _owners(model: nn.Module) -> Counter[int]:
    """{memory: how many parameters and buffers lie in it}."""
    tensors = (t for m in frame(model) for t in (*m._parameters.values(), *m._buffers.values()))
    return Counter(_memory(tensor) for tensor in tensors if tensor is not None)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_all_of_its_memory(W: Tensor, view: Tensor) -> bool:
    return W.untyped_storage().nbytes() == W.nbytes and view.data_ptr() == W.data_ptr() and not W.is_inference()
