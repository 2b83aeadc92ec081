"""The paper's counter-example: BinaryConnect walks one path on two functions, ProxQuant finds the better sign of each."""

import counter_example
import pytest
import torch

STARTS = [-0.95, -0.6, -0.31, -0.004, 0.0, 0.007, 0.3, 0.52, 0.99]


def test_the_two_functions_have_one_gradient_at_the_signs():
    found = []
    for s in (1, -1):
        signs = torch.tensor([-1.0, 1.0], requires_grad=True)
        values = counter_example.loss(signs, s)
        values.sum().backward()
        assert values.tolist() == ([0.0, 1.0] if s == 1 else [1.0, 0.0])
        found.append(signs.grad.tolist())
    assert found == [[-1.0, 1.0]] * 2


@pytest.mark.parametrize("start", STARTS)
def test_binaryconnect_walks_one_path_on_both(start):
    one, other = (counter_example.trajectory("lazy", s, start) for s in (1, -1))
    assert one == other  # to the last bit; so one of them ends at the wrong sign
    assert abs(one[-1]) == 1
    assert all(abs(x) <= 0.011 for x in one[150:-1])  # to and fro across 0


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("s", [1, -1])
def test_proxquant_finds_the_better_sign(s, start):
    path = counter_example.trajectory("prox", s, start)
    assert path[-1] == -s
    assert path[-2] == -s  # reached by the proximal steps alone, before the freeze
