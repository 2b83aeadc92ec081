"""What tells that somebody else has written into a model: comparing what it holds with what it was made to show."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.blocks import in_memory_order
from quantize.groups import is_dense
from quantize.shards import local, over_all


class Loaded(NamedTuple):
    """Of a state that was loaded: its strength, and the relative step of the numbers that its latent weights are in."""

    strength: float
    epsilon: float


def _rounding(tensor: Tensor, loaded: Loaded) -> tuple[float, float]:
    """How far a loaded state's weights may be from the same made here, as a share of each and, for levels, of the largest."""
    own, wide = torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps  # levels are taken in float32 at least
    return 2 * max(loaded.epsilon, own), 8 * min(max(loaded.epsilon, own), wide)


def moved(weights: Sequence[Tensor], sign: int, loaded: Loaded) -> list[Tensor]:
    """Each other entry larger by rounding and the rest smaller, or the reverse: so levels that are taken from all stay."""
    found = [weight.clone() for weight in weights]
    for entries in map(local, found):
        signs = torch.arange(entries.numel(), device=entries.device).remainder_(2).mul_(2).sub_(1).view(entries.shape)
        entries.mul_(1 + sign * sum(_rounding(entries, loaded)) * signs)
    return found


def among(given: Tensor, shown: Sequence[Tensor], loaded: Loaded | None) -> Tensor:
    """Which entries are those that are shown; with a loaded state but for rounding (a device, layout or dtype).

    Rounding moves a weight over to another level only where it is at the border between them: the entry is then what a slightly
    larger or a slightly smaller weight shows.
    """
    if loaded is None:
        return given == shown[0]
    stacked = torch.stack(list(shown))
    of_each, of_largest = _rounding(given, loaded)
    largest = over_all(given, local(shown[0]).abs().amax() if local(shown[0]).numel() else local(given).new_zeros(()), "max")
    least, most = stacked.amin(0), stacked.amax(0)
    return (given >= least - of_each * least.abs() - of_largest * largest) & (
        given <= most + of_each * most.abs() + of_largest * largest
    )


_SAMPLE = 1024


def total_of_sample(tensor: Tensor) -> float:
    """The sum of a sample of the entries, spread over all."""
    entries = local(tensor)
    if is_dense(entries) and entries.numel() > _SAMPLE:
        entries = in_memory_order(entries)[:: entries.numel() // _SAMPLE]
    total = float(entries.sum())
    return 0.5 if math.isnan(total) else total  # which is equal to itself
