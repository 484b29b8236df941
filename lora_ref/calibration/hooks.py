"""Looking at what flows through a model: the inputs of chosen layers, while it runs.

The initialisations that need data (EVA, CorDA) are computed from these inputs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..safe.atomic import finish


@contextmanager
def inputs(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """A `with` block in which every call of a layer first calls see(name, input). The model is not changed.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with inputs({"first": net[0]}, lambda name, x: print(name, tuple(x.shape))):
    ...     _ = net(torch.zeros(5, 2))
    first (5, 2)
    """

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return look

    handles: list[RemovableHandle] = []

    def off() -> None:
        for handle in handles:
            handle.remove()

    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
        yield
    finally:
        finish(off)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A `with` block in evaluation mode; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]

    def back() -> None:
        for module, training in modes:
            module.training = training

    try:
        model.eval()
        yield
    finally:
        finish(back)
