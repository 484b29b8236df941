"""The layer types: Linear (and transformers' Conv1D), Embedding, Conv1d, Conv2d, Conv3d."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..fast import linear as fused
from ..fast.mixed_batch import add_each
from .formula import add_product
from .layer import LoraLayer


class Linear(LoraLayer):
    """y = x W^T + b + s * (x A^T) B^T for `nn.Linear`, and for transformers' `Conv1D`, which stores W^T."""

    fan_in_fan_out: bool

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.have(fan_in_fan_out=is_conv1d_of_transformers(base_layer))

    def logical(self, W: Tensor) -> Float[Tensor, "out in"]:
        return W.T if self.fan_in_fan_out else W

    def stored(self, D: Float[Tensor, "out in"]) -> Tensor:
        return D.T if self.fan_in_fan_out else D

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_A[name].weight, self.lora_B[name].weight
        return add_product(y, self.dropped(x.to(A.dtype), name), A, B, self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The formula above, or the same by `fused` where that applies."""
        base: Any = self._modules["base_layer"]
        if fused.applies(x) and (type(base) is nn.Linear or self.fan_in_fan_out) and not (args or kwargs):
            plain, branch = fused.plain(base), self.branch()
            if plain is not None and branch is not None:
                return fused.add_branch(base, self.logical(plain[0]), plain[1], x, branch)
        return super().forward(x, *args, **kwargs)

    def branch(self) -> fused.Branch | None:
        """What `forward` adds to the base's output; None where only the formula can tell."""
        part: Any = self._modules  # dicts and not attributes, as in `fused.plain`
        taken, dropouts, merged, found = part.get("lora_taken"), part.get("lora_dropout"), self.merged_adapters, []
        if self.disable_adapters or self.sample_adapters is not None:
            return None
        if taken and not taken.keys() <= {*self.active_adapters, *merged}:
            return None
        for name in self.active_adapters:
            if name in merged:
                continue
            A = part["lora_A"]._modules[name]._parameters.get("weight")
            B, p = part["lora_B"]._modules[name]._parameters.get("weight"), 0.0
            if dropouts and name in dropouts:
                dropout = dropouts[name]
                if type(dropout) is not nn.Dropout or (dropout.p > 0.5 and dropout.training):
                    return None
                p = dropout.p if dropout.training else 0.0
            if A is None or B is None or A.dtype != B.dtype:  # None: computed from others, by a parametrisation
                return None
            found.append(fused.Branch(A, B, self.scaling[name], p))
        if len(found) > 1:
            return fused.joined(found) if not any(branch.p for branch in found) else None  # each has its own mask
        return found[0] if found else None

    def _add_by_row(self, y: Tensor, x: Tensor) -> Tensor:
        """Every row's own factors in one stack: this costs what the rows cost, however many adapters there are."""
        names = self.row_names(x.shape[0])
        rows = [i for i, name in enumerate(names) if name in self.r]
        if self.lora_taken or self.training or not rows:
            return super()._add_by_row(y, x)
        pairs = [(*self.factors(names[i]), self.scaling[names[i]]) for i in rows]
        if len(rows) == len(names):
            return add_each(y, x, pairs)
        return y.index_put((torch.tensor(rows, device=y.device),), add_each(y[rows], x[rows], pairs))


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

    def logical(self, W: Tensor) -> Float[Tensor, "dim vocabulary"]:
        return W.T

    def stored(self, D: Float[Tensor, "dim vocabulary"]) -> Tensor:
        return D.T

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A[name] = nn.Parameter(A.contiguous(), requires_grad=False)
        self.lora_embedding_B[name] = nn.Parameter(B.contiguous(), requires_grad=False)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def add_branch(self, y: Tensor, x: Tensor, name: str) -> Tensor:
        A, B = self.factors(name)
        base: Any = self.get_base_layer()
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

    def logical(self, W: Tensor) -> Float[Tensor, "out fan_in"]:
        if self.groups == 1:
            return W.flatten(1)
        # A sees all groups' inputs, which no grouped kernel does: a weight of that shape, without memory
        fan_in = self.in_channels * W[0, 0].numel()
        return W.new_zeros(()).expand(self.out_channels, fan_in)

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        base: Any = self.get_base_layer()
        r, kernel, ones = A.shape[0], base.kernel_size, (1,) * len(base.kernel_size)
        cls: Any = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(base, c))
        like_base = {k: getattr(base, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        lora_A = cls(base.in_channels, r, kernel, bias=False, device="meta", **like_base)
        lora_B = cls(r, base.out_channels, ones, groups=base.groups, bias=False, device="meta")
        lora_A.weight = nn.Parameter(A.reshape(r, base.in_channels, *kernel), requires_grad=False)
        # each group of outputs sees its own r / groups rows of A
        B = B[:, : r // base.groups].reshape(base.out_channels, -1, *ones)
        lora_B.weight = nn.Parameter(B.contiguous(), requires_grad=False)
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
        z = lora_A(self.dropped(x.to(lora_A.weight.dtype), name))  # (batch, r, *space)
        return y + self.scaling[name] * self.lora_B[name](z)  # (batch, out, *space)


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's linear layer, recognised without importing transformers: weight (in, out), `nf` outputs."""
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nf"):
        return False
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2
