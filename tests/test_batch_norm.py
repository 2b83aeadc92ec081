"""Batch normalization against torch's own, in float64."""

import shutil

import pytest
import torch
from torch import nn

from models.batch_norm import BatchNorm, normalize

EPS = 1e-5


def inputs(offset: float = 0.0):
    torch.manual_seed(0)
    x = offset + torch.randn(5, 3, 4, 6, dtype=torch.float64) * torch.tensor([0.5, 2.0, 1e-3], dtype=torch.float64)[:, None, None]
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    return x, weight, bias


@pytest.mark.parametrize("near", [0.0, 3.0])
def test_values_gradients_and_statistics(near):
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs())
    y, mean, variance = normalize(x, weight, bias, torch.full((3,), near, dtype=torch.float64), EPS)
    expected = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight, bias), upstream))
    around = torch.zeros(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: normalize(*given, around, EPS)[0], (x, weight, bias))


def test_float32_with_a_mean_far_from_zero():
    """Around 0 the mean square, 1e6, would round away a variance of 1e-6."""
    x, weight, bias = inputs(offset=1000.0)
    near = torch.tensor([1000.0] * 3)
    y, _, variance = normalize(x.float(), weight.float(), bias.float(), near, EPS)
    assert ((variance.double() / x.float().double().var((0, 2, 3), unbiased=False) - 1).abs() < 1e-4).all()
    assert y.dtype == torch.float32


def test_a_channel_without_variance_is_its_bias():
    x = torch.full((2, 1, 3, 3), 1234.5)
    y, _, variance = normalize(x, torch.ones(1), torch.tensor([0.25]), torch.zeros(1), EPS)
    assert variance == 0
    assert torch.allclose(y, torch.tensor(0.25), atol=1e-2)


def test_gradients_of_bf16_activations_are_as_good_as_bf16_is():
    x, weight, bias = inputs(offset=2.0)
    narrow = x.bfloat16().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    upstream = torch.randn(x.shape).bfloat16()
    y, *_ = normalize(narrow, weight.float(), bias.float(), torch.zeros(3), EPS)
    assert y.dtype == torch.bfloat16
    (found,) = torch.autograd.grad(y, narrow, upstream)
    expected = nn.functional.batch_norm(wide, None, None, weight, bias, training=True, eps=EPS)
    (exact,) = torch.autograd.grad(expected, wide, upstream.double())
    torch.testing.assert_close(found, exact.bfloat16(), rtol=0.01, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_the_layer_compiled_is_the_layer():
    """What a compiler makes of a training step, running statistics and counter included; eager it is torch's own."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 5, 5)
    layers = [BatchNorm(3), nn.BatchNorm2d(3)]
    networks = [torch.compile(layers[0], dynamic=False), layers[1]]
    gradients = []
    for layer, network in zip(layers, networks, strict=True):
        for _ in range(3):
            y = network(images + 1)
        (y**2 * images).sum().backward()
        gradients.append((layer.weight.grad, layer.bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())
    layers[0].zero_grad()
    assert torch.equal(layers[0](images), nn.functional.batch_norm(images, None, None, layers[0].weight, layers[0].bias, True))
