"""pissa_niter_n: how near n subspace iterations come to the leading singular triple, and that it is n of them.

W has the singular values 1, t, t, ..., t, so everything is known about subspace iteration from a Gaussian matrix with
w columns. With u the leading left singular vector, the smallest angle between u and the columns' range has

    tan(angle) = t^(2 n + 1) sqrt(X / Y),   X of the chi-squared law with 40 - w, Y with w degrees of freedom

which is theorem 9.1 of Halko, Martinsson and Tropp, arXiv 0909.4061, without an inequality. Fifteen matrices are
started. For every w from 1 to 16 the median of sqrt(X / Y) is between 0.4 and 400 but for one case in 10**11, and
t = 1/32: one iteration more or less moves the angle by 1024, beyond either end from near any place in between.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Array, Implementation, LayerSpec
from ..generate import ALPHAS, seeds
from ..registry import requirement
from .inits_weight import update

SIZE, TAIL, MATRICES = 40, 1 / 32, 15
LEAST, MOST = 0.4, 400.0
HALKO = "Halko, Martinsson and Tropp, arXiv 0909.4061, theorem 9.1 and algorithm 4.4 (Q3)"
COUNT = 'PEFT\'s documentation: "the number of subspace iterations to perform FSVD" (Q3)'

Case = tuple[LayerSpec, int]


def flat(rng: np.random.Generator, dtype: str) -> Array:
    """(40, 40) with the singular values 1, t, t, ..., as the dtype stores it."""
    U, V = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in "UV")
    S = np.full(SIZE, TAIL)
    S[0] = 1.0
    return np.asarray((U * S) @ V.T, dtype=dtype).astype(np.float64)


@st.composite
def iterated(draw: Any, implementation: Implementation, dtype: str, counts: tuple[int, ...]) -> Case:
    """A layer of that weight, and n."""
    n, seed = draw(st.sampled_from(counts)), draw(seeds)
    options = {"lora_alpha": draw(st.sampled_from(ALPHAS)), "init_lora_weights": f"pissa_niter_{n}", "seed": seed}
    return LayerSpec("linear", flat(np.random.default_rng(seed), dtype), dtype=dtype, **options), n


def distance(implementation: Implementation, case: Case) -> float:
    """The median over 15 matrices of tan(angle) / t^(2 n + 1)."""
    (spec, n), found = case, []
    for number in range(MATRICES):
        W = spec.W if not number else flat(np.random.default_rng([spec.seed, number]), spec.dtype)
        D = update(implementation.layer(spec.but(W=W, seed=spec.seed + number)).read())
        U, _, Vt = np.linalg.svd(W)
        left, right = U.T @ D @ Vt[0], U[:, 0] @ D @ Vt.T
        # the first product is with the columns or with the rows of W: the worse of the two sides counts
        found.append(max(np.linalg.norm(v[1:]) / abs(v[0]) for v in (left, right)))
    return float(np.median(found)) / TAIL ** (2 * n + 1)


def refused(implementation: Implementation, case: Case) -> bool:
    """Is float64 refused? PISSA-016 allows that."""
    try:
        implementation.layer(case[0])
    except Exception:
        return True
    return False


def near(implementation: Implementation, case: Case, check: Check) -> None:
    found = distance(implementation, case)
    check.that(
        found < MOST, f"the angle to the leading triple is {found:.3g} t^(2 n + 1), more than n iterations leave"
    )


def far(implementation: Implementation, case: Case, check: Check) -> None:
    found = distance(implementation, case)
    check.that(
        found > LEAST, f"the angle to the leading triple is {found:.3g} t^(2 n + 1), less than n iterations leave"
    )


@requirement(
    "PISSANITER-012",
    "pissa_niter_n: the leading triple is as near as n subspace iterations bring it.",
    HALKO,
    "linear float32 init:pissa_niter",
    lambda i: iterated(i, "float32", (0, 1)),
    slow=4,
)
def pissaniter_012(implementation: Implementation, case: Case, check: Check) -> None:
    near(implementation, case, check)


@requirement(
    "PISSANITER-013",
    "pissa_niter_n: no more than n subspace iterations are made.",
    COUNT,
    "linear float32 init:pissa_niter",
    lambda i: iterated(i, "float32", (0, 1)),
    slow=4,
)
def pissaniter_013(implementation: Implementation, case: Case, check: Check) -> None:
    far(implementation, case, check)


@requirement(
    "PISSANITER-014",
    "pissa_niter_n: in float64 two and three iterations bring it as near as they must, or it is refused.",
    HALKO,
    "linear float64 init:pissa_niter",
    lambda i: iterated(i, "float64", (2, 3)),
    slow=4,
)
def pissaniter_014(implementation: Implementation, case: Case, check: Check) -> None:
    if not refused(implementation, case):
        near(implementation, case, check)


@requirement(
    "PISSANITER-015",
    "pissa_niter_n: in float64 no more than the two or three iterations asked for are made.",
    COUNT,
    "linear float64 init:pissa_niter",
    lambda i: iterated(i, "float64", (2, 3)),
    slow=4,
)
def pissaniter_015(implementation: Implementation, case: Case, check: Check) -> None:
    if not refused(implementation, case):
        far(implementation, case, check)
