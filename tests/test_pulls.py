"""Pulls against a brute-force minimization of their objective, in float64, and against their formulas."""

import numpy as np
import plain
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quantize
from quantize.groups import OneTensor

weights = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12)
strengths = st.one_of(st.just(0.0), st.floats(1e-6, 3))


def minimize(objective, low: float, high: float) -> float:
    """The minimizer over [low, high] by brute force: a grid, refined around its best point until it is fine to 1e-9."""
    while high - low > 1e-9:
        grid = np.linspace(low, high, 401)
        best = int(np.argmin(objective(grid)))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 400)]
    return (low + high) / 2


@given(weights, strengths)
def test_binary_minimizes_its_objective(values, strength):
    w = torch.tensor(values, dtype=torch.float64)
    found = quantize.prox_binary(w, strength)
    for x, v in zip(w.tolist(), found.tolist(), strict=True):

        def objective(u, x=x):
            return 0.5 * (u - x) ** 2 + strength * np.abs(np.abs(u) - 1)

        # The objective has two valleys, of positive and of negative u: the better of their minima.
        best = min((minimize(objective, 0, 4), minimize(objective, -4, 0)), key=objective)
        assert objective(v) <= objective(best) + 1e-12
        if abs(x) > 1e-6:
            assert v == pytest.approx(best, abs=2e-7)


@given(weights, strengths)
def test_ternary_minimizes_its_objective(values, strength):
    w = torch.tensor(values, dtype=torch.float64)
    found = quantize.prox_ternary(w, strength)
    for x, level, v in zip(w.tolist(), plain.ternarize(w.numpy()), found.tolist(), strict=True):

        def objective(u, x=x, level=level):
            return 0.5 * (u - x) ** 2 + 0.5 * strength * (u - level) ** 2

        assert v == pytest.approx(minimize(objective, -4, 4), abs=2e-7)


@given(weights, strengths)
def test_binary_is_its_equation(values, strength):
    w = np.array(values)
    np.testing.assert_allclose(quantize.prox_binary(torch.tensor(w), strength).numpy(), plain.prox_binary(w, strength), atol=1e-15)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=12), st.floats(1, 100))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_binary_at_strength_one_is_the_hard_quantizer_exactly(dtype, values, strength):
    w = torch.tensor(values, dtype=dtype)
    assert torch.equal(quantize.prox_binary(w, strength), quantize.binarize(w))


@given(weights)
@pytest.mark.parametrize("prox", [quantize.prox_binary, quantize.prox_ternary])
def test_strength_zero_changes_nothing(prox, values):
    w = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(prox(w, 0.0), w)


@given(weights, strengths)
def test_binary_moves_toward_one_by_at_most_the_strength(values, strength):
    w = torch.tensor(values, dtype=torch.float64)
    before, after = (w.abs() - 1).abs(), (quantize.prox_binary(w, strength).abs() - 1).abs()
    assert (after <= before).all()
    assert (before - after <= strength + 1e-12).all()


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_counts_as_positive(zero):
    assert quantize.prox_binary(torch.tensor([zero]), 0.25).item() == 0.25
    assert quantize.prox_binary(torch.tensor([zero]), 2.0).item() == 1.0


def test_strength_can_be_a_tensor():
    w = torch.tensor([[0.5, -0.5], [0.5, -0.5]], dtype=torch.float64)
    strength = torch.tensor([[0.1], [0.3]], dtype=torch.float64)
    for prox in (quantize.prox_binary, quantize.prox_ternary):
        for row in range(2):
            alone = prox(w[row], strength[row].item())
            if prox is quantize.prox_binary:
                torch.testing.assert_close(prox(w, strength)[row], alone, rtol=0, atol=1e-15)
        assert prox(w, strength).shape == w.shape


@given(weights, strengths)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_clip_and_pull_in_one_are_the_same_bits(dtype, values, strength):
    w = torch.tensor([*values, 0.0, -0.0, 1.0, -1.0], dtype=dtype)
    pull, binary = quantize.MODES["prox"].pull, quantize.MODES["prox"].quantizer
    pulled_first, clipped_first = w.clone(), w.clamp(-1, 1)
    for x in (pulled_first, clipped_first):
        (piece,) = pull.pull_(OneTensor([x]), binary, strength, clipped=True)
        assert piece is x
    assert torch.equal(pulled_first.clamp(-1, 1), quantize.prox_binary(w, strength).clamp(-1, 1))
    assert torch.equal(clipped_first, quantize.prox_binary(w.clamp(-1, 1), strength))


@given(weights, weights, strengths)
def test_soft_minimizes_its_objective(values, targets, strength):
    count = min(len(values), len(targets))
    w, q = (torch.tensor(v[:count], dtype=torch.float64) for v in (values, targets))
    for x, target, v in zip(w.tolist(), q.tolist(), quantize.soft(w, q, strength).tolist(), strict=True):

        def objective(u, x=x, target=target):
            return 0.5 * (u - x) ** 2 + strength * np.abs(u - target)

        assert v == pytest.approx(minimize(objective, -4, 4), abs=2e-7)
    np.testing.assert_allclose(quantize.soft(w, q, strength), plain.soft(w.numpy(), q.numpy(), strength), atol=1e-14)


@given(weights, weights, strengths)
def test_quadratic_minimizes_its_objective(values, targets, strength):
    count = min(len(values), len(targets))
    w, q = (torch.tensor(v[:count], dtype=torch.float64) for v in (values, targets))
    for x, target, v in zip(w.tolist(), q.tolist(), quantize.quadratic(w, q, strength).tolist(), strict=True):

        def objective(u, x=x, target=target):
            return 0.5 * (u - x) ** 2 + 0.5 * strength * (u - target) ** 2

        assert v == pytest.approx(minimize(objective, -4, 4), abs=2e-7)


def test_an_infinite_quadratic_pull_is_the_target_itself():
    w, q = torch.tensor([0.3, -2.0]), torch.tensor([1.0, -1.0])
    assert torch.equal(quantize.quadratic(w, q, float("inf")), q)


@given(weights, st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=5, unique=True), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_piecewise_affine_is_its_formula(values, levels, slope):
    w, levels = torch.tensor(values, dtype=torch.float64), sorted(levels)
    found = quantize.piecewise_affine(w, levels, slope)
    np.testing.assert_allclose(found.numpy(), plain.piecewise_affine(w.numpy(), levels, slope), atol=1e-12)
    if slope == 1:
        np.testing.assert_allclose(found.numpy(), np.clip(w.numpy(), levels[0], levels[-1]), atol=1e-12)
    if slope == 0:
        assert set(found.tolist()) <= {float(level) for level in levels}
