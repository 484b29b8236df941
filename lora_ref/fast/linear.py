"""A linear layer with its branch as one autograd function. It equals `core.layer_types.Linear.forward`.

With T tokens, x (T, in), W (out, in), A (r, in), B (out, r), scaling s, and x~ = dropout(x):

    forward                          backward, from g = dL/dy (T, out)
    z  = A x~^T           (r, T)     dz = s B^T g^T      (r, T)
    y  = x W^T + b        (T, out)   dB = s (z g)^T      (out, r)
    y += s z^T B^T        (T, out)   dA = dz x~          (r, in)
                                     dx = g W            (T, in)
                                     dx += dz^T A        (T, in), where x was kept

It is faster than autograd. The rank comes first in a product: (r, T) @ (T, out) is several times faster than
(out, T) @ (T, r) where r is small. The sums are in place, in y and in dx. Few Python instructions run between the two
large products. Backward needs x, z, and one byte per element for dropout. Several adapters without dropout become one
of the sum of their ranks. On a CPU, compilers get this function too.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

from ..core import layer_types
from ..core.layer import is_observed
from .sums import add_each, add_in_place


class Branch(NamedTuple):
    """The branch of an adapter: s B A dropout(x), each element of x dropped with probability p."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    s: float
    p: float = 0.0


class Linear(layer_types.Linear):
    """`core.layer_types.Linear`, sooner where the base, lora_A, lora_B and lora_dropout are plain modules."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = input  # the name in torch's layers
        base: Any = self._modules["base_layer"]
        eager = not torch.compiler.is_compiling()
        if applies(x) and (type(base) is nn.Linear or (self.fan_in_fan_out and eager)) and not (args or kwargs):
            weights = plain_weights(base)
            if weights is not None and weights[0].device == x.device:
                if (branch := self.branch_tensors(x)) is not None:
                    return add_branch(base, self.logical(weights[0]), weights[1], x, branch)
                if eager and (each := self.factors_by_sample(x)):
                    y, rows = base(x), torch.tensor(list(each), device=x.device)
                    if len(each) == len(y):
                        return add_each(y, x, list(each.values()))
                    return y.index_put((rows,), add_each(y[rows], x[rows], list(each.values())))
        return super().forward(x, *args, **kwargs)

    def branch_tensors(self, x: Tensor) -> Branch | None:
        """The branch as tensors, or None where this file does not apply: disabled, a mixed batch, a D0, factors that
        are not plain, two dropout masks. Nor for p > 1/2, since s / (1 - p) might leave the range of the dtype."""
        found = []
        if self.disable_adapters or self.adapter_names is not None:
            return None
        for name in self.active_adapters:
            if name in self.merged_adapters:
                continue
            pair, dropout, p = self.plain_factors(name, x), self.part("lora_dropout", name), 0.0
            if pair is None or self.part("lora_initial", name) is not None:
                return None
            if dropout is not None:
                if type(dropout) is not nn.Dropout or is_observed(dropout) or (dropout.p > 0.5 and dropout.training):
                    return None
                p = dropout.p if dropout.training else 0.0
            found.append(Branch(*pair, self.scaling[name], p))
        if len(found) > 1:
            return joined(found) if not any(branch.p for branch in found) else None  # each has its own mask
        return found[0] if found else None

    def plain_factors(self, name: str, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """A and B, if lora_A and lora_B are plain modules of one dtype on the device of x."""
        part: Any = self._modules
        lora_A, lora_B = part["lora_A"]._modules[name], part["lora_B"]._modules[name]
        if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return None
        weights_A, weights_B = plain_weights(lora_A), plain_weights(lora_B)
        if weights_A is None or weights_B is None or weights_A[1] is not None or weights_B[1] is not None:
            return None
        A, B = weights_A[0], weights_B[0]
        return (A, B) if A.dtype == B.dtype and A.device == B.device == x.device else None

    def factors_by_sample(self, x: Tensor) -> dict[int, tuple[Tensor, Tensor, float]]:
        """{i: (A, B, s)} of the samples that have an adapter, in a mixed batch; {} where this file does not apply."""
        if self.disable_adapters or self.adapter_names is None:
            return {}
        names = self.names_of_batch(x.shape[0])
        used = {name: self.plain_factors(name, x) for name in dict.fromkeys(names) if name in self.r}
        for name, pair in used.items():
            dropout = self.part("lora_dropout", name)
            plain = dropout is None or (type(dropout) is nn.Dropout and not (dropout.training or is_observed(dropout)))
            if pair is None or not plain or self.part("lora_initial", name) is not None:
                return {}
        return {i: (*used[name], self.scaling[name]) for i, name in enumerate(names) if name in used}  # type: ignore[misc]


def joined(branches: Sequence[Branch]) -> Branch:
    """The sum of branches without dropout: s1 B1 A1 + s2 B2 A2 = s [s1/s B1 | s2/s B2] [A1; A2], of rank r1 + r2."""
    s = max(abs(b.s) for b in branches) or 1.0  # the largest: the others' B stay in their dtype's range
    return Branch(torch.cat([b.A for b in branches]), torch.cat([b.B * (b.s / s) for b in branches], dim=1), s)


def applies(x: Tensor) -> bool:
    """Is this a plain call? Transforms, exports, modes, subclasses of tensors and global hooks get the core's way."""
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or type(x) not in (Tensor, nn.Parameter)
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    ):
        return False
    if torch.compiler.is_compiling():  # for other devices a compiler fuses these operations better
        return x.device.type == "cpu" and not (torch.compiler.is_exporting() or torch.is_autocast_enabled("cpu"))
    # selective checkpointing keeps outputs, here they are added to
    return not (torch._C._is_tracing() or torch._C._len_torch_dispatch_stack())


def plain_weights(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """W and b, if the module computes x W^T + b and nothing observes or replaces that (`core.layer.is_observed`).
    Else None: hooks, a patched forward, a tensor subclass, a W that is computed from others.

    (Dicts and one function: between two large products a call, or an attribute lookup on a module, is expensive.)
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return None
    weights = own["_parameters"]
    if "forward" in own or "bias" not in weights:
        return None
    return (W, weights["bias"]) if type(W := weights.get("weight")) in (nn.Parameter, Tensor) else None


def add_branch(base: Any, W: Float[Tensor, "out in"], b: Tensor | None, x: Tensor, branch: Branch) -> Tensor:
    """base(x) + the branch, summed in the wider of the dtypes, rounded once to base(x)'s."""
    A, B, s, p = branch
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type) and A.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)  # torch's own operations would cast; the base does
        A, B = A.to(dtype), B.to(dtype)
    kept = mask(x, p) if p else None
    if torch.is_grad_enabled():
        return LinearWithBranch.apply(base, s / (1 - p), kept, x, W, b, A, B)
    return forward(base, s / (1 - p), kept, x, W, b, A, B)[0]


def forward(
    base: Any, s: float, kept: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """y (*tokens, out), the base's output with the branch added in its memory, and z (r, T)."""
    z = A.mm(dropped(x, kept, A.dtype).T)  # (r, in) @ (in, T) -> (r, T)
    y = F.linear(x, W, b) if type(base) is nn.Linear else base.forward(x)  # bit for bit what the base says
    y = y.contiguous()
    add_in_place(y if y.ndim == 2 else y.view(-1, y.shape[-1]), z.T, B.T, s)  # (T, r) @ (r, out) -> (T, out)
    return y, z


class LinearWithBranch(torch.autograd.Function):
    """x, W, b, A, B -> base(x) + s B A dropout(x)."""

    @staticmethod
    def forward(
        ctx: Any, base: Any, s: float, kept: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        y, z = forward(base, s, kept, x, W, b, A, B)
        ctx.save_for_backward(x, W, A, B, z, kept)
        ctx.s = s
        # a view could not be changed in place by others
        return y if torch.compiler.is_compiling() or not y._is_view() else y.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, A, B, z, kept = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B = ctx.needs_input_grad[3:]
        dx = dW = None
        g = g if g.ndim == 2 else g.reshape(-1, g.shape[-1])
        wide, x_ = in_dtype(g, B.dtype), dropped(x, kept, A.dtype)
        if torch.is_grad_enabled():  # second derivatives: z depends on x and A
            z = A @ x_.T
        dz = product(B.T, wide.T, ctx.s)  # (r, out) @ (out, T) -> (r, T)
        dB = product(z, wide, ctx.s).T if need_B else None  # (r, T) @ (T, out) -> (r, out)
        dA = dz @ x_ if need_A else None  # (r, T) @ (T, in) -> (r, in)
        del wide, x_  # copies, perhaps
        if need_x:
            dx = g @ in_dtype(W, g.dtype)  # (T, out) @ (out, in) -> (T, in)
            # (T, r) @ (r, in) -> (T, in)
            dx = add_in_place(dx, dz.T, A) if kept is None else dx.add_((dz.T @ A).mul_(kept))
            dx = in_dtype(dx, x.dtype).view(x.shape)
        if need_W:
            dW = g.T @ dropped(x, None, g.dtype)  # (out, T) @ (T, in) -> (out, in)
        return None, None, None, dx, dW, g.sum(0) if need_b else None, dA, dB


def product(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s * a @ b in one pass."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=s)


def dropped(x: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "tokens in"]:
    """x in this dtype, zero where it is dropped; the factor 1 / (1 - p) is part of the scaling."""
    x = in_dtype(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), dtype)
    return x if kept is None else x * kept


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)  # `to` alone takes as long as a product of one token


def mask(x: Float[Tensor, "*tokens in"], p: float) -> UInt8[Tensor, "tokens in"]:
    """1 where an element is kept, 0 where it is dropped: with probability p, rounded to a multiple of 2^-16.

    Four elements share a random integer of 64 bits, since drawing takes most of dropout's time. The rounding
    changes the expected share that is kept by a factor within 1 +- 2^-17 / (1 - p).
    """
    n = x.numel()
    words = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = words.view(torch.int16)[:n] >= round(p * 2**16) - 2**15
    return kept.view(torch.uint8).view(-1, x.shape[-1])
