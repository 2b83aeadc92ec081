"""Hard quantizers and metrics, on ordinary and on adversarial tensors."""

import math

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quantize
from quantize.quantizers import ExponentialBinary, StochasticBinary

finite = st.floats(-(2.0**100), 2.0**100, width=32)
tensors = st.lists(st.one_of(finite, st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.5])), min_size=1, max_size=20)


@given(tensors)
def test_binarize_is_the_sign_with_ties_up(values):
    w = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(quantize.binarize(w), torch.tensor(plain.binarize(w.numpy()), dtype=torch.float32))


@given(tensors)
def test_ternarize_is_its_rule(values):
    w = torch.tensor(values, dtype=torch.float64)
    np.testing.assert_allclose(quantize.ternarize(w).numpy(), plain.ternarize(w.numpy()), rtol=1e-13)


@given(tensors)
def test_ternarize_in_float32_is_the_rule_to_rounding(values):
    w = torch.tensor(values, dtype=torch.float32)
    exact = w.double()
    delta = 0.7 * exact.abs().mean()
    if ((exact.abs() - delta).abs() <= 1e-6 * delta).any():
        return  # an entry so near to the threshold that its side depends on rounding
    np.testing.assert_allclose(quantize.ternarize(w).numpy(), plain.ternarize(w.numpy()), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", [quantize.binarize, quantize.ternarize])
@pytest.mark.parametrize(
    "values",
    [[0.0], [-0.0, 0.0], [1.0, -1.0, 1.0], [0.25], [-3.0], [1e-7, -1e-7, 0.0], [6e4, -6e4, 1.0], [0.5] * 7 + [0.0] * 3],
)
def test_no_nan_and_few_levels(quantizer, values, dtype):
    w = torch.tensor(values, dtype=dtype)
    q = quantizer(w)
    assert q.dtype == dtype
    assert q.shape == w.shape
    assert q.isfinite().all()
    assert len(q.unique()) <= (2 if quantizer is quantize.binarize else 3)


def test_binarize_leaves_no_zero():
    assert quantize.binarize(torch.tensor([0.0, -0.0])).tolist() == [1.0, 1.0]


def test_ternary_of_zeros_is_zero():
    assert torch.equal(quantize.ternarize(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_ternary_threshold_belongs_to_the_level():
    w = torch.tensor([0.7] * 5 + [1.3] * 5, dtype=torch.float64)  # 0.7 * mean = 0.7 * 1.0: an exact tie
    assert w.mean() == 1.0
    assert torch.equal(quantize.ternarize(w), torch.full((10,), 1.0, dtype=torch.float64))


def test_ternary_levels_differ_between_the_sides():
    q = quantize.ternarize(torch.tensor([1.0, 0.8, -0.5, -0.6, 0.1, -0.1], dtype=torch.float64))
    assert q.tolist() == pytest.approx([0.9, 0.9, -0.55, -0.55, 0.0, 0.0])


def test_ternary_of_one_side_only():
    assert quantize.ternarize(torch.tensor([2.0, 4.0, 0.0])).tolist() == [3.0, 3.0, 0.0]
    assert quantize.ternarize(torch.tensor([-2.0, -4.0, 0.0])).tolist() == [-3.0, -3.0, 0.0]


def test_ternary_of_the_largest_and_the_smallest_numbers():
    huge = torch.finfo(torch.float32).max
    assert quantize.ternarize(torch.tensor([huge, huge, -huge, 0.0])).tolist() == [huge, huge, -huge, 0.0]
    tiny = math.ldexp(1.0, -149)
    assert quantize.ternarize(torch.tensor([tiny, 0.0, 0.0, -tiny])).tolist() == [tiny, 0.0, 0.0, -tiny]


def test_metrics_are_their_definitions():
    w = torch.tensor([0.5, -1.5, 0.0, 1.0], dtype=torch.float64)
    q = quantize.binarize(w)
    assert quantize.binary_level(w).item() == pytest.approx((0.5 + 0.5 + 1.0 + 0.0) / 4)
    assert quantize.quantization_error(w, q).item() == pytest.approx(np.linalg.norm(w - q) / np.linalg.norm(w))
    assert quantize.quantization_error(torch.zeros(3), torch.ones(3)).item() == 0.0
    assert quantize.sign_change(w, torch.tensor([-1.0, -1.0, -1.0, 1.0])).item() == pytest.approx(0.5)
    assert quantize.sign_change(w, w).item() == 0.0


def test_measure_is_the_metrics_by_name():
    w = {"a": torch.randn(4, 4), "b": torch.randn(7)}
    q = {name: quantize.binarize(x) for name, x in w.items()}
    start = {name: -quantize.binarize(x) for name, x in w.items()}
    table = quantize.measure(w, q, start)
    assert list(table) == ["binary", "quant_error", "sign_change"]
    for name in w:
        assert table["binary"][name] == pytest.approx(quantize.binary_level(w[name]).item())
        assert table["quant_error"][name] == pytest.approx(quantize.quantization_error(w[name], q[name]).item())
        assert table["sign_change"][name] == 1.0
    assert quantize.measure({}, {}, {}) == {}


@given(st.integers(0, 2**31 - 1), st.floats(-2, 2), st.floats(-2, 2))
def test_learned_levels_stand_beyond_their_threshold(seed, positive, negative):
    w = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = quantize.learned_ternary(w, positive, negative)
    np.testing.assert_allclose(found.numpy(), plain.learned_ternary(w.numpy(), positive, negative), atol=1e-15)
    assert torch.equal(quantize.learned_ternary(torch.zeros(3), positive, negative), torch.zeros(3))


@pytest.mark.parametrize(("kind", "chance"), [(StochasticBinary, lambda w: min(max((w + 1) / 2, 0), 1)),
                                              (ExponentialBinary, lambda w: np.exp(w) / (np.exp(w) + np.exp(-w)))])  # fmt: skip
@pytest.mark.parametrize("w", [-1.5, -0.4, 0.0, 0.9])
def test_signs_are_drawn_with_their_chance(kind, chance, w):
    drawn = kind()(torch.full((40_000,), w), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) <= {-1.0, 1.0}
    share = (drawn > 0).float().mean().item()
    assert share == pytest.approx(chance(w), abs=0.015)  # six standard deviations of 40,000 draws
    again = kind()(torch.full((40_000,), w), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_what_is_certain_is_drawn_at_the_ends_of_what_is_drawn_from_too(monkeypatch):
    """Clipped weights gather at -1 and +1; zero is among the numbers that are drawn, one is not."""
    w = torch.tensor([-1.0, 1.0])
    for drawn in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, drawn=drawn, **more: torch.full(shape, drawn))
        assert StochasticBinary()(w, torch.Generator()).tolist() == [-1.0, 1.0]
