"""All or nothing: a change of a module tree that fails leaves the tree as it was.

A `transaction(module)` undoes changes of modules, parameters, buffers, plain attributes, dicts and lists. It undoes
`requires_grad` and `.data` of a parameter (replaced by another tensor, not written into). `ATOMIC` lists the methods
of `LoraModel` that run in one.
"""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

from torch import nn

from ..core.layer import LoraLayer

# ids of the modules that full transactions cover, and of the roots of the partial ones
_covered: ContextVar[frozenset[int]] = ContextVar("_covered", default=frozenset())
_shallow: ContextVar[frozenset[int]] = ContextVar("_shallow", default=frozenset())


@contextmanager
def transaction(
    *roots: nn.Module, modules: Callable[[], Iterable[nn.Module]] | None = None, flags: Iterable[nn.Parameter] = ()
) -> Iterator[None]:
    """Undo every change of the module trees when the body raises, KeyboardInterrupt included.

    It costs a shallow copy of each module's attributes; tensors are not copied. The outermost transaction undoes
    everything, so do not catch errors in between. `modules` (a function that gives the modules which may change) and
    `flags` (parameters whose requires_grad may change) copy less. A full one inside of a partial one is not skipped.

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
        finish(undo)
        raise
    finally:
        finish(lambda: variable.set(before))


def finish(action: Callable[[], object]) -> None:
    """Run `action` to completion: if Ctrl-C interrupts it, run it again from the start, then re-raise.

    `action` must be safe to repeat.
    """
    try:
        action()
    except KeyboardInterrupt:
        action()
        raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the body is done: for a change that cannot be undone."""
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


def tree(*roots: nn.Module, factors: bool = True) -> list[nn.Module]:
    """`modules()` of all the roots, each once and in that order, in a tenth of the time. factors=False: not A and B.

    >>> [type(m).__name__ for m in tree(nn.Sequential(nn.Sequential(nn.ReLU()), nn.Tanh()))]
    ['Sequential', 'Sequential', 'ReLU', 'Tanh']
    """
    found: dict[int, nn.Module] = {}
    waiting = [*reversed(roots)]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            if not factors and isinstance(module, LoraLayer):
                waiting.append(module.base_layer)
            elif inner := module._modules:
                waiting += [child for child in reversed(inner.values()) if child is not None]
    return list(found.values())


def switches(model: Any, flags: Iterable[nn.Parameter] = ()) -> AbstractContextManager[None]:
    """Weights are replaced, adapters activated, disabled or scaled. The modules that hold A and B do not change."""
    return transaction(model, modules=lambda: tree(model, factors=False), flags=flags)


def switches_and_flags(model: Any) -> AbstractContextManager[None]:
    """As `switches`, and adapters are frozen or trained."""
    return switches(model, (p for wrapper in model.adapter_wrappers() for _, p in wrapper.adapter_parameters()))


ATOMIC: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "add_adapter": transaction,
    "delete_adapter": transaction,
    "rename_adapter": transaction,
    "set_adapter": switches_and_flags,
    "set_scale": switches,
    "disable_adapter_layers": switches_and_flags,
    "enable_adapter_layers": switches_and_flags,
    "unload": switches_and_flags,
}


def atomic(
    method: Callable[..., Any],
    changes: Callable[[Any], AbstractContextManager[None]],
    check: Callable[[Any], None] | None = None,
) -> Callable[..., Any]:
    """A method of a model that finishes, or changes nothing. `check` may refuse it before."""

    @wraps(method)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        if check:
            check(model)
        with changes(model):
            return method(model, *args, **kwargs)

    return run
