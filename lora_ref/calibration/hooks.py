"""Hooks that record the inputs of layers (EVA, CorDA) and the gradients of weights (LoRA-GA) while a model runs."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import numerics
from ..safe.atomic import finish


@contextmanager
def record_inputs(layers: Mapping[str, nn.Module], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A `with` block in which every call of a layer first calls record(name, input). The model does not change.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with record_inputs({"first": net[0]}, lambda name, x: print(name, tuple(x.shape))):
    ...     _ = net(torch.zeros(5, 2))
    first (5, 2)
    """

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record(name, args[0] if args else next(iter(kwargs.values())))

    handles: list[RemovableHandle] = []

    def remove_hooks() -> None:
        for handle in handles:
            handle.remove()

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True))
        yield
    finally:
        finish(remove_hooks)


@contextmanager
def mean_gradients(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[dict[int, Tensor]]:
    """A `with` block in which only these weights get gradients; after it {id(weight): mean over the backward passes}.

    A hook adds each new gradient to a sum in at least float32 and sets `grad` to None. So the model holds one
    gradient at a time, and `zero_grad` in the block has no effect. `requires_grad` and `grad` are restored.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> with mean_gradients(net, [net.weight]) as gradients:
    ...     net(torch.tensor([1.0, 2.0])).backward()
    ...     net(torch.tensor([3.0, 6.0])).backward()
    >>> gradients[id(net.weight)], net.weight.grad
    (tensor([[2., 4.]]), None)
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = {id(weight): weight for weight in weights}  # a weight that two layers share counts once
    sums: dict[int, Tensor] = {}
    passes = dict.fromkeys(wanted, 0)

    def add_gradient(weight: Tensor) -> None:
        assert weight.grad is not None
        sums[id(weight)] = sums.get(id(weight), 0) + numerics.at_least_float32(weight.grad.detach())
        passes[id(weight)] += 1
        weight.grad = None

    handles: list[RemovableHandle] = []

    def restore() -> None:
        for handle in handles:
            handle.remove()
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad).grad = grad

    try:
        for p, _, _ in before:
            p.grad = None
            p.requires_grad_(id(p) in wanted)
        for weight in wanted.values():
            handles.append(weight.register_post_accumulate_grad_hook(add_gradient))
        with torch.enable_grad():
            yield sums
        for key in sums:
            sums[key] /= passes[key]
    finally:
        finish(restore)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A `with` block in evaluation mode. At the end every module returns to the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    try:
        model.eval()
        yield
    finally:
        finish(restore)
