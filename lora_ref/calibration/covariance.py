"""The covariances of what layers get to see, shared by the layers that see the same.

The query, key and value projections of an attention get one tensor: its X^T X (in, in) is computed once,
and one sum is kept for the three, as long as they get the same inputs.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..init.corda import call_covariance


class Sum:
    """The sum of X^T X over the inputs up to some call. It never changes: a further input makes a new one.

    Layers that got the same inputs so far point at the same sum. The first of them to get a further input enters
    the new sum in `next`, where the others find it if they get that input too. Where nobody points at a sum any
    more, it is gone.
    """

    def __init__(self, total: Any = 0.0, calls: int = 0, x: Tensor | None = None) -> None:
        self.total, self.calls = total, calls
        self.x = None if x is None else weakref.ref(x)  # the latest input; not kept alive
        self.version = _version(x)
        self.next: Sum | None = None

    def add(self, x: Tensor) -> "Sum":
        """This sum and X^T X."""
        if self.next is None or not self.next.ends_in(x):
            # not in the half precision of a surrounding autocast
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                total = call_covariance(x)
                total += self.total  # into the new array, of in x in: one more would cost as much as the sum
                self.next = Sum(total, self.calls + 1, x)
        return self.next

    def ends_in(self, x: Tensor) -> bool:
        """Is x the latest input, the same object and not changed in place since?"""
        return self.x is not None and self.x() is x and self.version is not None and self.version == _version(x)

    def mean(self) -> Tensor:
        """The sum divided by the number of calls.

        Raises:
            ValueError: there was no call.
        """
        if self.calls == 0:
            raise ValueError("the layer got no input while the model ran")
        return self.total / self.calls


class Covariances:
    """For each layer the `Sum` of its inputs; `see` is what `watch.inputs` calls.

    >>> x, other = torch.ones(3, 2), torch.zeros(1, 2)
    >>> seen = Covariances(["q", "k"])
    >>> seen.see("q", x); seen.see("k", x); seen.see("q", other)
    >>> seen.pop("k").mean(), seen.pop("q").mean()
    (tensor([[3., 3.],
            [3., 3.]]), tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]]))
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.by_layer = dict.fromkeys(layers, Sum())

    def see(self, layer: str, x: Tensor) -> None:
        """Add an input of this layer."""
        self.by_layer[layer] = self.by_layer[layer].add(x)

    def pop(self, layer: str) -> Sum:
        """What this layer saw; it is forgotten here."""
        return self.by_layer.pop(layer)


def _version(x: Tensor | None) -> int | None:
    """How often a tensor was changed in place; None where torch does not count (inference mode)."""
    return None if x is None or x.is_inference() else x._version
