"""Sums in place: total += s B A, without a second array of total's size."""

import torch
from jaxtyping import Float
from torch import Tensor


def add_in_place(
    total: Float[Tensor, "rows m"], B: Float[Tensor, "rows r"], A: Float[Tensor, "r m"], s: float = 1.0
) -> Tensor:
    """total += s B A, in total's own memory. An s of 0 hides numbers in A and B that are not finite.

    The sum is in the wider of the dtypes of total and A, and is rounded once. Rows at a distance of a multiple of 4096
    bytes share few lines of a processor's cache. Where r is small, BLAS sums many such rows at a time in single
    precision. A batch of products of 16 rows each is faster.

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
