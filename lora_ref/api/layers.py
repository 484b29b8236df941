"""The adapted layers as users of PEFT know them: the core's, with PEFT's names for what they hold and do."""

import warnings
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import layer_types
from ..core.layer import LoraLayer
from ..fast import linear, merging
from ..safe import quantized
from ..safe.plain import check_plain, warn_of_forward_hooks
from ..safe.recomputed import checked
from ..safe.strict import levels_to_the_caller

# the adapted layers that have run; see `LoraModel.forward`. Not their attributes: a forward changes no model
CALLED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class PeftLayer(LoraLayer):
    """PEFT's names. Source: PEFT's LoraLayer and BaseTunerLayer.

    >>> from torch import nn
    >>> from lora_ref import LoraConfig, get_peft_model
    >>> layer = get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(r=2, target_modules=["0"])).model[0]
    >>> layer.in_features, layer.out_features, layer.active_adapter, layer.merged
    (3, 2, 'default', False)
    >>> layer.get_delta_weight("default").shape
    torch.Size([2, 3])
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs:  # fc(input=x); PEFT, Conv1D and bitsandbytes call it x, others as they like
            args = (kwargs.pop(next((name for name in ("input", "x") if name in kwargs), next(iter(kwargs)))),)
        if not torch.compiler.is_compiling():
            CALLED.add(self)
        y = super().forward(*args, **kwargs)
        scalings = tuple(self.scaling.get(name) for name in self.active_adapters)
        return checked(self, y, scalings, tuple(self.merged_adapters))

    @property
    def in_features(self) -> int:
        """The number of inputs: of a convolution the channels, of an embedding the tokens, of experts those of one."""
        return self._sizes()[1]

    @property
    def out_features(self) -> int:
        """The number of outputs, or of channels."""
        return self._sizes()[0]

    def _sizes(self) -> tuple[int, int]:
        base: Any = self.get_base_layer()
        if self.kind == "conv":
            return base.out_channels, base.in_channels
        n_out, n_in = self.logical(self.unmerged_weight).shape[-2:]
        return n_out, n_in

    @property
    def merged(self) -> bool:
        """Is an adapter merged into the weight?"""
        return bool(self.merged_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names if there is not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s B A - D0, what a merge adds to the weight, in its shape and A's dtype. ValueError: the layer lacks it.

        Differs from PEFT: the sum of a merge is rounded once, not this summand.
        """
        if adapter not in self.r:
            raise ValueError(f"there is no adapter {adapter!r} in this layer; there are {list(self.r)}")
        return self.update(adapter).to(self.factors(adapter)[0].dtype)

    def merge(self, safe_merge: bool = True, adapter_names: str | Iterable[str] | None = None) -> None:
        """Merge the active (or the named) adapters into this layer alone. Arguments as in `LoraModel.merge_adapter`.

        Raises: ValueError: as there.
        """
        given = self.active_adapters if adapter_names is None else adapter_names
        names = [given] if isinstance(given, str) else list(given)
        if not names and adapter_names is not None:
            raise ValueError(f"adapter_names={adapter_names!r}: name an adapter, or None for the active ones")
        if len(set(names)) < len(names):
            raise ValueError(f"an adapter is named twice: {names}")
        if unknown := [name for name in names if name not in self.r]:
            raise ValueError(f"there is no adapter {unknown[0]!r} in this layer; there are {list(self.r)}")
        if again := [name for name in names if name in self.merged_adapters]:
            warnings.warn(f"{', '.join(again)} is merged already: nothing is added", stacklevel=levels_to_the_caller())
        check_plain({type(self).__name__: self}, names)
        warn_of_forward_hooks({type(self).__name__: self})
        merging.merge({type(self).__name__: self}, names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from this layer alone."""
        super().delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """s = scale * the configured s. As in PEFT, nothing happens in a layer that has no such adapter."""
        if adapter in self.r:
            super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """s *= scale for the active adapters. ValueError: as `set_scale`."""
        self._rescale({name: self.scaling[name] * scale for name in self.active_adapters})

    def unscale_layer(self, scale: float | None = None) -> None:
        """s /= scale for the active adapters; None: the configured s again. ValueError: as `set_scale`, or for 0."""
        if scale == 0:
            raise ValueError("scale=0: the scaling cannot be divided by it; give None for the configured one")
        now = self.initial_scaling if scale is None else {n: s / scale for n, s in self.scaling.items()}
        self._rescale({name: now[name] for name in self.active_adapters})


class Linear(PeftLayer, linear.Linear):
    """See `core.layer_types.Linear`."""


class QuantizedLinear(PeftLayer, layer_types.Linear):
    """y = base(x) + s B A x, where the base's weight is packed. What needs its numbers is refused."""

    @property
    def unmerged_weight(self) -> Any:
        """Shape, dtype and device of W, without its numbers."""
        return quantized.stand_in(self.get_base_layer())

    def merged_weight(self, names: Sequence[str]) -> Tensor:
        raise ValueError(f"a quantised weight cannot be merged: {quantized.WAY}")


class Embedding(PeftLayer, layer_types.Embedding):
    """See `core.layer_types.Embedding`."""


class Conv(PeftLayer, layer_types.Conv):
    """See `core.layer_types.Conv`."""


class Parameter(PeftLayer, layer_types.Parameter):
    """See `core.layer_types.Parameter`."""


LAYER_TYPES: dict[str, Any] = {t.kind: t for t in (Linear, Embedding, Conv, Parameter)}
