"""NormalFloat quantisation: the published table, and the nearest code exactly, against exact arithmetic."""

import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from lora_ref.numerics.quantization import AT_ONCE, CELLS, Quantized, codebook, dequantize, quantize
from spec_tests.rounding import unit

BITS = (2, 4, 8)
NUMPY = (np.float64, np.float32, np.float16)
TORCH = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# QLoRA, arXiv 2305.14314, appendix E
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]

bits_ = st.sampled_from(BITS)
seeds = st.integers(0, 2**32 - 1)


def middles(bits: int) -> np.ndarray:
    """Exact in float64, because the codebook's numbers are float32 numbers."""
    c = codebook(bits)
    return (c[1:] + c[:-1]) / 2


def nearest(x: float, bits: int) -> int:
    """argmin |x - c_j| in exact arithmetic, the first of two equal ones."""
    table = [Fraction(c) for c in codebook(bits)]
    return min(range(len(table)), key=lambda j: abs(Fraction(float(x)) - table[j]))


def computed_in(dtype: type) -> type:
    return np.float64 if dtype == np.float64 else np.float32


@st.composite
def weights(draw: st.DrawFn, dtype: type, bits: int) -> np.ndarray:
    """Blocks full of trouble: middles of codes and their neighbours, the cells' edges, zeros, subnormals."""
    c, m = codebook(bits).astype(dtype), middles(bits).astype(dtype)
    edges = (np.arange(CELLS + 1) * (2 / CELLS) - 1).astype(dtype)
    awkward = np.concatenate([c, m, np.nextafter(m, dtype(-2)), np.nextafter(m, dtype(2)), edges])
    x = st.sampled_from(awkward.tolist()) | st.floats(-1, 1, width=8 * np.dtype(dtype).itemsize)
    sizes = st.integers(1, 3) | st.sampled_from([63, 64, 65, 100, 128])
    values = draw(st.lists(x, min_size=(n := draw(sizes)), max_size=n))
    lowest = {np.float64: -1074, np.float32: -149, np.float16: -24}[dtype]
    exponents = st.sampled_from([0, 1, -3, lowest, lowest + 1, lowest + 5]) | st.integers(lowest, 14)
    scales = [draw(exponents) for _ in range(0, n, 64)]
    w = np.array(values, dtype)
    for k, e in enumerate(scales):
        w[64 * k] = draw(st.sampled_from([1, -1, w[64 * k]]))  # mostly scale 2^e, so that w / scale is x
        w[64 * k : 64 * k + 64] = np.ldexp(w[64 * k : 64 * k + 64].astype(np.float64), e).astype(dtype)
    return w * draw(st.sampled_from([1, 1, 1, 0])) if draw(st.booleans()) else w


def by_definition(w: np.ndarray, bits: int) -> tuple[list[int], list[float]]:
    codes, scales = [], []
    for start in range(0, w.size, 64):
        block = w.reshape(-1)[start : start + 64]
        scales.append(float(max(abs(block))))
        wide = computed_in(w.dtype.type)
        codes += [nearest(wide(x) / wide(scales[-1] or 1), bits) for x in block]
    return codes, scales


# -- the codebook ------------------------------------------------------------------------------


def test_the_codebook_of_four_bits_is_the_published_table_to_the_last_bit():
    assert codebook(4).tolist() == NF4


def test_the_codebook_of_two_bits_is_that_of_loftq():
    assert codebook(2).round(7).tolist() == [-1, 0, 0.3379152, 1]


@pytest.mark.parametrize("bits", BITS)
def test_the_codebook_holds_quantiles_of_the_normal_distribution(bits):
    c, n = codebook(bits), 2**bits
    upper = norm.ppf(np.linspace(0.9677083, 0.5, n // 2 + 1)[:-1])
    lower = -norm.ppf(np.linspace(0.9677083, 0.5, n // 2)[:-1])
    want = np.sort(np.concatenate([upper, [0], lower])) / upper[0]
    # probabilities below 1 off by three roundings to float32, through ppf's slope, in numerator and denominator
    slope = 1 / norm.pdf(upper[0])
    assert abs(c - want).max() <= 2 * 3 * 2.0**-24 * slope / upper[0] + 2 * 2.0**-24
    assert (np.diff(c) > 0).all()
    assert ((c < 0).sum(), (c == 0).sum(), (c > 0).sum()) == (n // 2 - 1, 1, n // 2)
    assert c.dtype == np.float64
    assert (c == c.astype(np.float32)).all()
    assert np.diff(middles(bits)).min() > 1.5 * 2 / CELLS  # what the lookup table stands on


# -- the nearest code --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMPY)
@given(data=st.data(), bits=bits_)
def test_the_code_is_the_nearest_exactly_and_the_lower_of_two(dtype, data, bits):
    w = data.draw(weights(dtype, bits))
    q = quantize(w, bits)
    codes, scales = by_definition(w, bits)
    assert q.codes.reshape(-1)[: w.size].tolist() == codes
    assert q.scales.reshape(-1).tolist() == scales
    assert q.codes.shape == (len(scales), 64)
    assert q[2:] == (w.shape, bits)
    t = quantize(torch.from_numpy(w), bits)
    assert np.array_equal(t.codes.numpy(), q.codes)
    assert np.array_equal(t.scales.numpy(), q.scales)
    assert (q.codes.dtype, t.codes.dtype) == (np.uint8, torch.uint8)
    assert (q.scales.dtype, t.scales.dtype) == (dtype, torch.from_numpy(w).dtype)
    assert np.array_equal(dequantize(t).numpy(), dequantize(q))


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_has_the_codes_of_the_same_numbers_in_float32(bits):
    w = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, single = quantize(w, bits), quantize(w.float(), bits)
    assert torch.equal(half.codes, single.codes)
    assert half.scales.dtype is torch.bfloat16
    assert torch.equal(half.scales.float(), single.scales)
    assert torch.equal(dequantize(half), dequantize(single).bfloat16())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("bits", BITS)
def test_every_middle_and_every_edge_of_a_cell_is_on_the_right_side(bits, dtype):
    points = np.concatenate([np.arange(CELLS + 1) * (2 / CELLS) - 1, middles(bits), codebook(bits)]).astype(dtype)
    near = [points]
    for end in (-2, 2):
        x = points
        for _ in range(3):
            near.append(x := np.nextafter(x, dtype(end)))
    x = np.concatenate(near).clip(-1, 1)
    x = np.concatenate([x, np.zeros(-x.size % 63, dtype)]).reshape(-1, 63)
    w = np.concatenate([np.ones((len(x), 1), dtype), x], axis=1)  # every block's scale is 1
    want = (w.reshape(-1, 1) > middles(bits)).sum(1)  # as many middles as it has passed
    assert np.array_equal(quantize(w, bits).codes.reshape(-1), want)


@pytest.mark.parametrize("bits", BITS)
def test_a_table_of_all_distances_gives_the_same_codes(bits):
    """The quantiser as it is written down: a distance for every weight and every number of the codebook."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    blocks = w.reshape(-1, 64)
    x = (blocks / blocks.abs().amax(1, keepdim=True)).double()
    distances = (x[..., None] - torch.from_numpy(codebook(bits))).abs()
    assert torch.equal(quantize(w, bits).codes.long(), distances.argmin(-1))


@pytest.mark.parametrize("n_blocks", [AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 3])
def test_a_large_weight_is_its_blocks_one_after_another(n_blocks):
    w = torch.randn(n_blocks, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize(w, 8)
    for rows in (slice(0, 5), slice(AT_ONCE - 3, AT_ONCE + 1), slice(n_blocks - 2, n_blocks)):
        some = quantize(w[rows], 8)
        assert torch.equal(whole.codes[rows], some.codes)
        assert torch.equal(whole.scales[rows], some.scales)
        assert torch.equal(dequantize(whole)[rows], dequantize(some))


def test_no_array_of_the_weights_size_is_made_on_the_way():
    w = np.ones((2048, 4096))
    tracemalloc.start()
    quantized = quantize(w, 8)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= 0.6 * w.nbytes  # the codes, at most twice, and a sixteenth or two of the weight for a few steps
    assert quantized.codes.nbytes == w.size


# -- laws --------------------------------------------------------------------------------------


def random_weight(seed: int, dtype: torch.dtype, n_out: int, n_in: int) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 40))


@pytest.mark.parametrize("dtype", TORCH)
@given(seed=seeds, shape=shapes, bits=bits_)
def test_the_error_is_at_most_half_the_widest_gap(dtype, seed, shape, bits):
    w = random_weight(seed, dtype, *shape)
    q = quantize(w, bits)
    back = dequantize(q)
    assert (back.shape, back.dtype) == (w.shape, w.dtype)
    scale = q.scales.double().expand(-1, 64).reshape(-1)[: w.numel()].reshape(w.shape)
    half_gap = np.diff(codebook(bits)).max() / 2
    # w / scale, scale * c and the storing of that are rounded; below 2^-14 a float16 has its spacing still
    bound = scale * (half_gap + 3 * unit(dtype)) + 2.0**-25 * (dtype is torch.float16)
    assert ((back.double() - w.double()).abs() <= bound).all()
    largest = w.double().abs() == scale
    assert torch.equal(back[largest], w[largest])


@pytest.mark.parametrize("dtype", TORCH)
@given(seed=seeds, shape=shapes, bits=bits_)
def test_quantising_what_is_quantised_changes_nothing(dtype, seed, shape, bits):
    first = quantize(random_weight(seed, dtype, *shape) + 0.5, bits)  # + 0.5: no block is so small as to underflow
    again = quantize(dequantize(first), bits)
    assert torch.equal(again.codes, first.codes)
    assert torch.equal(again.scales, first.scales)
    assert torch.equal(dequantize(again), dequantize(first))


@given(seeds, shapes, bits_, st.integers(-200, 200))
def test_a_power_of_two_moves_the_scales_only(seed, shape, bits, e):
    w = random_weight(seed, torch.float64, *shape).numpy()
    one, other = quantize(w, bits), quantize(w * 2.0**e, bits)
    assert np.array_equal(one.codes, other.codes)
    assert np.array_equal(one.scales * 2.0**e, other.scales)


@given(seeds, shapes, bits_)
def test_blocks_run_along_the_rows_of_the_logical_weight_however_it_is_stored(seed, shape, bits):
    w = random_weight(seed, torch.float32, *shape)
    want = quantize(w, bits)
    transposed, strided = w.T.contiguous().T, w.repeat_interleave(2, dim=1)[:, ::2]
    for stored in (transposed, strided, w.clone().requires_grad_()):
        made = quantize(stored, bits)
        assert torch.equal(made.codes, want.codes) and torch.equal(made.scales, want.scales)
        assert torch.equal(dequantize(made), dequantize(want))
    for stored in (transposed.numpy(), strided.numpy(), np.asfortranarray(w.numpy())):
        assert np.array_equal(quantize(stored, bits).codes, want.codes.numpy())


@given(seeds, st.integers(1, 200), bits_)
def test_filling_up_the_last_block_changes_nothing_in_it(seed, n, bits):
    w = random_weight(seed, torch.float64, 1, n).numpy()
    filled = np.concatenate([w, np.zeros((1, -n % 64))], axis=1)
    assert np.array_equal(quantize(w, bits).codes, quantize(filled, bits).codes)
    assert np.array_equal(dequantize(quantize(w, bits)), dequantize(quantize(filled, bits))[:, :n])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("bits", BITS)
def test_a_block_of_zeros_stays_one(bits, dtype):
    w = torch.zeros(3, 64, dtype=dtype)
    w[1] = torch.linspace(-1, 1, 64)
    q = quantize(w, bits)
    assert q.scales.reshape(-1).tolist() == [0, 1, 0]
    assert not dequantize(q)[[0, 2]].any()
    assert dequantize(q)[1].any()


def test_by_hand():
    q = quantize(np.array([[0.5, -2.0], [2.0, 0.3]]), 2)  # / 2: 0.25, -1, 1, 0.15; middles -0.5, 0.169, 0.669
    assert q.codes[0, :5].tolist() == [2, 0, 3, 1, 1]
    assert q.scales.tolist() == [[2.0]]
    assert dequantize(q).tolist() == [[2 * codebook(2)[2], -2.0], [2.0, 0.0]]


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -4])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="must be 2, 4 or 8"):
        quantize(np.ones((2, 2)), bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", TORCH)
def test_what_is_not_finite_is_refused(dtype, bad):
    w = torch.ones(2, 100, dtype=dtype)
    w[1, 99] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(w, 4)
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(w.double().numpy(), 4)


def test_the_dtype_and_the_shape_come_back_from_the_parts():
    q = quantize(torch.ones(2, 3, dtype=torch.bfloat16), 4)
    back = dequantize(Quantized(q.codes, q.scales.float(), q.shape, q.bits))
    assert (back.shape, back.dtype) == ((2, 3), torch.float32)
