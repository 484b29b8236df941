"""All or nothing: a change of a module tree that fails leaves the tree as it was.

What may change inside `transaction(module)`: which modules, parameters and buffers there are,
the values of dicts, lists and plain attributes, `requires_grad`, and a parameter's `.data`
(replaced by another tensor, not written into).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_covered: ContextVar[frozenset[int]] = ContextVar("_covered", default=frozenset())  # ids of modules


@contextmanager
def transaction(*roots: nn.Module) -> Iterator[None]:
    """Undo every change of the module trees when the body raises, KeyboardInterrupt included.

    The price is one shallow copy of each module's attributes: no tensor is copied, and modules that
    an enclosing transaction covers are left to that one (so do not catch an error between the two).

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with transaction(net):
    ...         net[0] = nn.ReLU()
    ...         raise ValueError("on second thoughts")
    ... except ValueError:
    ...     print(net[0])
    Linear(in_features=2, out_features=2, bias=True)
    """
    outer = _covered.get()
    if all(id(root) in outer for root in roots):
        yield
        return
    modules = {id(m): m for root in roots for m in root.modules() if id(m) not in outer}
    attributes = [(m, {key: (value, _copy(value)) for key, value in vars(m).items()}) for m in modules.values()]
    tensors = [(p, p.data, p.requires_grad) for m in modules.values() for p in m._parameters.values() if p is not None]
    token = _covered.set(outer | modules.keys())
    try:
        yield
    except BaseException:
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update({key: _refill(value, copy) for key, (value, copy) in kept.items()})
        for tensor, data, requires_grad in tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        raise
    finally:
        _covered.reset(token)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else None


def _refill(value: Any, copy: Any) -> Any:
    """The same container with its earlier contents: others may hold a reference to it (hooks do)."""
    if copy is not None:
        value.clear()
        value.extend(copy) if isinstance(value, list) else value.update(copy)
    return value
