"""How A and B start: init_lora_weights = True, False, "gaussian", "orthogonal".

Statistics are taken over at least 1000 numbers and allow 6.5 standard deviations of themselves: a right
implementation is called wrong once in 10**10 runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import UNIT, Check
from ..contract import MESH, Array, Implementation, LayerSpec, ModelSpec, ModuleSpec
from ..generate import CONVOLUTIONS, LINEAR, MERGEABLE, claimed, layers, seeds
from ..registry import requirement

ZERO = "LoRA, arXiv 2106.09685, section 4.1: A random, B zero, so that B A = 0 at the start (I1, I6)"
SIGMAS = 6.5


@st.composite
def wide(
    draw: Any, implementation: Implementation, kinds: tuple[str, ...], init: Any = True, r: Any = None
) -> LayerSpec:
    """A layer with enough inputs for statistics."""
    kind = draw(st.sampled_from(claimed(implementation, kinds)))
    kernel = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}.get(MESH.get(kind, 0), ())
    rank = draw(st.sampled_from(r or (4, 8, 16)))
    if kind == "embedding":
        shape: tuple[int, ...] = (1024, 16)
    else:
        shape = (*((2,) if kind == "experts" else ()), 16, 512 // int(np.prod(kernel)) if kernel else 512, *kernel)
    options = {"lora_alpha": draw(st.sampled_from((1.0, 8.0, 32.0))), "init_lora_weights": init}
    return LayerSpec(kind, np.ones(shape), r=rank, seed=draw(seeds), **options)


def uniform(check: Check, values: Array, bound: float, what: str) -> None:
    """Uniform in [-bound, bound]."""
    n, largest = values.size, abs(values).max()
    # the bound, 2 * bound * u and the difference are rounded
    check.that(largest <= bound * (1 + 8 * UNIT["float32"]), f"{what}: |{largest:.6g}| is beyond the bound {bound:.6g}")
    check.that(largest >= bound * (1 - 25 / n), f"{what}: of {n} numbers none is beyond {largest:.6g}, of {bound:.6g}")
    moments(check, values, bound / 3**0.5, (0.8 / n) ** 0.5, what)


def normal(check: Check, values: Array, std: float, what: str) -> None:
    """Normal with mean 0 and this standard deviation."""
    moments(check, values, std, (2 / values.size) ** 0.5, what)
    beyond = (abs(values) > 2 * std).mean()  # 0.0455; uniform numbers would have none
    check.that(
        abs(beyond - 0.0455) < SIGMAS * (0.0455 * 0.9545 / values.size) ** 0.5,
        f"{what}: {beyond:.4f} of the numbers are beyond 2 standard deviations, must be about 0.0455",
    )


def moments(check: Check, values: Array, std: float, spread: float, what: str) -> None:
    """Mean 0 and variance std**2; `spread`: the relative standard deviation of the sample's variance."""
    mean, variance = values.mean(), (values**2).mean()
    check.that(
        abs(mean) < SIGMAS * std / values.size**0.5, f"{what}: the mean is {mean:.3g}, of a deviation of {std:.3g}"
    )
    check.that(
        abs(variance / std**2 - 1) < SIGMAS * spread,
        f"{what}: the standard deviation is {variance**0.5:.4g}, must be {std:.4g}",
    )


def noop(check: Check, implementation: Implementation, spec: LayerSpec, zero: str) -> Any:
    """W is bit for bit what it was and one factor is zero; the state."""
    state = implementation.layer(spec).read()
    check.equal(state.W, spec.W, "the base weight at the start")
    factor = getattr(state, zero)
    check.equal(factor, np.zeros_like(factor), f"{zero} at the start")
    return state


def _default(id: str, kind: str) -> None:
    fan_in = "in * kernel" if kind in CONVOLUTIONS else "in"

    @requirement(
        id,
        f"init_lora_weights=True: one factor is zero, the other uniform up to 1 / sqrt({fan_in}) ({kind}).",
        ZERO + "; microsoft/LoRA: kaiming_uniform_ with a = sqrt(5)",
        f"{kind} init:True",
        lambda i: wide(i, (kind,)),
        slow=4,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        zero = implementation.conventions.get("zero_factor", "B")
        state = noop(check, implementation, spec, str(zero))
        other = state.A if zero == "B" else state.B
        fan = int(np.prod(other.shape[1:] if other.ndim != 3 or kind in CONVOLUTIONS else other.shape[2:]))
        uniform(check, other, fan**-0.5, "A" if zero == "B" else "B")


_default("INIT-001", "linear")
_default("INIT-002", "transposed")
_default("INIT-003", "conv1d")
_default("INIT-004", "conv2d")
_default("INIT-005", "conv3d")
_default("INIT-006", "parameter")
_default("INIT-007", "experts")


@requirement(
    "INIT-008",
    "init_lora_weights=True on an embedding: A is zero, B is normal with standard deviation 1.",
    "microsoft/LoRA's Embedding (I2)",
    "embedding init:True",
    lambda i: wide(i, ("embedding",)),
    slow=4,
)
def init_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if implementation.conventions.get("zero_factor_of_embedding", "A") != "A":
        return
    normal(check, noop(check, implementation, spec, "A").B, 1.0, "B")


@requirement(
    "INIT-009",
    'init_lora_weights="gaussian": A is normal with the standard deviation 1 / r, B is zero.',
    'PEFT\'s documentation of "gaussian": scaled by the rank (I3)',
    "init:gaussian",
    lambda i: wide(i, (*LINEAR, *CONVOLUTIONS), "gaussian"),
    slow=4,
)
def init_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    normal(check, noop(check, implementation, spec, "B").A, 1 / spec.r, "A")


@requirement(
    "INIT-010",
    'init_lora_weights="gaussian" starts an embedding as True does.',
    "PEFT (I3)",
    "embedding init:gaussian",
    lambda i: wide(i, ("embedding",), "gaussian"),
    slow=4,
)
def init_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    normal(check, noop(check, implementation, spec, "A").B, 1.0, "B")


@requirement(
    "INIT-011",
    "init_lora_weights=False zeroes neither factor, and leaves W alone.",
    "PEFT's documentation of init_lora_weights=False: random, no identity transform (I4)",
    "init:False",
    lambda i: layers(i, MERGEABLE, init_lora_weights=False, lora_alpha=8.0),
)
def init_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    check.equal(state.W, spec.W, "the base weight at the start")
    for name in "AB":
        check.that(getattr(state, name).all(), f"{name} has zeros")


def _seeds(id: str, init: Any, needs: str) -> None:
    @requirement(
        id,
        f"init_lora_weights={init!r}: the same seed starts alike, another seed otherwise.",
        "torch.manual_seed: sets the seed for generating random numbers",
        needs,
        lambda i: layers(i, LINEAR, init_lora_weights=init, r=2),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        first, again, other = (implementation.layer(spec.but(seed=spec.seed + n)).read() for n in (0, 0, 1))
        for name in "AB":
            check.equal(getattr(again, name), getattr(first, name), f"{name} of the same seed")
        check.that((first.A != other.A).any() or (first.B != other.B).any(), "two seeds gave the same factors")


_seeds("INIT-012", True, "init:True")
_seeds("INIT-013", "gaussian", "init:gaussian")
_seeds("INIT-014", "orthogonal", "init:orthogonal")


@st.composite
def even(draw: Any, implementation: Implementation, dtypes: tuple[str, ...] = ("float32",)) -> LayerSpec:
    """A linear layer with an even rank."""
    options = {"init_lora_weights": "orthogonal", "use_rslora": False, "W": np.ones((12, 16)), "b": None}
    return draw(layers(implementation, LINEAR, dtypes, r=draw(st.sampled_from((2, 4, 8))), **options))


@requirement(
    "INIT-015",
    'init_lora_weights="orthogonal": B A = 0 although neither A nor B is zero.',
    'PEFT\'s documentation of "orthogonal" (G1, G2)',
    "init:orthogonal",
    lambda i: even(i),
)
def init_015(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    check.equal(state.W, spec.W, "the base weight at the start")
    check.that(state.A.any() and state.B.any(), "a factor is zero")
    # r products, and the QR decomposition of r x r numbers, which is orthogonal to a few r roundings
    bound = np.linalg.norm(state.B, axis=1)[:, None] * np.linalg.norm(state.A, axis=0)
    check.close(state.B @ state.A, np.zeros_like(spec.W), bound, "float32", "B A", factor=16 * spec.r)


@requirement(
    "INIT-016",
    'init_lora_weights="orthogonal": A and B have the rank r / 2.',
    "rows of one orthogonal matrix span A, the others span B (G2)",
    "init:orthogonal",
    lambda i: even(i),
)
def init_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    for name in "AB":
        S = np.linalg.svd(getattr(state, name), compute_uv=False)
        found = int((16 * spec.r * UNIT["float32"] * S[0] < S).sum())  # the others are roundings, as in B A = 0
        check.equal(found, spec.r // 2, f"the rank of {name}")


@requirement(
    "INIT-017",
    "The start depends on lora_alpha in no way.",
    "A and B start before s multiplies them (I1, G2)",
    "init:True",
    lambda i: layers(i, MERGEABLE, init_lora_weights=True, lora_alpha=1.0),
)
def init_017(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, two = (implementation.layer(spec.but(lora_alpha=a)).read() for a in (1.0, 16.0))
    for name in "AB":
        check.equal(getattr(two, name), getattr(one, name), f"{name} with another lora_alpha")


@requirement(
    "INIT-018",
    "Merging at the start changes no bit of W.",
    ZERO,
    "merge init:True",
    lambda i: layers(i, MERGEABLE, ("float32", "float16", "bfloat16")),
)
def init_018(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    layer.merge()
    check.equal(layer.read().W, spec.W, "the merged weight")


_seeds("INIT-019", False, "init:False")


@requirement(
    "INIT-020",
    "init_lora_weights=False draws the numbers of both factors: they are not all alike.",
    "PEFT's documentation of init_lora_weights=False: completely random (I4)",
    "init:False",
    lambda i: layers(i, MERGEABLE, init_lora_weights=False, lora_alpha=8.0),
)
def init_020(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    for name in "AB":
        factor = getattr(state, name)
        # of a few hundred numbers of 24 bits hardly two are equal, and half of them practically never
        check.that(np.unique(factor).size > factor.size // 2, f"{name} has the same number many times")


@requirement(
    "INIT-021",
    "The experts of a stack start with factors of their own.",
    "PEFT's documentation of target_parameters: a LoRA for each expert (D7, I1)",
    "experts init:True",
    lambda i: layers(i, ("experts",), lora_alpha=8.0),
)
def init_021(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    random = state.A if state.A.any() else state.B
    check.that((random[0] != random[1]).any(), "two experts start with the same random numbers")


@requirement(
    "INIT-022",
    "Two modules of one shape start with different random numbers.",
    ZERO + "; each module has an A of its own",
    "model init:True linear",
    lambda i: seeds,
    slow=2,
)
def init_022(implementation: Implementation, seed: int, check: Check) -> None:
    modules = {name: ModuleSpec("linear", np.eye(6)) for name in ("block.0.proj", "block.1.proj", "proj")}
    model = implementation.model(ModelSpec(modules, {"r": 2, "lora_alpha": 2, "target_modules": ["proj"]}, seed=seed))
    states = [model.read(name) for name in modules]
    for i, one in enumerate(states):
        for other in states[i + 1 :]:
            check.that((one.A != other.A).any() or (one.B != other.B).any(), "two modules have the same numbers")
