"""The adapted layers: the untouched base module plus a dict of named adapters.

    y = base(x) + sum over active adapters of  s * B A dropout(x)

One class holds what all layers share; a layer type adds only how A and B look in storage
(`build`, `factors`, `assign`, `stored`) and how a branch is computed (`add_branch`).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import decomposition
from .decomposition import Factors
from .scaling import scaling
from .wrappers import AdapterModule

Init = Callable[[Tensor, int, float], Factors]


class LoraLayer(AdapterModule):
    """What every adapted layer has: the base, A and B for each adapter, their r, alpha and s.

    `kind` is what the initialisations know it by; `weight_name` is the base parameter that an
    update is added to by a merge.
    """

    kind = "linear"
    weight_name = "weight"
    groups = 1  # how many pairs of factors share out the rank
    by_adapter = ("lora_A", "lora_B", "lora_dropout", "r", "lora_alpha", "scaling", "initial_scaling")

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
        base = self.base_layer
        while isinstance(base, AdapterModule):
            base = base.base
        return base

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

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        if all(name in self.adapters() for name in state["merged"]):
            self.put_weight(state["weight"])
            self.merged_adapters, self.spare = state["merged"], state["spare"]

    # -- storage: what a layer type must say ---------------------------------------------------

    def logical_weight(self) -> Float[Tensor, "*batch out in"]:
        """The base weight as (out, in): transposed storage is undone here and nowhere else."""
        return self.base_weight.detach()

    def stored(self, D: Float[Tensor, "*batch out in"]) -> Tensor:
        """A logical update in the shape that the base weight is stored in."""
        return D.reshape(self.base_weight.shape)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        """Make the modules that hold A (r, in) and B (out, r), in the shapes of the adapter file."""
        self.lora_A[name] = _linear(A)
        self.lora_B[name] = _linear(B)

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


class Linear(LoraLayer):
    """y = x W^T + b + s * (x A^T) B^T for `nn.Linear`, and for transformers' `Conv1D`, which stores W^T."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.fan_in_fan_out = is_conv1d_of_transformers(base_layer)

    def logical_weight(self) -> Float[Tensor, "out in"]:
        W = self.base_weight.detach()
        return W.T if self.fan_in_fan_out else W

    def stored(self, D: Float[Tensor, "out in"]) -> Tensor:
        return D.T if self.fan_in_fan_out else D

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        z = F.linear(self.lora_dropout[name](x.to(A.dtype)), A)  # (*tokens, in) @ (in, r) -> (*tokens, r)
        dtype = torch.promote_types(y.dtype, z.dtype)
        y, z, B = y.to(dtype), z.to(dtype), B.to(dtype)
        # product, scaling and sum in one pass over y
        flat = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=self.scaling[name])
        return flat.view(y.shape)  # (tokens, r) @ (r, out) -> (*tokens, out)


class Embedding(LoraLayer):
    """y[i] = E[i] + s * A^T[i] B^T for `nn.Embedding` (V, d): a linear layer on one-hot vectors.

    A (r, V) is looked up, B (d, r) multiplied. lora_dropout does not apply: the input is a token.
    At padding_idx the branch is added but A gets no gradient. A base with an `embed_scale`
    (Gemma) scales the branch too, so that merging changes nothing.
    """

    kind = "embedding"
    by_adapter = ("lora_embedding_A", "lora_embedding_B", *LoraLayer.by_adapter)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def logical_weight(self) -> Float[Tensor, "dim vocabulary"]:
        return self.base_weight.detach().T

    def stored(self, D: Float[Tensor, "dim vocabulary"]) -> Tensor:
        return D.T

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A[name] = nn.Parameter(A.contiguous())
        self.lora_embedding_B[name] = nn.Parameter(B.contiguous())

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        A, B = self.factors(name)
        base = self.get_base_layer()
        # the gradient of A is dense even where the base asks for sparse ones: A is small
        z = F.embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (*tokens, r)
        branch = F.linear(z, B) * self.scaling[name]  # (*tokens, r) @ (r, d) -> (*tokens, d)
        return y + branch * getattr(base, "embed_scale", 1.0)


class Conv(LoraLayer):
    """y = conv(x) + s * conv_1x1(conv_A(dropout(x))) for `nn.Conv1d`, `Conv2d` and `Conv3d`.

    A (r, in, *kernel) has the base's kernel, stride, padding and dilation; B (out, r / groups, 1, ...)
    has kernel 1 and the base's groups. Flattened, that is A (r, in * prod(kernel)) and the usual product.
    """

    kind = "conv"

    @property
    def groups(self) -> int:  # type: ignore[override]
        """The base's groups: each has its own r / groups rows of A and columns of B."""
        return self.get_base_layer().groups  # type: ignore[return-value]

    def logical_weight(self) -> Float[Tensor, "out fan_in"]:
        base: Any = self.get_base_layer()
        if base.groups == 1:
            return base.weight.detach().flatten(1)
        # A sees all groups' inputs, which no grouped kernel does: a weight of that shape, without memory
        fan_in = base.in_channels * base.weight[0, 0].numel()
        return base.weight.new_zeros(()).expand(base.out_channels, fan_in)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        base: Any = self.get_base_layer()
        r, kernel, ones = A.shape[0], base.kernel_size, (1,) * len(base.kernel_size)
        cls = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, c))
        like_base = {k: getattr(base, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        lora_A = cls(base.in_channels, r, kernel, bias=False, device="meta", **like_base)
        lora_B = cls(r, base.out_channels, ones, groups=base.groups, bias=False, device="meta")
        lora_A.weight = nn.Parameter(A.reshape(r, base.in_channels, *kernel))
        # each group of outputs sees its own r / groups rows of A
        lora_B.weight = nn.Parameter(B[:, : r // base.groups].reshape(base.out_channels, -1, *ones).contiguous())
        self.lora_A[name], self.lora_B[name] = lora_A, lora_B

    def factors(self, name: str) -> tuple[Float[Tensor, "*groups r fan_in"], Float[Tensor, "*groups out r"]]:
        A, B = self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1)
        if self.groups == 1:
            return A, B
        return A.reshape(self.groups, -1, A.shape[1]), B.reshape(self.groups, -1, B.shape[1])

    def packed(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        return A.flatten(0, -2), B.flatten(0, -2)

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        lora_A = self.lora_A[name]
        z = lora_A(self.lora_dropout[name](x.to(lora_A.weight.dtype)))  # (batch, r, *space)
        return y + self.scaling[name] * self.lora_B[name](z)  # (batch, out, *space)


def adapter_dtype(base: torch.dtype, autocast_adapter_dtype: bool = True) -> torch.dtype:
    """The dtype of A and B: the base's, but float32 for half and quarter precision."""
    return torch.float32 if autocast_adapter_dtype and base.itemsize < 4 else base


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's linear layer, recognised without importing transformers: weight (in, out), `nf` outputs."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight").ndim == 2


def _linear(weight: Float[Tensor, "n_out n_in"]) -> nn.Linear:
    """A bias-free nn.Linear around this weight, without drawing another one first."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    return layer
