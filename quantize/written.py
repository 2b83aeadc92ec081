"""What tells that somebody else has written into a model: comparing what it holds with what it was made to show."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantize.blocks import in_memory_order
from quantize.finished import levels_alone
from quantize.groups import is_dense
from quantize.quantizers import Quantizer
from quantize.shards import local, over_all, over_group


class Snapshot(NamedTuple):
    """One mode's parameters at a moment: what the model shows, the weights in training, learned levels, and the numbers of the
    parameters that others have written, which are in training as they were written."""

    shown: list[Tensor]
    latent: list[Tensor]
    levels: list[Tensor]
    written: set[int]

    def kept(self) -> "Snapshot":
        """The same for when the model's own weights change."""
        shown = [weight.clone() for weight in self.shown]
        if self.latent is self.shown:
            return self._replace(shown=shown, latent=shown)
        return self._replace(shown=shown, latent=[w.clone() if i in self.written else w for i, w in enumerate(self.latent)])


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


def of_another(given: Tensor, kept: Tensor, shown: Tensor, quantizer: Quantizer, loaded: Loaded | None) -> Tensor:
    """Whether a tensor, or each row, that is not ``kept`` as it was shown holds levels alone: then it is of another quantized
    network, of whose levels some may be the same, and all of it was written. But where the rest is zeros, which are a mask's; and
    after a loaded state where it is few entries at other levels, which rounding may have put there.

    Of the levels -1 and +1 half are the same in every network: few others are signs that somebody turned. And a network that was
    clipped there has some of them among its weights, so that all of it was written where more than half was."""
    quantized = levels_alone(given, quantizer)
    others = ~local(kept) & (local(given) != 0)
    count = others.flatten(1).sum(1) if quantized.dim() else others.sum()
    count = over_group(given, quantized.dim() > 0, count.float(), "sum")
    length = given.numel() // max(1, len(given) if quantized.dim() else 1)
    if quantizer.at_ends:
        return count > torch.where(quantized, length / 16, length / 2)
    by_rounding = levels_alone(shown, quantizer) * (length / 16 if loaded else 0)
    return quantized & (count.view(quantized.shape) > by_rounding)


def levels_in(tensor: Tensor, own: Tensor) -> Tensor:
    """The positive and the negative level in a tensor of more entries than these and zero; ``own`` where it lacks one, or holds
    other values."""
    entries, both = local(tensor), extremes(tensor)
    others = ~((entries == 0) | (entries == both[0]) | (entries == both[1]))
    has_others = over_all(tensor, others.any().float(), "max")
    return both.to(own) if tensor.numel() > 3 and not has_others and both[0] > 0 > both[1] else own


def extremes(tensor: Tensor) -> Tensor:
    """The largest and the smallest entry, ``(2,)``."""
    entries = local(tensor)
    both = torch.stack([entries.max(), -entries.min()]) if entries.numel() else entries.new_full((2,), -math.inf)
    return over_all(tensor, both, "max") * entries.new_tensor([1.0, -1.0])


_SAMPLE = 1024


def total_of_sample(tensor: Tensor) -> float:
    """The sum of a sample of the entries, spread over all."""
    entries = local(tensor)
    if is_dense(entries) and entries.numel() > _SAMPLE:
        entries = in_memory_order(entries)[:: entries.numel() // _SAMPLE]
    total = float(entries.sum())
    return 0.5 if math.isnan(total) else total  # which is equal to itself
