"""Quantizers of k bits against a look at all codes, in float64, and what must hold for any weights."""

import functools
import itertools

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quantize
from quantize.finished import levels_alone
from quantize.groups import OneTensor
from quantize.multibit import Alternating, GreedyMean, Uniform, UniformWithZero

NAMES = {"greedy_median": 3, "greedy_mean": 3, "alternating": 3, "uniform": 4}  # with the most bits that are compared
seeds = st.integers(0, 2**31 - 1)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("name", NAMES)
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))
def test_all_are_what_a_look_at_all_codes_gives(name, by_row, seed, rows, columns, bits):
    w = normal(seed, rows, columns)
    found = getattr(quantize, name)(w, bits, by_row=by_row)
    reference = getattr(plain, name)
    expected = plain.by_row(reference, w.numpy(), bits) if by_row else reference(w.numpy(), bits)
    if columns * (1 if by_row else rows) >= 2 ** (bits - 1) and not np.allclose(found.numpy(), expected, atol=1e-10):
        # A weight in the middle between two values may go either way where there are so few of them.
        error, other = ((w.numpy() - q) ** 2 for q in (found.numpy(), expected))
        assert name in ("alternating", "uniform")
        assert error.sum() == pytest.approx(other.sum(), rel=1e-6, abs=1e-12)
    elif columns * (1 if by_row else rows) >= 2 ** (bits - 1):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_usual_size(name, bits):
    w = normal(bits, 6, 50)
    for by_row in (False, True):
        reference = functools.partial(getattr(plain, name))
        expected = plain.by_row(reference, w.numpy(), bits) if by_row else reference(w.numpy(), bits)
        found = getattr(quantize, name)(w, bits, by_row=by_row)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
        values = [found] if not by_row else list(found)
        assert all(len(torch.unique(row)) <= 2**bits for row in values)


@given(seeds, st.integers(1, 4), st.integers(1, 40), st.integers(1, 8), st.booleans())
def test_alternating_never_grows_worse(seed, rows, columns, bits, by_row):
    w = normal(seed, rows, columns)
    errors = [(w - quantize.alternating(w, bits, by_row, rounds)).norm().item() for rounds in range(1, 6)]
    assert all(after <= before * (1 + 1e-9) + 1e-12 for before, after in itertools.pairwise(errors))


@given(seeds, st.integers(1, 5), st.integers(1, 20), st.sampled_from(sorted(NAMES)), st.integers(1, 4))
def test_by_row_is_the_rows_one_by_one(seed, rows, columns, name, bits):
    w = normal(seed, rows, columns)
    quantizer = getattr(quantize, name)
    one_by_one = torch.stack([quantizer(row, bits) for row in w])
    torch.testing.assert_close(quantizer(w, bits, by_row=True), one_by_one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        quantizer(w.view(rows, columns, 1), bits, by_row=True).view_as(w), one_by_one, rtol=1e-10, atol=1e-12
    )


ADVERSARIAL = {
    "all equal": torch.full((3, 8), 0.7),
    "all negative and equal": torch.full((3, 8), -0.7),
    "zero": torch.zeros(3, 8),
    "one element": torch.tensor([[0.3]]),
    "nothing": torch.zeros(0, 4),
    "huge": torch.tensor([[1e30, -1e30, 1e29, 0.0]]),
    "tiny": torch.tensor([[1e-38, -1e-38, 1e-40, 0.0]]),
    "two values": torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.5, 0.25, 0.5, 0.25]]),
    "of no dimension": torch.tensor(-0.4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", ADVERSARIAL)
@pytest.mark.parametrize("name", [*quantize.QUANTIZERS])
def test_weights_that_are_hard_to_quantize(name, words, dtype):
    w = ADVERSARIAL[words].to(dtype)
    kind = quantize.QUANTIZERS[name]
    for bits in (1, 2, 3) if kind.takes_bits else (None,):
        for by_row in (False, True) if kind.takes_bits else (False,):
            if bits == 1 and kind is UniformWithZero:
                continue
            quantizer = kind() if bits is None else kind(bits, by_row)
            found = quantizer(w)
            assert found.shape == w.shape
            assert found.dtype == dtype
            assert found.isfinite().all()
            if bits is not None and words == "all equal" and name != "uniform_with_zero":
                torch.testing.assert_close(found, w, rtol=0.01, atol=0)


def test_an_amplitude_that_the_codes_leave_open_is_the_smallest():
    w = torch.full((5,), 0.8, dtype=torch.float64)  # both codes are equal everywhere: only the sum of the amplitudes is told
    fitted = Alternating(2).fit(OneTensor([w]))
    assert [level.item() for level in fitted] == pytest.approx([0.0, 0.8])
    w = torch.tensor([3.0, 1.0, -3.0, 1.0], dtype=torch.float64)
    for rounds in (2, 3, 4):
        np.testing.assert_allclose(quantize.alternating(w, 2, rounds=rounds), w, atol=1e-12)
        np.testing.assert_allclose(quantize.alternating(w, 3, rounds=rounds), w, atol=1e-12)


def test_one_bit_is_the_best_scaled_sign():
    w = normal(0, 100)
    for quantizer in (quantize.alternating, quantize.greedy_mean):
        torch.testing.assert_close(quantizer(w, 1), w.sign() * w.abs().mean())


def test_levels_are_all_values_in_order():
    w = normal(1, 200)
    for quantizer in (GreedyMean(3), Alternating(3), Alternating(3, rounds=1), quantize.QUANTIZERS["uniform"](3)):
        fitted = quantizer.fit(OneTensor([w]))
        levels = [float(level) for level in quantizer.levels(fitted)]
        assert len(levels) == 8
        assert levels == sorted(levels)
        assert {round(x, 9) for x in quantizer(w).tolist()} <= {round(x, 9) for x in levels}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_with_zero_has_one_level_fewer_and_zero(bits):
    w = torch.cat([normal(2, 3000), torch.zeros(1, dtype=torch.float64)])
    values = UniformWithZero(bits)(w).unique()
    assert len(values) <= 2**bits - 1
    assert 0.0 in values.tolist()
    steps = values.diff()
    torch.testing.assert_close(steps, (steps / steps.min()).round() * steps.min(), rtol=1e-9, atol=1e-12)


KINDS = [kind for kind in quantize.QUANTIZERS.values() if kind.takes_bits]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(seeds, st.integers(2, 5), st.integers(20, 90), st.sampled_from([0.0, 1e-3, 1.0, 40.0]))
def test_its_own_weights_are_known_again(kind, by_row, dtype, seed, bits, columns, size):
    """And those of the first row alone, where the second has others."""
    w = kind(bits, by_row)((size * normal(seed, 2, columns)).to(dtype))
    if columns > 2**bits + 1:
        assert levels_alone(w, kind(bits, by_row)).all()
        if by_row:
            w[1] = torch.arange(1, columns + 1)  # more than it gives, and exact in every dtype
            assert levels_alone(w, kind(bits, True)).flatten().tolist() == [True, False]


@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(seeds, st.integers(2, 5), st.integers(40, 90), st.sampled_from([1.0, 40.0]))
def test_they_are_known_again_from_a_file_in_less_precision(kind, by_row, kept, seed, bits, columns, size):
    w = kind(bits, by_row)(size * normal(seed, 2, columns).float())
    for dtype in (torch.float32, torch.float64):
        assert levels_alone(w.to(kept).to(dtype), kind(bits, by_row)).all()


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("kind", [Uniform, UniformWithZero])
def test_no_weights_in_less_precision_are_taken_for_a_grid_of_many_levels(kind, bits):
    w = (normal(0, 32, 288) / 17).bfloat16().float()
    assert not levels_alone(w, kind(bits, True)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_how_many_values_it_has(kind):
    w = normal(0, 5000)
    for bits in (2, 3, 4):
        assert len(kind(bits)(w).unique()) == kind(bits).values


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_values_of_another_quantizer_are_quantized(kind, by_row):
    """Four of the values on either side of zero, as all of these have with 3 bits, but at no equal distances from it."""
    values = torch.tensor([-1.0, -0.7, -0.31, 0.05, 0.2, 0.55]).repeat(3, 20)
    model = torch.nn.Linear(120, 3)
    model.weight.data.copy_(values)
    mode = quantize.mode("prox_alt", kind.name, bits=3, by_row=by_row)
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    expected = kind(3, by_row)(values)
    assert (expected - values).abs().max() > 0.01
    assert torch.allclose(optimizer.quantized()["weight"], expected, atol=1e-6)
    optimizer.freeze()
    assert torch.allclose(model.weight, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [Uniform, UniformWithZero])
def test_an_even_grid_is_made_of_alternating_values(kind):
    """Eight values that are symmetric about zero, but not evenly spaced: what deployment on integers asks of them."""
    w = quantize.alternating(normal(0, 3, 400).float(), 3)
    assert levels_alone(w, Alternating(3))
    assert not levels_alone(w, kind(3))
    assert not levels_alone(w, kind(4))
