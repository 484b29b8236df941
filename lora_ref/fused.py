"""A linear layer and its branches, faster: what `layers.Linear` says, with the gradients written by hand.

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
cache; and for backward stay x, z, and one byte an element for dropout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

from .formula import add_in_place


class Branch(NamedTuple):
    """One adapter's part: s * B A dropout(x), each element of x dropped with probability p."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    s: float
    p: float = 0.0


def applies(x: Tensor) -> bool:
    """Is this a plain eager call? Compilers, transforms and modes get the formula in torch's own operations."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # selective checkpointing keeps outputs, here they are added to
        or forward_ad._current_level >= 0
        or type(x) not in (Tensor, nn.Parameter)
    )


def is_plain(base: Any) -> bool:
    """Does it compute x W^T + b, seen by nobody? Not with hooks, a forward of its own, a weight of another class."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    forward = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    backward = everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks
    changed = hooked or forward or backward or "forward" in base.__dict__
    return not changed and type(base.weight) in (nn.Parameter, Tensor)


def add_branches(base: Any, W: Float[Tensor, "out in"], x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """base(x) + the sum of the branches, summed in the widest of the dtypes, rounded once to base(x)'s."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)  # torch's own operations would cast; the base does
        branches = [b if b.A.dtype == torch.float64 else Branch(b.A.to(dtype), b.B.to(dtype), *b[2:]) for b in branches]
    As, Bs, scales, masks = [], [], [], []
    for A, B, s, p in branches:
        As.append(A)
        Bs.append(B)
        scales.append(s / (1 - p))
        masks.append(mask(x, p) if p else None)
    if torch.is_grad_enabled():
        return Linear.apply(base, scales, masks, x, W, base.bias, *As, *Bs)
    return total(base, scales, masks, x, As, Bs)[0]


def total(
    base: Any, scales: Sequence[float], masks: Sequence[Tensor | None], x: Tensor, As: Sequence[Tensor], Bs: Any
) -> tuple[Tensor, list[Tensor]]:
    """y, and z of each branch."""
    zs = [A @ dropped(x, kept, A.dtype).T for A, kept in zip(As, masks, strict=True)]  # (r, in) @ (in, T) -> (r, T)
    y = base.forward(x).contiguous()  # it has no hooks
    flat = wide = y if y.ndim == 2 else y.view(-1, y.shape[-1])
    for z, B, s in zip(zs, Bs, scales, strict=True):
        if z.dtype != wide.dtype:
            wide, z, B = widened(wide, z, B)
        add_in_place(wide, z.T, B.T, s)  # (T, r) @ (r, out) -> (T, out)
    if wide is not flat:
        flat.copy_(wide)
    return y, zs


class Linear(torch.autograd.Function):
    """x, W, b, A_1, ..., B_1, ... -> base(x) + sum of s B A dropout(x)."""

    @staticmethod
    def forward(
        ctx: Any, base: Any, scales: Any, masks: Any, x: Tensor, W: Tensor, b: Tensor | None, *factors: Tensor
    ) -> Tensor:
        n = len(scales)
        y, zs = total(base, scales, masks, x, factors[:n], factors[n:])
        ctx.save_for_backward(x, W, *factors, *zs, *masks)
        ctx.scales = scales
        return y.detach() if y._is_view() else y  # a view could not be changed in place by others

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, *saved = ctx.saved_tensors
        n, (need_x, need_W, need_b, *need) = len(ctx.scales), ctx.needs_input_grad[3:]
        grads: list[Tensor | None] = [None] * (2 * n)
        g, dzs = g if g.ndim == 2 else g.reshape(-1, g.shape[-1]), []
        for i, s in enumerate(ctx.scales):
            A, B, z, kept = saved[i::n]
            wide, x_ = cast(g, B.dtype), dropped(x, kept, A.dtype)
            if torch.is_grad_enabled():  # second derivatives: z depends on x and A
                z = A @ x_.T
            dzs.append(product(B.T, wide.T, s))  # (r, out) @ (out, T) -> (r, T)
            if need[i]:
                grads[i] = dzs[i] @ x_  # (r, T) @ (T, in) -> (r, in)
            if need[n + i]:
                grads[n + i] = product(z, wide, s).T  # (r, T) @ (T, out) -> (r, out)
            del wide, x_
        dx = g @ cast(W, g.dtype) if need_x else None  # (T, out) @ (out, in) -> (T, in)
        if dx is not None:
            for i, dz in enumerate(dzs):
                dx = add_dx(dx, dz, saved[i], saved[3 * n + i])
            dx = cast(dx, x.dtype).view(x.shape)
        dW = g.T @ dropped(x, None, g.dtype) if need_W else None  # (out, T) @ (T, in) -> (out, in)
        return None, None, None, dx, dW, g.sum(0) if need_b else None, *grads


def add_dx(dx: Tensor, dz: Tensor, A: Tensor, kept: Tensor | None) -> Tensor:
    """dx += dz^T A, (T, r) @ (r, in) -> (T, in), where x was kept; in the wider of the dtypes."""
    if dx.dtype != A.dtype:
        dx, dz, A = widened(dx, dz, A)
    return add_in_place(dx, dz.T, A) if kept is None else dx.add_((dz.T @ A).mul_(kept))


def widened(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
    """All in the dtype that torch gives to x + y."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    return [cast(t, dtype) for t in (x, y, z)]


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
