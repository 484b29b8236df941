"""One spelling for the array work that NumPy and torch spell differently.

NumPy arrays stay in their precision, float64 for the oracle; torch tensors are decomposed in at
least float32 (half precision has no decompositions). Importing this package does not import torch:
a tensor can only arrive if torch is there already.
"""

from ..core.inits import draw_normal, draw_uniform, zeros
from ..core.update import Array, at_least_float32, is_torch
from .arrays import cast, cast_finite, check_finite, is_finite, near_one, times_power
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
    "near_one",
    "qr",
    "randomized_svd",
    "subtract_product",
    "svd",
    "svd_of_product",
    "times_power",
    "zeros",
]
