"""A linear layer and its branch, faster: what `layers.Linear` says, with the gradients written by hand.

With T tokens, x (T, in), W (out, in), A (r, in), B (out, r), scaling s, and x~ = dropout(x):

    forward                          backward, from g = dL/dy (T, out)
    z  = A x~^T           (r, T)     dz = s B^T g^T      (r, T)
    y  = x W^T + b        (T, out)   dB = s (z g)^T      (out, r)
    y += s z^T B^T        (T, out)   dA = dz x~          (r, in)
                                     dx = g W            (T, in)
                                     dx += dz^T A        (T, in), where x was kept

Autograd computes the same. What is faster: the rank comes first, for (r, T) @ (T, out) takes a fraction of
(out, T) @ (T, r) where r is small, and leaves x and g in the cache for the large products; the sums are made in
place, in y and in dx; between two large products little of Python runs, whose own memory they have driven out of the
cache; and for backward stay x, z, and one byte an element for dropout. Several adapters are one of their ranks' sum.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

from ..core.formula import add_in_place


class Branch(NamedTuple):
    """An adapter's part: s * B A dropout(x), each element of x dropped with probability p."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    s: float
    p: float = 0.0


def joined(branches: Sequence[Branch]) -> Branch:
    """The sum of branches without dropout: s1 B1 A1 + s2 B2 A2 = s [s1/s B1 | s2/s B2] [A1; A2], of rank r1 + r2."""
    s = max(abs(b.s) for b in branches) or 1.0  # the largest: the others' B stay in their dtype's range
    return Branch(torch.cat([b.A for b in branches]), torch.cat([b.B * (b.s / s) for b in branches], dim=1), s)


def applies(x: Tensor) -> bool:
    """Is this a plain eager call? Compilers, transforms and modes get the formula in torch's own operations."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # selective checkpointing keeps outputs, here they are added to
        or forward_ad._current_level >= 0
        or type(x) not in (Tensor, nn.Parameter)
    )


def plain(base: Any) -> tuple[Tensor, Tensor | None] | None:
    """W and b, if the module computes x W^T + b, seen by nobody: no hooks, no other forward, no W of another class.

    (Out of a dict: an attribute of a module is looked for in three places, which takes as long as a small product.)
    """
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    forward = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    backward = everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks
    own = base._parameters
    if hooked or forward or backward or "forward" in base.__dict__ or "bias" not in own:
        return None
    return (W, own["bias"]) if type(W := own.get("weight")) in (nn.Parameter, Tensor) else None


def add_branch(base: Any, W: Float[Tensor, "out in"], b: Tensor | None, x: Tensor, branch: Branch) -> Tensor:
    """base(x) + the branch, summed in the wider of the dtypes, rounded once to base(x)'s."""
    A, B, s, p = branch
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type) and A.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)  # torch's own operations would cast; the base does
        A, B = A.to(dtype), B.to(dtype)
    kept = mask(x, p) if p else None
    if torch.is_grad_enabled():
        return Linear.apply(base, s / (1 - p), kept, x, W, b, A, B)
    return total(base, s / (1 - p), kept, x, W, b, A, B)[0]


def total(
    base: Any, s: float, kept: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor
) -> tuple[Tensor, Tensor]:
    """y (*tokens, out), the base's output with the branch added in its memory, and z (r, T)."""
    z = A.mm(dropped(x, kept, A.dtype).T)  # (r, in) @ (in, T) -> (r, T)
    y = F.linear(x, W, b) if type(base) is nn.Linear else base.forward(x)  # bit for bit what the base says
    y = y.contiguous()
    add_in_place(y if y.ndim == 2 else y.view(-1, y.shape[-1]), z.T, B.T, s)  # (T, r) @ (r, out) -> (T, out)
    return y, z


class Linear(torch.autograd.Function):
    """x, W, b, A, B -> base(x) + s B A dropout(x)."""

    @staticmethod
    def forward(
        ctx: Any, base: Any, s: float, kept: Tensor | None, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor
    ) -> Tensor:
        y, z = total(base, s, kept, x, W, b, A, B)
        ctx.save_for_backward(x, W, A, B, z, kept)
        ctx.s = s
        return y.detach() if y._is_view() else y  # a view could not be changed in place by others

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, A, B, z, kept = ctx.saved_tensors
        need_x, need_W, need_b, need_A, need_B = ctx.needs_input_grad[3:]
        dx = dW = None
        g = g if g.ndim == 2 else g.reshape(-1, g.shape[-1])
        wide, x_ = cast(g, B.dtype), dropped(x, kept, A.dtype)
        if torch.is_grad_enabled():  # second derivatives: z depends on x and A
            z = A @ x_.T
        dz = product(B.T, wide.T, ctx.s)  # (r, out) @ (out, T) -> (r, T)
        dB = product(z, wide, ctx.s).T if need_B else None  # (r, T) @ (T, out) -> (r, out)
        dA = dz @ x_ if need_A else None  # (r, T) @ (T, in) -> (r, in)
        del wide, x_  # copies, perhaps
        if need_x:
            dx = g @ cast(W, g.dtype)  # (T, out) @ (out, in) -> (T, in)
            # (T, r) @ (r, in) -> (T, in)
            dx = add_in_place(dx, dz.T, A) if kept is None else dx.add_((dz.T @ A).mul_(kept))
            dx = cast(dx, x.dtype).view(x.shape)
        if need_W:
            dW = g.T @ dropped(x, None, g.dtype)  # (out, T) @ (T, in) -> (out, in)
        return None, None, None, dx, dW, g.sum(0) if need_b else None, dA, dB


def product(a: Tensor, b: Tensor, s: float) -> Tensor:
    """s * a @ b in one pass."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=s)


def dropped(x: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Float[Tensor, "tokens in"]:
    """x in this dtype, zero where it is dropped; the factor 1 / (1 - p) is part of the scaling."""
    x = cast(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]), dtype)
    return x if kept is None else x * kept


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
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
