"""Pulls: how weights are moved toward their quantization, at a strength t >= 0.

The functions are of one tensor ``w`` and a target ``q`` of its shape; a strength is a number or a tensor that broadcasts against
them. The classes apply them to weights in groups, see ``groups``.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantize.groups import Groups
from quantize.quantizers import Fitted, Quantizer, binarize, ternarize

Strength = float | Tensor


def soft(w: Tensor, q: Tensor, strength: Strength) -> Tensor:
    """Toward q by at most t: q + sign(w - q) max(|w - q| - t, 0), the proximal operator of t ||v - q||_1 with q held."""
    # Which is q, clipped to [w - t, w + t]: without the rounding of w - q.
    return torch.clamp(q, w - strength, w + strength)


def quadratic(w: Tensor, q: Tensor, strength: Strength) -> Tensor:
    """(w + t q) / (1 + t): the proximal operator of t/2 ||v - q||^2 with q held; q itself where t is infinite."""
    if isinstance(strength, Tensor):
        return torch.where(strength.isinf(), q, (w + strength * q) / (1 + strength))
    return q.clone() if math.isinf(strength) else (q * strength).add_(w).div_(1 + strength)


def piecewise_affine(w: Tensor, levels: Sequence[Tensor | float] | Tensor, slope: Strength) -> Tensor:
    """The proximal operator of PARQ (Jin et al., ICML 2025), between neighbouring levels a <= w <= b with centre c:
    c + (w - c) / s, clipped to [a, b]; beyond the outermost level that level.

    Args:
        w: any shape.
        levels: in increasing order, each a number or a tensor that broadcasts against ``w``.
        slope: s in [0, 1]; with 1 a weight between the levels stays as it is, with 0 it becomes the nearest level.
    """
    levels = [torch.as_tensor(level, dtype=w.dtype, device=w.device) for level in levels]
    moved = None
    for lower, upper in itertools.pairwise(levels):
        centre = (lower + upper) / 2
        nearest = torch.where(w >= centre, upper, lower) + 0 * w  # what is no finite number stays none
        if isinstance(slope, Tensor):
            here = torch.where(slope > 0, _between(centre + (w - centre) / slope, lower, upper), nearest)
        else:
            here = _between(centre + (w - centre) / slope, lower, upper) if slope > 0 else nearest
        moved = here if moved is None else torch.where(w > lower, here, moved)
    return moved if moved is not None else levels[0].expand_as(w).clone()


def _between(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(v, upper), lower)


def prox_binary(w: Tensor, strength: Strength) -> Tensor:
    """Proximal operator of the W-shaped regularizer R(w) = ||w - sign(w)||_1 (section 3.1 of the paper).

    sign(w) * (1 + soft(|w| - 1, t)) with soft(x, t) = sign(x) max(|x| - t, 0), that is: |w| moves toward 1 by at most t. Zero
    counts as positive. With t >= 1 and w in [-1, 1] this is exactly ``binarize``; with t = 0 it is exactly w.
    """
    return soft(w, binarize(w), strength)


def prox_ternary(w: Tensor, strength: Strength) -> Tensor:
    """Pull toward the ternary quantization T of w: (w + t T) / (1 + t) (section 4 of the paper)."""
    return quadratic(w, ternarize(w), strength)


@dataclass(frozen=True)
class Pull:
    """A pull of weights in groups toward their quantization."""

    name: ClassVar[str]

    def toward(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength) -> Tensor:
        """The pulled weights, elementwise; a new tensor."""
        raise NotImplementedError

    def pulled(self, x: Groups, quantizer: Quantizer, strength: Strength, given: Any = None) -> Iterable[Tensor]:
        """The pulled weights, piece by piece; ``x`` is not changed, and a piece may be overwritten once its result is there."""
        fitted = quantizer.fit(x, given)
        return (self.toward(piece, quantizer, fitted, strength) for piece in x.pieces)


@dataclass(frozen=True)
class Soft(Pull):
    """See ``soft``."""

    name = "soft"

    def toward(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength) -> Tensor:
        return soft(w, quantizer.assign(w, fitted), strength)


@dataclass(frozen=True)
class Quadratic(Pull):
    """See ``quadratic``.

    Attributes:
        repeats: how often, each time toward the quantization of the last result, with w held (the published code's rounds).
    """

    repeats: int = 1

    name = "quadratic"

    def toward(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength) -> Tensor:
        return quadratic(w, quantizer.assign(w, fitted), strength)

    def pulled(self, x: Groups, quantizer: Quantizer, strength: Strength, given: Any = None) -> Iterable[Tensor]:
        result = x
        for _ in range(self.repeats - 1):
            result = x.holding(list(self._once(x, result, quantizer, strength, given)))
        return self._once(x, result, quantizer, strength, given)

    @staticmethod
    def _once(x: Groups, last: Groups, quantizer: Quantizer, strength: Strength, given: Any) -> Iterator[Tensor]:
        fitted = quantizer.fit(last, given)
        for w, before in zip(x.pieces, last.pieces, strict=True):
            yield quadratic(w, quantizer.assign(before, fitted), strength)


@dataclass(frozen=True)
class PiecewiseAffine(Pull):
    """See ``piecewise_affine``; the strength is the slope."""

    name = "piecewise affine"

    def toward(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength) -> Tensor:
        return piecewise_affine(w, quantizer.levels(fitted), strength)


@dataclass(frozen=True)
class Hard(Pull):
    """All the way, at any strength; a weight that is no finite number stays none, whatever level it would be compared to."""

    name = "hard"

    def toward(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength) -> Tensor:
        return quantizer.assign(w, fitted).add_(w * 0)
