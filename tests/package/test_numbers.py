"""Extreme numbers in every dtype: the result is right within a bound, or it is refused, and never silently NaN.

Numbers from the smallest subnormal to the largest finite one, zeros, NaN and infinity; matrices of one row or column,
and of low rank. The reference is NumPy's long double, whose range holds the products of all of them. With u the unit
roundoff and eta the smallest subnormal number of a dtype, rounding x changes it by at most u |x| + eta, and a sum of n
products x_i y_i is off by at most n u sum |x_i y_i| + n eta. Each bound below is that, for each step of the formula.

LAPACK's QR and SVD of m by n numbers are off by at most c m n u of the largest singular value, with a small c. (Source:
N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, theorem 19.4.) Here c is 8, and m and n are
8 at most: 64 n for n columns, 512 in all.

    HYPOTHESIS_PROFILE=deep python tests/package/test_numbers.py     tries 1,000 examples of each; writes numbers.json
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import stored
from torch import Tensor, nn

from lora_ref import LoftQConfig, LoraConfig, PeftModel, get_peft_model, numerics
from lora_ref import init as inits
from lora_ref.calibration.preprocess import preprocess_corda, preprocess_loraga
from lora_ref.core.scaling import scaling
from lora_ref.fast import linear as fused
from lora_ref.init import corda, eva, lora_ga
from lora_ref.numerics import pca, quantization
from lora_ref.tools.inspect import read_contents
from lora_ref.tools.spectrum import bar, singular_values
from spec_tests import close

Long = np.longdouble
pytestmark = [
    pytest.mark.skipif(np.finfo(Long).maxexp < 16384, reason="the reference needs a long double of more range"),
    pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered"),
]
HERE = Path(__file__).parent
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 6), (6, 1), (4, 4), (7, 5), (5, 8)]
QR, SVD = 64, 512  # roundings of a decomposition: of a column, and of all
TRIED: dict[str, Counter[str]] = {}  # {property: how often it was tried, and how often the answer was a refusal}


def counted(test: Callable[..., Any]) -> Callable[..., Any]:
    """Count the examples of a property; where it returns an error, that was a refusal."""

    @functools.wraps(test)
    def counting(*args: Any, **kwargs: Any) -> None:
        outcome = test(*args, **kwargs)
        TRIED.setdefault(test.__name__, Counter()).update(tried=1, refused=isinstance(outcome, ValueError))

    counting.is_counted = True  # type: ignore[attr-defined]
    return counting


# -- numbers -------------------------------------------------------------------------------------


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def eta(dtype: torch.dtype) -> Long:
    """The smallest subnormal number."""
    return Long(torch.finfo(dtype).tiny) * torch.finfo(dtype).eps


def top(dtype: torch.dtype) -> Long:
    return Long(torch.finfo(dtype).max)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a dtype is computed in."""
    return torch.promote_types(dtype, torch.float32)


def exact(*arrays: Any) -> Any:
    """As long double, without rounding."""
    made = [
        (x.detach().double().numpy() if isinstance(x, Tensor) else np.asarray(x, np.float64)).astype(Long)
        for x in arrays
    ]
    return made if len(made) > 1 else made[0]


@st.composite
def sizes(draw: Any, dtype: torch.dtype) -> float:
    """A power of two, from the smallest number of the dtype to the largest; mostly an end or 1."""
    low, high = (
        round(math.log2(float(eta(dtype)))) if dtype != torch.float64 else -1074,
        math.frexp(float(top(dtype)))[1],
    )
    ends = st.sampled_from([low, low + 3, low // 2, -8, 0, 8, high // 2, high - 4, high - 1])
    return 2.0 ** draw(ends | st.integers(low, high - 1))


@st.composite
def matrices(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, spoilt: bool = False) -> Tensor:
    """A tensor with numbers of one of the sizes, or of several."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    size = draw(st.just(1.0) | sizes(dtype))
    kind = draw(st.sampled_from(["full", "full", "mixed", "rank one", "sparse", "largest"]))
    if kind == "mixed":
        small = torch.rand(shape, generator=generator) < 0.5
        x *= torch.where(small, *torch.tensor([size, draw(sizes(dtype))], dtype=torch.float64))
    elif kind == "rank one":
        x = x.select(0, 0)[None] * torch.linspace(1, -1, shape[0]).double().view(-1, *[1] * (len(shape) - 1)) * size
    elif kind == "sparse":
        x = torch.where(torch.rand(shape, generator=generator) < 0.3, x * size, 0)
    elif kind == "largest":
        x = x.sign() * size * float(2 - torch.finfo(dtype).eps)
    else:
        x *= size
    x = x.to(dtype)
    x[~x.isfinite()] = torch.finfo(dtype).max
    if spoilt and draw(st.integers(0, 3)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    return x


dtypes, shapes = st.sampled_from(DTYPES), st.sampled_from(SHAPES)
scalings = st.sampled_from([1.0, 0.5, 2.0, 16 / math.sqrt(3), 2.0**-20, 2.0**20]) | st.sampled_from(
    [2.0**e for e in (-1074, -500, -149, -120, -60, 60, 120, 127, 500, 1020)]
)


def finite(*arrays: Any) -> bool:
    return all(bool(np.isfinite(x).all()) for x in exact(*arrays, 0)[:-1])


def bits(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes() if x.ndim else bits(x[None])


def state(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(tensor) for name, tensor in model.state_dict().items()}


def refusal(what: Callable[[], Any]) -> Any:
    """The result, or the ValueError: any other error is one of the library."""
    try:
        return what()
    except ValueError as error:
        assert str(error)
        return error


# -- initialisations, on NumPy and torch ------------------------------------------------------------


def decomposed(W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, Vh in float64 of a long double matrix of any size, S in long double."""
    size = np.abs(W).max() or Long(1)
    U, S, Vh = np.linalg.svd((W / size).astype(np.float64), full_matrices=False)
    return U, S * size, Vh


def assert_adds_up(W: Tensor, made: Any, s: float) -> None:
    """W = residual + s B A: r products and sums in at least float32, a scaling, a sum, a rounding to W's dtype."""
    dtype, r = W.dtype, made.A.shape[0]
    w, A, B, residual = exact(W, made.A, made.B, made.residual)
    s, u = Long(s), unit(wide(dtype))
    size = np.abs(w) + s * (np.abs(B) @ np.abs(A))
    # by underflow; a BLAS may compute s B or s A first
    lost = eta(dtype) + eta(wide(dtype)) * (r + 2) * (s + 1 + np.abs(A).max() + np.abs(B).max())
    assert (np.abs(residual + s * B @ A - w) <= unit(dtype) * np.abs(residual) + (r + 3) * u * size + lost).all()


def takes_out(W: Tensor, r: int, s: float, want: np.ndarray, made: Any) -> None:
    """s B A is `want`, but for the decomposition's rounding, and the rounding of A and B to W's dtype."""
    dtype = W.dtype
    A, B = exact(made.A, made.B)
    norm = decomposed(exact(W))[1][0]
    error = SVD * unit(wide(dtype)) * norm + 3 * r * unit(dtype) * norm
    small = eta(dtype) * r  # A and B are off by eta where they underflow
    lost = s * small * (np.abs(A).max() + np.abs(B).max() + small) + eta(wide(dtype)) * 64
    assert np.abs(s * B @ A - want).max() <= error + lost


DATA_FREE = {"True": True, "False": False, "gaussian": "gaussian", "orthogonal": "orthogonal"}
FROM_WEIGHT = ["pissa", "pissa_niter_2", "olora", "loftq", "mica", "corda", "lora_ga", "eva"]


@st.composite
def starts(draw: Any) -> tuple[Any, Tensor, int, float]:
    """(the weight as NumPy or torch has it, the same as a tensor, r, s)."""
    dtype, shape = draw(dtypes), draw(shapes)
    W = draw(matrices(shape, dtype, spoilt=True))
    as_numpy = dtype != torch.bfloat16 and draw(st.booleans())
    return (W.numpy() if as_numpy else W), W, draw(st.integers(1, min(shape))), draw(scalings)


@pytest.mark.parametrize("name", DATA_FREE)
@given(starts())
@counted
def test_an_init_without_data_does_not_look_at_the_weights_numbers(name: str, case: Any) -> None:
    weight, W, r, s = case
    before = bits(W)
    made = inits.find(DATA_FREE[name], "linear")(weight, 2 * r, s)
    assert finite(made.A, made.B) and made.residual is None and bits(W) == before
    A, B = exact(made.A, made.B)
    assert A.any() and B.any() == (name in ("False", "orthogonal"))
    if name == "orthogonal":
        # 2 r orthogonal rows come of QR in float32, and A and B of them
        size = np.outer((B**2).sum(1), (A**2).sum(0)) ** Long(0.5)
        assert (np.abs(B @ A) <= 2 * 8 * (2 * r) ** 2 * unit(torch.float32) * size).all()


@pytest.mark.parametrize("name", FROM_WEIGHT)
@given(starts(), st.data())
@counted
def test_an_init_from_the_weight_is_right_or_refused(name: str, case: Any, data: Any) -> Any:
    """Q1, O1, L3, K3, M1, E6, LoRA-GA's scales: whatever the size of the weight, its data and its scaling."""
    weight, W, r, s = case
    before, options, kind = bits(W), {}, "linear"
    library = (lambda x: x.numpy()) if isinstance(weight, np.ndarray) else (lambda x: x)
    n_out, n_in = W.shape
    x = data.draw(matrices((9, n_in), W.dtype)) if name in ("corda", "eva") else None
    if name == "corda":
        options = {
            "covariance": corda.call_covariance(library(x)), "corda_method": data.draw(st.sampled_from(["ipm", "kpm"]))
        }  # fmt: skip
    elif name == "lora_ga":
        gradient = data.draw(matrices((n_out, n_in), wide(W.dtype)))
        options = {"gradient": library(gradient), "scale": data.draw(st.sampled_from(lora_ga.SCALES))}
    elif name == "eva":
        components = refusal(lambda: pca.components(pca.update(None, library(x)), r))
        if isinstance(components, ValueError):
            assert np.abs(exact(x)).max() ** 2 > top(torch.float64) / 1e3  # only float64 can be that large
            return components
        options = {"components": components, "whiten": data.draw(st.booleans())}
    elif name == "loftq":
        options = {"bits": data.draw(st.sampled_from([2, 4, 8])), "iterations": data.draw(st.integers(1, 2))}
    method = {"corda": corda.corda, "lora_ga": lora_ga.lora_ga, "eva": eva.eva}.get(name) or inits.find(name, kind)
    made = refusal(lambda: method(weight, r, s, **options))
    assert bits(W) == before
    w = exact(W)
    if not finite(W) and name != "eva":  # EVA does not look at it
        assert isinstance(made, ValueError)
        return made
    S = np.zeros(1, Long) if name == "eva" else decomposed(w)[1]
    if isinstance(made, ValueError):
        assert may_refuse(name, S[0], s, W.dtype, x, options, r, (n_out, n_in)), made
        return made
    assert finite(*(f for f in made[:3] if f is not None))
    assert all(type(f) is type(weight) and f.dtype == weight.dtype for f in made[:2]) or name in ("eva", "mica")
    A, B = exact(made.A, made.B)
    if made.residual is not None and made.exact:
        assert_adds_up(W, made, s)
    if name == "pissa":
        U, S, Vh = decomposed(w)
        if np.all(S[:r] - S[r : r + 1].sum() > S[0] / 16):  # else several approximations of rank r are as good
            takes_out(W, r, s, (U[:, :r] * S[:r]) @ Vh[:r], made)
        takes_no_less(W, r, s, S, made)
    elif name == "corda":
        lost = eta(W.dtype) * (np.abs(A).max() + np.abs(B).max() + eta(W.dtype)) * r * s + eta(wide(W.dtype)) * 64
        P = B / np.where(np.abs(B).max(0) > 0, np.abs(B).max(0), 1)
        P = P / np.where((P**2).sum(0) > 0, (P**2).sum(0), 1) ** 0.5  # U, whose columns B has
        rounding = (SVD * unit(wide(W.dtype)) + 8 * r * unit(W.dtype)) * S[0]
        held = np.abs(B).max(0) > 1e3 * eta(W.dtype)  # U to three digits and more
        if held.all() and unit(W.dtype) * np.abs(B).max() < np.abs(B).max(0).min():
            left = P.T @ (w - s * B @ A)
            slack = lost * 8 + 4 * S[0] * float(eta(W.dtype) / np.abs(B).max(0).min())
            assert np.abs(left).max() <= rounding + slack + unit(W.dtype) * S[0] * 4
    elif name == "olora":
        assert np.abs(B.T @ B - np.eye(r)).max() <= QR * r * unit(wide(W.dtype)) + 4 * r * unit(W.dtype)
        takes_out(W, r, 1.0, B @ (B.T @ w), made)
    elif name == "mica":
        assert not A.any() and np.abs(B.T @ B - np.eye(r)).max() <= QR * r * unit(wide(W.dtype)) + 4 * r * unit(W.dtype)
        left = decomposed(B.T @ w)[1]
        assert (np.abs(left - S[-r:]) <= (SVD * unit(wide(W.dtype)) + 4 * r * unit(W.dtype)) * S[0]).all()
    elif name == "loftq":
        Q = exact(made.residual)
        lost = s * eta(W.dtype) * (np.abs(A).sum() + np.abs(B).sum() + 1) + eta(wide(W.dtype)) * 64 * w.size**0.5
        slack = (SVD * unit(wide(W.dtype)) + 3 * r * unit(W.dtype)) * S[0] * w.size**0.5 + lost * w.size**0.5
        assert norm(w - Q - s * B @ A) <= norm(w - Q) + slack  # never worse than Q alone
    elif name == "eva":
        assert not B.any() and A.any()
        if not options["whiten"]:
            assert np.abs(A @ A.T - np.eye(r)).max() <= QR * r * unit(torch.float64) + 4 * r * unit(W.dtype)
    return None


def norm(x: np.ndarray) -> Long:
    return (x.astype(Long) ** 2).sum() ** Long(0.5)  # in numpy 1.26, Long() * float64 is float64


def takes_no_less(W: Tensor, r: int, s: float, S: np.ndarray, made: Any) -> None:
    """Eckart-Young: the largest singular value that is left is the next one."""
    A, B = exact(made.A, made.B)
    left = decomposed(exact(W) - s * B @ A)[1][0]
    small = eta(W.dtype)
    lost = s * r * small * (np.abs(A).max() + np.abs(B).max() + small) * max(W.shape) + eta(wide(W.dtype)) * 64
    following = S[r] if len(S) > r else Long(0)
    assert left <= following + (SVD * unit(wide(W.dtype)) + 8 * r * unit(W.dtype)) * S[0] + lost


def may_refuse(
    name: str, S: Long, s: float, dtype: torch.dtype, x: Tensor | None, options: Any, r: int, shape: tuple[int, int]
) -> bool:
    """Does anything in the formula come within a factor of 16 of the largest number, or is nothing to divide?"""
    limit, s = top(dtype) / 16, Long(s)
    if name == "eva":
        sigma = exact(options["components"].singular_values)[:r]
        return options["whiten"] and bool((sigma == 0).any() or 1 / sigma.min() ** Long(0.5) > limit)
    if s == 0 or s > top(wide(dtype)) / 4:
        return True
    if name == "mica":
        return False
    if top(wide(dtype)) / 16 < S or s ** Long(0.5) < eta(wide(dtype)):
        return True
    if name == "lora_ga":
        g = exact(options["gradient"])
        if 2 * r > min(shape) or not g.any():
            return True
        c = {
            "stable": Long(shape[0]) ** Long(0.25) / 4,
            "gd_scale": 1 / s,
            "unit": Long(1),
            "weight_svd": (S / s) ** Long(0.5),
        }[options["scale"]]
        return max(c, s * c * c + S) > limit or c * c > top(wide(dtype)) / 256
    if name == "corda":
        if not exact(x).any():
            return True
        wC = S * (np.abs(exact(options["covariance"])).sum() + 1) * 2
        small = Long(torch.finfo(wide(dtype)).tiny) * 2**20  # sqrt(S s) divides: S may be as small as rounding
        return max(S, (wC / s) ** Long(0.5), S / (small * s) ** Long(0.5)) > limit or S / s > top(wide(dtype)) / 256
    if name == "olora":
        return max(S, s * S) > limit
    return max(S, (S / s) ** Long(0.5)) > limit or S / s > top(wide(dtype)) / 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-1.0, -0.8, -0.5, 0.0, 0.5, 0.8, 0.95])
def test_the_leading_triples_of_a_large_matrix_of_any_size(dtype: torch.dtype, power: float) -> None:
    """Lanczos takes norms, whose squares leave the dtype long before the numbers do."""
    info = torch.finfo(dtype)
    size = (info.max if power > 0 else info.tiny) ** abs(power)
    W = torch.randn(270, 260, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.linalg.svdvals(W)[:4]
    for weight in ((W * size).to(dtype), (W * size).to(dtype).numpy()):
        for U, S, _ in (numerics.leading_svd(weight, 4), numerics.randomized_svd(weight, 4, niter=200)):
            assert np.abs(exact(S) / Long(size) / exact(want) - 1).max() <= 1e-3  # what `niter` has of a flat spectrum
            assert np.abs(exact(U).T @ exact(U) - np.eye(4)).max() <= 270 * 4 * info.eps


# -- forward and backward ---------------------------------------------------------------------------


def adapted(base: nn.Module, A: Tensor, B: Tensor, s: float, autocast: bool = True, name: str = "default") -> PeftModel:
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    model = get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=autocast)
    layer = model.lora_layers()["0"]
    layer.build("default", A, B)
    layer.r["default"] = layer.initial_scaling["default"] = A.shape[0]
    layer.scaling["default"] = layer.initial_scaling["default"] = s
    model.set_adapter("default")
    return model


@st.composite
def layers(draw: Any) -> tuple[Callable[[], PeftModel], Tensor, Tensor, Tensor, float]:
    """What makes an adapted linear layer, W, A, B and s, with numbers of any size."""
    dtype, (n_out, n_in), r = draw(dtypes), draw(shapes), draw(st.integers(1, 3))
    autocast = draw(st.booleans())
    held = wide(dtype) if autocast else dtype
    W, b = draw(matrices((n_out, n_in), dtype, spoilt=True)), draw(matrices((n_out,), dtype))
    A, B = draw(matrices((r, n_in), held, spoilt=True)), draw(matrices((n_out, r), held))
    s = draw(scalings) * draw(st.sampled_from([1, -1, 0]))
    if abs(s) > top(wide(held)) / 2:
        s = 1.0

    def make() -> PeftModel:
        base = nn.Linear(n_in, n_out, dtype=dtype)
        base.weight.data, base.bias.data = W.clone(), b.clone()
        return adapted(base, A.clone(), B.clone(), s, autocast)

    return make, W, A, B, s


@given(layers(), st.data())
@counted
def test_a_step_is_the_formula_and_overflows_only_where_that_does(case: Any, data: Any) -> None:
    """Fused and plain: within the bound where nothing leaves the dtype; NaN and infinity spread to the same places."""
    make, W, A, B, s = case
    model = make()
    dtype, held = W.dtype, A.dtype
    x = data.draw(matrices((3, W.shape[1]), dtype, spoilt=True)).requires_grad_()
    g = data.draw(matrices((3, W.shape[0]), dtype))
    model.lora_layers()["0"].lora_dropout["default"] = nn.Identity()
    got = []
    for applies in (fused.applies, lambda x: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused, "applies", applies)
            y = model(x)
            grads = torch.autograd.grad(y, [x, *stored(model.lora_layers()["0"], "default")], g)
        got.append([y.detach(), *grads])
    w, b, a, B, X, G = exact(W, model.lora_layers()["0"].base_layer.bias, A, B, x, g)
    S, r, n = Long(abs(s)), A.shape[0], max(W.shape)
    Z, H = np.abs(X) @ np.abs(a.T), np.abs(G) @ np.abs(B)
    between = [Z, H, *(S * np.abs(part) for part in (a, B, X, G, Z))]  # BLAS may scale any factor of a product first
    sizes = [
        [np.abs(X) @ np.abs(w.T) + np.abs(b), S * Z @ np.abs(B.T), Z @ np.abs(B.T)],
        [np.abs(G) @ np.abs(w), S * H @ np.abs(a), H @ np.abs(a), S * H],
        [S * H.T @ np.abs(X), H.T @ np.abs(X), S * H],
        [S * np.abs(G.T) @ Z, np.abs(G.T) @ Z],
    ]
    Xa = X @ a.T
    wants = [X @ w.T + b + s * Xa @ B.T, G @ w + s * (G @ B) @ a, s * (G @ B).T @ X, s * G.T @ Xa]
    narrow = unit(dtype) if dtype.itemsize <= held.itemsize else unit(held)
    terms = W.shape[0] + W.shape[1] + r + 12
    for plain, quick, want, size in zip(got[1], got[0], wants, sizes, strict=True):
        assert plain.dtype == quick.dtype and plain.shape == quick.shape
        calm = (
            max(np.max(part) for part in [*size, *between]) < min(top(dtype), top(held)) / 16
            if finite(W, A, x)
            else False
        )
        if calm:
            tiny = max(eta(dtype), eta(held))
            # what underflows in z, dz or a product is multiplied by what comes after
            after = 1 + S + (1 + S) * max(np.abs(part).max() for part in (w, a, B, X, G, Z, H))
            allowed = terms * narrow * sum(size[:2]) * 2 + n * terms * tiny * after
            for made in (plain, quick):
                assert (np.abs(exact(made) - want) <= allowed).all()
        elif not finite(W, A, x):
            spoilt = ~np.isfinite(exact(plain))
            parts = [np.where(np.isfinite(part), part, 0) for part in [*size, *between]]
            least = min(np.where(part > 0, part, 1).min() for part in parts)
            huge = max(part.max() for part in parts)
            if huge < min(top(dtype), top(held)) / 16 and min(least, S) > torch.finfo(held).tiny * 2.0**8:
                # nothing else overflows, nor underflows: 0 times infinity is NaN, a tiny number times it is not;
                # and a product that is multiplied by 0 is not even looked at
                assert (spoilt == ~np.isfinite(exact(quick))).all()
                assert (plain.isnan() == quick.isnan()).all()


# -- merging ----------------------------------------------------------------------------------------


@given(layers())
@counted
def test_a_merge_is_right_or_refused_and_undone_to_the_bit(case: Any) -> Any:
    """U4 and T3: one rounding of W + s B A, computed in at least float32; merge_and_unload makes the same."""
    make, W, A, B, s = case
    model = make()
    plain = copy.deepcopy(model)
    W, before = W.clone(), state(model)
    merged = refusal(model.merge_adapter)
    now = model.lora_layers()["0"].base_weight.detach().clone()
    w, a, b = exact(W, A, B)
    size = np.abs(w) + abs(Long(s)) * (np.abs(b) @ np.abs(a))
    between = max(size.max(), abs(s) * np.abs(b).max()) if finite(W, A) else math.nan
    unloaded = refusal(plain.merge_and_unload)
    if isinstance(merged, ValueError):
        assert isinstance(unloaded, ValueError) and state(model) == before == state(plain)
        assert not between < top(W.dtype) / 4
        return merged
    assert finite(now)
    computed, r = wide(W.dtype), A.shape[0]
    # s B is rounded, and underflows, before it is multiplied by A
    lost = eta(W.dtype) + eta(computed) * (r + 1) * (1 + np.abs(a).max())
    allowed = unit(W.dtype) * np.abs(exact(now)) + (r + 3) * unit(computed) * size + lost
    assert (np.abs(exact(now) - (w + s * b @ a)) <= allowed).all()
    assert bits(unloaded[0].weight) == bits(now)
    with model.disable_adapter():
        assert bits(model.lora_layers()["0"].base_weight) == bits(W)
    model.unmerge_adapter()
    assert state(model) == before
    return None


# -- initialisations, in a model --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["True", "orthogonal", "mica", "pissa", "pissa_niter_1", "olora", "loftq", "corda", "lora_ga"]
)
@given(starts(), st.data())
@counted
def test_a_model_is_adapted_rightly_or_left_alone(name: str, tmp_path_factory: Any, case: Any, data: Any) -> Any:
    """And disabled, unloaded, saved as a plain adapter and loaded: the original weight, to rounding (U2, U6, V5)."""
    _, W, r, s = case
    net = nn.Sequential(nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype))
    net[0].weight.data = W.clone()
    alpha = s * 2 * r
    config = LoraConfig(
        r=2 * r if name in ("True", "orthogonal") else r, lora_alpha=alpha if math.isfinite(alpha) else 1.0,
        target_modules=["0"], init_lora_weights=True if name == "True" else name,
        loftq_config=LoftQConfig() if name == "loftq" else None,
    )  # fmt: skip
    original, before = copy.deepcopy(net), state(net)
    x = data.draw(matrices((5, W.shape[1]), W.dtype))

    def adapt() -> PeftModel:
        if name == "corda":
            preprocess_corda(net, config, run_model=lambda: net(x), progress=False)
        elif name == "lora_ga":
            preprocess_loraga(net, config, lambda: net(x).sum().backward(), progress=False)
        return get_peft_model(net, config)

    model = refusal(adapt)
    if isinstance(model, ValueError):
        assert state(net) == before and type(net[0]) is nn.Linear
        return model
    layer = model.lora_layers()["0"]
    A, B = layer.factors("default")
    left, whole = layer.base_weight.detach(), layer.unmerged_weight
    assert finite(A, B)
    s = layer.scaling["default"]
    if name in ("True", "orthogonal", "mica"):
        assert bits(left) == bits(W)
        return None
    assert finite(left, whole)
    w, a, b, residual = exact(W, A, B, left)
    dtype, n = W.dtype, A.shape[0]
    size = np.abs(w) + s * (np.abs(b) @ np.abs(a)) * (name != "loftq") + np.abs(residual)
    lost = 2 * eta(dtype) + eta(wide(dtype)) * (n + 2) * (s + 1 + np.abs(a).max() + np.abs(b).max())
    # the residual is rounded once, the whole again; LoftQ keeps the difference in W's dtype
    allowed = (
        unit(dtype) * (2 * np.abs(residual) + 2 * np.abs(w) + size * (name == "loftq"))
        + 2 * (n + 3) * unit(wide(dtype)) * size
    )
    assert (np.abs(exact(whole) - w) <= allowed + lost).all()
    folder = tmp_path_factory.mktemp("adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = refusal(lambda: model.save_pretrained(folder))
    if isinstance(saved, ValueError):  # twice the alpha may be more than a float holds
        assert 2 * abs(config.lora_alpha) > 1e308
        return saved
    again = PeftModel.from_pretrained(original, folder)
    delta = again.lora_layers()["0"].delta("default")
    if name != "loftq":  # [B | -B0] [A; A0] is a sum that cancels
        assert not finite(delta) or (np.abs(exact(delta)) <= (4 * n + 6) * unit(wide(dtype)) * size + 8 * lost).all()
        assert finite(delta) or np.max(size) > top(wide(dtype)) / 16
    else:
        assert bits(again.lora_layers()["0"].base_weight) == bits(left)
    assert bits(model.unload()[0].weight) == bits(whole)
    return None


# -- weighted combinations, files -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
@given(st.data())
@counted
def test_a_combination_is_right_or_refused(kind: str, data: Any) -> Any:
    """U9: sum w_i s_i B_i A_i for "cat" and, at full rank, "svd"; the sums of the factors for "linear"."""
    dtype, (n_out, n_in), r = data.draw(dtypes), data.draw(shapes), 2
    held = wide(dtype)
    base = nn.Linear(n_in, n_out, bias=False, dtype=dtype)
    model = adapted(base, torch.zeros(r, n_in, dtype=held), torch.zeros(n_out, r, dtype=held), 1.0)
    model.add_adapter("b", LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    layer, weights = model.lora_layers()["0"], [data.draw(scalings), -data.draw(scalings)]
    for name in ("default", "b"):
        layer.build(name, data.draw(matrices((r, n_in), held)), data.draw(matrices((n_out, r), held)))
    pairs = [exact(*layer.factors(name)) for name in ("default", "b")]
    before = state(model)
    made = refusal(
        lambda: model.add_weighted_adapter(
            ["default", "b"], weights, "c", kind, svd_rank=2 * r if kind == "svd" else None
        )
    )
    scales = [Long(x) for x in weights]
    largest, u = top(held) / 16, unit(held)
    if isinstance(made, ValueError):
        assert state(model) == before and list(model.peft_config) == ["default", "b"]
        inner = [np.abs(f).max() * abs(x) for x, (A, B) in zip(scales, pairs, strict=True) for f in (A, B)]
        sums = sum(abs(x) * (np.abs(B).sum() * np.abs(A).sum()) for x, (A, B) in zip(scales, pairs, strict=True))
        ends = max(abs(x) for x in scales)
        assert max(*inner, sums if kind == "svd" else 0, ends, *(np.abs(f).sum() for p in pairs for f in p)) > largest
        return made
    A, B = layer.factors("c")
    assert finite(A, B) and A.dtype == held
    A, B = exact(A, B)
    if kind == "linear":
        roots = [math.copysign(math.sqrt(abs(float(x))), x) for x in scales]
        sum_A = sum(Long(x) * p[0] for x, p in zip(roots, pairs, strict=True))
        sum_B = sum(Long(abs(x)) * p[1] for x, p in zip(roots, pairs, strict=True))
        size_A, size_B = (sum(abs(Long(x)) * np.abs(p[i]) for x, p in zip(roots, pairs, strict=True)) for i in (0, 1))
        reach = max(np.abs(f).max() for p in pairs for f in p) + 1
        assert (np.abs(A - sum_A) <= 4 * u * size_A + 4 * eta(held) * reach).all()
        assert (np.abs(B - sum_B) <= 4 * u * size_B + 4 * eta(held) * reach).all()
        return None
    want = sum(x * q @ p for x, (p, q) in zip(scales, pairs, strict=True))
    parts = sum(abs(x) * norm(q) * norm(p) for x, (p, q) in zip(scales, pairs, strict=True))
    reach = max(np.abs(f).max() * max(1, abs(x)) for x, p in zip(scales, pairs, strict=True) for f in p) + 1
    lost = 64 * eta(held) * reach  # w s A underflows, and is multiplied by B
    if kind == "cat":
        assert (np.abs(B @ A - want) <= 4 * u * parts + lost).all()
    else:  # QR is backward stable by columns of the whole [B_1 B_2] and [w_1 s_1 A_1; ...], not of each part
        stacked = norm(np.hstack([q for _, q in pairs])) * norm(
            np.vstack([x * p for x, (p, _) in zip(scales, pairs, strict=True)])
        )
        assert (np.abs(B @ A - want) <= SVD * u * stacked + lost).all()
    return None


def test_a_combination_keeps_the_precision_of_its_parents() -> None:
    """U9: one adapter with weight 1 is the same update, also where the base alone is of half precision."""
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        model = adapted(nn.Linear(6, 5, dtype=dtype), torch.randn(2, 6) * 1e6, torch.randn(5, 2), 1.0)
        for kind in ("cat", "linear"):
            model.add_weighted_adapter(["default"], [1.0], kind, kind)
            for one, other in zip(*(model.lora_layers()["0"].factors(name) for name in ("default", kind)), strict=True):
                assert bits(one) == bits(other)
        held = adapted(nn.Linear(6, 5, dtype=dtype), torch.randn(2, 6), torch.randn(5, 2), 1.0, autocast=False)
        layer, w = held.lora_layers()["0"], 0.7
        layer.build("default", *(f.detach().to(dtype) for f in layer.factors("default")))
        held.add_weighted_adapter(["default"], [w], "cat", "cat")
        (A, B), (a, b) = (exact(*layer.factors(name)) for name in ("cat", "default"))
        # A is rounded to float32 when it is multiplied, and when it is kept
        assert (np.abs(B @ A - w * b @ a) <= 2 * unit(torch.float32) * w * np.abs(b) @ np.abs(a)).all()


@given(layers())
@counted
def test_a_saved_adapter_comes_back_to_the_bit(tmp_path_factory: Any, case: Any) -> Any:
    """Subnormal numbers, signed zeros and all; NaN and infinity are written with a warning and not read."""
    make, W, A, B, _ = case
    model = make()
    folder, plain = tmp_path_factory.mktemp("adapter"), nn.Sequential(nn.Linear(W.shape[1], W.shape[0], dtype=W.dtype))
    config, layer = model.peft_config["default"], model.lora_layers()["0"]
    config.r, layer.initial_scaling["default"] = A.shape[0], config.lora_alpha / A.shape[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    before = state(plain)
    again = refusal(lambda: PeftModel.from_pretrained(plain, folder, autocast_adapter_dtype=A.dtype != W.dtype))
    if not finite(A, B):
        assert isinstance(again, ValueError) and state(plain) == before
        assert any("holds NaN or infinite numbers" in str(w.message) for w in said)
        return again
    assert not said
    found = again.lora_layers()["0"].factors("default")
    for one, other in zip(found, (A, B), strict=True):
        assert other.dtype == one.dtype or A.dtype != W.dtype or W.dtype == wide(W.dtype)
        assert bits(one) == bits(other)
    return None


# -- quantisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4, 8])
@given(starts())
@counted
def test_a_quantised_number_is_the_nearest_of_the_codebook(k: int, case: Any) -> Any:
    """L2: |W~ - W| <= (distance to the nearest) + rounding, in every dtype; the largest of a block exactly."""
    weight, W, _, _ = case
    made = refusal(lambda: quantization.quantize(weight, k))
    if not finite(W):
        assert isinstance(made, ValueError)
        return made
    back = quantization.dequantize(made)
    assert type(back) is type(weight) and back.dtype == weight.dtype
    w, got, codes = exact(W).ravel(), exact(back).ravel(), quantization.codebook(k).astype(Long)
    scale = np.abs(w).max()  # less than a block
    assert len(w) < quantization.BLOCK and (exact(made.scales) == scale).all()
    nearest = np.abs(w[:, None] - scale * codes).min(1)
    u, tiny = unit(wide(W.dtype)), eta(W.dtype)
    assert (np.abs(got - w) <= nearest + 4 * u * scale + unit(W.dtype) * np.abs(got) + tiny).all()
    at = np.abs(w).argmax()
    assert got[at] == w[at] or (k == 2 and scale == 0)
    if isinstance(weight, np.ndarray):
        same = quantization.quantize(W, k)
        assert (same.codes.numpy() == made.codes).all() and bits(quantization.dequantize(same)) == back.tobytes()
    return None


# -- scaling, spectra, data -------------------------------------------------------------------------


@given(
    st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**1023), 2**1023),
    st.integers(1, 2**52),
    st.booleans(),
)
@counted
def test_a_scaling_is_the_quotient_rounded(alpha: float, r: int, rslora: bool) -> None:
    """S1: alpha / r, or alpha / sqrt(r), within 2^-50 of its size, and within 2^-1073 below the normal numbers."""
    s = scaling(r, alpha, rslora)
    assert math.isfinite(s)
    square = Fraction(s) ** 2 * r if rslora else (Fraction(s) * r) ** 2
    want = Fraction(alpha) ** 2
    if abs(s) > 2.0**-1021:
        assert abs(square - want) <= want * Fraction(1, 2**49)
    else:
        assert abs(Fraction(s) - Fraction(alpha) / (Fraction(math.sqrt(r)) if rslora else r)) <= Fraction(1, 2**1073)


@given(dtypes, st.floats(0.0, exclude_min=True, allow_infinity=False), st.floats(allow_nan=True), st.booleans())
@counted
def test_a_scaling_that_the_dtype_cannot_hold_is_refused(
    dtype: torch.dtype, alpha: float, factor: float, divide: bool
) -> Any:
    net = nn.Sequential(nn.Linear(3, 2, dtype=dtype))
    before = state(net)
    model = refusal(lambda: get_peft_model(net, LoraConfig(r=1, lora_alpha=alpha, target_modules=["0"])))
    if isinstance(model, ValueError):
        assert alpha > top(wide(dtype)) / 2 and state(net) == before
        return model
    layer = model.lora_layers()["0"]
    x = torch.ones(1, 3, dtype=dtype)
    assert bits(model(x)) == bits(net[0].base_layer(x))  # B is zero, however large s is
    change = layer.unscale_layer if divide else layer.scale_layer
    said = refusal(lambda: change(factor))
    want = alpha / factor if divide and factor else alpha * factor
    if isinstance(said, ValueError):
        assert layer.scaling == {"default": alpha}
        assert not abs(want) <= top(wide(dtype)) / 2 or (divide and factor == 0)
        return said
    assert layer.scaling["default"] == want and bits(model(x)) == bits(net[0].base_layer(x))
    assert isinstance(refusal(lambda: layer.set_scale("default", math.inf)), ValueError)
    return None


@given(st.data())
@counted
def test_a_spectrum_is_right_or_refused(tmp_path_factory: Any, data: Any) -> Any:
    """`lora-ref inspect` of any folder that can be read: finite numbers within rounding, and a bar."""
    dtype, (n_out, n_in), r = data.draw(dtypes), data.draw(shapes), 2
    A, B = data.draw(matrices((r, n_in), dtype)), data.draw(matrices((n_out, r), dtype))
    alpha, s = r * data.draw(scalings), 0.0
    folder = tmp_path_factory.mktemp("adapter")
    net = nn.Sequential(nn.Linear(n_in, n_out, bias=False, dtype=dtype))
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]), autocast_adapter_dtype=False)
    model.lora_layers()["0"].build("default", A, B)
    model.peft_config["default"].lora_alpha = alpha
    s = model.lora_layers()["0"].initial_scaling["default"] = alpha / r
    model.save_pretrained(folder)
    a, b = exact(A, B)
    made = refusal(lambda: read_contents(folder))
    size = norm(b) * norm(a) * max(1, s)
    if isinstance(made, ValueError):
        assert size > top(torch.float64) / 64
        return made
    (update,) = made.modules
    values = np.array(update.singular_values)
    assert np.isfinite(values).all() and math.isfinite(update.frobenius_norm)
    want = Long(s) * decomposed(b @ a)[1] if (b @ a).any() else np.zeros(len(values), Long)
    short = min(len(values), len(want))
    allowed = SVD * unit(torch.float64) * norm(b) * norm(a) * s + 64 * eta(torch.float64) * (1 + s)
    assert np.abs(values[:short] - want[:short]).max(initial=0) <= allowed
    assert abs(update.frobenius_norm - norm(want)) <= 2 * r * allowed
    assert len(bar(update.singular_values)) == len(values)
    assert (singular_values(exact(A).astype(float), exact(B).astype(float), s) >= 0).all()
    return None


@pytest.mark.parametrize("wide_data", [False, True])
@given(st.data())
@counted
def test_components_of_any_data_are_orthonormal_or_refused(wide_data: bool, data: Any) -> Any:
    """E3: sigma within sqrt(in) 2^-25 of the largest, for float64 squares are kept; NaN and overflow are refused."""
    dtype, n_in = data.draw(dtypes), 300 if wide_data else data.draw(st.integers(1, 6))
    batches = [data.draw(matrices((m, n_in), dtype, spoilt=True)) for m in ((320, 5) if wide_data else (7, 2))]
    if data.draw(st.booleans()) and dtype != torch.bfloat16:
        batches = [batch.numpy() for batch in batches]
    n = min(n_in, 4)

    def run() -> pca.Components:
        return pca.components(functools.reduce(pca.update, batches, None), n)

    made = refusal(run)
    X = np.vstack([exact(batch) for batch in batches])
    if isinstance(made, ValueError):
        assert not np.isfinite(X).all() or np.abs(X).max() ** 2 * X.size > top(torch.float64) / 64
        return made
    assert np.isfinite(X).all() and finite(*made)
    V, sigma, ratios = exact(*made)
    # QR and a symmetric eigenproblem, both of n columns of n_in numbers
    assert np.abs(V @ V.T - np.eye(n)).max() <= 2 * 8 * n_in * n * unit(torch.float64)
    assert (sigma >= 0).all() and (ratios >= 0).all()
    # n eigenvalues, each off by c n_in^2 roundings of the largest
    most = 1 + 8 * n * n_in**2 * unit(torch.float64)
    assert ratios.sum() <= most or sigma[0] < 2.0**-500  # squares with few digits
    S = decomposed(X - X.mean(0))[1][:n]
    lost = Long(2) ** -530 * n_in  # a square that underflows
    cancelled = 8 * unit(torch.float64) * np.abs(X).max() * len(X)  # the mean, rounded, is subtracted
    # squares are summed, and a root of what is lost is left: 8 roundings for each of n_in, as above
    assert np.abs(sigma - S).max() <= (n_in * 8 * unit(torch.float64)) ** 0.5 * S[0] + lost + cancelled
    return None


# -- single cases -----------------------------------------------------------------------------------


def test_the_factors_of_a_small_weight_at_a_large_scaling_do_not_vanish() -> None:
    """sqrt(S / s) is a number where S / s is none."""
    W = torch.tensor([[0.0], [-8e-278]], dtype=torch.float64)
    for made in (inits.find("pissa", "linear")(W, 1, 2.0**500), inits.find("pissa", "linear")(W.numpy(), 1, 2.0**500)):
        # a decomposition of 2 by 1 numbers, two roots, two quotients, two products
        close(2.0**500 * made.A[0, 0] * made.B[1, 0], -8e-278, terms=8 * 2 + 6, size=8e-278)
        close(made.residual[1, 0], 0.0, terms=8 * 2 + 6, size=8e-278)


def test_loftq_and_lora_ga_do_not_lose_a_small_weight_at_a_large_scaling_either() -> None:
    W, s = 1e-277 * torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 2.0**500
    A, B, Q = inits.find("loftq", "linear", bits=2)(W, 2, s)[:3]
    assert norm(exact(W - Q) - s * exact(B) @ exact(A)) < 0.8 * norm(exact(W - Q))
    A, B = lora_ga.lora_ga(W, 2, s, gradient=torch.eye(6, 5), scale="weight_svd")[:2]
    assert A.any() and B.any()


def test_a_start_that_the_dtype_cannot_hold_is_refused() -> None:
    """The factors, what is left of the weight, and principal components divided by a tiny root."""
    W, G = torch.ones(6, 5, dtype=torch.float16), torch.eye(6, 5)
    with pytest.raises(ValueError, match="not finite in float16"):
        lora_ga.lora_ga(W, 2, 2.0**17, gradient=G, scale="unit")
    with pytest.raises(ValueError, match="not finite in float16"):
        lora_ga.lora_ga(W, 2, 2.0**-17, gradient=G, scale="gd_scale")
    found = pca.components(pca.update(None, 1e-12 * torch.randn(9, 5)), 2)
    with pytest.raises(ValueError, match="not finite in float16"):
        eva.eva(W, 2, 1.0, components=found, whiten=True)


def test_a_bar_of_large_numbers() -> None:
    assert bar([1.7e308, 8e307]) == bar([1.7, 0.8])


def test_a_covariance_has_no_negative_variance() -> None:
    with pytest.raises(ValueError, match="has a negative variance"):
        corda.damp(np.diag([-5.0, 1.0]))


def test_a_start_whose_product_overflows_is_refused() -> None:
    """s (B A) would be infinite although s, A and B are not, nor the residual: B (s A) is not."""
    net = nn.Sequential(nn.Linear(1, 2, bias=False, dtype=torch.float64))
    net[0].weight.data = torch.tensor([[1.0], [1e20]], dtype=torch.float64)
    before = state(net)
    with pytest.raises(ValueError, match=r"^0: B @ A is not finite at the start: with a scaling of 4\.94066e-324"):
        get_peft_model(net, LoraConfig(r=1, lora_alpha=5e-324, target_modules=["0"], init_lora_weights="pissa"))
    assert state(net) == before


def test_subnormal_factors_have_all_the_singular_values_that_they_have() -> None:
    """QR of numbers with one digit has none; multiplied by a power of two they have all."""
    A = np.array([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]])
    want = np.linalg.svd(A, compute_uv=False)
    for tiny, huge in ((2.0**-1074, 2.0**1000), (2.0**1000, 2.0**-1074)):
        got = singular_values(tiny * A, huge * np.eye(4, 2), 2.0**74)
        close(got, want, terms=8 * (2 * 3 + 4 * 2 + 2 * 2), size=want[0])  # QR of both and SVD of what is between


def test_components_of_data_whose_squares_are_subnormal_are_orthonormal() -> None:
    X = np.random.default_rng(0).standard_normal((320, 300)) * 1e-162
    for data in (X, torch.from_numpy(X)):
        V = exact(pca.components(pca.update(None, data), 4).vectors)
        close(V @ V.T, np.eye(4), terms=8 * 300 * 4, size=1.0, dtype="float64")


def test_components_of_data_whose_squares_overflow_are_refused() -> None:
    for shape in ((3, 5), (5, 3)):
        X = np.random.default_rng(0).standard_normal(shape) * 1e160
        for data in (X, torch.from_numpy(X)):
            with pytest.raises(ValueError, match="so large that their squares leave float64"):
                pca.components(pca.update(None, data), 2)


def test_a_damping_is_found_for_a_covariance_of_any_size() -> None:
    for size in (1e-300, 1e-160, 1.0, 1e160, 1e300):
        # the mean of two, its product with 0.01, the sum; the two with `size`, and the quotient
        close(corda.damp(np.diag([1.0, 3.0]) * size) / size, np.diag([1.02, 3.02]), terms=7, size=3.02)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_saved_adapter_that_is_not_finite_cannot_be_read(value: float, tmp_path: Path) -> None:
    A = torch.zeros(1, 3)
    A[0, 1] = value
    with pytest.warns(UserWarning, match="holds NaN or infinite numbers"):
        adapted(nn.Linear(3, 2), A, torch.zeros(2, 1), 1.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lora_A\.weight: holds NaN or infinite numbers"):
        read_contents(tmp_path)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_corda_takes_out_the_same_part_of_a_weight_of_any_size(size: float) -> None:
    """Norms of U^T W C in float32: their squares leave it from 1e-20 and 1e20 on."""
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(W.double()).tolist()
    want = corda.output_directions(W, torch.eye(5), 2)[1]
    roundings = 8 * 6 * 5 + 4  # of the decomposition, and of W and C times their sizes
    for of_W, of_C in ((size, 1.0), (1.0, size), (size, 1 / size)):
        S = corda.output_directions(W * of_W, torch.eye(5) * of_C, 2)[1]
        found = (exact(S) / Long(of_W) / Long(of_C)).astype(float)
        close(found, want, roundings, size=values[0], dtype=torch.float32)
    made, want = (corda.corda(x, 2, covariance=torch.eye(5)) for x in (W * size, W))
    turned = values[0] / (values[1] - values[2])  # a rounding of W turns its leading directions by 1 / gap
    found, wanted = (exact(x.B @ x.A).astype(float) for x in (made, want))
    close(found / size, wanted, terms=roundings * (1 + 2 * turned), size=values[0], dtype=torch.float32)


@pytest.mark.parametrize("method", ["mica", "pissa", "olora", "orthogonal"])
def test_numpys_float16_is_decomposed_in_float32(method: str) -> None:
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).half()
    A, B = inits.find(method, "linear")(W.numpy(), 2, 1.0)[:2]
    if method != "orthogonal":
        want = exact(*inits.find(method, "linear")(W, 2, 1.0)[:2])
        assert A.dtype == B.dtype == np.float16
        # float32's roundings count for less than one of float16, which each factor has
        for got, wanted in zip((A, B), want, strict=True):
            close(got, wanted.astype(float), terms=2, size=np.abs(wanted).astype(float).max(), dtype="float16")


# -- the record -------------------------------------------------------------------------------------


class Failures:
    """A plugin for pytest: how many tests of each property failed."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.found[report.nodeid.partition("::")[2].partition("[")[0]] += 1


def test_the_record_is_of_these_properties_and_has_no_failure() -> None:
    record = json.loads((HERE / "numbers.json").read_text(encoding="utf-8"))
    named = {name.removeprefix("test_") for name, test in globals().items() if hasattr(test, "is_counted")}
    assert record["profile"] == "deep" and record["properties"].keys() == named
    assert all(made["tried"] >= 1000 and not made["found"] for made in record["properties"].values())


def main() -> int:
    failures = Failures()
    line = [__file__, "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-k", "not the_record"]
    code = pytest.main(line, plugins=[failures])
    tried = sys.modules["test_numbers"].TRIED
    made = {
        name.removeprefix("test_"): {"tried": n["tried"], "refused": n["refused"], "found": failures.found[name]}
        for name, n in sorted(tried.items())
    }
    profile = os.environ.get("HYPOTHESIS_PROFILE", "default")
    record = {"profile": profile, "torch": torch.__version__, "properties": made}
    (HERE / "numbers.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
