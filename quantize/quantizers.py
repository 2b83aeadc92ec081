"""Hard quantizers: the few values that weights have in the finished network.

A quantizer takes its levels from the weights of a group, a tensor or a row (``fit``), and then gives each weight one of them
(``assign``). The functions at the end do both for one tensor. METHOD: sign of zero is +1 everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.groups import Groups, OneTensor, Rows

Fitted = tuple[Tensor, ...]  # a group's levels and thresholds, in shapes that broadcast against its weights


@dataclass(frozen=True)
class Quantizer:
    """What all quantizers have.

    Attributes:
        name: the word on the command line.
        bits: log2 of the number of values, rounded up.
        by_row: True where each row of a tensor, flattened to (first dimension, rest), has levels of its own.
        takes_bits: whether other ``bits`` and ``by_row`` make sense.
        clips: whether weights are kept in [-1, 1] while they are trained toward it.
        at_ends: whether the level of each weight is the end of [-1, 1] on its own side of zero.
        spares_ends: whether the network's first and last layer stay in full precision.
        fits: whether ``fit`` looks at the weights.
        gathers: whether it needs all of a group in one place; the others need sums and maxima.
        settled: whether weights that it has quantized are quantized to themselves again.
        given: what ``fit`` must be given beside the weights: "levels", a generator for a "draw", or nothing.
    """

    bits: int = 1
    by_row: bool = False

    name: ClassVar[str]
    takes_bits: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    at_ends: ClassVar[bool] = False
    spares_ends: ClassVar[bool] = False
    fits: ClassVar[bool] = True
    gathers: ClassVar[bool] = False
    settled: ClassVar[bool] = False
    given: ClassVar[str] = ""

    @property
    def values(self) -> int:
        """How many different values a group's quantized weights have at most."""
        return 2**self.bits

    @property
    def in_words(self) -> str:
        """Its name, with bits and rows where they can be chosen."""
        return f"{self.name}, {self.bits} bit{'s' * (self.bits > 1)}{' by row' * self.by_row}" if self.takes_bits else self.name

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        """Levels and thresholds of each group."""
        raise NotImplementedError

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        """The level of each weight, elementwise; a new tensor of the same dtype."""
        raise NotImplementedError

    def add_times_(self, w: Tensor, factor: float, fitted: Fitted) -> None:
        """Adds so many times the level of each weight to it, in place."""
        w.add_(self.assign(w, fitted).mul_(factor))

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        """The levels of each group in increasing order."""
        raise NotImplementedError

    def may_give(self, rows: Tensor, largest: Tensor) -> Tensor:
        """Which rows, of no more values than there are levels, hold values that may be levels of one group.

        Args:
            rows: ``(groups, weights)``, of each group what is here of it.
            largest: the largest size of a weight in each whole group, ``(groups,)``.

        Returns:
            a boolean a row.
        """
        return torch.ones_like(largest, dtype=torch.bool)

    def __call__(self, w: Tensor, given: Any = None) -> Tensor:
        """Quantizes one tensor of any shape; no gradient goes through it."""
        w = w.detach()
        rows = self.by_row and w.dim() > 0
        x = Rows(w.reshape(len(w), -1) if w.numel() else w.new_empty(len(w), 0)) if rows else OneTensor([w])
        return self.assign(x.pieces[0], self.fit(x, given)).view(w.shape)


@dataclass(frozen=True)
class Binary(Quantizer):
    """sign(w): -1 or +1 (section 3.1 of the paper)."""

    name = "binary"
    clips = True
    at_ends = True
    fits = False
    settled = True

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        return ()

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        return sign(w)

    def add_times_(self, w: Tensor, factor: float, fitted: Fitted) -> None:
        w.add_(at_least(w, 0.0).sub_(0.5), alpha=2 * factor)  # half the sign, twice as often: an operation fewer

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        return [-1.0, 1.0]


@dataclass(frozen=True)
class Ternary(Quantizer):
    """In the manner of TWN: two levels and zero, all from the weights themselves (section 4 of the paper).

    With D = 0.7 * mean|w|, entries >= D become the mean of those entries, entries <= -D the mean of those, the rest 0. The two
    levels differ in general. A side without entries has no level; an all-zero tensor stays zero. Half-precision weights are
    quantized in float32 and rounded at the end.
    """

    bits: int = 2

    name = "ternary"
    clips = True
    spares_ends = True
    settled = True
    values = 3

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        dtype = wide(x.pieces[0]).dtype
        threshold = _above_zero((0.7 * x.mean(lambda w: wide(w).abs())).to(dtype))
        lower = -threshold

        def sides(w: Tensor) -> Iterator[Tensor]:
            w = wide(w)
            side = torch.empty_like(w)
            for compare, bound in ((torch.ge, threshold), (torch.le, lower)):
                yield compare(w, bound, out=side)
                yield side.mul_(w)

        high_count, high_sum, low_count, low_sum = x.sums(sides)
        return threshold, (high_sum / high_count.clamp(min=1)).to(dtype), (low_sum / low_count.clamp(min=1)).to(dtype)

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        return _ternary(w, *fitted)

    def add_times_(self, w: Tensor, factor: float, fitted: Fitted) -> None:
        if w is not wide(w):
            super().add_times_(w, factor, fitted)
        else:  # the same to the last bit, with two operations fewer; entries on one side stay there
            threshold, high_level, low_level = fitted
            w.addcmul_(at_least(w, threshold), high_level * factor)
            w.addcmul_(at_most(w, -threshold), low_level * factor)

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        _, high, low = fitted
        return [low, torch.zeros_like(low), high]


@dataclass(frozen=True)
class LearnedTernary(Quantizer):
    """Trained ternary quantization: two levels a tensor that are learned by gradient, and zero (Zhu et al., ICLR 2017).

    Entries >= D become the positive level, entries <= -D the negative one, the rest 0, with D = 0.05 * max|w|.
    """

    bits: int = 2

    name = "learned"
    spares_ends = True
    values = 3
    given = "levels"
    start = (1.0, -1.0)  # positive, negative

    def fit(self, x: Groups, given: Tensor | None = None) -> Fitted:
        """``given``: the levels of each tensor, ``(tensors, 2)``."""
        dtype = wide(x.pieces[0]).dtype
        threshold = _above_zero((0.05 * x.max(lambda w: wide(w).abs())).to(dtype))
        return threshold, x.spread(given[:, 0]).to(dtype), x.spread(given[:, 1]).to(dtype)

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        return _ternary(w, *fitted)

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        _, positive, negative = fitted
        return list(torch.stack([torch.zeros_like(positive), positive, negative]).sort(0).values)

    def level_terms(self, gradient: Tensor, w: Tensor, fitted: Fitted) -> tuple[Tensor, Tensor]:
        """What the gradients at the positive and at the negative level are the sums of, from that at the quantized weights."""
        x = wide(w)
        return at_least(x, fitted[0]).mul_(gradient), at_most(x, -fitted[0]).mul_(gradient)

    def pull_back(self, gradient: Tensor, w: Tensor, fitted: Fitted) -> Tensor:
        """The gradient at the latent weights, from that at the quantized ones: scaled by the size of the level of each."""
        threshold, positive, negative = fitted
        x = wide(w)
        high, low = at_least(x, threshold), at_most(x, -threshold)
        middle = (1 - high).sub_(low)
        return (gradient * (middle.add_(high.mul_(positive.abs())).add_(low.mul_(negative.abs())))).to(gradient.dtype)


@dataclass(frozen=True)
class StochasticBinary(Binary):
    """+1 with probability clip((w + 1) / 2, 0, 1), else -1. For the gradient's place in training (BinaryConnect)."""

    name = "stochastic"
    at_ends = False
    given = "draw"
    add_times_ = Quantizer.add_times_

    def fit(self, x: Groups, given: torch.Generator | None = None) -> Fitted:
        """``given``: the generator that is drawn from."""
        return (given,)

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        drawn = torch.rand(w.shape, generator=fitted[0], dtype=wide(w).dtype, device=w.device)
        return sign(drawn.sub_(self.chance(wide(w)))).neg_().to(w.dtype)  # +1 below the chance: never where that is 0

    def chance(self, w: Tensor) -> Tensor:
        """The probability of +1."""
        return (w + 1).div_(2)  # beyond 0 and 1 it is as certain as there


@dataclass(frozen=True)
class ExponentialBinary(StochasticBinary):
    """+1 with probability e^w / (e^w + e^-w), else -1."""

    name = "exponential"

    def chance(self, w: Tensor) -> Tensor:
        """The probability of +1."""
        return torch.sigmoid(2 * w)


def _ternary(w: Tensor, threshold: Tensor, high_level: Tensor, low_level: Tensor) -> Tensor:
    x = wide(w)
    high, low = at_least(x, threshold), at_most(x, -threshold)
    return high.mul_(high_level).addcmul_(low, low_level).to(w.dtype)


def _above_zero(threshold: Tensor) -> Tensor:
    """Where a threshold is too small to be represented, every entry but zero lies beyond it."""
    return torch.maximum(threshold, torch.nextafter(torch.zeros_like(threshold), torch.ones_like(threshold)))


# On a CPU comparisons that give booleans, and choices by them, take ten times as long as arithmetic with zeros and ones.


def at_least(w: Tensor, bound: Tensor | float) -> Tensor:
    """1 where w >= bound, else 0, in the dtype of ``w``."""
    return torch.ge(w, bound, out=torch.empty_like(w))


def at_most(w: Tensor, bound: Tensor | float) -> Tensor:
    """1 where w <= bound, else 0, in the dtype of ``w``."""
    return torch.le(w, bound, out=torch.empty_like(w))


def sign(w: Tensor) -> Tensor:
    """-1 or +1, and +1 at zero."""
    return at_least(w, 0.0).mul_(2).sub_(1)


def wide(w: Tensor) -> Tensor:
    """In float32 where it is narrower."""
    return w if w.dtype in (torch.float32, torch.float64) else w.float()


def binarize(w: Tensor) -> Tensor:
    """sign(w) with a tie broken to +1, so that the result holds only -1 and +1; see ``Binary``."""
    return Binary()(w)


def ternarize(w: Tensor) -> Tensor:
    """Two levels and zero, from the tensor itself; see ``Ternary``."""
    return Ternary()(w)


def learned_ternary(w: Tensor, positive: float, negative: float) -> Tensor:
    """The levels of trained ternary quantization; see ``LearnedTernary``."""
    return LearnedTernary()(w, torch.tensor([[positive, negative]], dtype=wide(w).dtype, device=w.device))
