"""The cases that requirements are tried on. What is drawn decides how strict a suite is.

A fresh layer with lora_alpha = r on a square weight hides most bugs: so B is random, r and lora_alpha differ, and
shapes are square, wide and tall, from a small pool (a new shape makes some frameworks compile anew).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .contract import MESH, Array, Implementation, LayerSpec, LayerState, ModelSpec, ModuleSpec
from .registry import Unsupported

SHAPES = ((2, 2), (4, 4), (3, 8), (8, 3), (1, 5), (5, 1))  # (out, in)
RANKS = (1, 2, 3, 4, 9)  # 4 and 9: their roots are exact
ALPHAS = (1.0, 2.0, 8.0, 16.0)
ODD_ALPHAS = (0.5, 3.0, 7.5, -4.0, 0.0)
LINEAR = ("linear", "transposed")
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MERGEABLE = (*LINEAR, "embedding", *CONVOLUTIONS, "parameter", "experts")
DTYPES = ("float64", "float32", "float16", "bfloat16")

seeds = st.integers(0, 2**16)


def claimed(implementation: Implementation, names: Sequence[str]) -> list[str]:
    """Those of these names that the implementation claims.

    Raises:
        Unsupported: it claims none.
    """
    found = [name for name in names if name in implementation.claims]
    if not found:
        raise Unsupported(f"claims none of {', '.join(names)}")
    return found


def scales(implementation: Implementation) -> bool:
    """Does it have an s that follows from lora_alpha?"""
    return implementation.conventions.get("scaling", "alpha") != "none"


def scaled(implementation: Implementation, kinds: Sequence[str], **fixed: Any) -> Any:
    """As `layers`, of what has an s.

    Raises:
        Unsupported: its update is B A, by convention.
    """
    if not scales(implementation):
        raise Unsupported("it has no scaling, by convention")
    return layers(implementation, kinds, **fixed)


def integers(rng: np.random.Generator, shape: Sequence[int], largest: int = 4) -> Array:
    """Small integers without zeros, exact in every dtype."""
    return rng.integers(1, largest + 1, shape) * rng.choice([-1.0, 1.0], shape)


def reals(rng: np.random.Generator, shape: Sequence[int]) -> Array:
    """Normal numbers that are exact in bfloat16 (8 bits), so exact in every dtype."""
    mantissa, exponent = np.frexp(rng.standard_normal(shape))
    return np.ldexp(np.round(mantissa * 128) / 128, exponent)


@st.composite
def layers(
    draw: Any,
    implementation: Implementation,
    kinds: Sequence[str] = MERGEABLE,
    dtypes: Sequence[str] = ("float32",),
    exact: bool = False,
    **fixed: Any,
) -> LayerSpec:
    """A layer of a claimed kind and dtype. exact: integers as weights, and a scaling that is a power of two.

    `fixed`: options that are not drawn, by the names of `LayerSpec`.
    """
    kind = draw(st.sampled_from(claimed(implementation, kinds)))
    out, n_in = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(seeds))
    kernel = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}.get(MESH.get(kind, 0), ())
    batch = (2,) if kind == "experts" else ()
    numbers = integers if exact else reals
    ranks = [r for r in RANKS if r <= min(out, n_in) or "large_r" in implementation.claims] or [1]
    options: dict[str, Any] = {
        "kind": kind,
        "W": numbers(rng, (*batch, out, n_in, *kernel)),
        "b": numbers(rng, (out,)) if kind in (*LINEAR, *CONVOLUTIONS) and draw(st.booleans()) else None,
        "r": draw(st.sampled_from(ranks)),
        "seed": draw(seeds),
        "dtype": draw(st.sampled_from(claimed(implementation, dtypes))),
    }
    if kind in CONVOLUTIONS:
        options |= {"stride": draw(st.integers(1, 2)), "padding": draw(st.integers(0, 2))}
    options["use_rslora"] = draw(st.booleans()) if "rslora" in implementation.claims and "r" not in fixed else False
    if exact:  # s = 1/2, 1 or 2
        if options["use_rslora"]:
            options["r"] = draw(st.sampled_from([r for r in ranks if r in (1, 4, 9)]))
        divisor = int(options["r"] ** 0.5) if options["use_rslora"] else options["r"]
        options["lora_alpha"] = divisor * draw(
            st.sampled_from([0.5, 1.0, 2.0] if "alpha" in implementation.claims else [1.0, 2.0])
        )
    else:
        odd = ODD_ALPHAS if "alpha" in implementation.claims else ()
        options["lora_alpha"] = draw(st.sampled_from([*ALPHAS, *odd]))
    options |= fixed
    if not scales(implementation):
        options |= {"lora_alpha": float(options["r"]), "use_rslora": False}
    return LayerSpec(**options)


def factors(spec: LayerSpec, like: LayerState, exact: bool = False, salt: int = 0) -> tuple[Array, Array]:
    """A and B for a layer, both random and nonzero."""
    rng = np.random.default_rng([spec.seed, salt])
    numbers = integers if exact else reals
    return numbers(rng, like.A.shape), numbers(rng, like.B.shape)


def inputs(spec: LayerSpec, exact: bool = False, salt: int = 0, tokens: Sequence[int] = (2, 3)) -> Array:
    """An input: (2, 3, in); of an embedding indices (2, 3); of a convolution (2, in, 6, ...); of experts (E, 3, in)."""
    rng = np.random.default_rng([spec.seed, salt, 1])
    n_in = spec.n_in
    if spec.kind == "embedding":
        return rng.integers(0, n_in, tokens)
    numbers = integers if exact else reals
    if spec.kind == "experts":
        return numbers(rng, (len(spec.W), 3, n_in))
    if dims := MESH.get(spec.kind, 0):
        return numbers(rng, (2, n_in, *[6] * dims))
    return numbers(rng, (*tokens, n_in))


def chain(
    rng: np.random.Generator, shapes: Mapping[str, tuple[str, int, int]], bias: bool = True
) -> dict[str, ModuleSpec]:
    """Modules {name: (kind, out, in)} with small real weights; norms have out = in."""
    made = {}
    for name, (kind, out, n_in) in shapes.items():
        shape = (out,) if kind == "norm" else (out, n_in)
        has_bias = bias and kind != "embedding"
        made[name] = ModuleSpec(kind, reals(rng, shape), reals(rng, (out,)) if has_bias else None)
    return made


BLOCKS = {
    "emb": ("embedding", 4, 6),
    "layers.0.attn.q_proj": ("linear", 4, 4),
    "layers.0.mlp.up": ("linear", 6, 4),
    "layers.0.mlp.down": ("linear", 4, 6),
    "layers.0.norm": ("norm", 4, 4),
    "layers.1.attn.q_proj": ("linear", 4, 4),
    "layers.1.mlp.up": ("linear", 6, 4),
    "layers.1.mlp.down": ("linear", 4, 6),
    "layers.1.norm": ("norm", 4, 4),
    "layers.10.attn.q_proj": ("linear", 4, 4),
    "head": ("linear", 3, 4),
}  # a small transformer's names: what patterns must tell apart


@st.composite
def models(
    draw: Any, implementation: Implementation, shapes: Mapping[str, tuple[str, int, int]] | None = None, **config: Any
) -> ModelSpec:
    """A model of `BLOCKS` (or of other shapes) and a configuration; `config`: options, or strategies of them."""
    rng = np.random.default_rng(draw(seeds))
    modules = chain(rng, shapes or {k: v for k, v in BLOCKS.items() if v[0] == "norm" or v[0] in implementation.claims})
    options: dict[str, Any] = {"r": st.sampled_from((1, 2, 4)), "lora_alpha": st.sampled_from(ALPHAS)}
    options |= {"target_modules": ["q_proj", "up", "down"]} | config
    chosen = {k: draw(v) if isinstance(v, st.SearchStrategy) else v for k, v in options.items()}
    return ModelSpec(modules, chosen, seed=draw(seeds))


def model_inputs(spec: ModelSpec, batch: int = 3, salt: int = 0) -> Array:
    """An input of a model: (batch, in), or indices (batch,) where the first module is an embedding."""
    first = next(iter(spec.modules.values()))
    rng = np.random.default_rng([spec.seed, salt, 2])
    if first.kind == "embedding":
        return rng.integers(0, first.W.shape[1], (batch,))
    if dims := MESH.get(first.kind, 0):
        return reals(rng, (batch, first.W.shape[1], *[6] * dims))
    return reals(rng, (batch, first.W.shape[-1]))
