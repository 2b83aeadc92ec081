"""Layers whose weights stay packed in memory, and are unpacked one layer at a time while it runs.

What they compute is what the float layers compute, to the last bit, since the unpacked weights are the same tensors. They save
memory, not time: the arithmetic is that of floats, and unpacking comes on top. They are for finished networks and do not train.
"""

import os
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize import codes
from quantize.packing import Packed, unpack


class _PackedWeight(nn.Module):
    """A weight as codes and levels, in buffers."""

    _version = 2  # of its part of a state_dict: in the first the codes lay as the weight did in memory

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        # How torch computes depends on the order in which a weight lies in memory, to the last bit. The codes, which a state_dict
        # has without their order, lie in that of the indices.
        self._turned = weight.dim() == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        self._stride = weight.stride() if self._turned else weight.contiguous().stride()
        coded = codes.encode(weight.contiguous())
        self._shape, self._coding = coded.shape, coded.coding
        self.register_buffer("codes", coded.codes.to(weight.device))
        self.register_buffer("levels", coded.levels.to(weight.device))
        self.bias = bias

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        if self._turned and local_metadata.get("version") == 1:
            error_msgs.append(f"{prefix}codes: of an earlier version, in another order; pack the network again")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    @property
    def weight(self) -> Tensor:
        """The float weight, unpacked anew each time."""
        coded = codes.Coded(self._shape, self.levels.dtype, self._coding, self.codes, self.levels)
        weight = codes.decode(coded)
        if self._turned:
            return torch.empty_strided(self._shape, self._stride, dtype=weight.dtype, device=weight.device).copy_(weight)
        return weight.as_strided(self._shape, self._stride)


class PackedLinear(_PackedWeight):
    """``nn.Linear`` with a packed weight; made of a layer, whose bias it shares.

    Raises:
        ValueError: if the weight has more than 256 values in a row.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PackedConv2d(_PackedWeight):
    """``nn.Conv2d`` with a packed weight; made of a layer, whose bias it shares.

    Raises:
        ValueError: if the weight has more than 256 values in a row.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(layer.weight, layer.bias)
        self.stride, self.padding, self.dilation, self.groups = layer.stride, layer.padding, layer.dilation, layer.groups
        self._padding_mode, self._edges = layer.padding_mode, layer._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if self._padding_mode != "zeros":
            x, padding = F.pad(x, self._edges, mode=self._padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups)


_LAYERS = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def pack_layers(model: nn.Module, names: Collection[str]) -> list[str]:
    """Swaps packed layers into a finished network.

    Args:
        model: changed in place; hard-quantized.
        names: of the quantized weights, as in its state_dict. Those of other layers than linear ones and 2-D convolutions stay,
            and layers with hooks.

    Returns:
        The names of the weights that are packed now.

    Raises:
        ValueError: naming a weight that is not quantized; the model is as it was then.
    """
    places = {}
    packed: dict[int, nn.Module] = {}  # a layer that the network has in two places stays one layer
    for prefix, layer in model.named_modules(remove_duplicate=False):
        name = f"{prefix}.weight"
        if not prefix or name not in names or type(layer) not in _LAYERS or _does_more(layer):
            continue
        if id(layer) not in packed:
            try:
                packed[id(layer)] = _LAYERS[type(layer)](layer).train(layer.training)
            except ValueError as error:
                raise ValueError(f"{name!r}: {error}") from None
        places[prefix] = packed[id(layer)]
    for prefix, layer in places.items():  # when all are known to be quantized: a model that is refused is left as it was
        parent, _, last = prefix.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return [f"{prefix}.weight" for prefix in places]


def _does_more(layer: nn.Module) -> bool:
    """Whether somebody has added to what a layer of its kind computes."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks) or "forward" in layer.__dict__


def load_packed_layers(path: str | os.PathLike, model: nn.Module) -> list[str]:
    """Loads a packed network's file into a network of its kind, and keeps packed in memory what ``pack_layers`` can.

    Returns:
        The names of the weights that are packed in memory.
    """
    packed: Packed = unpack(Path(path).read_bytes())
    model.load_state_dict(packed.state_dict())
    return pack_layers(model, {name for name, value in packed.tensors.items() if isinstance(value, codes.Coded)})
