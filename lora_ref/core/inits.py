"""How A and B start: the table of `init_lora_weights`, and the inits that need no more than the weight's shape.

With one factor zero an adapted model starts as the base model. With both zero no gradient would ever reach either. An
init is a pure function (weight, r, scaling, rng) -> Factors, on NumPy arrays and torch tensors. The weight is (out, in)
or a batch of such. `lora_ref.init` enters the inits that look at the weight's numbers, or at data.
"""

import functools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .update import Array, Factors, Weight, is_torch


def uniform(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: `init_lora_weights=True`.

    The bound is that of a fresh `torch.nn.Linear`. For a convolution, `in` counts input channels times kernel size.
    Source: microsoft/LoRA, `loralib/layers.py`; LoRA, arXiv 2106.09685, section 4.1 (there Gaussian).

    >>> A, B, residual, _ = uniform(np.zeros((3, 4)), r=2, rng=np.random.default_rng(0))
    >>> A.shape, B.shape, bool((abs(A) <= 0.5).all()), B.any(), residual
    ((2, 4), (3, 2), True, np.False_, None)
    """
    *batch, n_out, n_in = weight.shape
    A = draw_uniform((*batch, r, n_in), 1 / math.sqrt(n_in), weight, rng)
    return Factors(A, zeros((*batch, n_out, r), weight))


def gaussian(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ N(0, (1/r)^2), B = 0: `init_lora_weights="gaussian"`. 1/r is the standard deviation.

    Source: PEFT's LoraConfig, `init_lora_weights`.

    >>> A, B, *_ = gaussian(np.zeros((3, 10_000)), r=4, rng=np.random.default_rng(0))
    >>> round(float(A.std()), 2)
    0.25
    """
    *batch, n_out, n_in = weight.shape
    A = draw_normal((*batch, r, n_in), 1 / r, weight, rng)
    return Factors(A, zeros((*batch, n_out, r), weight))


def unzeroed(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A ~ U(+-1/sqrt(in)), B ~ U(+-1/sqrt(r)): `init_lora_weights=False`. NOT a no-op: for tests.

    Source: PEFT's LoraConfig, `init_lora_weights`.

    >>> A, B, *_ = unzeroed(np.zeros((3, 4)), r=2, rng=np.random.default_rng(0))
    >>> bool(A.all() and B.all())
    True
    """
    A, B, *_ = uniform(weight, r, scaling, rng)
    return Factors(A, draw_uniform(B.shape, 1 / math.sqrt(r), weight, rng))


def embedding(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A = 0, B ~ N(0, 1): True and "gaussian" for an embedding, weight (dim, vocabulary).

    Reversed, because A is looked up: a zero row of A^T changes only when its token has been seen.
    Source: microsoft/LoRA, `loralib/layers.py`, Embedding.

    >>> A, B, *_ = embedding(np.zeros((3, 10)), r=2, rng=np.random.default_rng(0))
    >>> A.any(), bool(B.all())
    (np.False_, True)
    """
    *batch, n_out, n_in = weight.shape
    B = draw_normal((*batch, n_out, r), 1.0, weight, rng)
    return Factors(zeros((*batch, r, n_in), weight), B)


def embedding_unzeroed(weight: Weight, r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A, B ~ N(0, 1): `init_lora_weights=False` for an embedding. NOT a no-op: for tests."""
    A, B, *_ = embedding(weight, r, scaling, rng)
    return Factors(draw_normal(A.shape, 1.0, weight, rng), B)


@dataclass(frozen=True)
class Method:
    """One value of `init_lora_weights`."""

    kinds: dict[str, Callable[..., Factors]]  # "linear", "embedding", "conv", "parameter" -> the function
    changes_base: bool = False  # its first update is subtracted: y = W x + s B A x - D0 x
    reads_weight: bool = False  # the weight's numbers, not only its shape
    train_B: bool = True
    check: Callable[[tuple[int, ...], int, float], None] | None = None  # of (shape, r, scaling): ValueError
    prepare: str = ""  # the public function that must see data before
    number: str = ""  # "<name>_<number>_<n>" passes n under this keyword: pissa_niter_4
    config: type | None = None  # the class of LoraConfig's option <name>_config
    options: Callable[[Any], dict[str, Any]] | None = None  # that option -> keywords of the function


METHODS: dict[bool | str, Method] = {
    True: Method({"linear": uniform, "conv": uniform, "parameter": uniform, "embedding": embedding}),
    False: Method({"linear": unzeroed, "conv": unzeroed, "parameter": unzeroed, "embedding": embedding_unzeroed}),
    "gaussian": Method({"linear": gaussian, "conv": gaussian, "parameter": gaussian, "embedding": embedding}),
}


def method_of(init_lora_weights: bool | str) -> bool | str:
    """The key of `METHODS` that a value of init_lora_weights names, without its number. ValueError if there is none.

    >>> method_of("pissa_niter_4"), method_of(True)
    ('pissa', True)
    """
    if isinstance(init_lora_weights, bool | str):
        if init_lora_weights in METHODS:
            return init_lora_weights
        for name, method in METHODS.items():
            if method.number and re.fullmatch(f"{name}_{method.number}_[0-9]+", str(init_lora_weights)):
                return name
    numbered = [repr(f"{name}_{method.number}_<n>") for name, method in METHODS.items() if method.number]
    allowed = ", ".join([*map(repr, METHODS), *numbered])
    raise ValueError(f"init_lora_weights={repr(init_lora_weights)[:80]}: must be one of {allowed}")


def find(init_lora_weights: bool | str, kind: str, layer: str = "this layer", **options: Any) -> Callable[..., Factors]:
    """The init of a layer of this kind. `options` are the method's own (LoftQ's bits and iterations).

    >>> find("gaussian", "linear").__name__, find("gaussian", "embedding").__name__
    ('gaussian', 'embedding')
    """
    name = method_of(init_lora_weights)
    method = METHODS[name]
    if kind not in method.kinds:
        raise ValueError(f"{layer}: init_lora_weights={init_lora_weights!r} is not available for {kind} layers")
    if init_lora_weights != name:
        options[method.number] = int(str(init_lora_weights).removeprefix(f"{name}_{method.number}_"))
    return functools.partial(method.kinds[kind], **options) if options else method.kinds[kind]


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in the library of `like`: in NumPy float64, in torch the dtype of `like`, at least float32, on the CPU."""
    if not is_torch(like):
        return np.zeros(shape)
    torch = sys.modules["torch"]
    dtype = like.dtype if like.dtype.itemsize >= 4 else torch.float32
    return torch.zeros(shape, dtype=dtype, device="meta" if like.is_meta else "cpu")


def draw_normal(shape: tuple[int, ...], std: float, like: Array, rng: Any = None) -> Array:
    """Draws of N(0, std^2), in the dtype and library of `zeros`.

    `rng` is a `numpy.random.Generator` (None: a fresh one) or a `torch.Generator` (None: the global one). torch draws
    on the CPU, so that a seed gives the same adapter on every device.
    Differs from PEFT: there a float64 weight gets draws in the default dtype.
    """
    if is_torch(like):
        return zeros(shape, like).normal_(0, std, generator=rng)
    return (rng or np.random.default_rng()).normal(0.0, std, shape)


def draw_uniform(shape: tuple[int, ...], bound: float, like: Array, rng: Any = None) -> Array:
    """Draws of U(-bound, bound); see `draw_normal`."""
    if is_torch(like):
        return zeros(shape, like).uniform_(-bound, bound, generator=rng)
    return (rng or np.random.default_rng()).uniform(-bound, bound, shape)
