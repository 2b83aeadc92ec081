"""What is watched while weights become quantized: pure functions of one weight tensor, and their table over a network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from quantize.quantizers import binarize
from quantize.shards import whole


def binary_level(w: Tensor) -> Tensor:
    """Mean distance of |w| from 1, a scalar tensor: 0 when every entry is -1 or +1."""
    return (w.abs() - 1).abs().mean()


def quantization_error(w: Tensor, q: Tensor) -> Tensor:
    """||w - q|| / ||w||, a scalar tensor: the relative distance of w from its hard quantization q; 0 for an all-zero w."""
    norm = w.norm()
    return torch.where(norm > 0, (w - q).norm() / norm, torch.zeros_like(norm))


def sign_change(w: Tensor, w0: Tensor) -> Tensor:
    """Share of the entries of w whose sign differs from that in w0, a scalar tensor in [0, 1]; zero counts as positive."""
    return (binarize(w) != binarize(w0)).to(torch.float32).mean()


def measure(
    latent: Mapping[str, Tensor], quantized: Mapping[str, Tensor], start: Mapping[str, Tensor]
) -> dict[str, dict[str, float]]:
    """All metrics of all quantized parameters: ``{"binary" | "quant_error" | "sign_change": {parameter name: value}}``.

    ``latent`` are the weights now, ``quantized`` their hard quantization, ``start`` copies of the weights (or their signs) at the
    start of the run. Reads back from the device once. Empty where nothing is quantized. Of sharded parameters all processes call
    it, and each has the figures of the whole.
    """
    if not latent:
        return {}
    table = {
        "binary": [binary_level(whole(w)) for w in latent.values()],
        "quant_error": [quantization_error(whole(w), whole(quantized[name])) for name, w in latent.items()],
        "sign_change": [sign_change(whole(w), whole(start[name])) for name, w in latent.items()],
    }
    device = next(iter(latent.values())).device  # of a model on several
    values = [value.float().to(device) for column in table.values() for value in column]
    values = torch.stack(values).view(len(table), -1).tolist()
    return {metric: dict(zip(latent, row, strict=True)) for metric, row in zip(table, values, strict=True)}
