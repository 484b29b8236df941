"""Looking at what trains a model: the mean gradient of chosen weights, while it runs backwards."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import numerics
from ..safe.atomic import finish


@contextmanager
def mean_gradients(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """A `with` block in which only these weights get gradients; after it {id(weight): mean over the backward passes}.

    Each gradient is taken away as soon as it is there, into a sum in at least float32: so only one is held at a time,
    and nothing that the block does to `grad` matters. `requires_grad` and `grad` are then as they were.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with mean_gradients(net, [net.weight]) as gradients:
    ...     net(torch.tensor([1.0, 2.0])).backward()
    ...     net(torch.tensor([3.0, 6.0])).backward()
    >>> gradients[id(net.weight)], net.weight.grad
    (tensor([[2., 4.]]), None)
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(weight): weight for weight in weights}  # a weight that two layers share comes once
    sums: dict[int, Tensor] = {}
    passes = dict.fromkeys(wanted, 0)

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        sums[id(weight)] = sums.get(id(weight), 0) + numerics.at_least_float32(weight.grad.detach())
        passes[id(weight)] += 1
        weight.grad = None

    handles: list[RemovableHandle] = []

    def back() -> None:
        for handle in handles:
            handle.remove()
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad

    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(id(p) in wanted)
        for weight in wanted.values():
            handles.append(weight.register_post_accumulate_grad_hook(take))
        with torch.enable_grad():
            yield sums
        for key in sums:
            sums[key] /= passes[key]
    finally:
        finish(back)
