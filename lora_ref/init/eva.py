"""`init_lora_weights="eva"`: A from the principal components of the layer's inputs, the ranks shared out anew.

What it needs of the data is in `lora_ref.numerics.pca`; `lora_ref.calibration.eva` collects it from a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from ..numerics.pca import Components


def eva(
    weight: Float[Array, "out in"],
    r: int,
    scaling: float = 1.0,
    rng: Any = None,
    *,
    components: Components,
    whiten: bool = False,
) -> Factors:
    """A = the r leading principal components of the inputs, B = 0: the start is a no-op.

    The rows of A are orthonormal, A A^T = I, and the r-dimensional subspace that they span holds
    more of the inputs' variance than any other. With `whiten` row i is divided by sqrt(sigma_i), the
    root of its singular value, so that A x varies less unevenly.

    Raises:
        ValueError: fewer than r components are given, one to be whitened has singular value 0, or one so
            small that A is beyond the weight's dtype.

    Source: EVA, arXiv 2410.07170, section 3.

    >>> import numpy as np
    >>> found = Components(np.eye(3)[:2], np.array([4.0, 1.0]), np.array([0.9, 0.1]))
    >>> eva(np.zeros((2, 3)), r=1, components=found).A
    array([[1., 0., 0.]])
    >>> eva(np.zeros((2, 3)), r=2, components=found, whiten=True).A
    array([[0.5, 0. , 0. ],
           [0. , 1. , 0. ]])
    """
    vectors, singular_values, _ = components
    if r > vectors.shape[0]:
        raise ValueError(f"init_lora_weights='eva' with r={r}: only {vectors.shape[0]} components are known")
    A = vectors[:r]
    if whiten:
        if not (singular_values[:r] > 0).all():
            raise ValueError(
                f"EvaConfig(whiten=True): the inputs vary in fewer than r={r} directions, and the others cannot be "
                "whitened; use more data, a smaller r or whiten=False"
            )
        A = A / singular_values[:r, None] ** 0.5
    return Factors(numerics.cast_finite(A, weight), numerics.zeros((weight.shape[0], r), weight))


def most(r: int, rho: float) -> int:
    """round(r * rho), the rank that a layer of rank r may grow to; Python's rounding, ties to even.

    >>> most(8, 2.0), most(5, 1.5)
    (16, 8)
    """
    return round(r * rho)


def redistribute(ratios: Mapping[str, Sequence[float]], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """{layer: new rank}: the sum of all ranks is spent on the components that explain most, whosever they are.

    `ratios` are the parts of the variance of each layer's input that its components explain, falling; of
    layer l the first round(r_l * rho) take part, so no rank exceeds that, and with rho = 1 all stay. A
    layer may come out with rank 0. Equal ratios go to the layer that comes first, so of layers that share
    an input, and with it the ratios, the first gets the highest rank (as far as its own limit goes).

    Source: EVA, arXiv 2410.07170, section 3 and algorithm 1.

    >>> redistribute({"a": [0.9, 0.05], "b": [0.5, 0.3]}, {"a": 1, "b": 1}, rho=2.0)
    {'a': 1, 'b': 1}
    >>> redistribute({"a": [0.2, 0.1], "b": [0.5, 0.3]}, {"a": 1, "b": 1}, rho=2.0)
    {'a': 0, 'b': 2}
    """
    offers = [(float(ratio), layer) for layer, r in ranks.items() for ratio in ratios[layer][: most(r, rho)]]
    best = sorted(offers, key=lambda offer: -offer[0])[: sum(ranks.values())]  # stable: ties keep their order
    taken = [layer for _, layer in best]
    return {layer: taken.count(layer) for layer in ranks}
