"""Means, spreads and Student's t against the books."""

import math

import pytest
from reporting import statistics


def test_verdicts():
    assert statistics.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 3.0, 2: 2.9}).shown is False
    assert statistics.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.1, 2: 2.05}).shown is True
    assert statistics.paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).shown is False
    assert statistics.paired({0: 1.0}, {1: 1.0}) == statistics.Difference(0)
    assert statistics.spread([]) is None
    assert statistics.spread([3.0]) == statistics.Spread(3.0, None, 1)
    assert statistics.spread([math.inf, 3.0, math.inf]) == statistics.Spread(math.inf, None, 3)
    assert statistics.spread([math.inf, 3.0, math.inf]).half_width is None
    beyond = statistics.paired({0: math.inf, 1: math.inf, 2: 1.0}, {0: 1.0, 1: math.inf, 2: math.inf})
    assert (beyond.n, beyond.low, beyond.shown) == (3, None, False)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_books(degrees, expected):
    assert statistics.t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_t_distribution():
    assert statistics.t_quantile(3, 0.99) == pytest.approx(5.841, abs=5e-4)
    assert statistics.t_quantile(1, 0.5) == pytest.approx(1)  # Cauchy
