"""An adapted layer: the untouched base module plus a dict of named adapters.

    y = base(x) + sum over active adapters of  s * B A dropout(x)

This class holds what all layers share. A layer type (`layers.py`, `parameters.py`) adds only how A
and B look in storage (`build`, `factors`, `packed`, `stored`) and how a branch is computed (`add_branch`).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..safe.sharded import gathered
from . import update as decomposition
from .adapter_modules import on_demand, put
from .formula import at_least_float32
from .scaling import check_scaling, scaling
from .update import Factors
from .weights import WeightKeeper

Init = Callable[[Tensor, int, float], Factors]


class LoraLayer(WeightKeeper):
    """What every adapted layer has: the base, A and B for each adapter, their r, alpha and s.

    `kind` is what the initialisations know it by; `weight_name` is the base parameter that an
    update is added to by a merge.

    Differs from PEFT: an adapter without dropout has no entry in `lora_dropout`, where PEFT has an nn.Identity.
    """

    kind = "linear"
    groups = 1  # how many pairs of factors share out the rank
    by_adapter: tuple[str, ...] = (
        *("lora_A", "lora_B", "lora_dropout", "lora_taken"),
        *("r", "lora_alpha", "scaling", "initial_scaling", "train_B"),
    )

    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    initial_scaling: dict[str, float]
    train_B: dict[str, bool]
    lora_A: Any  # {adapter: module}
    lora_B: Any
    lora_dropout = on_demand("lora_dropout")  # of the adapters that have any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self._modules.update(lora_A=nn.ModuleDict(), lora_B=nn.ModuleDict())
        self.have(r={}, lora_alpha={}, scaling={}, initial_scaling={}, train_B={})

    @property
    def merged(self) -> bool:
        """Is any adapter merged into the base weight?"""
        return bool(self.merged_adapters)

    # -- storage: what a layer type must say ---------------------------------------------------

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        """Make the modules that hold A (r, in) and B (out, r), in the shapes of the adapter file."""
        put(self, "lora_A", name, linear_of(A))
        put(self, "lora_B", name, linear_of(B))

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
        train_B: bool = True,
        rounded: bool = True,
    ) -> None:
        """Add an adapter, inactive and frozen. A and B take the base weight's device and (if `rounded`) floating
        dtype, and are then held in float32 where that is a half precision (unless told not to)."""
        weight = self.base_weight
        dtype = adapter_dtype(weight.dtype, autocast_adapter_dtype)
        s = fitting(scaling(r, lora_alpha, use_rslora), dtype)
        A, B, residual, exact = init(self.logical_weight(), r, s)
        # tensors without numbers yet (on "meta") get them, and a device, from a file
        A, B = (x.to(x.device if x.is_meta else weight.device, weight.dtype if rounded else dtype) for x in (A, B))
        A, B = A.to(dtype), B.to(dtype)
        if residual is not None:
            self.take(name, residual, (A, B, s) if exact else None)
        self.build(name, A, B)
        if lora_dropout:
            put(self, "lora_dropout", name, nn.Dropout(lora_dropout).train(self.training))
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = self.initial_scaling[name] = s
        self.train_B[name] = train_B

    def adapters(self) -> list[str]:
        """The names of the adapters that have a part here."""
        return list(self.r)

    def set_adapter(self, names: Iterable[str], inference_mode: bool = False) -> None:
        super().set_adapter(names, inference_mode)
        for name in self.r:
            if not self.train_B[name]:
                self.factors(name)[1].requires_grad_(False)

    def converted(
        self, name: str, s: float | None = None
    ) -> tuple[Float[Tensor, "*batch q in"], Float[Tensor, "*batch out q"]]:
        """A and B such that s * B @ A updates the ORIGINAL weight: where the initialisation took s0 * B0 @ A0
        out of it, [A; A0] and [B | -s0/s B0], of twice the rank; else the factors as they are. s: default
        the present scaling.

        Raises:
            ValueError: what was taken is of full rank (LoftQ), or s = 0.
        """
        A, B = (gathered(f.detach()) for f in self.factors(name))
        if name not in self.lora_taken:
            return A, B
        taken, s = self.lora_taken[name], self.scaling[name] if s is None else s
        if taken.A is None:
            raise ValueError(f"adapter {name!r} works on a quantised base weight: it is no update of the original one")
        if s == 0:
            raise ValueError(f"adapter {name!r} has scaling 0: give it another one")
        return torch.cat([A, taken.A.to(A)]), torch.cat([B, -(taken.scaling / s) * taken.B.to(B)], dim=1)

    def delta(self, name: str) -> Tensor:
        """s * B @ A in the shape of the stored base weight, in at least float32."""
        A, B = (at_least_float32(x.detach()) for x in self.factors(name))
        return self.stored(decomposition.delta(A, B, self.scaling[name]))

    def dropped(self, x: Tensor, name: str) -> Tensor:
        """dropout(x), as one adapter has it."""
        return self.lora_dropout[name](x) if name in self.lora_dropout else x

    def set_scale(self, name: str, factor: float) -> None:
        """s = factor * the scaling that the configuration gives; ValueError if the dtype cannot hold it."""
        self._rescale({name: factor * self.initial_scaling[name]})

    def scale_layer(self, factor: float) -> None:
        """s *= factor for the active adapters; ValueError as from `set_scale`."""
        self._rescale({name: self.scaling[name] * factor for name in self.active_adapters})

    def unscale_layer(self, factor: float | None = None) -> None:
        """s /= factor for the active adapters; None: back to the configured s. ValueError: as there, or for 0."""
        if factor == 0:
            raise ValueError("factor=0: the scaling cannot be divided by it; give None for the configured one")
        by = {
            name: self.initial_scaling[name] if factor is None else self.scaling[name] / factor
            for name in self.active_adapters
        }
        self._rescale(by)

    def _rescale(self, scalings: dict[str, float]) -> None:
        self.scaling.update({name: fitting(s, self.base_weight.dtype) for name, s in scalings.items()})

    # -- forward -------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return self.add_missing(y, x, speaking=()).to(y.dtype)
        if self.sample_adapters is not None:
            return self._add_by_row(y, x)
        return self._add(y, x, self.active_adapters)

    def _add(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        total = y
        for name in names:
            if name not in self.merged_adapters:
                total = self.add_branch(total, x, name)
        if self.lora_taken:
            total = self.add_missing(total, x, speaking=[*names, *self.merged_adapters])
        return total.to(y.dtype)  # summed in the adapter's precision, rounded once

    def _add_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.clone()
        for name, rows in self.rows(x.shape[0]):
            rows = rows.to(x.device)
            if name in self.r or self.lora_taken:
                y[rows] = self._add(y[rows], x[rows], [name] if name in self.r else [])
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


def fitting(s: float, dtype: torch.dtype) -> float:
    """s, or ValueError: factors of this dtype cannot be multiplied by it (half precisions are, as float32)."""
    return check_scaling(s, torch.finfo(torch.promote_types(dtype, torch.float32)).max)


def linear_of(weight: Float[Tensor, "n_out n_in"]) -> nn.Linear:
    """A frozen, bias-free nn.Linear around this weight; its own __init__ would draw another one first."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    vars(layer).update(out_features=weight.shape[0], in_features=weight.shape[1])
    layer._parameters.update(weight=nn.Parameter(weight.contiguous(), requires_grad=False), bias=None)
    return layer
