"""The branch of a linear layer, faster: what `weights.add_product` says, with the gradients written by hand.

With T tokens, x (T, in), A (r, in), B (out, r), scaling s, and x~ = dropout(x):

    forward                          backward, from g = dL/dy (T, out)
    z  = A x~^T           (r, T)     dz = s B^T g^T      (r, T)
    y += s z^T B^T        (T, out)   dB = s (z g)^T      (out, r)
                                     dA = dz x~          (r, in)
                                     dx += dz^T A        (T, in), where x was kept

Autograd computes the same. What is faster: the rank comes first, for (r, T) @ (T, out) takes a fraction of
(out, T) @ (T, r) where r is small; the sums are made in place, `Up`'s in the base's y and `Down`'s, which x passes
through on its way to the base, in the base's dx; and for backward stay x, z, and one byte an element for dropout.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere


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


def unobserved(base: nn.Module) -> bool:
    """May what this layer returns, forward and backward, be changed in place? Not where a hook might keep it."""
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    forward = everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks
    return not (hooked or forward or everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks)


def add_branches(base: nn.Module, x: Tensor, branches: Sequence[Branch], in_place: bool) -> Tensor:
    """base(x) + the sum of the branches, summed in the widest of the dtypes, rounded once to base(x)'s."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)  # torch's own operations would cast; the base does
        branches = [b if b.A.dtype == torch.float64 else Branch(b.A.to(dtype), b.B.to(dtype), *b[2:]) for b in branches]
    As, Bs, scales = [b.A for b in branches], [b.B for b in branches], [b.s / (1 - b.p) for b in branches]
    masks = [mask(x, b.p) if b.p else None for b in branches]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *As, *Bs)):
        x, *zs = Down.apply(x, in_place, masks, *As)
        return Up.apply(base(x), in_place, scales, *zs, *Bs)
    zs = [A @ dropped(x, kept, A.dtype).T for A, kept in zip(As, masks, strict=True)]
    return up(base(x), in_place, scales, zs, Bs)


def up(y: Tensor, in_place: bool, scales: Sequence[float], zs: Sequence[Tensor], Bs: Sequence[Tensor]) -> Tensor:
    """y + sum of s z^T B^T, in y's own memory if allowed."""
    total, dtype = y.detach(), y.dtype  # y's memory, but for autograd not y: a result of `Up`, not a change of y
    for z in zs:
        dtype = z.dtype if z.dtype == dtype else torch.promote_types(dtype, z.dtype)
    if not (in_place and dtype == y.dtype and total.is_contiguous()):
        total = total.to(dtype, copy=True, memory_format=torch.contiguous_format)
    flat = total.view(-1, y.shape[-1])
    for s, z, B in zip(scales, zs, Bs, strict=True):
        flat.addmm_(cast(z, dtype).T, cast(B, dtype).T, alpha=s)  # (T, r) @ (r, out) -> (T, out)
    return cast(total, y.dtype)


class Down(torch.autograd.Function):
    """x, A_1, ... -> x for the base layer, z_1, ...: x has several users, whose gradients meet in one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_place: bool, masks: list[Tensor | None], *As: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *As, *masks)
        ctx.in_place = in_place
        ctx.set_materialize_grads(False)
        passed = x.detach()
        if not x.requires_grad:
            ctx.mark_non_differentiable(passed)
        zs = [A @ dropped(x, kept, A.dtype).T for A, kept in zip(As, masks, strict=True)]
        return passed, *zs  # (r, in) @ (in, T) -> (r, T)

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *dzs: Tensor) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        n, needs = len(dzs), ctx.needs_input_grad
        dAs: list[Tensor | None] = [None] * n
        for i, dz in enumerate(dzs):
            A, kept = saved[i], saved[n + i]
            if needs[3 + i]:
                dAs[i] = dz @ dropped(x, kept, A.dtype)  # (r, T) @ (T, in) -> (r, in)
            if needs[0]:
                dx = add_dx(torch.zeros_like(x) if dx is None else dx, dz, A, kept, ctx.in_place)
        return dx, None, None, *dAs


def add_dx(dx: Tensor, dz: Tensor, A: Tensor, kept: Tensor | None, in_place: bool) -> Tensor:
    """dx + dz^T A, (T, r) @ (r, in) -> (T, in), where x was kept; in dx's own memory if allowed."""
    flat = dx if dx.ndim == 2 else dx.reshape(-1, dx.shape[-1])
    if kept is None and dx.dtype == A.dtype:
        flat = flat.addmm_(dz.T, A) if in_place else torch.addmm(flat, dz.T, A)
    else:
        part = dz.T @ A
        part = part if kept is None else part.mul_(kept) if in_place else part * kept
        flat = flat.add_(part) if in_place else (flat + part).to(dx.dtype)
    return flat if dx.ndim == 2 else flat.view(dx.shape)


class Up(torch.autograd.Function):
    """y, z_1, ..., B_1, ... -> y + sum of s z^T B^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, in_place: bool, scales: Sequence[float], *factors: Tensor) -> Tensor:
        ctx.save_for_backward(*factors)
        ctx.scales, n = scales, len(scales)
        return up(y, in_place, scales, factors[:n], factors[n:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        factors, needs, n = ctx.saved_tensors, ctx.needs_input_grad, len(ctx.scales)
        flat = g.reshape(-1, g.shape[-1])
        grads: list[Tensor | None] = [None] * (2 * n)
        for i, s in enumerate(ctx.scales):
            z, B = factors[i], factors[n + i]
            wide = cast(flat, B.dtype)
            if needs[3 + i]:
                grads[i] = product(B.T, wide.T, s)  # (r, out) @ (out, T) -> (r, T)
            if needs[3 + n + i]:
                grads[n + i] = product(z, wide, s).T  # (r, T) @ (T, out) -> (r, out)
        return g, None, None, *grads


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
