"""Sums of products: into an array's own memory, and over a batch in which each sample has its own factors.

total += s B A          y_i + s_i B_i A_i x_i
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def add_in_place(
    total: Float[Tensor, "rows m"], B: Float[Tensor, "rows r"], A: Float[Tensor, "r m"], s: float = 1.0
) -> Tensor:
    """total += s B A, in total's own memory. An s of 0 hides numbers in A and B that are not finite.

    The sum is in the wider of the dtypes of total and A, and is rounded once. Rows at a distance of a multiple of 4096
    bytes share few lines of a cache. Then, where r is small, a batch of products of 16 rows each is faster.

    >>> add_in_place(torch.ones(2, 2), B=torch.tensor([[1.0], [2.0]]), A=torch.tensor([[3.0, 4.0]]), s=0.5)
    tensor([[2.5000, 3.0000],
            [4.0000, 5.0000]])
    """
    if torch.compiler.is_compiling():
        torch.ops.lora_ref.add_product(total, B, A, s)
        return total
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


# `add_in_place` as one operator: of single operations a compiler would make a sum in a new array
OPERATOR = "lora_ref::add_product"
torch.library.define(OPERATOR, "(Tensor(a!) total, Tensor B, Tensor A, float s) -> ()")
torch.library.register_fake(OPERATOR, lambda total, B, A, s: None)
torch.library.impl(OPERATOR, "cpu", lambda *given: (add_in_place(*given), None)[1])


def add_each(
    y: Float[Tensor, "n *tokens out"], x: Float[Tensor, "n *tokens in"], each: Sequence[tuple[Tensor, Tensor, float]]
) -> Float[Tensor, "n *tokens out"]:
    """y_i + s_i B_i A_i x_i for n samples: the factors in one stack, and two batched products.

    Each (A_i, B_i, s_i) has its own rank; smaller ones are filled up with zeros. It equals
    `core.layer.LoraLayer.add_by_sample`.
    """
    r = max(A.shape[0] for A, _, _ in each)
    A = torch.stack([F.pad(A, (0, 0, 0, r - len(A))) if len(A) < r else A for A, _, _ in each])  # (n, r, in)
    B = torch.stack([F.pad(B, (0, r - B.shape[1])) if B.shape[1] < r else B for _, B, _ in each])  # (n, out, r)
    scales = [s for _, _, s in each]
    if len(set(scales)) > 1:
        A = A * torch.tensor(scales, dtype=A.dtype, device=A.device)[:, None, None]
    x, flat = (t.reshape(len(t), -1, t.shape[-1]) for t in (x.to(A.dtype), y))
    z = (A @ x.mT).mT if x.shape[1] > 1 else x @ A.mT  # (n, tokens, r), the rank first where that is faster
    dtype = torch.promote_types(y.dtype, z.dtype)
    s = 1.0 if len(set(scales)) > 1 else scales[0]
    return torch.baddbmm(flat.to(dtype), z.to(dtype), B.mT.to(dtype), alpha=s).to(y.dtype).view(y.shape)
