"""Batch normalization against torch's own, in float64."""

import copy
import shutil

import pytest
import torch
from torch import nn

from training.batch_norm import BatchNorm, normalize, swap_in
from training.computing import CompiledNetwork

EPS = 1e-5


def inputs(offset: float = 0.0):
    torch.manual_seed(0)
    x = offset + torch.randn(5, 3, 4, 6, dtype=torch.float64) * torch.tensor([0.5, 2.0, 1e-3], dtype=torch.float64)[:, None, None]
    weight, bias = torch.randn(2, 3, dtype=torch.float64)
    return x, weight, bias


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_values_gradients_and_statistics(offset):
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(offset))
    y, mean, variance = normalize(x, weight, bias, EPS)
    expected = nn.functional.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), unbiased=False))
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, weight, bias), upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight, bias), upstream))
    assert torch.autograd.gradcheck(lambda *given: normalize(*given, EPS)[0], (x, weight, bias))


@pytest.mark.parametrize("odd_image", [0.0, 50.0])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_float32_with_a_mean_far_from_zero(offset, odd_image):
    """The mean square about 0 would round away a small variance; one odd image, the first, must not bring that back."""
    x, weight, bias = inputs(offset)
    x[0] += odd_image
    x = x.float()
    _, mean, variance = normalize(x, weight.float(), bias.float(), EPS)
    exact = x.double().var((0, 2, 3), unbiased=False)
    # What float32 leaves of the mean's own digits is all that may be lost.
    allowed = 1e-5 * exact + (2e-7 * (offset + odd_image)) ** 2
    assert ((variance.double() - exact).abs() <= allowed).all(), (variance, exact)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-7)


def test_a_channel_without_variance_is_its_bias():
    x = torch.full((2, 1, 3, 3), 1234.5)
    y, _, variance = normalize(x, torch.ones(1), torch.tensor([0.25]), EPS)
    assert variance == 0
    assert torch.allclose(y, torch.tensor(0.25), atol=1e-2)


def test_gradients_of_bf16_activations_are_as_good_as_bf16_is():
    x, weight, bias = inputs(offset=2.0)
    narrow = x.bfloat16().requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    upstream = torch.randn(x.shape).bfloat16()
    y, *_ = normalize(narrow, weight.float(), bias.float(), EPS)
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
    layers = [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    networks = [CompiledNetwork(layers[0], length=4), layers[1]]
    assert [type(layer) for layer in layers] == [BatchNorm, nn.BatchNorm2d]
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


def test_swapped_in_the_network_is_the_same_one():
    """Names and objects stay, for optimizers and checkpoints; a copy computes what torch's own layers do while not compiled."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    plain, images = copy.deepcopy(network), torch.randn(4, 3, 5, 5)
    before = network.state_dict(keep_vars=True)
    swap_in(network)
    assert [type(layer) for layer in (network[1], network[2][0])] == [BatchNorm, nn.BatchNorm2d]
    after = network.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    copied = copy.deepcopy(network)
    for training in (True, False):
        assert torch.equal(copied.train(training)(images), plain.train(training)(images))
    for name, value in plain.state_dict().items():
        assert torch.equal(copied.state_dict()[name], value), name
