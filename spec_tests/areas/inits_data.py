"""Starts that look at data: CorDA, EVA, LoRA-GA."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, LayerSpec
from ..generate import ALPHAS, LINEAR, claimed, inputs, seeds
from ..registry import requirement
from .inits_weight import FACTOR, separated, start, update

CORDA = "CorDA, arXiv 2406.05223, section 3.2 (K1 to K4)"
EVA = "EVA, arXiv 2410.07170, section 3 (E3, E6)"
LORA_GA = "LoRA-GA, arXiv 2407.05000, section 3.2"
DAMP = 0.01


def basis(rng: np.random.Generator, n: int, k: int | None = None) -> Array:
    """k orthonormal columns of n numbers."""
    return np.asarray(np.linalg.qr(rng.standard_normal((n, k or n)))[0])


def single(values: Array) -> Array:
    """Rounded to float32."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


@st.composite
def common(draw: Any, implementation: Implementation, init: str, shape: tuple[int, int] | None = None) -> LayerSpec:
    """A linear layer without data."""
    kind = draw(st.sampled_from(claimed(implementation, LINEAR)))
    out, n_in = shape or draw(st.sampled_from(((5, 5), (6, 4), (4, 6))))
    options = {
        "r": draw(st.sampled_from((1, 2))),
        "lora_alpha": draw(st.sampled_from(ALPHAS)),
        "use_rslora": "rslora" in implementation.claims and draw(st.booleans()),
        "seed": draw(seeds),
    }
    W = separated(np.random.default_rng(draw(seeds)), out, n_in)
    return LayerSpec(kind, W, **options, init_lora_weights=init)


# -- CorDA -------------------------------------------------------------------------------------


def covariance(batches: list[Array]) -> Array:
    """C = the mean over calls of X^T X, each X divided by its largest absolute value; damped."""
    C = sum((X / abs(X).max()).T @ (X / abs(X).max()) for X in batches) / len(batches)
    return np.asarray(C + DAMP * np.diag(C).mean() * np.eye(len(C)))


def corda(implementation: Implementation, method: str, batches: int = 1) -> Any:
    """Inputs along orthogonal directions, with variances that fall by 4: then the damping needs no second try.

    Their largest number is positive: whether |max x| or max |x| is meant makes no difference.
    """

    def build(spec: LayerSpec, seed: int) -> LayerSpec:
        rng = np.random.default_rng(seed)
        n = spec.W.shape[1]
        data = []
        for size in (1.0, 3.0)[:batches]:
            X = size * basis(rng, 12, n) * 0.5 ** np.arange(n) @ basis(rng, n).T
            X *= np.sign(X.flat[abs(X).argmax()])
            data.append(single(X))
        return spec.but(init_options={"inputs": data, "method": method})

    return st.builds(build, common(implementation, "corda"), seeds)


def corda_update(spec: LayerSpec) -> tuple[Array, float]:
    """U_r S_r V_r^T C^-1 of U S V^T = W C, and how much it magnifies rounding."""
    C = covariance(list(spec.init_options["inputs"]))
    U, S, Vt = np.linalg.svd(spec.W @ C, full_matrices=False)
    r, n = spec.r, len(S)
    first = spec.init_options["method"] == "ipm"
    at = slice(0, r) if first else slice(n - r, n)
    gap = S[r - 1] - S[r] if first else S[n - r - 1] - S[n - r]
    inverse = np.linalg.inv(C)
    D = (U[:, at] * S[at]) @ Vt[at] @ inverse
    return np.asarray(D), float(S[0] * S[0] / gap * np.linalg.norm(inverse, 2) * np.linalg.cond(C) ** 0.5)


@requirement("CORDA-001", "corda: W_res + s B A = W.", CORDA, "init:corda", lambda i: corda(i, "ipm"), slow=2)
def corda_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")


def _corda(id: str, method: str, which: str, batches: int) -> None:
    @requirement(
        id,
        f"corda, {method}: s B A is the part of W along the {which} directions of W C, C the inputs' covariance"
        f"{' over all calls' if batches > 1 else ''}.",
        CORDA,
        "init:corda",
        lambda i: corda(i, method, batches),
        slow=2,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        want, bound = corda_update(spec)
        check.close(update(start(implementation, spec)), want, bound, spec.dtype, "s B A", FACTOR)


_corda("CORDA-002", "ipm", "r first", 1)
_corda("CORDA-003", "kpm", "r last", 1)
_corda("CORDA-004", "ipm", "r first", 2)


@requirement(
    "CORDA-005",
    "corda: the columns of B are orthogonal, with squared lengths S_k / s.",
    CORDA,
    "init:corda",
    lambda i: corda(i, "ipm"),
    slow=2,
)
def corda_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    S = np.linalg.svd(spec.W @ covariance(list(spec.init_options["inputs"])), compute_uv=False)
    B = start(implementation, spec).B
    want = np.diag(S[: spec.r]) / spec.scaling
    bound = S[0] / spec.scaling * S[0] / (S[spec.r - 1] - S[spec.r])
    check.close(B.T @ B, want, bound, spec.dtype, "B^T B", FACTOR)


@requirement(
    "CORDA-006",
    "corda: s B A is the same for every lora_alpha.",
    CORDA,
    "init:corda",
    lambda i: corda(i, "ipm"),
    slow=2,
)
def corda_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, two = (start(implementation, spec.but(lora_alpha=a)) for a in (1.0, 8.0))
    check.close(
        update(two), update(one), corda_update(spec)[1], spec.dtype, "s B A with 8 times the lora_alpha", FACTOR
    )


@requirement(
    "CORDA-007",
    "corda: a transposed weight starts as the linear layer with the same W does.",
    "the start is that of the logical weight, whatever its storage (F3)",
    "linear transposed init:corda",
    lambda i: corda(i, "ipm"),
    slow=2,
)
def corda_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    linear, transposed = (start(implementation, spec.but(kind=kind)) for kind in LINEAR)
    check.close(update(transposed), update(linear), corda_update(spec)[1], spec.dtype, "s B A", FACTOR)


# -- EVA ---------------------------------------------------------------------------------------


def eva(implementation: Implementation, whiten: bool = False, mean: float = 0.0) -> Any:
    """The same batch several times: its principal components are those of all."""

    def build(spec: LayerSpec, seed: int) -> LayerSpec:
        rng = np.random.default_rng(seed)
        n = spec.W.shape[1]
        X = basis(rng, 32, n)
        X -= X.mean(0)
        X = np.linalg.qr(X)[0] * 8.0 * 0.5 ** np.arange(n) @ basis(rng, n).T
        return spec.but(init_options={"inputs": [single(X + mean)] * 6, "rho": 1.0, "whiten": whiten})

    return st.builds(build, common(implementation, "eva", (5, 8)), seeds)


def components(spec: LayerSpec) -> tuple[Array, Array]:
    """The first r principal components of the inputs (rows), and their singular values."""
    X = spec.init_options["inputs"][0]
    _, S, Vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    return Vt[: spec.r], S[: spec.r]


NEAR = 0.02  # a converged component is within an angle of arccos(0.99) at worst; here all batches are the same


@requirement("EVA-001", "eva: B = 0 and W is bit for bit what it was.", EVA, "init:eva", lambda i: eva(i), slow=4)
def eva_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    check.equal(state.W, spec.W, "the base weight")
    check.equal(state.B, np.zeros_like(state.B), "B")


@requirement("EVA-002", "eva: A A^T = 1.", EVA, "init:eva", lambda i: eva(i), slow=4)
def eva_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    A = start(implementation, spec).A
    check.close(A @ A.T, np.eye(spec.r), 1.0, spec.dtype, "A A^T", FACTOR)


def _spans(id: str, mean: float, what: str) -> None:
    @requirement(
        id,
        f"eva: A spans the first r principal components of the inputs{what}.",
        EVA,
        "init:eva",
        lambda i: eva(i, mean=mean),
        slow=4,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        A, V = start(implementation, spec).A, components(spec)[0]
        off = np.linalg.norm(A.T @ A - V.T @ V, 2)
        check.that(off < NEAR, f"the projector A^T A is off by {off:.3g}")


_spans("EVA-003", 0.0, "")
_spans("EVA-004", 20.0, ", whose mean is not one of them however large it is")


@requirement(
    "EVA-005",
    "eva with whiten: the rows of A are orthogonal, and as long as 1 / sqrt(S_k) up to a common factor.",
    "PEFT's documentation of EvaConfig.whiten (E6)",
    "init:eva",
    lambda i: eva(i, whiten=True),
    slow=4,
)
def eva_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    spec = spec.but(r=2)
    A, S = start(implementation, spec).A, components(spec)[1]
    length = np.linalg.norm(A, axis=1)
    ratio, want = length[1] / length[0], (S[0] / S[1]) ** 0.5
    check.that(abs(ratio / want - 1) < NEAR, f"|A_2| / |A_1| is {ratio:.4g}, sqrt(S_1 / S_2) is {want:.4g}")
    check.that(abs(A[0] @ A[1]) < NEAR * length[0] * length[1], "the rows of A are not orthogonal")


@requirement("EVA-006", "eva: the output at the start is the base's.", EVA, "init:eva", lambda i: eva(i), slow=4)
def eva_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    x = inputs(spec)
    base, bound = (f(spec, spec.W, spec.b, x) for f in (oracle.apply, oracle.apply_bound))
    check.close(layer.forward(x), base, bound, spec.dtype, "the output")


@requirement(
    "EVA-007",
    "eva: s is lora_alpha / r, or lora_alpha / sqrt(r), where ranks stay as they are.",
    "PEFT's documentation of adjust_scaling_factors (E7)",
    "init:eva",
    lambda i: eva(i),
    slow=4,
)
def eva_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.close(start(implementation, spec).scaling, spec.scaling, spec.scaling, "float64", "s")


# -- LoRA-GA -----------------------------------------------------------------------------------


def lora_ga(implementation: Implementation) -> Any:
    """dL/dW = dy^T x = G with the singular values 8, 4, 2, ..."""

    def build(spec: LayerSpec, seed: int) -> LayerSpec:
        G = separated(np.random.default_rng(seed), *spec.W.shape)
        return spec.but(init_options={"x": np.eye(G.shape[1]), "dy": G.T.copy()})

    return st.builds(build, common(implementation, "lora_ga"), seeds)


@requirement(
    "LORAGA-001",
    "lora_ga: W_res + s B A = W, and s B A is not 0.",
    LORA_GA,
    "init:lora_ga",
    lambda i: lora_ga(i),
    slow=2,
)
def loraga_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")
    check.that(update(state).any(), "s B A is 0")


@requirement(
    "LORAGA-002",
    "lora_ga: A and B share out the first 2 r singular triples of the gradient as their directions.",
    LORA_GA + ", theorem 3.1: the 2 r directions together are the best first step",
    "init:lora_ga",
    lambda i: lora_ga(i),
    slow=2,
)
def loraga_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    G, r = spec.init_options["dy"].T, spec.r
    U, S, Vt = np.linalg.svd(G, full_matrices=False)
    rest = S[2 * r] if 2 * r < len(S) else 0.0
    for name, rows, directions in (("A", state.A, Vt), ("B", state.B.T, U.T)):
        size = np.linalg.norm(rows, axis=1)
        unit = rows / size[:, None]
        outside = unit - unit @ directions[: 2 * r].T @ directions[: 2 * r]
        what = f"the part of {name} outside of the first 2 r singular vectors"
        check.close(outside, np.zeros_like(outside), S[0] / (S[2 * r - 1] - rest), spec.dtype, what, FACTOR)
        check.close(
            unit @ unit.T, np.eye(r), S[0] / 2.0**-3, spec.dtype, f"the angles between the directions of {name}", FACTOR
        )
    used = (abs(state.A @ Vt[: 2 * r].T) > 0.5 * abs(state.A @ Vt[: 2 * r].T).max()).any(0)
    used_b = (abs(state.B.T @ U[:, : 2 * r]) > 0.5 * abs(state.B.T @ U[:, : 2 * r]).max()).any(0)
    check.that(not (used & used_b).any(), "a singular triple gives a direction both to A and to B")


# -- more of CorDA -----------------------------------------------------------------------------


@requirement(
    "CORDA-008",
    "corda: the columns of B have squared lengths S_k / s, where C is the mean over the calls and not their sum.",
    CORDA,
    "init:corda",
    lambda i: corda(i, "ipm", 2),
    slow=2,
)
def corda_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    S = np.linalg.svd(spec.W @ covariance(list(spec.init_options["inputs"])), compute_uv=False)
    B = start(implementation, spec).B
    bound = S[0] / spec.scaling * S[0] / (S[spec.r - 1] - S[spec.r])
    check.close(B.T @ B, np.diag(S[: spec.r]) / spec.scaling, bound, spec.dtype, "B^T B", FACTOR)


def _switched_off(id: str, init: str, cases: Any) -> None:
    @requirement(
        id,
        f"{init}: switched off, the layer is the base layer.",
        'PEFT\'s documentation of disable_adapter: "Use this to run inference on the base model" (U2)',
        f"disable init:{init}",
        cases,
        slow=2,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer = implementation.layer(spec)
        x = inputs(spec)
        bound = oracle.forward(spec, layer.read(), x)[1]
        layer.enable(False)
        check.close(layer.forward(x), oracle.apply(spec, spec.W, spec.b, x), bound, spec.dtype, "the output, off")


def _half(id: str, init: str, source: str, cases: Any) -> None:
    def rounded(spec: LayerSpec, dtype: str) -> LayerSpec:
        mantissa, exponent = np.frexp(spec.W)
        return spec.but(dtype=dtype, W=np.ldexp(np.round(mantissa * 128) / 128, exponent))

    @requirement(
        id,
        f"{init}: in half precision, too, W_res + s B A = W up to rounding.",
        source + " (T4)",
        f"init:{init}",
        lambda i: st.builds(rounded, cases(i), st.sampled_from(claimed(i, ("float16", "bfloat16")))),
        slow=2,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        state = start(implementation, spec)
        bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
        check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")
        check.that(update(state).any(), "s B A is 0")


def _refused_or_right(id: str, init: str, what: str, source: str, cases: Any) -> None:
    @requirement(id, f"{init}: {what}", source, cases[0], cases[1], slow=2)
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        try:
            state = start(implementation, spec)
        except Exception:
            return
        out, n_in = spec.W.shape
        check.equal((state.A.shape, state.B.shape), ((spec.r, n_in), (out, spec.r)), "the shapes of A and B")
        bound = abs(state.W) + oracle.delta_bound(state.A, state.B, state.scaling)
        check.close(state.W + update(state), spec.W, bound, spec.dtype, "W_res + s B A")


_switched_off("CORDA-009", "corda", lambda i: corda(i, "ipm"))
_half("CORDA-010", "corda", CORDA, lambda i: corda(i, "ipm"))
_refused_or_right(
    "CORDA-011",
    "corda",
    "r > min(in, out) is refused, or else everything holds with A (r, in) and B (out, r).",
    "there are min(in, out) singular triples (K5, D8)",
    ("init:corda errors", lambda i: corda(i, "ipm").map(lambda spec: spec.but(r=7))),
)
_refused_or_right(
    "CORDA-012",
    "corda",
    "lora_alpha = 0 or below is refused, or else W_res + s B A = W without NaN.",
    "dividing by s needs s > 0 (S3)",
    (
        "init:corda alpha errors",
        lambda i: st.builds(lambda spec, a: spec.but(lora_alpha=a), corda(i, "ipm"), st.sampled_from((0.0, -4.0))),
    ),
)


@requirement(
    "CORDA-013",
    "corda: in float64 the columns of B are orthogonal as exactly as in float64, or the layer is refused.",
    CORDA + " (T4)",
    "init:corda float64",
    lambda i: corda(i, "ipm").map(lambda spec: spec.but(dtype="float64")),
    slow=2,
)
def corda_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    try:
        B = start(implementation, spec).B
    except Exception:
        return
    S = np.linalg.svd(spec.W @ covariance(list(spec.init_options["inputs"])), compute_uv=False)
    gram = B.T @ B * spec.scaling
    bound = S[0] * S[0] / (S[spec.r - 1] - S[spec.r])
    check.close(
        gram - np.diag(np.diag(gram)), np.zeros_like(gram), bound, "float64", "s B^T B off its diagonal", FACTOR
    )


# -- more of EVA -------------------------------------------------------------------------------


def differing(implementation: Implementation, shifted: bool) -> Any:
    """Two kinds of batches by turns; one direction outweighs all others however often each is seen.

    shifted: the same batch around two means, far apart along the direction in which each alone varies least. Else:
    each around 0, and the second 16 times larger, with its directions in the opposite order.
    """

    def build(spec: LayerSpec, seed: int) -> LayerSpec:
        rng = np.random.default_rng(seed)
        n = spec.W.shape[1]
        X = basis(rng, 32, n)
        Q, V = np.linalg.qr(X - X.mean(0))[0], basis(rng, n)
        sizes = 8.0 * 0.5 ** np.arange(n)
        one = Q * sizes @ V.T
        two = one + 16.0 * V[:, -1] if shifted else 16.0 * Q * sizes[::-1] @ V.T
        data = [one, two, one, two, one] + [two] * shifted
        return spec.but(r=1, init_options={"inputs": [single(X) for X in data], "rho": 1.0, "whiten": False})

    return st.builds(build, common(implementation, "eva", (5, 8)), seeds)


def _of_all(id: str, shifted: bool, what: str) -> None:
    @requirement(id, f"eva: {what}", EVA, "init:eva", lambda i: differing(i, shifted), slow=4)
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        X = np.concatenate(spec.init_options["inputs"])
        V = np.linalg.svd(X - X.mean(0), full_matrices=False)[2][:1]
        A = start(implementation, spec).A
        off = np.linalg.norm(A.T @ A - V.T @ V, 2)
        check.that(off < NEAR, f"the projector A^T A is off by {off:.3g}")


_of_all("EVA-008", False, "A spans the first principal component of all batches, not of one of them.")
_of_all("EVA-009", True, "what varies from batch to batch, and not within one, is a principal component, too.")


@requirement(
    "EVA-010",
    "eva: more components than the inputs have numbers are refused.",
    "PEFT's EvaConfig: at most `in` components (E9)",
    "init:eva errors",
    lambda i: eva(i).map(lambda spec: spec.but(r=9)),
    slow=4,
)
def eva_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.refused(lambda: implementation.layer(spec), "eva with r = 9 on inputs of 8 numbers")


# -- more of LoRA-GA ---------------------------------------------------------------------------


@requirement(
    "LORAGA-003",
    "lora_ga: the rows of A are equally long, and so are the columns of B: the singular values are in neither.",
    LORA_GA + ", algorithm 1: A and B are singular vectors times one number (R2)",
    "init:lora_ga",
    lambda i: lora_ga(i).map(lambda spec: spec.but(r=2)),
    slow=2,
)
def loraga_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = start(implementation, spec)
    for name, rows in (("A", state.A), ("B", state.B.T)):
        length = np.linalg.norm(rows, axis=1)
        check.close(length[1] / length[0], 1.0, 1.0, spec.dtype, f"the second length of {name}, of the first", FACTOR)


_switched_off("LORAGA-004", "lora_ga", lambda i: lora_ga(i))
_half("LORAGA-005", "lora_ga", LORA_GA, lambda i: lora_ga(i))
_refused_or_right(
    "LORAGA-006",
    "lora_ga",
    "2 r > min(in, out) is refused, or else everything holds with A (r, in) and B (out, r).",
    "A and B take r different singular triples each, and there are min(in, out) (R1, R2)",
    ("init:lora_ga errors", lambda i: lora_ga(i).map(lambda spec: spec.but(r=3))),
)
