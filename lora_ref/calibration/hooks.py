"""What is recorded while a model runs: inputs of layers (EVA), their covariances (CorDA), gradients (LoRA-GA)."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .. import numerics
from ..init.corda import call_covariance
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
    try:
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(functools.partial(hook, name), with_kwargs=True))
        yield
    finally:
        finish(lambda: list(map(RemovableHandle.remove, handles)))


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


class CovarianceSum:
    """The sum of X^T X over a sequence of inputs. It is immutable: `add` returns another sum, `next`.

    Query, key and value projections get the same tensor. Its X^T X (in, in) is computed once: layers refer to the same
    sum while their inputs are the same. They add the same input and get the same `next`.

    >>> x, start = torch.ones(3, 2), CovarianceSum()
    >>> q, k = start.add(x), start.add(x)
    >>> q is k, q.add(torch.zeros(1, 2)).mean(), k.mean()
    (True, tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]]), tensor([[3., 3.],
            [3., 3.]]))
    """

    def __init__(self, total: Any = 0.0, calls: int = 0, x: Tensor | None = None) -> None:
        self.total, self.calls = total, calls
        self.x = None if x is None else weakref.ref(x)  # the latest input, not kept alive
        self.version = _version(x)
        self.next: CovarianceSum | None = None

    def add(self, x: Tensor) -> "CovarianceSum":
        """The sum of this and X^T X."""
        if self.next is None or not self.next.ends_in(x):
            # not in the half precision of a surrounding autocast
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                total = call_covariance(x)
                total += self.total  # in place: one more (in, in) array would cost as much as the sum
                self.next = CovarianceSum(total, self.calls + 1, x)
        return self.next

    def ends_in(self, x: Tensor) -> bool:
        """True if x is the latest input: the same object, and not changed in place since then."""
        return self.x is not None and self.x() is x and self.version is not None and self.version == _version(x)

    def mean(self) -> Tensor:
        """The sum divided by the number of calls; ValueError if there was none."""
        if self.calls == 0:
            raise ValueError("the layer got no input while the model ran")
        return self.total / self.calls


def _version(x: Tensor | None) -> int | None:
    """The number of in-place changes of a tensor; None in inference mode, where torch does not count them."""
    return None if x is None or x.is_inference() else x._version
