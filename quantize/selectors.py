"""Which parameters are quantized.

A selector takes a network and returns ``(qualified name, parameter)`` pairs in the order of the network. Layers are found by
their type and not by their name, so that a prefix that a wrapper puts before the names changes nothing.
"""

from torch import nn

NamedParameters = list[tuple[str, nn.Parameter]]

_LAYERS_WITH_WEIGHTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def quantizable_layers(model: nn.Module) -> NamedParameters:
    """The weights of all convolutional and linear layers but those of residual shortcuts.

    A shortcut is whatever has ``downsample`` as one part of its qualified name (torchvision's naming): its 1x1 convolution stays
    in full precision in every mode. Biases and normalization layers are never quantized. A weight that two layers share is listed
    once, under its first name.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for prefix, layer in model.named_modules():
        if isinstance(layer, _LAYERS_WITH_WEIGHTS) and "downsample" not in prefix.split("."):
            name = f"{prefix}.weight" if prefix else "weight"
            found.setdefault(id(layer.weight), (name, layer.weight))
    return list(found.values())


def select_all_layers(model: nn.Module) -> NamedParameters:
    """Rule of the binary modes: every convolution, the first one too, and the classifier's weight (METHOD: ``fc.weight``)."""
    return quantizable_layers(model)


def select_inner_layers(model: nn.Module) -> NamedParameters:
    """Rule of the ternary modes: as the binary rule, but the network's first and last layer stay in full precision."""
    return quantizable_layers(model)[1:-1]
