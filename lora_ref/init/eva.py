"""`init_lora_weights="eva"`: A from the principal components of the layer's inputs, and new ranks.

`lora_ref.numerics.pca` computes the components, `lora_ref.calibration.eva` records the inputs of a model.
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
    """A = the r leading principal components of the inputs, B = 0: the first update is zero.

    The rows of A are orthonormal, A A^T = I. They span the r-dimensional subspace with most of the inputs' variance.
    With `whiten` row i is divided by sqrt(sigma_i), its singular value. Then the entries of A x vary more evenly.
    Raises: ValueError: fewer than r components. With `whiten`: a singular value is 0, or too small for W's dtype.
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
            few = f"EvaConfig(whiten=True): the inputs vary in fewer than r={r} directions"
            raise ValueError(f"{few}, and the others cannot be whitened; use more data, a smaller r or whiten=False")
        A = A / singular_values[:r, None] ** 0.5
    return Factors(numerics.cast_finite(A, weight), numerics.zeros((weight.shape[0], r), weight))


def redistribute(ratios: Mapping[str, Sequence[float]], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """{layer: new rank}: how many of the sum(ranks) largest ratios, over all layers, are the layer's.

    `ratios` holds for each layer the explained variance ratios of its components, in falling order. Of layer l only
    the first round(r_l * rho) count (ties to even), so no new rank is larger. With rho = 1 all ranks stay. A new rank
    may be 0. Of equal ratios the earlier layer's counts first, so of layers with the same input the first gets most.
    Source: EVA, arXiv 2410.07170, section 3 and algorithm 1.

    >>> redistribute({"a": [0.9, 0.05], "b": [0.5, 0.3]}, {"a": 1, "b": 1}, rho=2.0)
    {'a': 1, 'b': 1}
    >>> redistribute({"a": [0.2, 0.1], "b": [0.5, 0.3]}, {"a": 1, "b": 1}, rho=2.0)
    {'a': 0, 'b': 2}
    """
    offers = [(float(ratio), layer) for layer, r in ranks.items() for ratio in ratios[layer][: round(r * rho)]]
    best = sorted(offers, key=lambda offer: -offer[0])[: sum(ranks.values())]  # stable: ties keep their order
    taken = [layer for _, layer in best]
    return {layer: taken.count(layer) for layer in ranks}
