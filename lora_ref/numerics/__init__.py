"""Array functions and decompositions for NumPy arrays and torch tensors alike.

A result has the library, the device and the dtype of its input. Decompositions work in at least float32, because
LAPACK has no half precision. This package does not import torch. It finds the module that made the tensor.
"""

from ..core.inits import draw_normal, draw_uniform, zeros
from ..core.update import Array, at_least_float32, is_torch
from .arrays import cast, cast_finite, check_finite, is_finite, scaled_to_one, times_2_to_the
from .dense import qr, subtract_product, svd, svd_of_product
from .leading import leading_svd, randomized_svd

__all__ = [
    "Array",
    "at_least_float32",
    "cast",
    "cast_finite",
    "check_finite",
    "draw_normal",
    "draw_uniform",
    "is_finite",
    "is_torch",
    "leading_svd",
    "qr",
    "randomized_svd",
    "scaled_to_one",
    "subtract_product",
    "svd",
    "svd_of_product",
    "times_2_to_the",
    "zeros",
]
