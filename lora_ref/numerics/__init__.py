"""One spelling for the array work that NumPy and torch spell differently.

NumPy arrays stay in their precision, float64 for the oracle; torch tensors are decomposed in at
least float32 (half precision has no decompositions). Importing this package does not import torch:
a tensor can only arrive if torch is there already.
"""

from .arrays import (
    Array,
    at_least_float32,
    cast,
    cast_finite,
    check_finite,
    is_finite,
    is_torch,
    near_one,
    normal,
    times_power,
    uniform,
    zeros,
)
from .dense import qr, subtract_product, svd, svd_of_product
from .leading import leading_svd, randomized_svd

__all__ = [
    "Array",
    "at_least_float32",
    "cast",
    "cast_finite",
    "check_finite",
    "is_finite",
    "is_torch",
    "leading_svd",
    "near_one",
    "normal",
    "qr",
    "randomized_svd",
    "subtract_product",
    "svd",
    "svd_of_product",
    "times_power",
    "uniform",
    "zeros",
]
