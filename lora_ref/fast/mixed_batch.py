"""A batch in which each sample has its own adapter: the factors in one stack, and two batched products.

    y_i + s_i B_i A_i x_i

It equals `core.layer.LoraLayer.add_by_sample`. The cost grows with the samples, not with the adapters.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def add_each(
    y: Float[Tensor, "n *tokens out"], x: Float[Tensor, "n *tokens in"], each: Sequence[tuple[Tensor, Tensor, float]]
) -> Float[Tensor, "n *tokens out"]:
    """y_i + s_i B_i A_i x_i for n samples, (A_i, B_i, s_i) of any rank; smaller ones are filled up with zeros."""
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
