"""Starts that decompose the weight: PiSSA, OLoRA, LoftQ, MiCA.

Singular vectors have free signs, and rotate freely within equal singular values: so products, projectors and
singular values are compared, and W has singular values 8, 4, 2, ... What a decomposition may be wrong by is
c u |W|_2 for itself, and |W|_2 / gap times that for a subspace; c = 32 allows for the sizes here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from scipy.stats import norm

from .. import oracle
from ..check import UNIT, Check
from ..contract import Array, Implementation, LayerSpec, LayerState
from ..generate import ALPHAS, LINEAR, claimed, inputs, layers, seeds
from ..registry import requirement

PISSA = "PiSSA, arXiv 2404.02948, equations 2 to 4 (Q1, Q2)"
OLORA = "OLoRA, arXiv 2406.01775, section 3 (O1, O2)"
LOFTQ = "LoftQ, arXiv 2310.08659, algorithm 1 (L1, L3)"
MICA = "MiCA, arXiv 2604.01694 (M1)"
SHIFTED = "the adapted model starts as the base model"
FACTOR = 32.0


def separated(rng: np.random.Generator, out: int, n_in: int) -> Array:
    """(out, in) in float32, with the singular values 8, 4, 2, ... up to rounding."""
    n = min(out, n_in)
    U, V = (np.linalg.qr(rng.standard_normal((m, n)))[0] for m in (out, n_in))
    return np.asarray((U * 8.0 * 0.5 ** np.arange(n)) @ V.T, dtype=np.float32).astype(np.float64)


@st.composite
def specs(
    draw: Any, implementation: Implementation, init: str, kinds: tuple[str, ...] = LINEAR, **fixed: Any
) -> LayerSpec:
    """A layer with well separated singular values, and a rank below min(in, out)."""
    kind = draw(st.sampled_from(claimed(implementation, kinds)))
    out, n_in = draw(st.sampled_from(((5, 5), (6, 4), (4, 6)))) if "W" not in fixed else fixed["W"].shape
    rng = np.random.default_rng(draw(seeds))
    options: dict[str, Any] = {
        "W": separated(rng, out, n_in),
        "b": np.arange(1.0, out + 1) if kind in LINEAR and draw(st.booleans()) else None,
        "r": draw(st.sampled_from((1, 2, 3))),
        "lora_alpha": draw(st.sampled_from(ALPHAS)),
        "use_rslora": "rslora" in implementation.claims and draw(st.booleans()),
        "seed": draw(seeds),
    }
    return LayerSpec(kind, **options | fixed, init_lora_weights=init)


def update(state: LayerState) -> Array:
    return oracle.delta(state.A, state.B, state.scaling)


def start(implementation: Implementation, spec: LayerSpec) -> LayerState:
    return implementation.layer(spec).read()


def wide_bound(spec: LayerSpec, at: int | None = None) -> float:
    """|W|_2 times |W|_2 / gap, with the gap below singular value `at` (the rank)."""
    S = np.linalg.svd(spec.W, compute_uv=False)
    at = spec.r if at is None else at
    gap = S[at - 1] - (S[at] if at < len(S) else 0.0)
    return float(S[0] * S[0] / gap)


def best(W: Array, r: int) -> Array:
    """The nearest matrix of rank r."""
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    return np.asarray((U[:, :r] * S[:r]) @ Vt[:r])


def keeps_the_sum(implementation: Implementation, spec: LayerSpec, check: Check, dtype: str = "") -> None:
    state = start(implementation, spec)
    bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(state.W + update(state), spec.W, bound, dtype or spec.dtype, "W_res + s B A")
    check.that(update(state).any(), "s B A is 0")


def claim_of(init: str) -> str:
    return f"init:{init.removesuffix('_16')}"


def _sum(id: str, init: str, source: str) -> None:
    claim = claim_of(init)

    @requirement(id, f"{init}: W_res + s B A = W, and s B A is not 0.", source, claim, lambda i: specs(i, init))
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        keeps_the_sum(implementation, spec, check)


def _first_output(id: str, init: str, source: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: the output at the start is the base's.",
        f"{source}: {SHIFTED}",
        claim,
        lambda i: specs(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer = implementation.layer(spec)
        state = layer.read()
        x = inputs(spec)
        bound = oracle.forward(spec, state, x)[1]
        check.close(layer.forward(x), oracle.apply(spec, spec.W, spec.b, x), bound, spec.dtype, "the output")


def _transposed(id: str, init: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: a transposed weight starts as the linear layer with the same W does.",
        "the start is that of the logical weight, whatever its storage (F3)",
        f"linear transposed {claim}",
        lambda i: specs(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        linear, transposed = (start(implementation, spec.but(kind=kind)) for kind in LINEAR)
        bound = wide_bound(spec) * max(1.0, spec.scaling)
        loose = FACTOR if "niter" not in init else FACTOR * 2**6  # another random start of an approximation
        check.close(update(transposed), update(linear), bound, spec.dtype, "s B A", loose)
        check.close(transposed.W, linear.W, bound, spec.dtype, "W_res", loose)


def _sum_in_half(id: str, init: str, source: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: in half precision, too, W_res + s B A = W up to rounding.",
        f"{source}: {SHIFTED} (T4)",
        claim,
        lambda i: half(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        keeps_the_sum(implementation, spec, check)


def _residual_in_half(id: str, init: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: in half precision W_res + s B A is as near to W as the rounding of W_res alone allows.",
        "lora_ref's decision (T4): the residual is that of the factors as they are stored",
        f"{claim} exact_residual",
        lambda i: half(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        state = start(implementation, spec)
        inner = oracle.delta_bound(state.A, state.B, state.scaling)
        slack = 8 * UNIT["float32"] / UNIT[spec.dtype] * (abs(spec.W) + inner)
        bound = abs(state.W) * (1 + 2 * UNIT[spec.dtype]) + slack
        check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A", factor=1.0)


def _switched_off(id: str, init: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: switched off, the layer is the base layer.",
        'PEFT\'s documentation of disable_adapter: "Use this to run inference on the base model" (Q5, U2)',
        f"disable {claim}",
        lambda i: specs(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer = implementation.layer(spec)
        x = inputs(spec)
        bound = oracle.forward(spec, layer.read(), x)[1]
        layer.enable(False)
        check.close(layer.forward(x), oracle.apply(spec, spec.W, spec.b, x), bound, spec.dtype, "the output, off")


def _large_r(id: str, init: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: r > min(in, out) is refused, or else everything holds with A (r, in) and B (out, r).",
        "there are min(in, out) singular triples, or columns of Q (D8)",
        f"{claim} errors",
        lambda i: specs(i, init, r=7),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        try:
            state = start(implementation, spec)
        except Exception:
            return
        out, n_in = spec.W.shape
        check.equal((state.A.shape, state.B.shape), ((7, n_in), (out, 7)), "the shapes of A and B with r = 7")
        keeps_the_sum(implementation, spec, check)


def _merged(id: str, init: str, source: str) -> None:
    claim = claim_of(init)

    @requirement(
        id,
        f"{init}: merging at the start gives W back.",
        f"{source}: {SHIFTED}",
        f"merge {claim}",
        lambda i: specs(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer = implementation.layer(spec)
        state = layer.read()
        layer.merge()
        bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
        check.close(layer.read().W, spec.W, bound, spec.dtype, "the merged weight")


def half(implementation: Implementation, init: str) -> Any:
    """The same in float16 and bfloat16: W is rounded to bfloat16 first, so that it is exact in both."""
    dtypes = claimed(implementation, ("float16", "bfloat16"))

    def rounded(spec: LayerSpec, dtype: str) -> LayerSpec:
        mantissa, exponent = np.frexp(spec.W)
        return spec.but(dtype=dtype, W=np.ldexp(np.round(mantissa * 128) / 128, exponent))

    return st.builds(rounded, specs(implementation, init), st.sampled_from(dtypes))


_sum("PISSA-001", "pissa", PISSA)
_sum("OLORA-001", "olora", OLORA)
_sum("PISSANITER-001", "pissa_niter_16", PISSA)
_first_output("PISSA-002", "pissa", PISSA)
_first_output("OLORA-002", "olora", OLORA)
_first_output("PISSANITER-002", "pissa_niter_16", PISSA)
_transposed("PISSA-003", "pissa")
_transposed("OLORA-003", "olora")
_transposed("PISSANITER-003", "pissa_niter_16")
_sum_in_half("PISSA-004", "pissa", PISSA)
_sum_in_half("OLORA-004", "olora", OLORA)
_sum_in_half("PISSANITER-004", "pissa_niter_16", PISSA)
_residual_in_half("PISSA-005", "pissa")
_residual_in_half("OLORA-005", "olora")
_residual_in_half("PISSANITER-005", "pissa_niter_16")
_switched_off("PISSA-006", "pissa")
_switched_off("OLORA-006", "olora")
_switched_off("PISSANITER-006", "pissa_niter_16")
_large_r("PISSA-007", "pissa")
_large_r("OLORA-007", "olora")
_large_r("PISSANITER-007", "pissa_niter_16")
_merged("PISSA-008", "pissa", PISSA)
_merged("OLORA-008", "olora", OLORA)
_merged("PISSANITER-008", "pissa_niter_16", PISSA)


def _alpha(id: str, init: str, what: str) -> None:
    @requirement(
        id,
        f"{init}: s B A is the same for every lora_alpha, with use_rslora and without.",
        what,
        f"init:{init}",
        lambda i: specs(i, init),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        want = update(start(implementation, spec))
        other = start(implementation, spec.but(lora_alpha=3 * spec.lora_alpha))
        check.close(other.scaling, 3 * spec.scaling, 3 * spec.scaling, "float64", "s with three times the lora_alpha")
        check.close(update(other), want, wide_bound(spec), spec.dtype, "s B A with three times the lora_alpha", FACTOR)


_alpha("PISSA-010", "pissa", PISSA + ": the factors are divided by sqrt(s)")


@requirement(
    "PISSA-011", "pissa: s B A is the nearest matrix of rank r to W.", PISSA, "init:pissa", lambda i: specs(i, "pissa")
)
def pissa_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    check.close(update(state), best(spec.W, spec.r), wide_bound(spec), spec.dtype, "s B A", FACTOR)


@requirement(
    "PISSA-012",
    "pissa: the singular values of W_res are those of W beyond the r-th.",
    PISSA,
    "init:pissa",
    lambda i: specs(i, "pissa"),
)
def pissa_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    S = np.linalg.svd(spec.W, compute_uv=False)
    got = np.linalg.svd(start(implementation, spec).W, compute_uv=False)
    want = np.concatenate([S[spec.r :], np.zeros(spec.r)])
    check.close(got, want, S[0], spec.dtype, "the singular values of W_res", FACTOR)


@requirement(
    "PISSA-013", "pissa: A A^T = B^T B = diag(S_1, ..., S_r) / s.", PISSA, "init:pissa", lambda i: specs(i, "pissa")
)
def pissa_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    want = np.diag(np.linalg.svd(spec.W, compute_uv=False)[: spec.r]) / spec.scaling
    bound = wide_bound(spec) / spec.scaling
    for got, what in ((state.A @ state.A.T, "A A^T"), (state.B.T @ state.B, "B^T B")):
        check.close(got, want, bound, spec.dtype, what, FACTOR)


@requirement(
    "PISSA-014",
    "pissa: B^T W_res = 0 and W_res A^T = 0.",
    PISSA,
    "init:pissa",
    lambda i: specs(i, "pissa"),
)
def pissa_014(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    bound = wide_bound(spec) / spec.scaling**0.5 * 3
    for got, what in ((state.B.T @ state.W, "B^T W_res"), (state.W @ state.A.T, "W_res A^T")):
        check.close(got, np.zeros_like(got), bound, spec.dtype, what, FACTOR)


def _no_nan(id: str, init: str) -> None:
    @requirement(
        id,
        f"{init}: lora_alpha = 0 or below is refused, or else W_res + s B A = W without NaN.",
        "dividing by sqrt(s) needs s > 0 (S3)",
        f"init:{init} alpha errors",
        lambda i: st.tuples(specs(i, init), st.sampled_from((0.0, -4.0))),
    )
    def body(implementation: Implementation, case: tuple[LayerSpec, float], check: Check) -> None:
        spec = case[0].but(lora_alpha=case[1])
        try:
            state = start(implementation, spec)
        except Exception:
            return
        bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
        check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")


_no_nan("PISSA-015", "pissa")
_no_nan("OLORA-014", "olora")


@requirement(
    "PISSA-016",
    "pissa: in float64 the start is as exact as float64, or refused.",
    PISSA,
    "init:pissa float64",
    lambda i: specs(i, "pissa", dtype="float64"),
)
def pissa_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    try:
        state = start(implementation, spec)
    except Exception:
        return
    check.close(update(state), best(spec.W, spec.r), wide_bound(spec), "float64", "s B A", FACTOR)


@requirement(
    "PISSANITER-010",
    "pissa_niter_16: s B A is nearly the nearest matrix of rank r, where singular values halve.",
    "Halko, Martinsson and Tropp, arXiv 0909.4061, corollary 10.10: each iteration squares the ratio (Q3)",
    "init:pissa_niter",
    lambda i: specs(i, "pissa_niter_16"),
)
def pissaniter_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    # 16 iterations leave 2^-33 of what is sought: less than the rounding that each of them makes
    check.close(
        update(start(implementation, spec)), best(spec.W, spec.r), wide_bound(spec), spec.dtype, "s B A", FACTOR
    )


@requirement(
    "PISSANITER-011",
    "pissa_niter: the same seed gives the same factors.",
    "experiments can be repeated (Q3)",
    "init:pissa_niter",
    lambda i: specs(i, "pissa_niter_1"),
)
def pissaniter_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, two = (start(implementation, spec) for _ in range(2))
    for name in "AB":
        check.equal(getattr(two, name), getattr(one, name), f"{name} of the same seed")


# -- OLoRA -------------------------------------------------------------------------------------


@requirement("OLORA-010", "olora: B^T B = 1.", OLORA, "init:olora", lambda i: specs(i, "olora"))
def olora_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    B = start(implementation, spec).B
    check.close(B.T @ B, np.eye(spec.r), 1.0, spec.dtype, "B^T B", FACTOR)


@requirement("OLORA-011", "olora: A is upper trapezoidal.", OLORA, "init:olora", lambda i: specs(i, "olora"))
def olora_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    A = start(implementation, spec).A
    check.close(np.tril(A, -1), np.zeros_like(A), np.linalg.norm(spec.W, 2), spec.dtype, "A below its diagonal", FACTOR)


@requirement(
    "OLORA-012",
    "olora: B A = Q_r R_r, which is W in the first r columns.",
    OLORA,
    "init:olora",
    lambda i: specs(i, "olora"),
)
def olora_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    Q, R = np.linalg.qr(spec.W)
    size = np.linalg.norm(spec.W, 2)
    first = np.linalg.svd(spec.W[:, : spec.r], compute_uv=False)
    bound = size * size / first[-1]
    check.close(state.B @ state.A, Q[:, : spec.r] @ R[: spec.r], bound, spec.dtype, "B A", FACTOR)


@requirement(
    "OLORA-013", "olora: A and B are the same for every lora_alpha.", OLORA, "init:olora", lambda i: specs(i, "olora")
)
def olora_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, two = (start(implementation, spec.but(lora_alpha=a)) for a in (1.0, 8.0))
    for name in "AB":
        check.equal(getattr(two, name), getattr(one, name), f"{name} with another lora_alpha")


# -- LoftQ -------------------------------------------------------------------------------------


def codes(bits: int) -> Array:
    """The NormalFloat codebook, QLoRA, arXiv 2305.14314, equation 4 and appendix E (L2)."""
    n, offset = 2**bits, 0.9677083
    high = norm.ppf(np.linspace(offset, 0.5, n // 2 + 1)[:-1])
    low = -norm.ppf(np.linspace(offset, 0.5, n // 2)[:-1])
    values = np.sort(np.concatenate([high, [0.0], low]))
    return np.asarray(values / values.max())


def loftq(implementation: Implementation, iterations: int | None = None) -> Any:
    steps = st.just(iterations) if iterations else st.integers(1, 3)

    def build(spec: LayerSpec, bits: int, steps: int, shape: tuple[int, int], seed: int) -> LayerSpec:
        W = np.random.default_rng(seed).standard_normal(shape).astype(np.float32).astype(np.float64)
        return spec.but(W=W, b=None, init_options={"bits": bits, "iterations": steps})

    shapes = st.sampled_from(((16, 8), (8, 16), (5, 9)))  # 45 numbers: less than a block
    return st.builds(build, specs(implementation, "loftq"), st.sampled_from((2, 4, 8)), steps, shapes, seeds)


def blocks(W: Array) -> tuple[Array, Array]:
    """W row by row in blocks of 64, filled up with zeros, and the largest absolute value of each."""
    flat = np.pad(W.ravel(), (0, -W.size % 64)).reshape(-1, 64)
    return flat, abs(flat).max(1, keepdims=True)


@requirement(
    "LOFTQ-001",
    "loftq with one iteration: the base weight is W in blocks of 64, each number at its nearest code.",
    LOFTQ + "; QLoRA's NormalFloat (L2)",
    "init:loftq",
    lambda i: loftq(i, 1),
)
def loftq_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    Q = start(implementation, spec).W
    table = codes(spec.init_options["bits"])
    given, scale = blocks(spec.W)
    got, _ = blocks(Q)
    nearest = abs(given[..., None] - scale[..., None] * table).min(-1)
    size = np.broadcast_to(scale, given.shape)
    check.close(abs(given - got), nearest, size, "float32", "the distance to the weight, against the nearest code's")
    ratio = np.clip(got / np.where(scale > 0, scale, 1), -1, 1)
    off = abs(ratio[..., None] - table).min(-1)
    check.close(off, np.zeros_like(off), 1.0, "float32", "the distance to the nearest code of the table", factor=16)


@requirement(
    "LOFTQ-002", "loftq: s B A is the nearest matrix of rank r to W - Q.", LOFTQ, "init:loftq", lambda i: loftq(i)
)
def loftq_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    gap_free = np.linalg.norm(spec.W - state.W - best(spec.W - state.W, spec.r))
    got = np.linalg.norm(spec.W - state.W - update(state))
    size = np.linalg.norm(spec.W)  # the error of the best is well defined, the best one itself is not
    check.close(got, gap_free, size, spec.dtype, "|W - Q - s B A|", FACTOR)


@requirement(
    "LOFTQ-003",
    "loftq with one iteration: with the adapter, W is met better than by quantisation alone.",
    LOFTQ + " (L4)",
    "init:loftq",
    lambda i: loftq(i, 1),
)
def loftq_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    alone, together = (np.linalg.norm(spec.W - W) for W in (state.W, state.W + update(state)))
    check.that(together < alone, f"|W - Q - s B A| is {together:.6g}, |W - Q| is {alone:.6g}")


@requirement(
    "LOFTQ-004",
    "loftq: Q + s B A is the same for every lora_alpha, so that the model starts as near to W with each.",
    LOFTQ + ": the objective is |W - Q - A B^T| as the model computes it",
    "init:loftq",
    lambda i: loftq(i),
)
def loftq_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, two = (start(implementation, spec.but(lora_alpha=a * spec.lora_alpha)) for a in (1, 4))
    errors = [np.linalg.norm(spec.W - state.W - update(state)) for state in (one, two)]
    check.close(
        errors[1], errors[0], np.linalg.norm(spec.W), spec.dtype, "|W - Q - s B A|, 4 times the lora_alpha", FACTOR
    )


@requirement(
    "LOFTQ-005",
    "loftq quantises a transposed weight as it does the linear layer's.",
    "the start is that of the logical weight, whatever its storage (F3, L3)",
    "linear transposed init:loftq",
    lambda i: loftq(i),
)
def loftq_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    linear, transposed = (start(implementation, spec.but(kind=kind)) for kind in LINEAR)
    check.equal(transposed.W, linear.W, "the quantised weight")


# -- MiCA --------------------------------------------------------------------------------------

CLAIMED_BY_MICA = (*LINEAR, "embedding")


@requirement(
    "MICA-001",
    "mica: A = 0 and W is bit for bit what it was.",
    MICA,
    "init:mica",
    lambda i: specs(i, "mica", CLAIMED_BY_MICA),
)
def mica_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    check.equal(state.W, spec.W, "the base weight")
    check.equal(state.A, np.zeros_like(state.A), "A")


@requirement("MICA-002", "mica: B^T B = 1.", MICA, "init:mica", lambda i: specs(i, "mica", CLAIMED_BY_MICA))
def mica_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    B = start(implementation, spec).B
    check.close(B.T @ B, np.eye(spec.r), 1.0, spec.dtype, "B^T B", FACTOR)


def _minor(id: str, kinds: tuple[str, ...]) -> None:
    @requirement(
        id,
        f"mica: B spans the left singular vectors of the r smallest singular values of W ({', '.join(kinds)}).",
        MICA,
        {"init:mica", *(kinds if len(kinds) == 1 else ())},
        lambda i: specs(i, "mica", kinds, W=separated(np.random.default_rng(7), 4, 6)),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        B = start(implementation, spec).B
        U = np.linalg.svd(spec.W)[0][:, -spec.r :]
        bound = wide_bound(spec, 4 - spec.r) / 8.0
        check.close(B @ B.T, U @ U.T, bound, spec.dtype, "the projector B B^T", FACTOR)


_minor("MICA-003", LINEAR)
_minor("MICA-004", ("embedding",))


@requirement(
    "MICA-005", "mica: only A trains.", MICA, "init:mica trainable", lambda i: specs(i, "mica", CLAIMED_BY_MICA)
)
def mica_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.equal(sorted(implementation.layer(spec).trainable()), ["A"], "what trains")


@requirement(
    "MICA-006",
    "mica: only A trains, after the adapter was switched off and on again, too.",
    MICA,
    "init:mica trainable disable",
    lambda i: specs(i, "mica", LINEAR),
)
def mica_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    layer.enable(False)
    layer.enable(True)
    check.equal(sorted(layer.trainable()), ["A"], "what trains")


@requirement(
    "MICA-007",
    "mica: more directions than there are (r > out) are refused.",
    "B has orthonormal columns (D8)",
    "init:mica errors",
    lambda i: specs(i, "mica", LINEAR, r=7),
)
def mica_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.refused(lambda: implementation.layer(spec), f"mica with r = 7 on a weight {spec.W.shape}")


def _only_linear(id: str, init: str, options: Any = None) -> None:
    @requirement(
        id,
        f"{init} on a convolution or an embedding is refused, or else the model starts as the base.",
        "it is defined for a matrix (I8)",
        f"init:{init} errors",
        lambda i: layers(i, ("conv1d", "conv2d", "embedding"), init_lora_weights=init, r=1, lora_alpha=1.0),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        try:
            state = start(implementation, spec)
        except Exception:
            return
        bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
        check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")


_only_linear("PISSA-017", "pissa")
_only_linear("OLORA-015", "olora")


@requirement(
    "LOFTQ-006",
    "loftq: each further iteration quantises W less the update that the one before has left.",
    LOFTQ + ": Q_t = q_N(W - A_(t-1) B_(t-1)^T)",
    "init:loftq",
    lambda i: st.tuples(loftq(i, 1), st.integers(1, 2)),
    slow=2,
)
def loftq_006(implementation: Implementation, case: tuple[LayerSpec, int], check: Check) -> None:
    spec, t = case
    before, after = (
        start(implementation, spec.but(init_options={**spec.init_options, "iterations": n})) for n in (t, t + 1)
    )
    X, table = spec.W - update(before), codes(spec.init_options["bits"])
    given, scale = blocks(X)
    got, _ = blocks(after.W)
    nearest = abs(given[..., None] - scale[..., None] * table).min(-1)  # continuous in X, as the nearest code is not
    S = np.linalg.svd(spec.W - before.W, compute_uv=False)
    rest = S[spec.r] if spec.r < len(S) else 0.0
    size = (np.linalg.norm(spec.W, 2) + scale.max()) * (1 + S[0] / (S[spec.r - 1] - rest))  # what X is known to
    what = f"the distance of Q after {t + 1} iterations to W - s B A after {t}, against the nearest code's"
    check.close(abs(given - got), nearest, size, "float32", what, FACTOR)


def _loftq_refused(id: str, sentence: str, source: str, needs: str, **options: Any) -> None:
    @requirement(id, f"loftq: {sentence}", source, needs, lambda i: loftq(i, 1).map(lambda spec: spec.but(**options)))
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        try:
            state = start(implementation, spec)
        except Exception:
            return
        out, n_in = spec.W.shape
        check.equal((state.A.shape, state.B.shape), ((spec.r, n_in), (out, spec.r)), "the shapes of A and B")
        finite = all(np.isfinite(v).all() for v in (state.W, state.A, state.B))
        check.that(finite, "accepted, and the layer now holds NaN or infinite numbers")


_loftq_refused(
    "LOFTQ-007",
    "r > min(in, out) is refused, or else A is (r, in) and B (out, r).",
    "there are min(in, out) singular triples (D8)",
    "init:loftq errors",
    r=9,
)
_loftq_refused(
    "LOFTQ-008",
    "lora_alpha below 0 is refused, or else nothing is NaN.",
    "dividing by sqrt(s) needs s > 0 (S3)",
    "init:loftq alpha errors",
    lora_alpha=-4.0,
)


@requirement(
    "OLORA-016",
    "olora: in float64 B^T B = 1 as exactly as in float64, or the layer is refused.",
    OLORA + " (T4)",
    "init:olora float64",
    lambda i: specs(i, "olora", dtype="float64"),
)
def olora_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    try:
        B = start(implementation, spec).B
    except Exception:
        return
    check.close(B.T @ B, np.eye(spec.r), 1.0, "float64", "B^T B", FACTOR)
