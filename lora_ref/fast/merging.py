"""Merging, sooner: in blocks that stay in the cache, and in the weights' own memory where they need not come back.

    W <- W + s B A         summed in at least float32, rounded once to W's dtype

It equals `merged_weight` of `core.layer.LoraLayer`, and the methods of `core.model.LoraModel` that merge and unmerge.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .. import numerics
from ..core.adapter_modules import AdapterModule
from ..core.layer import LoraLayer, checked_scaling
from ..core.model import to_merge
from ..core.update import at_least_float32
from ..safe.atomic import finish, tree
from .sums import add_in_place

BLOCK = 1 << 18  # numbers that are summed at a time: they stay in a processor's cache (a GPU takes more)

Update = tuple[Tensor, Tensor, float]  # A (*batch, r, in), B (*batch, out, r) and s
State = tuple[LoraLayer, nn.Parameter, list[nn.Parameter], list[str]]  # a layer, and arguments of `install_weight`


@torch.no_grad()
def merged_weight(where: str, layer: LoraLayer, names: Sequence[str]) -> Tensor:
    """W + sum of s B A over the named adapters, in W's dtype and storage; ValueError if it is not finite."""
    if has_initial_update(layer, names):
        weight = layer.merged_weight(names)
    else:
        W = layer.logical(layer.base_weight.detach().clone())  # a view, or another copy
        for part, updates in blocks(W, updates_of(layer, names, W.dtype)):
            add(part, updates)
        weight = layer.stored(W)
    if not numerics.is_finite(weight):  # it is in the cache now
        raise ValueError(f"{where}: merging {', '.join(names)} gives weights that are not finite; nothing was merged")
    return weight


def has_initial_update(layer: LoraLayer, names: Iterable[str]) -> bool:
    """Does one of these adapters subtract a D0? Its difference from s B A is rounded once, so it is computed first."""
    return "lora_initial" in layer._modules and any(layer.part("lora_initial", name) is not None for name in names)


def updates_of(layer: LoraLayer, names: Sequence[str], dtype: torch.dtype) -> list[Update]:
    """(A, B, s) of the named adapters in the dtype the sum is computed in; not copied if they are in it already."""
    dtype = torch.promote_types(dtype, torch.float32)
    factors = ((*layer.factors(name), checked_scaling(layer.scaling[name], dtype)) for name in names)
    return [(A.detach().to(dtype), B.detach().to(dtype), s) for A, B, s in factors]


def blocks(W: Float[Tensor, "*batch out in"], updates: list[Update]) -> Iterator[tuple[Tensor, list[Update]]]:
    """A few rows of W's memory at a time (all, where no wider copy is made), with the updates of these rows."""
    if W.ndim == 3:
        for e, one in enumerate(W):
            yield from blocks(one, [(A[e], B[e], s) for A, B, s in updates])
        return
    if W.stride(0) < W.stride(1):  # stored as W^T, to which A^T B^T is added
        W, updates = W.T, [(B.T, A.T, s) for A, B, s in updates]
    if W.itemsize >= 4:  # summed where it is
        yield W, updates
        return
    at_most = BLOCK if W.device.type == "cpu" else 16 * BLOCK
    n_rows = max(1, min(at_most, W.nbytes // 5) // max(1, W.shape[1]))  # in float32 less than W's bytes
    for first in range(0, W.shape[0], n_rows):
        rows = slice(first, first + n_rows)
        yield W[rows], [(A, B[rows], s) for A, B, s in updates]


def add(W: Float[Tensor, "rows in"], updates: list[Update], sign: int = 1) -> None:
    """W += sum of s B A, in W's memory; rounded once."""
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
    quick = W.dtype in (torch.float32, torch.bfloat16)  # ||W|| takes a third of the time; its squares lose very little
    bound = float(torch.linalg.vector_norm(W)) if quick else largest(W)
    for A, B, s in updates:
        a, b = largest(A), largest(B)
        bound += abs(s) * max(A.shape[-2] * a * b, a, b)
    return bound < 0.9 * torch.finfo(W.dtype).max


def merge(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> None:
    """Merge the named adapters into all layers, or into none; ValueError as `LoraModel.merge_adapter`."""
    new = to_merge(layers, names)
    weights = {where: merged_weight(where, layers[where], adapters) for where, adapters in new.items()}
    states: list[State] = []
    for where, weight in weights.items():
        layer = layers[where]
        kept, merged = layer.set_aside or [layer.base_weight], layer.merged_adapters + new[where]
        states.append((layer, layer.as_weight(weight), kept, merged))
    install(states)


def unmerge(wrappers: Iterable[AdapterModule]) -> None:
    """Restore the weight that each layer had before merging, bit for bit; or none."""
    layers = [layer for layer in wrappers if isinstance(layer, LoraLayer) and layer.set_aside]
    install([(layer, layer.as_weight(layer.unmerged_weight), [], []) for layer in layers])


def install(states: list[State]) -> None:
    """Install a weight, a kept one and a list of merged adapters in each layer; in all, or (Ctrl-C) in none."""

    def install_all(states: list[State]) -> None:
        for layer, weight, kept, merged in states:
            layer.install_weight(weight, kept, merged)

    before = [(layer, layer.base_weight, layer.set_aside, layer.merged_adapters) for layer, *_ in states]
    try:
        install_all(states)
    except BaseException:
        finish(lambda: install_all(before))
        raise


def sums_in_place(
    model: nn.Module, layers: Mapping[str, LoraLayer], names: Sequence[str]
) -> list[tuple[Tensor, list[Update]]]:
    """Check everything, merge out of place where in place is unsafe, and return the sums that `write` can add in place.

    Unsafe: a weight that shares its memory with another one, which would change with it, and an adapter with a D0.
    """
    new, owners = to_merge(layers, names), _owners(model)
    sums: list[tuple[Tensor, list[Update]]] = []
    elsewhere: dict[str, LoraLayer] = {}
    for where, adapters in new.items():
        layer = layers[where]
        if has_initial_update(layer, adapters):
            elsewhere[where] = layer
            continue
        W = layer.base_weight.detach()
        updates = updates_of(layer, adapters, W.dtype)
        if not surely_finite(W, updates):
            merged_weight(where, layer, adapters)
        if owners[_memory(W)] == 1 and _is_all_of_its_memory(W, layer.logical(W)):
            sums += blocks(layer.logical(W), updates)
        else:
            elsewhere[where] = layer
    merge(elsewhere, names)
    for where in new.keys() - elsewhere.keys():
        layers[where].merged_adapters = layers[where].merged_adapters + new[where]
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
    """{memory: the number of parameters and buffers in it}."""
    tensors = (t for m in tree(model, factors=False) for t in (*m._parameters.values(), *m._buffers.values()))
    return Counter(_memory(tensor) for tensor in tensors if tensor is not None)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_all_of_its_memory(W: Tensor, view: Tensor) -> bool:
    return W.untyped_storage().nbytes() == W.nbytes and view.data_ptr() == W.data_ptr() and not W.is_inference()
