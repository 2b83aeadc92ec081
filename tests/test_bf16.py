"""bf16 by way of float32 against float64, of values that are rounded to bf16 by their bits."""

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from training import bf16
from training.computing import CompiledNetwork

UPPER_HALF = np.uint32(0xFFFF0000)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """To the nearest number whose lower 16 bits are zero, ties to the even one; in float64."""
    bits = x.detach().float().contiguous().numpy().view(np.uint32)
    lowest = (bits >> np.uint32(16)) & np.uint32(1)
    up = (bits + np.uint32(0x7FFF) + lowest) & UPPER_HALF
    return torch.from_numpy(up.view(np.float32).astype(np.float64))


def near(found: torch.Tensor, exact: torch.Tensor, parts: torch.Tensor) -> None:
    """Equal but for one rounding to bf16 and float32 sums; ``parts`` are the sums of the summands' magnitudes."""
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-5 * parts).all()


def on_a_leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


SIZES = st.tuples(*[st.integers(1, 5)] * 3)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.booleans(), st.integers(0, 2**31 - 1))
def test_products_and_gradients_of_rounded_values(sizes, convolves, seed):
    torch.manual_seed(seed)
    batch, inputs, outputs = sizes
    product = (lambda x, w, b: F.conv2d(x, w, b, padding=1)) if convolves else F.linear
    x = on_a_leaf(torch.randn(batch, inputs, 5, 4) if convolves else torch.randn(batch, inputs))
    w = on_a_leaf(torch.randn(outputs, inputs, 3, 3) if convolves else torch.randn(outputs, inputs))
    b = on_a_leaf(torch.randn(outputs))
    with bf16.autocast("cpu", by_rounding=True):
        y = product(x, w, b)
    upstream = torch.randn(y.shape).bfloat16()
    found = torch.autograd.grad(y, (x, w, b), upstream)
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in found} == {torch.float32}  # those of latent weights
    exact = [on_a_leaf(rounded(tensor)) for tensor in (x, w, b)]
    sizes = [on_a_leaf(tensor.detach().abs()) for tensor in exact]
    values, parts = product(*exact), product(*sizes)
    near(y, values, parts)
    expected = torch.autograd.grad(values, exact, rounded(upstream))
    of_parts = torch.autograd.grad(parts, sizes, rounded(upstream).abs())
    for one, other, magnitudes in zip(found, expected, of_parts, strict=True):
        near(one, other, magnitudes)
        assert (rounded(one) == one.double()).all()


def test_an_lstm_of_rounded_values():
    torch.manual_seed(0)
    lstm, x, states = nn.LSTM(6, 4), torch.randn(7, 3, 6), (torch.randn(1, 3, 4), torch.randn(1, 3, 4))
    with bf16.autocast("cpu", by_rounding=True):
        output, after = lstm(x, states)
    output.float().square().sum().backward()
    exact = nn.LSTM(6, 4).double()
    exact.load_state_dict({name: rounded(weight) for name, weight in lstm.state_dict().items()})
    expected, expected_after = exact(rounded(x), tuple(map(rounded, states)))
    for one, other in ((output, expected), *zip(after, expected_after, strict=True)):
        assert one.dtype == torch.bfloat16
        near(one, other, torch.ones_like(other))
    expected.square().sum().backward()
    for one, other in zip(lstm.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=2**-5, atol=0.02 * other.grad.abs().max().item())


def test_other_functions_are_as_under_autocast():
    x = torch.randn(4, 4)
    with bf16.autocast("cpu", by_rounding=True):
        assert x.exp().dtype == torch.float32
        assert torch.add(x, x, alpha=2).equal(3 * x)
    with bf16.autocast("cpu", by_rounding=False):
        assert F.linear(x, x).dtype == torch.bfloat16
    assert F.linear(x, x).dtype == torch.float32


def test_a_compiled_network_computes_the_same():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(4, 3, 6, 6)
    results = []
    for forward in (network, CompiledNetwork(network, len(x))):
        network.zero_grad()
        with bf16.autocast("cpu", by_rounding=True):
            y = forward(x)
        y.float().square().sum().backward()
        results.append((y, *(parameter.grad for parameter in network.parameters())))
    # Compiled code may leave out a rounding between two operations that it makes one of.
    for eager, compiled in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype
        torch.testing.assert_close(compiled, eager, rtol=0.02, atol=0.02 * eager.abs().max().item())
