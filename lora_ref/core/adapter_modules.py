"""Modules that hold one variant for each named adapter, and a switch.

`AdapterModule` is the switch: which adapters there are, which are active, whether all are off.
`ModulesToSave` is its simplest use: a whole copy of a module for each adapter.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..safe.atomic import tree

_OWN = ["answering", "base", "base_layer", "original_module", "modules_to_save", "active_adapters", "disable_adapters"]


def on_demand(name: str) -> Any:
    """An attribute {adapter: module} that most layers need not: no module is made before `put` puts one into it."""
    return property(lambda layer: layer._modules.get(name, {}))


def put(layer: nn.Module, attribute: str, name: str, module: nn.Module) -> None:
    """layer.attribute[name] = module, in half the time; the attribute is made if it is one `on_demand`."""
    if attribute not in layer._modules:
        layer._modules[attribute] = nn.ModuleDict()
    part: Any = layer._modules[attribute]
    part._modules[name] = module


class AdapterModule(nn.Module):
    """A wrapped module plus dicts keyed by adapter name.

    Subclasses list the attributes that are such dicts in `by_adapter`; adding, renaming and
    deleting an adapter then works on all of them alike.
    """

    by_adapter: tuple[str, ...] = ()
    active_adapters: list[str]
    disable_adapters: bool
    sample_adapters: Sequence[str] | None  # one name for each row of the batch

    def __init__(self) -> None:
        super().__init__()
        self.have(active_adapters=[], disable_adapters=False, sample_adapters=None)

    def have(self, **attributes: Any) -> None:
        """Set attributes that are no modules or parameters. (nn.Module's own assignment asks that of each, which for
        a dozen of them takes longer than making the module.)"""
        vars(self).update(attributes)

    @property
    def base(self) -> nn.Module:
        """The module that is wrapped."""
        raise TypeError(f"{type(self).__name__} wraps nothing")

    @property
    def answering(self) -> nn.Module:
        """The module that is asked for what the wrapper itself does not have."""
        return self.base

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, or on again as they were."""
        self.disable_adapters = not enabled

    def adapters(self) -> list[str]:
        """The names of the adapters that have a part here."""
        return list(dict.fromkeys(name for attribute in self.by_adapter for name in getattr(self, attribute)))

    def frame(self) -> Iterable[nn.Module]:
        """The modules in it that are more than an adapter's own numbers."""
        return [module for module in self._modules.values() if module is not None]

    def parameters_by_adapter(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(adapter, parameter) of all parameters that belong to adapters."""
        for attribute in self.by_adapter:
            part: Any = self._modules.get(attribute)  # a ModuleDict or a ParameterDict; not a dict of plain values
            for name, value in part.items() if part else ():
                if isinstance(value, nn.Module):
                    for module in tree(value) if value._modules else (value,):
                        yield from ((name, p) for p in module._parameters.values() if p is not None)
                else:
                    yield name, value

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters that belong to one adapter."""
        return (parameter for owner, parameter in self.parameters_by_adapter() if owner == name)

    def set_adapter(self, names: Iterable[str], inference_mode: bool = False) -> None:
        """Make these adapters active and trainable (not trainable with inference_mode), all others frozen."""
        here = self.adapters()
        active = [name for name in names if name in here]
        self.have(active_adapters=active)
        for name, parameter in self.parameters_by_adapter():
            parameter.requires_grad = name in active and not inference_mode

    def state(self) -> dict[str, Any]:
        """What switching changes, for `restore`."""
        return {"active": self.active_adapters, "off": self.disable_adapters}

    def restore(self, state: dict[str, Any], names: Mapping[str, str]) -> None:
        """Switch back to an earlier state; `names` says what its adapters are called now, deleted ones left out."""
        self.active_adapters = [names[name] for name in state["active"] if name in names]
        self.disable_adapters = state["off"]

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter."""
        for attribute in self.by_adapter:
            if name in (part := getattr(self, attribute)):
                del part[name]
        self.active_adapters = [x for x in self.active_adapters if x != name]

    def rename_adapter(self, old: str, new: str) -> None:
        """Call an adapter by another name."""
        for attribute in self.by_adapter:
            if old in (part := getattr(self, attribute)):
                part[new] = part[old]
                del part[old]
        self.active_adapters = [new if x == old else x for x in self.active_adapters]

    def row_names(self, batch: int) -> list[str]:
        """`sample_adapters`, one name for each row of the batch."""
        names = list(self.sample_adapters or [])
        if len(names) != batch:
            raise ValueError(
                f"adapter_names has {len(names)} names for a batch of {batch} samples at {type(self).__name__}"
            )
        return names

    def rows(self, batch: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name in `sample_adapters`, with the indices of its rows."""
        names = self.row_names(batch)
        for name in dict.fromkeys(names):
            yield name, torch.tensor([i for i, other in enumerate(names) if other == name])

    def __getattr__(self, name: str) -> Any:
        """What is not ours is the answering module's: weight, in_features, embed_scale, ..."""
        if name in (own := self.__dict__.get("_modules", {})):
            return own[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            # not set yet (the object is being made or unpickled), or Python's own protocol
            if name in _OWN or name.startswith("__"):
                raise
            return getattr(self.answering, name)


def frame(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, and the wrappers in it, without the adapters' own numbers: what switching changes."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            inner = module.frame() if isinstance(module, AdapterModule) else module._modules.values()
            waiting += [child for child in inner if child is not None]
    return list(found.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module at the bottom of nested wrappers."""
    while isinstance(module, AdapterModule):
        module = module.base
    return module


class ModulesToSave(AdapterModule):
    """A module that is trained whole: the original, and a copy for each adapter.

    The active adapter's copy answers; without one, or when disabled, the original does.
    """

    by_adapter = ("modules_to_save",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.training = module.training

    @property
    def base(self) -> nn.Module:
        """The module that is wrapped."""
        return self.original_module

    def add_adapter(self, name: str) -> None:
        """A fresh copy of the original for this adapter, frozen."""
        self.modules_to_save[name] = copy.deepcopy(self.original_module).requires_grad_(False)

    @property
    def answering(self) -> nn.Module:
        """The module whose forward and whose weight are used now."""
        if self.disable_adapters or not self.active_adapters:
            return self.original_module
        return self.modules_to_save[self.active_adapters[0]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.sample_adapters is None or self.disable_adapters:
            return self.answering(*args, **kwargs)
        x, *rest = args
        y = self.original_module(x, *rest, **kwargs).clone()
        for name, rows in self.rows(x.shape[0]):
            if name in self.modules_to_save:
                rows = rows.to(x.device)
                y[rows] = self.modules_to_save[name](x[rows], *rest, **kwargs).to(y.dtype)
        return y

    def __repr__(self) -> str:
        copies = ", ".join(self.modules_to_save) or "none"
        return f"ModulesToSave(copies: {copies}; active: {', '.join(self.active_adapters) or 'original'}; {self.base})"
