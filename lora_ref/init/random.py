"""The data-free initialisations: random A, zero B (or the other way round for an embedding).

With one factor zero the update s * B @ A is exactly zero, so an adapted model starts as the
base model; with both zero no gradient would ever reach either. All of them look at the
shape of the weight only; a batch of weights (..., out, in) gives a batch of factors.
"""

import math
from typing import Any

from jaxtyping import Float

from ..core.update import Array, Factors

Weight = Float[Array, "*batch out in"]


def uniform(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: `init_lora_weights=True`.

    The bound is that of a fresh `torch.nn.Linear` (Kaiming uniform with a = sqrt(5)). For a
    convolution, `in` counts input channels times kernel size.

    Source: microsoft/LoRA, `loralib/layers.py`; LoRA, arXiv 2106.09685, section 4.1 (there Gaussian).

    >>> import numpy as np
    >>> A, B, residual, _ = uniform(np.zeros((3, 4)), r=2, rng=np.random.default_rng(0))
    >>> A.shape, B.shape, bool((abs(A) <= 0.5).all()), B.any(), residual
    ((2, 4), (3, 2), True, np.False_, None)
    """
    *batch, n_out, n_in = weight.shape
    A = numerics.uniform((*batch, r, n_in), 1 / math.sqrt(n_in), weight, rng)
    return Factors(A, numerics.zeros((*batch, n_out, r), weight))


def gaussian(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ N(0, (1/r)^2), B = 0: `init_lora_weights="gaussian"`. 1/r is the standard deviation.

    Source: PEFT's LoraConfig, `init_lora_weights`.

    >>> import numpy as np
    >>> A, B, *_ = gaussian(np.zeros((3, 10_000)), r=4, rng=np.random.default_rng(0))
    >>> round(float(A.std()), 2)
    0.25
    """
    *batch, n_out, n_in = weight.shape
    A = numerics.normal((*batch, r, n_in), 1 / r, weight, rng)
    return Factors(A, numerics.zeros((*batch, n_out, r), weight))


def unzeroed(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ U(+-1/sqrt(in)), B ~ U(+-1/sqrt(r)): `init_lora_weights=False`. NOT a no-op: for tests.

    Source: PEFT's LoraConfig, `init_lora_weights`.

    >>> import numpy as np
    >>> A, B, *_ = unzeroed(np.zeros((3, 4)), r=2, rng=np.random.default_rng(0))
    >>> bool(A.all() and B.all())
    True
    """
    *batch, n_out, n_in = weight.shape
    A = numerics.uniform((*batch, r, n_in), 1 / math.sqrt(n_in), weight, rng)
    return Factors(A, numerics.uniform((*batch, n_out, r), 1 / math.sqrt(r), weight, rng))


def embedding(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A = 0, B ~ N(0, 1): True and "gaussian" for an embedding, weight (dim, vocabulary).

    Reversed, because A is looked up, not multiplied: zero rows of A^T move one token at a
    time, each only when it has been seen.

    Source: microsoft/LoRA, `loralib/layers.py`, Embedding.

    >>> import numpy as np
    >>> A, B, *_ = embedding(np.zeros((3, 10)), r=2, rng=np.random.default_rng(0))
    >>> A.any(), bool(B.all())
    (np.False_, True)
    """
    *batch, n_out, n_in = weight.shape
    B = numerics.normal((*batch, n_out, r), 1.0, weight, rng)
    return Factors(numerics.zeros((*batch, r, n_in), weight), B)


def embedding_unzeroed(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A, B ~ N(0, 1): `init_lora_weights=False` for an embedding. NOT a no-op: for tests."""
    *batch, _, n_in = weight.shape
    B = embedding(weight, r, scaling, rng).B
    return Factors(numerics.normal((*batch, r, n_in), 1.0, weight, rng), B)
