"""The singular values of an update s*B@A, computed from its factors, and their bar chart in one line."""

import numpy as np
from jaxtyping import Float

from .. import numerics

BARS = "▁▂▃▄▅▆▇█"


def singular_values(
    A: Float[np.ndarray, "*batch r in"], B: Float[np.ndarray, "*batch out r"], s: float
) -> Float[np.ndarray, "*batch k"]:
    """The min(r, in, out) singular values of D = s*B@A, in falling order. D (out, in) is not computed.

    Leading dimensions, such as the experts of a mixture, are a batch. See `numerics.svd_of_product`.

    >>> A, B = np.diag([3.0, 4.0]) @ np.eye(2, 5), np.eye(7, 2)
    >>> singular_values(A, B, s=-2.0)
    array([8., 6.])
    >>> np.linalg.svd(-2.0 * B @ A, compute_uv=False).round(6)  # the same and zeros
    array([8., 6., 0., 0., 0.])
    """
    return abs(s) * numerics.svd_of_product(B, A)[1]


def bar(values: list[float], width: int = 16) -> str:
    """A bar for each value, the largest with full height. Of more than `width` values it shows evenly spaced ones.

    >>> bar([8.0, 4.0, 1.0, 0.0])
    '█▅▂▁'
    >>> bar([0.0, 0.0])
    '▁▁'
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    top = max(values, default=0.0) or 1.0
    return "".join(BARS[round(7 * (value / top))] for value in values)


def block_diagonal(b: Float[np.ndarray, "out width"], groups: int) -> Float[np.ndarray, "out r"]:
    """B (out, r) of a grouped convolution: block g maps the g-th part of the r inputs to group g of the outputs.

    >>> block_diagonal(np.array([[1.0], [2.0], [3.0], [4.0]]), groups=2).tolist()
    [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 4.0]]
    """
    out, width = b.shape
    full = np.zeros((groups, out // groups, groups, width))
    for group, rows in enumerate(b.reshape(groups, -1, width)):
        full[group, :, group] = rows
    return full.reshape(out, groups * width)
