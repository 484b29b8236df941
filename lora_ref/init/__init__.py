"""Initialisations: pure functions (weight, r, scaling, rng) -> Factors, on NumPy and torch alike.

A weight is given in its logical orientation, (out, in); where and how a layer stores it is
none of their business. To add one, write the function and enter it in `METHODS`.
"""

from collections.abc import Callable

from ..decomposition import Factors
from .orthogonal import orthogonal
from .random import embedding, embedding_unzeroed, gaussian, uniform, unzeroed

# value of init_lora_weights -> kind of layer -> function
METHODS: dict[bool | str, dict[str, Callable[..., Factors]]] = {
    True: {"linear": uniform, "conv": uniform, "parameter": uniform, "embedding": embedding},
    False: {"linear": unzeroed, "conv": unzeroed, "parameter": unzeroed, "embedding": embedding_unzeroed},
    "gaussian": {"linear": gaussian, "conv": gaussian, "parameter": gaussian, "embedding": embedding},
    "orthogonal": {"linear": orthogonal},
}


def find(init_lora_weights: bool | str, kind: str, layer: str = "this layer") -> Callable[..., Factors]:
    """The initialisation of a layer of this kind ("linear", "embedding", "conv", "parameter").

    Raises:
        ValueError: there is none; names the layer, the method and what there is instead.

    >>> find("gaussian", "linear").__name__, find("gaussian", "embedding").__name__
    ('gaussian', 'embedding')
    >>> find("orthogonal", "embedding", "model.embed_tokens")
    Traceback (most recent call last):
    ...
    ValueError: model.embed_tokens: init_lora_weights='orthogonal' is not available for embedding layers; \
use True, False, 'gaussian', or exclude the layer
    """
    by_kind = METHODS.get(init_lora_weights, {})
    if kind not in by_kind:
        there_is = ", ".join(repr(name) for name, kinds in METHODS.items() if kind in kinds)
        raise ValueError(
            f"{layer}: init_lora_weights={init_lora_weights!r} is not available for {kind} layers; "
            f"use {there_is}, or exclude the layer"
        )
    return by_kind[kind]
