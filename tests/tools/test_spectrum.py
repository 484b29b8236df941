"""Singular values of updates, and the bars that show them."""

from __future__ import annotations

import numpy as np
import pytest

from lora_ref.tools.spectrum import BARS, bar, block_diagonal, singular_values
from spec_tests import agree


@pytest.mark.parametrize(("out", "r", "n"), [(20, 4, 12), (3, 4, 12), (20, 6, 5), (2, 9, 3), (1, 1, 1)])
def test_singular_values_for_any_shape(out, r, n):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(r, n)), rng.normal(size=(out, r))
    got = singular_values(A, B, -0.5)
    assert got.shape == (min(out, r, n),)
    every = np.linalg.svd(-0.5 * B @ A, compute_uv=False)
    agree(got, every[: len(got)], size=every.max())


def test_bars_and_blocks():
    assert bar([1.0] * 100) == "█" * 16
    assert bar([]) == ""
    assert np.array_equal(block_diagonal(np.ones((4, 2)), 1), np.ones((4, 2)))


def test_a_long_spectrum_is_shown_from_its_first_to_its_last_value() -> None:
    values = [8.0] + [4.0] * 48 + [0.0]
    assert bar(values, width=4) == BARS[7] + BARS[4] * 2 + BARS[0]
    assert len(bar(values)) == 16
