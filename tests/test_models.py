"""Networks: parameter counts, names, initialization, and what is quantized in them."""

import itertools
import math

import pytest
import torch
from torch import nn

import models
import quantize

# depth: all parameters, binary-quantized (tensors), ternary-quantized (tensors)
CIFAR = {
    20: (272_474, 268_336, 20, 267_264, 18),
    32: (466_906, 461_872, 32, 460_800, 30),
    44: (661_338, 655_408, 44, 654_336, 42),
    56: (855_770, 848_944, 56, 847_872, 54),
}
IMAGENET = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}


@pytest.mark.parametrize("depth", CIFAR)
def test_cifar_counts(depth):
    model = models.resnet("cifar10", depth)
    binary, ternary = (quantize.MODES[name].select(model) for name in ("prox", "prox_ternary"))
    found = sum(p.numel() for p in model.parameters()), sum(p.numel() for _, p in binary), len(binary)
    assert (*found, sum(p.numel() for _, p in ternary), len(ternary)) == CIFAR[depth]
    assert quantize.MODES["lazy"].select(model) == binary
    assert [name for name, _ in binary if name not in dict(ternary)] == ["conv1.weight", "fc.weight"]
    assert not any("downsample" in name for name, _ in binary)


@pytest.mark.parametrize("depth", IMAGENET)
def test_imagenet_counts_and_names(depth):
    from torchvision.models import get_model

    with torch.device("meta"):
        model, known = models.resnet("imagenet", depth, 1000), get_model(f"resnet{depth}")
    assert sum(p.numel() for p in model.parameters()) == IMAGENET[depth]
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in known.state_dict().items()}


def test_counts_are_those_of_the_docstring():
    for depth, count in [*((d, row[0]) for d, row in CIFAR.items()), *IMAGENET.items()]:
        lines = [line.split() for line in models.resnet.__globals__["__doc__"].splitlines()]
        assert any((str(depth), f"{count:,}") in itertools.pairwise(line) for line in lines), depth


@pytest.mark.parametrize("dataset", ["imagenet", "cifar10"])
def test_imagenet_network_computes_what_torchvisions_does(dataset):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    if dataset == "imagenet":
        model, known = models.resnet("imagenet", 18, 1000).eval(), resnet18().eval()
        known.load_state_dict(model.state_dict())
        images = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(images), known(images))
    else:
        assert models.resnet("cifar10", 20, 7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_initialization():
    torch.manual_seed(0)
    model = models.resnet("cifar10", 56)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            expected = math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels))
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.08)
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


@pytest.mark.parametrize("depth", [0, -4, 18, 21, 20.0, "20", True, 10**9 + 2])
def test_impossible_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6n"):
        models.resnet("cifar10", depth)


@pytest.mark.parametrize("depth", [20, 51, None])
def test_imagenet_depths(depth):
    if depth is None:
        assert len(models.resnet("imagenet").layer1) == 2
    else:
        with pytest.raises(ValueError, match="152"):
            models.resnet("imagenet", depth)
