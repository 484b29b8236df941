"""The formula y + s * (x A^T) B^T, and the precision in which it is summed."""

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
