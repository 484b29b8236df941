"""All or nothing: a change of a module tree that fails leaves the tree as it was.

What may change inside `transaction(module)`: which modules, parameters and buffers there are,
the values of dicts, lists and plain attributes, `requires_grad`, and a parameter's `.data`
(replaced by another tensor, not written into).
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

# ids of the modules that running transactions cover with all that is in them, and of the roots of the others
_covered: ContextVar[frozenset[int]] = ContextVar("_covered", default=frozenset())
_shallow: ContextVar[frozenset[int]] = ContextVar("_shallow", default=frozenset())


@contextmanager
def transaction(
    *roots: nn.Module,
    modules: Callable[[], Iterable[nn.Module]] | None = None,
    flags: Iterable[nn.Parameter] = (),
) -> Iterator[None]:
    """Undo every change of the module trees when the body raises, KeyboardInterrupt included.

    The price is a shallow copy of each module's attributes: no tensor is copied, and what an enclosing
    transaction covers is left to that one (so do not catch an error between the two). Where it is known
    that little may change, `modules()` gives the modules whose own attributes do, and `flags` the
    parameters in others whose `requires_grad` does; inside, a transaction of all is one of its own.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with transaction(net):
    ...         net[0] = nn.ReLU()
    ...         raise ValueError("on second thoughts")
    ... except ValueError:
    ...     print(net[0])
    Linear(in_features=2, out_features=2, bias=True)
    """
    outer, shallow = _covered.get(), _shallow.get()
    if all(id(root) in (outer | shallow if modules else outer) for root in roots):
        yield
        return
    covered = [m for m in (modules() if modules else tree(*roots)) if id(m) not in outer]
    attributes = [(m, vars(m).copy()) for m in covered]
    containers = [  # most are empty: hooks that nobody has set
        (v, v.copy() if v else v) for _, kept in attributes for v in kept.values() if isinstance(v, (dict, list, set))
    ]
    tensors = [(p, p.data, p.requires_grad) for m in covered for p in m._parameters.values() if p is not None]
    trains = [(p, p.requires_grad) for p in flags]

    def undo() -> None:
        for module, kept in attributes:
            vars(module).clear()
            vars(module).update(kept)
        for container, content in containers:  # into the same object: others may refer to it (hooks' handles do)
            container.clear()  # and an empty one is its own content
            container.extend(content) if isinstance(container, list) else container.update(content)
        for tensor, data, requires_grad in tensors:
            tensor.data = data
            tensor.requires_grad_(requires_grad)
        for parameter, requires_grad in trains:
            parameter.requires_grad_(requires_grad)

    variable, before = (_shallow, shallow) if modules else (_covered, outer)
    try:
        variable.set(before.union(map(id, roots if modules else covered)))
        yield
    except BaseException:
        surely(undo)
        raise
    finally:
        surely(lambda: variable.set(before))


def surely(action: Callable[[], object]) -> None:
    """Run what may run twice to its end: once more where Ctrl-C comes in between, which then takes effect."""
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the body is done: for what cannot be undone."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield  # Python gives Ctrl-C to the main thread alone
        return
    waiting: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def tree(*roots: nn.Module) -> list[nn.Module]:
    """What `modules()` of all the roots gives, each once and in that order, in a tenth of the time.

    >>> [type(m).__name__ for m in tree(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()))]
    ['Sequential', 'Sequential', 'ReLU', 'Tanh']
    """
    found: dict[int, nn.Module] = {}
    waiting = [*reversed(roots)]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())
