"""Which parameters are quantized.

A selector takes a network and returns ``(qualified name, parameter)`` pairs in the order of the network. Layers are found by
their type and not by their name, so that a prefix that a wrapper puts before the names changes nothing. A network that knows
better says so itself: a module with a method ``quantizable()``, which returns such pairs with names of its own, is asked.
"""

import inspect
import re
from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

NamedParameters = list[tuple[str, nn.Parameter]]

FROZEN_BY = "frozen_by"  # the attribute of a parameter that was quantized for good: the mode's name

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ONE_WEIGHT = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS)
_OF_RECURRENT = re.compile(r"(weight_(ih|hh|hr)(_l\d+)?(_reverse)?)(_g|_v|_orig|_raw)?")
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def quantizable_layers(model: nn.Module, embeddings: bool = False) -> NamedParameters:
    """The weights that a network multiplies with: of linear, convolutional and transposed convolutional layers, every weight matrix
    of LSTM, GRU and RNN layers, and the projections of multi-head attention.

    Biases and normalization layers are never among them, embeddings where asked for. A weight that two layers share is listed once,
    under its first name. A weight under a parametrization is represented by the parameter that it is computed from.

    Raises:
        ValueError: if a weight is computed from several parameters (weight normalization, say), none of which stands for it.
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in walk(model, embeddings=embeddings):
        if isinstance(parameter, str):
            raise ValueError(f"{name} {parameter}")
        found.setdefault(id(parameter), (name, parameter))
    return list(found.values())


def select_all_layers(model: nn.Module) -> NamedParameters:
    """Rule of the binary modes: every layer, the first one too, and the classifier's weight (METHOD: ``fc.weight``)."""
    return quantizable_layers(model)


def select_inner_layers(model: nn.Module) -> NamedParameters:
    """Rule of the ternary modes: as the binary rule, but the network's first and last layer stay in full precision."""
    return quantizable_layers(model)[1:-1]


def decides_itself(module: nn.Module) -> bool:
    """Whether a module has a method ``quantizable()``; a compiled one only passes on that of the network in it, whose names are
    other than its own."""
    its_own = inspect.getattr_static(module, "quantizable", None) is not None
    return its_own and callable(getattr(module, "quantizable", None))


def walk(module: nn.Module, prefix: str = "", embeddings: bool = False) -> Iterator[tuple[str, nn.Parameter | str]]:
    """Names with the parameters that ``quantizable_layers`` finds, or with the reason why there is none to quantize."""
    if decides_itself(module):
        yield from ((prefix + name, parameter) for name, parameter in module.quantizable())
        return
    for attribute in _weights_of(module, embeddings):
        yield _parameter_of(module, attribute, prefix)
    for name, child in module.named_children():
        if name != "parametrizations":
            yield from walk(child, f"{prefix}{name}.", embeddings)


def _weights_of(module: nn.Module, embeddings: bool) -> list[str]:
    """The attributes of a layer that hold weights to multiply with."""
    if isinstance(module, _ONE_WEIGHT) or (embeddings and isinstance(module, (nn.Embedding, nn.EmbeddingBag))):
        return ["weight"]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        names = [*dict(module.named_parameters(recurse=False)), *getattr(module, "parametrizations", {})]
        # With or without what weight normalization, pruning and the like put after the name of a weight that they compute.
        return list(dict.fromkeys(found[1] for found in map(_OF_RECURRENT.fullmatch, names) if found))
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a linear layer of its own
        return [name for name in _ATTENTION if getattr(module, name, None) is not None]
    return []


def _parameter_of(module: nn.Module, attribute: str, prefix: str) -> tuple[str, nn.Parameter | str]:
    if parametrize.is_parametrized(module, attribute):
        behind = module.parametrizations[attribute]
        if hasattr(behind, "original"):
            return f"{prefix}parametrizations.{attribute}.original", behind.original
        kinds = ", ".join(type(one).__name__.lstrip("_") for one in behind)
        return prefix + attribute, (
            f"is computed by the parametrization {kinds} from several parameters, none of which can be quantized in its place: "
            "remove it first (torch.nn.utils.parametrize.remove_parametrizations), or pass pairs without this layer"
        )
    weight = getattr(module, attribute, None)
    if not isinstance(weight, nn.Parameter):
        return prefix + attribute, (
            "is computed anew in each forward pass and is no parameter (pruned, or an old form of weight normalization?): end that "
            "first (torch.nn.utils.prune.remove, remove_weight_norm, remove_spectral_norm), or pass pairs without this layer"
        )
    return prefix + attribute, weight
