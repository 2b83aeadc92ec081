"""Pulls: how weights are moved toward their quantization, at a strength t >= 0.

The functions are of one tensor ``w`` and a target ``q`` of its shape; a strength is a number or a tensor that broadcasts against
them. The classes do the same to weights in groups, see ``groups``, where they lie.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
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


def _quadratic_into(result: Tensor, w: Tensor, q: Tensor, strength: Strength) -> None:
    """``quadratic`` into a place of its own, which may be that of ``w``; overwrites q."""
    if isinstance(strength, Tensor) or math.isinf(strength):
        result.copy_(quadratic(w, q, strength))
    elif w.dtype == torch.float16:  # whose largest number is 65,504
        result.copy_(quadratic(w.float(), q.float(), strength))
    else:
        torch.div(q.mul_(strength).add_(w), 1 + strength, out=result)


def piecewise_affine(w: Tensor, levels: Sequence[Tensor | float] | Tensor, slope: Strength) -> Tensor:
    """The proximal operator of PARQ (Jin et al., ICML 2025), between neighbouring levels a <= w <= b with centre c:
    c + (w - c) / s, clipped to [a, b]; beyond the outermost level that level.

    Args:
        w: any shape.
        levels: in increasing order, each a number or a tensor that broadcasts against ``w``.
        slope: s in [0, 1]; with 1 a weight between the levels stays as it is, with 0 it becomes the nearest level.
    """
    levels = [level.to(w) if isinstance(level, Tensor) else w.new_full((), level) for level in levels]
    moved = None
    for lower, upper in itertools.pairwise(levels):
        centre = (lower + upper) / 2
        if isinstance(slope, Tensor):
            nearest = torch.where(w >= centre, upper, lower) + 0 * w
            here = torch.where(slope > 0, _between(centre + (w - centre) / slope, lower, upper), nearest)
        elif slope > 0:
            here = _between(((w - centre) / slope).add_(centre), lower, upper)
        else:
            here = torch.where(w >= centre, upper, lower) + 0 * w  # what is no finite number stays none
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

    def toward_(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength, clipped: bool) -> None:
        """Pulls weights in place, elementwise; ``clipped``: they lie in [-1, 1], or are clipped to it right afterwards."""
        raise NotImplementedError

    def pull_(
        self, x: Groups, quantizer: Quantizer, strength: Strength, given: Any = None, clipped: bool = False
    ) -> Iterator[Tensor]:
        """Pulls weights in place, piece by piece: each is pulled when it is asked for. Arguments as of ``fit`` and ``toward_``."""
        fitted = quantizer.fit(x, given)
        for piece in x.pieces:
            self.toward_(piece, quantizer, fitted, strength, clipped)
            yield piece


@dataclass(frozen=True)
class Soft(Pull):
    """See ``soft``."""

    name = "soft"

    def toward_(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength, clipped: bool) -> None:
        if clipped and quantizer.at_ends and not isinstance(strength, Tensor):
            quantizer.add_times_(w, min(strength, 4.0), fitted)
            w.clamp_(-1.0, 1.0)  # the same to the last bit: the clip stops it at q
        else:
            if not isinstance(strength, Tensor):
                strength = min(strength, torch.finfo(w.dtype).max)
            torch.clamp(quantizer.assign(w, fitted), w - strength, w + strength, out=w)


@dataclass(frozen=True)
class Quadratic(Pull):
    """See ``quadratic``.

    Attributes:
        repeats: how often, each time toward the quantization of the last result, with w held (the published code's rounds).
    """

    repeats: int = 1

    name = "quadratic"

    def toward_(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength, clipped: bool) -> None:
        if isinstance(strength, Tensor) or math.isinf(strength) or w.dtype == torch.float16:
            _quadratic_into(w, w, quantizer.assign(w, fitted), strength)
        else:
            quantizer.add_times_(w, strength, fitted)
            w.div_(1 + strength)

    def pull_(
        self, x: Groups, quantizer: Quantizer, strength: Strength, given: Any = None, clipped: bool = False
    ) -> Iterator[Tensor]:
        last = x
        results = [torch.empty_like(piece) for piece in x.pieces] if self.repeats > 1 else []
        for _ in range(self.repeats - 1):
            fitted = quantizer.fit(last, given)
            for w, before, result in zip(x.pieces, last.pieces, results, strict=True):
                _quadratic_into(result, w, quantizer.assign(before, fitted), strength)
            last = x.holding(results)
        if last is x:
            yield from super().pull_(x, quantizer, strength, given, clipped)
            return
        fitted = quantizer.fit(last, given)
        for w, before in zip(x.pieces, last.pieces, strict=True):
            _quadratic_into(w, w, quantizer.assign(before, fitted), strength)
            yield w


@dataclass(frozen=True)
class PiecewiseAffine(Pull):
    """See ``piecewise_affine``; the strength is the slope."""

    name = "piecewise affine"

    def toward_(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength, clipped: bool) -> None:
        w.copy_(piecewise_affine(w, quantizer.levels(fitted), strength))


@dataclass(frozen=True)
class Hard(Pull):
    """All the way, at any strength; a weight that is no finite number stays none, whatever level it would be compared to."""

    name = "hard"

    def toward_(self, w: Tensor, quantizer: Quantizer, fitted: Fitted, strength: Strength, clipped: bool) -> None:
        q = quantizer.assign(w, fitted)
        w.mul_(0).add_(q)
