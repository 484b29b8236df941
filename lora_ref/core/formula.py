"""The formula y + s * (x A^T) B^T, the precision in which it is summed, and the sum in place."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 or float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_product(
    y: Float[Tensor, "*tokens out"],
    x: Float[Tensor, "*tokens in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    s: float,
) -> Float[Tensor, "*tokens out"]:
    """y + s * (x A^T) B^T, with product, scaling and sum in one pass over y, in the widest of the dtypes."""
    z = F.linear(x.to(A.dtype), A)  # (*tokens, in) @ (in, r) -> (*tokens, r)
    dtype = torch.promote_types(y.dtype, z.dtype)
    y, z, B = y.to(dtype), z.to(dtype), B.to(dtype)
    flat = torch.addmm(y.reshape(-1, y.shape[-1]), z.reshape(-1, z.shape[-1]), B.T, alpha=s)
    return flat.view(y.shape)  # (tokens, r) @ (r, out) -> (*tokens, out)


def add_in_place(
    total: Float[Tensor, "rows m"], B: Float[Tensor, "rows r"], A: Float[Tensor, "r m"], s: float = 1.0
) -> Tensor:
    """total += s * B @ A, in total's own memory; an s of 0 hides what is not finite in A and B.

    Summed in the wider of the dtypes of total and A, rounded once. Rows that lie a multiple of 4096 bytes apart share
    a few places in a processor's cache. Where r is small, BLAS sums many such rows at a time in single precision; a
    batch of products of 16 rows each is quicker.

    >>> add_in_place(torch.ones(2, 2), B=torch.tensor([[1.0], [2.0]]), A=torch.tensor([[3.0, 4.0]]), s=0.5)
    tensor([[2.5000, 3.0000],
            [4.0000, 5.0000]])
    """
    if total.dtype != A.dtype:
        dtype = torch.promote_types(total.dtype, A.dtype)
        wide = add_in_place(total.to(dtype), B.to(dtype), A.to(dtype), s)
        return total if wide is total else total.copy_(wide)
    (r, m), n = A.shape, total.shape[0] // 16
    if n and r <= 12 and total.dtype == torch.float32 and total.stride(0) % 1024 == 0 and total.device.type == "cpu":
        rows, of_B = total[: 16 * n].unflatten(0, (n, 16)), B[: 16 * n].unflatten(0, (n, 16))
        rows.baddbmm_(of_B, A.expand(n, r, m), alpha=s)  # (n, 16, r) @ (n, r, m) -> (n, 16, m)
        total[16 * n :].addmm_(B[16 * n :], A, alpha=s)
        return total
    return total.addmm_(B, A, alpha=s)  # (rows, r) @ (r, m) -> (rows, m)
