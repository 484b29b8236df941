"""Array functions and decompositions for NumPy arrays and torch tensors; torch is not imported here.

A result has the library, device and dtype of its input. Decompositions work in at least float32, as LAPACK does.
"""

from ..core.inits import draw_normal, draw_uniform, zeros
from ..core.update import Array, at_least_float32, is_torch
from .arrays import cast, cast_finite, check_finite, is_finite, scaled_to_one, times_2_to_the
from .dense import qr, subtract_product, svd, svd_of_product
from .leading import leading_svd, randomized_svd

# fmt: off
__all__ = [
    "Array", "at_least_float32", "cast", "cast_finite", "check_finite", "draw_normal", "draw_uniform", "is_finite",
    "is_torch", "leading_svd", "qr", "randomized_svd", "scaled_to_one", "subtract_product", "svd", "svd_of_product",
    "times_2_to_the", "zeros",
]
