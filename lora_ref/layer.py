"""An adapted layer: the untouched base module plus a dict of named adapters.

    y = base(x) + sum over active adapters of  s * B A dropout(x)

This class holds what all layers share. A layer type (`layers.py`, `parameters.py`) adds only how A
and B look in storage (`build`, `factors`, `packed`, `stored`) and how a branch is computed (`add_branch`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import decomposition
from .decomposition import Factors
from .scaling import scaling
from .wrappers import AdapterModule, unwrapped

Init = Callable[[Tensor, int, float], Factors]


class LoraLayer(AdapterModule):
    """What every adapted layer has: the base, A and B for each adapter, their r, alpha and s.

    `kind` is what the initialisations know it by; `weight_name` is the base parameter that an
    update is added to by a merge.
    """

    kind = "linear"
    weight_name = "weight"
    groups = 1  # how many pairs of factors share out the rank
    by_adapter: tuple[str, ...] = ("lora_A", "lora_B", "lora_dropout", "r", "lora_alpha", "scaling", "initial_scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A: Any = nn.ModuleDict()
        self.lora_B: Any = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.initial_scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        # while merged: the original weight, so that unmerging gives it back bit for bit; while merged
        # and disabled: the merged weight. In a list, for a parameter here would count as the model's
        self.spare: list[nn.Parameter] = []
        self.training = base_layer.training

    @property
    def base(self) -> nn.Module:
        """The module that is wrapped."""
        return self.base_layer

    def get_base_layer(self) -> nn.Module:
        """The module at the bottom of nested wrappers."""
        return unwrapped(self)

    @property
    def base_weight(self) -> nn.Parameter:
        """The base parameter that the update belongs to, as stored."""
        return getattr(self.get_base_layer(), self.weight_name)

    def put_weight(self, weight: nn.Parameter) -> None:
        """Replace the base parameter. Another module that shared it keeps the old one."""
        now = self.base_weight
        if weight.device != now.device or weight.dtype != now.dtype:
            weight.data = weight.data.to(now)  # the model moved while this weight was put aside
        setattr(self.get_base_layer(), self.weight_name, weight)

    @property
    def original_weight(self) -> nn.Parameter:
        """The base parameter as it was before any merge."""
        return self.spare[0] if self.spare and not self.disable_adapters else self.base_weight

    @property
    def merged(self) -> bool:
        """Is any adapter merged into the base weight?"""
        return bool(self.merged_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters off, or on again as they were: a merged weight is put aside meanwhile."""
        if enabled is self.disable_adapters and self.spare:
            now, then = self.base_weight, self.spare[0]
            self.put_weight(then)
            self.spare = [now]
        super().enable_adapters(enabled)

    def state(self) -> dict[str, Any]:
        return super().state() | {"merged": self.merged_adapters, "weight": self.base_weight, "spare": self.spare}

    def restore(self, state: dict[str, Any], names: Mapping[str, str]) -> None:
        super().restore(state, names)
        if all(name in names for name in state["merged"]):
            self.put_weight(state["weight"])
            self.merged_adapters, self.spare = [names[name] for name in state["merged"]], state["spare"]

    # -- storage: what a layer type must say ---------------------------------------------------

    def logical_weight(self) -> Float[Tensor, "*batch out in"]:
        """The base weight as (out, in): transposed storage is undone here and nowhere else."""
        return self.original_weight.detach()

    def stored(self, D: Float[Tensor, "*batch out in"]) -> Tensor:
        """A logical update in the shape that the base weight is stored in."""
        return D.reshape(self.base_weight.shape)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        """Make the modules that hold A (r, in) and B (out, r), in the shapes of the adapter file."""
        self.lora_A[name] = linear_of(A)
        self.lora_B[name] = linear_of(B)

    def factors(self, name: str) -> tuple[Float[Tensor, "*batch r in"], Float[Tensor, "*batch out r"]]:
        """A and B of one adapter in logical orientation."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def packed(self, A: Float[Tensor, "*batch r in"], B: Float[Tensor, "*batch out r"]) -> tuple[Tensor, Tensor]:
        """The inverse of `factors`: A and B as `build` and the adapter file want them."""
        return A, B

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        """y + s * B A dropout(x)."""
        raise AttributeError(f"{type(self).__name__} has no branch")

    # -- adapters ------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        use_rslora: bool,
        lora_dropout: float,
        init: Init,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter, inactive and frozen. A and B take the base weight's device and floating
        dtype, and are then held in float32 where that is a half precision (unless told not to)."""
        s = scaling(r, lora_alpha, use_rslora)
        weight = self.base_weight
        A, B, _ = init(self.logical_weight(), r, s)
        dtype = adapter_dtype(weight.dtype, autocast_adapter_dtype)
        # tensors without numbers yet (on "meta") get them, and a device, from a file
        A, B = (x.to(x.device if x.is_meta else weight.device, weight.dtype).to(dtype) for x in (A, B))
        self.build(name, A, B)
        self.lora_dropout[name] = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_dropout[name].train(self.training)
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = self.initial_scaling[name] = s
        for parameter in self.adapter_parameters(name):
            parameter.requires_grad_(False)

    def rename_adapter(self, old: str, new: str) -> None:
        super().rename_adapter(old, new)
        self.merged_adapters = [new if x == old else x for x in self.merged_adapters]

    def delta(self, name: str) -> Tensor:
        """s * B @ A in the shape of the stored base weight, in at least float32."""
        A, B = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in self.factors(name))
        return self.stored(decomposition.delta(A, B, self.scaling[name]))

    def set_scale(self, name: str, factor: float) -> None:
        """s = factor * the scaling that the configuration gives."""
        self.scaling[name] = factor * self.initial_scaling[name]

    def scale_layer(self, factor: float) -> None:
        """s *= factor for the active adapters."""
        for name in self.active_adapters:
            self.scaling[name] *= factor

    def unscale_layer(self, factor: float | None = None) -> None:
        """s /= factor for the active adapters; None: back to what the configuration gives."""
        for name in self.active_adapters:
            self.scaling[name] = self.initial_scaling[name] if factor is None else self.scaling[name] / factor

    # -- forward -------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        if self.sample_adapters is not None:
            return self._add_by_row(y, x)
        return self._add(y, x, self.active_adapters)

    def _add(self, y: Tensor, x: Tensor, names: Iterable[str]) -> Tensor:
        total = y
        for name in names:
            if name not in self.merged_adapters:
                total = self.add_branch(total, x, name)
        return total.to(y.dtype)  # summed in the adapter's precision, rounded once

    def _add_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.clone()
        for name, rows in self.rows(x.shape[0]):
            rows = rows.to(x.device)
            y[rows] = self._add(y[rows], x[rows], [name])
        return y

    def __repr__(self) -> str:
        def state(name: str) -> str:
            flags = ["active"] * (name in self.active_adapters) + ["merged"] * (name in self.merged_adapters)
            said = f"r={self.r[name]} alpha={self.lora_alpha[name]:g} s={self.scaling[name]:.4g}"
            return f"{name}: {said}" + (f" ({', '.join(flags)})" if flags else "")

        off = ["all disabled"] if self.disable_adapters else []
        return f"lora.{type(self).__name__}({'; '.join([repr(self.base_layer), *map(state, self.r), *off])})"


def adapter_dtype(base: torch.dtype, autocast_adapter_dtype: bool = True) -> torch.dtype:
    """The dtype of A and B: the base's, but float32 for half and quarter precision."""
    return torch.float32 if autocast_adapter_dtype and base.itemsize < 4 else base


def linear_of(weight: Float[Tensor, "n_out n_in"]) -> nn.Linear:
    """A bias-free nn.Linear around this weight, without drawing another one first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    return layer
