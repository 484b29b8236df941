"""Linear layers on which an adapter would not act: nobody calls them, or what they return is no x W^T + b.

"all-linear" leaves them out, and `refusals` refuses them by name.
"""

import dataclasses
import dis
import functools
import inspect
import re
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..core import model as core
from ..core.adapter_modules import unwrapped, walk
from ..core.layer_types import CONVOLUTIONS, is_conv1d_of_transformers, kind_of
from ..core.names import ModelNames
from .quantized import is_quantized

# functions that take the weights of layers that are not called: of state space models, short convolutions, attention
KERNELS = re.compile("selective_scan|mamba_|causal_conv1d|chunk_scan|multi_head_attention_forward")


def describe(model: nn.Module) -> ModelNames:
    """`core.model.describe`, and why "all-linear" leaves out the layers on which an adapter would not act."""
    names = core.describe(model)
    reasons = {name: why_not(getattr(parent, attribute), parent, attribute) for name, parent, attribute in walk(model)}
    found = {name: reason for name, reason in reasons.items() if reason and names.kinds[name] == "linear"}
    return dataclasses.replace(names, left_out={**names.left_out, **found}) if found else names


def why_not(module: nn.Module, parent: nn.Module, attribute: str) -> str | None:
    """The reason why an adapter on this layer would not act, or None."""
    bare: Any = unwrapped(module)
    if not kind_of(bare):
        return None
    if isinstance(parent, nn.MultiheadAttention):
        reads = f"nn.MultiheadAttention reads {attribute}.weight without calling {attribute}: an adapter would not run"
        return f"{reads}; leave it out with exclude_modules (target_parameters can adapt the in_proj_weight)"
    owner: Any = type(parent)
    if reads_weight(owner, attribute):
        kernel = f"{owner.__name__} passes {attribute}.weight to {kernels_of(owner)}"
        return f"{kernel}, in place of calling {attribute}: an adapter would not run; use exclude_modules"
    if kind_of(bare) != "linear" or not own_forward(bare) or is_quantized(bare):
        return None
    y: Any = None
    failed: Exception | None = None
    for tokens in ((1,), (1, 1), (1, 1, 1)):  # some take inputs of three or four dimensions only
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # its draws are not the user's
                y = bare(bare.weight.new_zeros(*tokens, bare.in_features))
        except TypeError:  # it wants further arguments
            return None
        except Exception as error:  # a forward of any class, which may raise any error
            failed = error
            continue
        if isinstance(y, torch.Tensor) and y.shape == (*tokens, bare.weight.shape[0]):
            return None
        break
    if y is None:
        takes = f"{type(bare).__name__} does not take an input of {bare.in_features} features, so it is no x W^T + b"
        return f"{takes} ({type(failed).__name__}: {failed})"
    given = f"a tensor of {y.shape[-1]} features" if isinstance(y, torch.Tensor) and y.ndim else f"a {type(y).__name__}"
    return f"{type(bare).__name__} returns {given}, so it is no x W^T + b, and an update cannot be added"


@functools.cache
def kernels_of(cls: type) -> str:
    """The name of a kernel that a class of modules calls, or ""."""
    names = {name for method in methods_of(cls) for name in method.__code__.co_names}
    return min((name for name in names if KERNELS.search(name)), default="")


@functools.cache
def reads_weight(cls: type, attribute: str) -> bool:
    """Does a class that calls a kernel read `self.<attribute>.weight`? Its dtype and device do not count."""
    for method in methods_of(cls) if kernels_of(cls) else ():
        found = [step.argval for step in dis.get_instructions(method)]
        for here, then, after in zip(found, found[1:], [*found[2:], None], strict=False):
            if (here, then) == (attribute, "weight") and after not in ("dtype", "device"):
                return True
    return False


def methods_of(cls: type) -> list[FunctionType]:
    """The methods of a class, its own and those that it has from bases which are not torch's."""
    found: dict[str, Any] = {}
    for base in reversed([base for base in cls.__mro__ if not base.__module__.startswith(("torch.", "builtins"))]):
        found |= vars(base)
    methods = (inspect.unwrap(value) for value in found.values() if callable(value))
    return [method for method in methods if isinstance(method, FunctionType)]


def own_forward(module: nn.Module) -> bool:
    """Does a subclass of torch's layers compute its output in another way?"""
    known = [cls.forward for cls in (nn.Linear, nn.Embedding, *CONVOLUTIONS)]
    return kind_of(module) != "" and not is_conv1d_of_transformers(module) and type(module).forward not in known
