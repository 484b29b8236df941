"""Initialisations: pure functions (weight, r, scaling, rng) -> Factors, on NumPy and torch alike.

A weight is given in its logical orientation, (out, in); where and how a layer stores it is
none of their business. To add one, write the function and enter it in `METHODS`.
"""

import functools
from collections.abc import Callable
from typing import Any

from ..core.update import Factors
from . import corda, lora_ga, residual
from .loftq import loftq
from .mica import mica
from .olora import olora
from .orthogonal import check_even, orthogonal
from .pissa import pissa
from .random import embedding, embedding_unzeroed, gaussian, uniform, unzeroed

# value of init_lora_weights -> kind of layer -> function
METHODS: dict[bool | str, dict[str, Callable[..., Factors]]] = {
    True: {"linear": uniform, "conv": uniform, "parameter": uniform, "embedding": embedding},
    False: {"linear": unzeroed, "conv": unzeroed, "parameter": unzeroed, "embedding": embedding_unzeroed},
    "gaussian": {"linear": gaussian, "conv": gaussian, "parameter": gaussian, "embedding": embedding},
    # until its pass over the data (`initialize_lora_eva_weights`) as True
    "eva": {"linear": uniform},
    "orthogonal": {"linear": orthogonal},
    "pissa": {"linear": pissa},
    "olora": {"linear": olora},
    "loftq": {"linear": loftq},
    "corda": {"linear": corda.corda},
    "lora_ga": {"linear": lora_ga.lora_ga},
    "mica": {"linear": mica, "embedding": mica},
}

# these take their first update out of the base weight; and these of them need a pass over data before
CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
PREPARED = {"corda": "preprocess_corda", "lora_ga": "preprocess_loraga"}


def method_of(init_lora_weights: bool | str) -> bool | str:
    """The method that a value of init_lora_weights names, without its number.

    >>> method_of("pissa_niter_4"), method_of(True)
    ('pissa', True)
    """
    return init_lora_weights.partition("_niter_")[0] if isinstance(init_lora_weights, str) else init_lora_weights


def find(init_lora_weights: bool | str, kind: str, layer: str = "this layer", **options: Any) -> Callable[..., Factors]:
    """The initialisation of a layer of this kind ("linear", "embedding", "conv", "parameter").

    `options` are the method's own (LoftQ's bits and iterations).

    Raises:
        ValueError: there is none; names the layer, the method and what there is instead.

    >>> find("gaussian", "linear").__name__, find("gaussian", "embedding").__name__
    ('gaussian', 'embedding')
    >>> find("orthogonal", "embedding", "model.embed_tokens")
    Traceback (most recent call last):
    ...
    ValueError: model.embed_tokens: init_lora_weights='orthogonal' is not available for embedding layers; \
use True, False, 'gaussian', 'mica', or exclude the layer
    """
    by_kind = METHODS.get(method_of(init_lora_weights), {})
    if kind not in by_kind:
        there_is = ", ".join(repr(name) for name, kinds in METHODS.items() if kind in kinds)
        raise ValueError(
            f"{layer}: init_lora_weights={init_lora_weights!r} is not available for {kind} layers; "
            f"use {there_is}, or exclude the layer"
        )
    if init_lora_weights != (method := method_of(init_lora_weights)):
        options["niter"] = int(str(init_lora_weights).removeprefix(f"{method}_niter_"))
    return functools.partial(by_kind[kind], **options) if options else by_kind[kind]


def check(init_lora_weights: bool | str, shape: tuple[int, ...], r: int, scaling: float) -> None:
    """Raise ValueError unless the method can start a layer of this shape with this rank and scaling."""
    method = method_of(init_lora_weights)
    if method == "orthogonal":
        check_even(r)
    if method == "lora_ga":
        lora_ga.check(shape, r, scaling)
    elif method in (*CHANGE_BASE, "mica"):
        residual.check(str(init_lora_weights), shape, r, scaling if method in CHANGE_BASE else 1.0)
