"""Modules that hold one variant for each named adapter, and a switch: the active adapters, or none of them."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

# not looked up in the wrapped module: they may be missing while this module is being built or unpickled
OWN = ("delegate", "model", "base_layer", "original_module", "modules_to_save", "active_adapters", "disable_adapters")
NOTHING = nn.ModuleDict()


class AdapterModule(nn.Module):
    """A wrapped module, and dicts {adapter: value}, listed in `by_adapter`. The last one has all the adapters."""

    by_adapter: tuple[str, ...] = ()
    base_attribute = "base_layer"  # the attribute that holds the wrapped module
    active_adapters: list[str]
    disable_adapters: bool
    adapter_names: Sequence[str] | None  # one adapter for each sample of the batch
    frozen: list[nn.Parameter]  # while disabled: what trains again afterwards

    def __init__(self) -> None:
        super().__init__()
        # vars(): nn.Module.__setattr__ is slow, and models have hundreds of layers
        vars(self).update(active_adapters=[], disable_adapters=False, adapter_names=None, frozen=[])

    @property
    def delegate(self) -> nn.Module:
        """The module that attribute lookups fall back to (weight, in_features, ...)."""
        return self._modules[self.base_attribute]  # type: ignore[return-value]

    def adapters(self) -> list[str]:
        return list(getattr(self, self.by_adapter[-1]))

    def part(self, attribute: str, adapter: str) -> Any:
        """attribute[adapter] of a dict of modules, or None."""
        return self._modules.get(attribute, NOTHING)._modules.get(adapter)  # type: ignore[union-attr]

    def dicts(self) -> list[Any]:
        """The dicts {adapter: value} that are there."""
        here = vars(self) | self._modules
        return [here[attribute] for attribute in self.by_adapter if attribute in here]

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(adapter, parameter) of all parameters of adapters."""
        for attribute in self.by_adapter:
            parts: Any = self._modules.get(attribute)  # None for a dict of plain values
            if isinstance(parts, nn.ParameterDict):
                yield from parts.items()
            for name, part in parts._modules.items() if parts is not None else ():
                modules = part.modules() if part._modules else [part]
                yield from ((name, p) for m in modules for p in m._parameters.values() if p is not None)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off and freeze them, or on again as they were."""
        for parameter in self.frozen:
            parameter.requires_grad = True
        frozen = [] if enabled else [p for _, p in self.adapter_parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad = False
        vars(self).update(disable_adapters=not enabled, frozen=frozen)

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate these adapters and let them train (not with inference_mode). All others are frozen."""
        names = dict.fromkeys([adapter_names] if isinstance(adapter_names, str) else adapter_names)  # each one once
        self.active_adapters = [name for name in names if name in self.adapters()]
        for name, parameter in self.adapter_parameters():
            parameter.requires_grad = name in self.active_adapters and not inference_mode

    def delete_adapter(self, name: str) -> None:
        for values in [values for values in self.dicts() if name in values]:
            del values[name]
        self.active_adapters = [other for other in self.active_adapters if other != name]

    def names_of_batch(self, batch: int) -> list[str]:
        """`adapter_names`, checked to be one name for each sample."""
        given, where = self.adapter_names, type(self).__name__
        names = list(given(batch) if callable(given) else given or [])  # a function says how often each comes
        if len(names) != batch:
            raise ValueError(f"adapter_names has {len(names)} names for a batch of {batch} samples at {where}")
        return names

    def groups_of_batch(self, x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name in `adapter_names`, with the indices of its samples."""
        names = self.names_of_batch(len(x))
        for name in dict.fromkeys(names):
            yield name, torch.tensor([i for i, other in enumerate(names) if other == name], device=x.device)

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name in OWN or name.startswith("__") or "_modules" not in vars(self):  # not set while unpickling
                raise
            return getattr(self.delegate, name)


class ModulesToSave(AdapterModule):
    """A module that trains in full: the original, and a copy for each adapter. The active adapter's copy computes."""

    by_adapter = ("modules_to_save",)
    base_attribute = "original_module"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.training = module.training

    @property
    def delegate(self) -> nn.Module:
        """The module in use: the active adapter's copy; without one, or when disabled, the original."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def add_adapter(self, name: str) -> None:
        """A copy of the original for this adapter, frozen."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.adapter_names is None or self.disable_adapters:
            return self.delegate(*args, **kwargs)
        y = self.original_module(*args, **kwargs)
        if not isinstance(y, torch.Tensor):
            raise ValueError(f"adapter_names needs a tensor of {self.original_module}: do not save that module whole")
        y = y.clone()
        for name, rows in self.groups_of_batch(y):
            if name in self.modules_to_save:  # the whole batch: which of its arguments have a row for each sample?
                y[rows] = self.modules_to_save[name](*args, **kwargs)[rows].to(y.dtype)
        return y

    def __repr__(self) -> str:
        copies, active = ", ".join(self.modules_to_save) or "none", ", ".join(self.active_adapters) or "original"
        return f"ModulesToSave(copies: {copies}; active: {active}; {self.original_module})"


def unwrapped(module: Any) -> Any:
    """The module inside of nested wrappers."""
    while isinstance(module, AdapterModule):
        module = module._modules[module.base_attribute]
    return module


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, parent, attribute) of every module, as if no wrapper were there. Shared modules come once."""
    seen: set[int] = set()
    waiting = [(attribute, model, attribute) for attribute in reversed(model._modules)]
    while waiting:
        name, parent, attribute = waiting.pop()
        bare = unwrapped(parent._modules[attribute])
        if bare is not None and id(bare) not in seen:
            seen.add(id(bare))
            yield name, parent, attribute
            waiting += [(f"{name}.{inner}", bare, inner) for inner in reversed(bare._modules)]


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of an unwrapped module: every (parent, attribute) that holds it}. A shared module has several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    waiting = [model]
    for parent in waiting:
        for attribute, child in parent._modules.items():
            if (bare := unwrapped(child)) is not None:
                waiting += [] if id(bare) in found else [bare]
                found.setdefault(id(bare), []).append((parent, attribute))
    return found


def unwrap(model: nn.Module) -> None:
    """Put every wrapped module back into its place. Of a module that is saved, the copy in use stays."""
    for parent, attribute in [place for places in holders(model).values() for place in places]:
        module = getattr(parent, attribute)
        if isinstance(module, AdapterModule):
            setattr(parent, attribute, module.delegate if isinstance(module, ModulesToSave) else unwrapped(module))
