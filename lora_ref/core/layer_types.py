"""The layer types: Linear (and transformers' Conv1D), Embedding, Conv1d, Conv2d, Conv3d, and raw parameters."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .layer import LoraLayer, is_observed
from .update import pack_experts, unpack_experts


class Linear(LoraLayer):
    """y = x W^T + b + s (x A^T) B^T for `nn.Linear`, and for transformers' `Conv1D`, which stores W^T."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        vars(self).update(fan_in_fan_out=is_conv1d_of_transformers(base_layer))


class FactorTable(nn.ParameterDict):
    """{adapter: factor} of an embedding. It is called, so that hooks of engines run."""

    __call__ = nn.Module.__call__

    def forward(self, name: str) -> Tensor:
        return self[name]


class Embedding(LoraLayer):
    """y[i] = E[i] + s A^T[i] B^T for `nn.Embedding` (V, d): a linear layer on one-hot vectors.

    A (r, V) is looked up, B (d, r) multiplied. lora_dropout does not apply: the input is a token. At padding_idx the
    branch is added, but A gets no gradient. The `embed_scale` of a base (Gemma) scales the branch, as it does merged.
    """

    kind = "embedding"
    fan_in_fan_out = True
    by_adapter = ("lora_embedding_A", "lora_embedding_B", *LoraLayer.by_adapter)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A, self.lora_embedding_B = FactorTable(), FactorTable()

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A[name] = nn.Parameter(A.contiguous(), requires_grad=False)
        self.lora_embedding_B[name] = nn.Parameter(B.contiguous(), requires_grad=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def stored_in(self, name: str) -> dict[str, tuple[nn.Module, str]]:
        return {part: (getattr(self, part), name) for part in ("lora_embedding_A", "lora_embedding_B")}

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_embedding_A(name), self.lora_embedding_B(name)
        base: Any = self.get_base_layer()
        # the gradient of A is dense even where the base asks for sparse ones: A is small
        z = F.embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)  # (*tokens, r)
        return F.linear(z, B) * self.scaling[name] * getattr(base, "embed_scale", 1.0)  # (*tokens, d)


class Conv(LoraLayer):
    """y = conv(x) + s conv_1x1(conv_A(dropout(x))) for `nn.Conv1d`, `Conv2d` and `Conv3d`.

    A (r, in, *kernel) has the base's kernel, stride, padding and dilation. B (out, r / groups, 1, ...) has the base's
    groups: each has its own r / groups rows of A and columns of B. Flattened, A is (r, in * prod(kernel)).
    """

    kind = "conv"

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.get_base_layer().groups

    def logical(self, W: Tensor) -> Float[Tensor, "out fan_in"]:
        if self.groups == 1:
            return W.flatten(1)
        # A sees the inputs of all groups, which no grouped kernel does: a weight of that shape, without memory
        return W.new_zeros(()).expand(self.out_channels, self.in_channels * W[0, 0].numel())

    def stored(self, D: Float[Tensor, "out fan_in"]) -> Tensor:
        return D.reshape(self.base_weight.shape)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        base: Any = self.get_base_layer()
        r, kernel, ones = A.shape[0], base.kernel_size, (1,) * len(base.kernel_size)
        cls: Any = next(c for c in CONVOLUTIONS if isinstance(base, c))
        like_base = {k: getattr(base, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        lora_A = cls(base.in_channels, r, kernel, bias=False, device="meta", **like_base)
        lora_B = cls(r, base.out_channels, ones, groups=base.groups, bias=False, device="meta")
        lora_A.weight = nn.Parameter(A.reshape(r, base.in_channels, *kernel), requires_grad=False)
        B = B[:, : r // base.groups].reshape(base.out_channels, -1, *ones)
        lora_B.weight = nn.Parameter(B.contiguous(), requires_grad=False)
        self.lora_A[name], self.lora_B[name] = lora_A, lora_B

    def factors(self, name: str) -> tuple[Float[Tensor, "*groups r fan_in"], Float[Tensor, "*groups out r"]]:
        A, B = self.lora_A[name].weight.flatten(1), self.lora_B[name].weight.flatten(1)
        if self.groups > 1:
            A, B = A.reshape(self.groups, -1, A.shape[1]), B.reshape(self.groups, -1, B.shape[1])
        return A, B


class Parameter(LoraLayer):
    """W_e <- W_e + s B_e A_e for a raw parameter of a module, (out, in) or a stack (E, out, in) of experts.

    The module runs with the adapted parameter installed for the time of the call. A stack whose module says
    `is_transposed` is stored as (E, in, out). The file's layout is that of `update.pack_experts`. Several parameters of
    one module nest: a wrapper in a wrapper.
    Differs from PEFT: the module is not parametrised during the call; merged and active adapters may be mixed.
    """

    kind = "parameter"

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.weight_name = parameter_name
        self.fan_in_fan_out = self.base_weight.ndim == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        super().build(name, *(pack_experts(A, B) if A.ndim == 3 else (A, B)))

    def factors(self, name: str) -> tuple[Float[Tensor, "*experts r in"], Float[Tensor, "*experts out r"]]:
        W = self.base_weight
        A, B = matrix_of(self.lora_A[name], W), matrix_of(self.lora_B[name], W)
        return (A, B) if W.ndim == 2 else unpack_experts(A, B, W.shape[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.adapter_names is not None and not self.disable_adapters and set(self.adapter_names) & set(self.r):
            raise ValueError("adapter_names is not possible with target_parameters: one weight serves all samples")
        names = [name for name in self.active_adapters if name not in self.merged_adapters]
        if self.disable_adapters or not names or self.adapter_names is not None:
            return self.base_layer(*args, **kwargs)
        path, inner = self.weight_name, self.base_layer
        while isinstance(inner, LoraLayer):
            path, inner = f"base_layer.{path}", inner.base_layer
        W, owner = self.base_weight, self.get_base_layer()
        is_own = type(W) in (Tensor, nn.Parameter) and self.weight_name not in vars(owner)
        if not is_own or (W.is_meta and is_observed(owner)):
            raise ValueError(f"Parameter: {self.weight_name} is sharded or offloaded; merge the adapter before")
        return torch.func.functional_call(self.base_layer, {path: self.merged_weight(names)}, args, kwargs)


LAYER_TYPES: dict[str, type[LoraLayer]] = {t.kind: t for t in (Linear, Embedding, Conv, Parameter)}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's linear layer, recognised without importing transformers: weight (in, out), `nf` outputs."""
    weight = getattr(module, "weight", None) if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None
    return isinstance(weight, Tensor) and weight.ndim == 2


def matrix_of(module: nn.Module, W: Tensor) -> Tensor:
    """The matrix (n_out, n_in) of a factor of W: its weight, or the output for the unit vectors if it is not plain."""
    if type(module) is nn.Linear and "weight" in module._parameters and not is_observed(module):
        matrix = module.weight
    else:
        first, weight = next(m for m in module.modules() if hasattr(m, "in_features")), next(module.parameters(), None)
        dtype = torch.float32 if weight is None else weight.dtype
        matrix = module(torch.eye(cast(int, first.in_features), dtype=dtype, device=W.device)).T
    if matrix.device != W.device:
        raise ValueError(f"Parameter: the weight is on {W.device}, a factor on {matrix.device}: move the model")
    return matrix


def kind_of(module: nn.Module) -> str:
    """The key of a module's layer type, or "" where there is none.

    >>> kind_of(nn.Linear(2, 2)), kind_of(nn.Conv2d(2, 2, 3)), kind_of(nn.ReLU())
    ('linear', 'conv', '')
    """
    if isinstance(module, nn.Linear) or is_conv1d_of_transformers(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, CONVOLUTIONS) else ""
