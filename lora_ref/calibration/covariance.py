"""The covariances of the inputs of layers. Layers with the same inputs share one.

The query, key and value projections of an attention get the same tensor. Its X^T X (in, in) is computed once. The
three share one sum as long as their inputs are the same.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..init.corda import call_covariance


class CovarianceSum:
    """The sum of X^T X over a sequence of inputs. It is immutable: `add` returns another sum, `next`.

    Layers refer to the same sum while their inputs are the same: they add the same input and get the same `next`.
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


class Covariances:
    """A `CovarianceSum` for each layer. `hooks.record_inputs` calls `record`.

    >>> x, other = torch.ones(3, 2), torch.zeros(1, 2)
    >>> covariances = Covariances(["q", "k"])
    >>> covariances.record("q", x); covariances.record("k", x); covariances.record("q", other)
    >>> covariances.pop("k").mean(), covariances.pop("q").mean()
    (tensor([[3., 3.],
            [3., 3.]]), tensor([[1.5000, 1.5000],
            [1.5000, 1.5000]]))
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self.by_layer = dict.fromkeys(layers, CovarianceSum())

    def record(self, layer: str, x: Tensor) -> None:
        """Add an input of this layer."""
        self.by_layer[layer] = self.by_layer[layer].add(x)

    def pop(self, layer: str) -> CovarianceSum:
        """The sum of this layer, which is removed here."""
        return self.by_layer.pop(layer)


def _version(x: Tensor | None) -> int | None:
    """The number of in-place changes of a tensor; None in inference mode, where torch does not count them."""
    return None if x is None or x.is_inference() else x._version
