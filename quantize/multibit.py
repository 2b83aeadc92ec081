"""Quantizers of k bits: 2^k values, taken from the weights of a tensor or of each of its rows.

Greedy and alternating ones have the values a_1 b_1 + ... + a_k b_k with amplitudes a >= 0 and codes b of -1 and +1, a set that is
symmetric about zero.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantize.groups import Function, Groups
from quantize.quantizers import Fitted, Quantizer, at_least, sign, wide


@dataclass(frozen=True)
class _Greedy(Quantizer):
    """r = w; then k times: b = sign(r), a = the size of r, r <- r - a b."""

    takes_bits = True

    def size(self, x: Groups, residual: Any) -> Tensor:
        """The size of a residual in each group."""
        raise NotImplementedError

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        """The amplitudes."""
        amplitudes: Fitted = ()
        for _ in range(self.bits):
            size = self.size(x, lambda w, so_far=amplitudes: _left(wide(w), so_far))
            amplitudes += (size.to(wide(x.pieces[0]).dtype),)
        return amplitudes

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        return _greedy_sum(wide(w), fitted).to(w.dtype)

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        return [*(-level for level in reversed(_magnitudes(fitted)[0])), *_magnitudes(fitted)[0]]

    def may_give(self, rows: Tensor, largest: Tensor) -> Tensor:
        return _different_sizes(rows) <= self.values // 2


@dataclass(frozen=True)
class GreedyMedian(_Greedy):
    """Greedy with a = median|r|, the lower one where there are two (the published code's ``prox_median``)."""

    name = "greedy_median"
    clips = True
    gathers = True

    def size(self, x: Groups, residual: Any) -> Tensor:
        return x.median(residual)


@dataclass(frozen=True)
class GreedyMean(_Greedy):
    """Greedy with a = mean|r|; with one bit the optimal scaled binary quantizer (BWN, XNOR-Net)."""

    name = "greedy_mean"

    def size(self, x: Groups, residual: Any) -> Tensor:
        return x.mean(residual)


@dataclass(frozen=True)
class Alternating(Quantizer):
    """Amplitudes by least squares over the codes, codes of the nearest value, in turn (Xu et al., ICLR 2018).

    Starts from the greedy mean. The error ||w - Q|| never grows from round to round. Where the codes leave the amplitudes open,
    they are those of the smallest norm.

    Attributes:
        rounds: the greedy start is the first.
    """

    bits: int = 2
    rounds: int = 3

    name = "alternating"
    takes_bits = True

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        """One round: the amplitudes. More: the magnitudes of the values in increasing order."""
        if self.bits == 2 and self.rounds > 1:
            return self._of_two_bits(x)
        amplitudes = GreedyMean(self.bits).fit(x)
        if self.rounds == 1:
            return amplitudes
        dtype = amplitudes[0].dtype
        amplitudes = _decreasing(_from_greedy_codes(x, amplitudes))
        for _ in range(self.rounds - 2):
            amplitudes = _decreasing(_from_nearest(x, amplitudes, dtype))
        return tuple(magnitude.to(dtype) for magnitude in _magnitudes(amplitudes)[0])

    def _of_two_bits(self, x: Groups) -> Fitted:
        """The same where there are as many amplitudes as magnitudes: least squares makes each magnitude its weights' mean."""
        dtype = wide(x.pieces[0]).dtype
        x, size = _sizes(x)
        (total,) = x.sums(lambda w: (size(w),))
        boundary = (total / x.counts).to(dtype)  # greedy codes turn where |w| is the first amplitude
        for _ in range(self.rounds - 1):

            def from_the_boundary_on(w: Tensor, boundary: Tensor = boundary) -> Iterator[Tensor]:
                magnitude = size(w)
                beyond = at_least(magnitude, boundary)
                yield beyond
                yield beyond.mul_(magnitude)

            beyond, of_beyond = x.sums(from_the_boundary_on)
            means = torch.stack([(total - of_beyond) / (x.counts - beyond).clamp(min=1), of_beyond / beyond.clamp(min=1)])
            small, large = means.clamp(min=0).sort(0).values.to(dtype)
            boundary = (small + large) / 2
        return small, large

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        if self.rounds == 1:
            return _greedy_sum(wide(w), fitted).to(w.dtype)
        magnitude = wide(w).abs()
        nearest = fitted[0]
        for level, boundary in zip(fitted[1:], _between(fitted), strict=True):  # the largest of those that are reached
            reached = at_least(magnitude, boundary).mul_(level)
            nearest = torch.maximum(reached, nearest, out=reached)
        return sign(wide(w)).mul_(nearest).to(w.dtype)

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        magnitudes = _magnitudes(fitted)[0] if self.rounds == 1 else fitted
        return [*(-level for level in reversed(magnitudes)), *magnitudes]

    def may_give(self, rows: Tensor, largest: Tensor) -> Tensor:
        return _different_sizes(rows) <= self.values // 2


@dataclass(frozen=True)
class Uniform(Quantizer):
    """Equidistant levels s (2j - 2^k + 1) / 2 for j = 0 ... 2^k - 1, without a zero, as in integer grids of deployment.

    The step s starts at 2 mean|w| 2^(1-k); nearest levels and the least-squares step for them then follow in turn.

    Attributes:
        rounds: of the two in turn.
    """

    bits: int = 4
    rounds: int = 10

    name = "uniform"
    takes_bits = True

    def fit(self, x: Groups, given: Any = None) -> Fitted:
        """The step."""
        dtype = wide(x.pieces[0]).dtype
        step = (2 * x.mean(lambda w: wide(w).abs()) * 2.0 ** (1 - self.bits)).to(dtype)
        for _ in range(self.rounds):

            def products(w: Tensor, step: Tensor = step) -> Iterator[Tensor]:
                code = self.code(wide(w), step)
                yield code.square()
                yield code.mul_(wide(w))

            with_itself, with_weights = x.sums(products)
            step = torch.where(with_itself > 0, with_weights / with_itself.clamp(min=0.25), step).to(dtype)
        return (step,)

    def code(self, w: Tensor, step: Tensor) -> Tensor:
        """The nearest level as a multiple of the step."""
        largest = (2**self.bits - 1) / 2
        return (w / torch.where(step > 0, step, 1.0)).floor_().add_(0.5).clamp_(-largest, largest)

    def assign(self, w: Tensor, fitted: Fitted) -> Tensor:
        return self.code(wide(w), fitted[0]).mul_(fitted[0]).to(w.dtype)

    def multiples(self) -> list[float]:
        """The levels as multiples of the step."""
        return [j - (2**self.bits - 1) / 2 for j in range(2**self.bits)]

    def levels(self, fitted: Fitted) -> list[Tensor | float]:
        return [multiple * fitted[0] for multiple in self.multiples()]

    def may_give(self, rows: Tensor, largest: Tensor) -> Tensor:
        """The largest weight is one of the multiples: with the step that this makes, the others must be, too, but for rounding,
        once in what they are computed in, and perhaps once more in what they were kept in."""
        if not rows.shape[1]:
            return super().may_give(rows, largest)
        found, computed, kept = largest == 0, 4 * torch.finfo(wide(rows).dtype).eps, 1.25 * _precision(rows).unsqueeze(1)
        for multiple in self.multiples():
            if multiple > 0:
                step = torch.where(largest > 0, wide(largest) / multiple, 1.0).unsqueeze(1)
                multiples = wide(rows) / step
                off = (self.code(wide(rows), step) - multiples).abs()
                found = found | (off <= computed * multiple + kept * multiples.abs()).all(1)
        return found


@dataclass(frozen=True)
class UniformWithZero(Uniform):
    """Equidistant levels s j with |j| <= 2^(k-1) - 1: one level fewer, and zero among them."""

    name = "uniform_with_zero"

    @property
    def values(self) -> int:
        return 2**self.bits - 1

    def code(self, w: Tensor, step: Tensor) -> Tensor:
        """The nearest level as a multiple of the step."""
        largest = 2 ** (self.bits - 1) - 1
        return (w / torch.where(step > 0, step, 1.0)).round_().clamp_(-largest, largest)

    def multiples(self) -> list[float]:
        """The levels as multiples of the step."""
        largest = 2 ** (self.bits - 1) - 1
        return [float(j) for j in range(-largest, largest + 1)]


def _sizes(x: Groups) -> tuple[Groups, Function]:
    """Groups, and a function of them that is |w|: taken once where they are one piece, which is small, else at each use."""
    if len(x.pieces) > 1:
        return x, lambda w: wide(w).abs()
    return x.holding([wide(x.pieces[0]).abs()]), lambda w: w


def _different_sizes(rows: Tensor) -> Tensor:
    """How many different |w| each row holds."""
    return rows.abs().sort(dim=1).values.diff(dim=1).ne(0).sum(1) + 1


def _precision(rows: Tensor) -> Tensor:
    """The relative distance of neighbouring numbers in the coarsest type that holds all weights of a row, ``(groups,)``."""
    finest = torch.full((len(rows),), torch.finfo(rows.dtype).eps, dtype=wide(rows).dtype, device=rows.device)
    for kept in (torch.float32, torch.float16, torch.bfloat16):
        finest = torch.where((rows.to(kept) == rows).all(1), max(torch.finfo(kept).eps, torch.finfo(rows.dtype).eps), finest)
    return finest


def _left(w: Tensor, amplitudes: Fitted) -> Tensor:
    """The size of what greedy codes with these amplitudes leave of the weights."""
    size = w.abs()
    for amplitude in amplitudes:
        size = size.sub_(amplitude).abs_()
    return size


def _greedy_sum(w: Tensor, amplitudes: Fitted) -> Tensor:
    """What greedy codes with these amplitudes make of the weights."""
    total, residual = sign(w).mul_(amplitudes[0]), w
    term = total
    for amplitude in amplitudes[1:]:
        residual = residual - term
        term = sign(residual).mul_(amplitude)
        total = total + term
    return total


def _between(levels: Fitted) -> list[Tensor]:
    """The middles between neighbouring levels."""
    return [(lower + upper) / 2 for lower, upper in itertools.pairwise(levels)]


def _magnitudes(amplitudes: Fitted) -> tuple[list[Tensor], Tensor]:
    """The upper half of the values: 2^(k-1) magnitudes in increasing order, and the codes of each, ``(..., 2^(k-1), k)``."""
    stacked = torch.stack(amplitudes, dim=-1)
    codes = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(amplitudes))), dtype=stacked.dtype, device=stacked.device)
    values, order = torch.sort((stacked.unsqueeze(-2) * codes).sum(-1), dim=-1, stable=True)
    half = values.shape[-1] // 2
    # Of two values that differ in the sign alone rounding may put either below zero by a hair.
    return list(values[..., half:].clamp(min=0).unbind(-1)), codes[order[..., half:]]


def _decreasing(amplitudes: Tensor) -> Fitted:
    """``(..., k)`` amplitudes as k values, |a| in decreasing order."""
    return amplitudes.abs().sort(-1, descending=True).values.unbind(-1)


def _from_greedy_codes(x: Groups, amplitudes: Fitted) -> Tensor:
    """Amplitudes ``(..., k)`` by least squares over greedy codes, float64."""
    k = len(amplitudes)
    pairs = list(itertools.combinations(range(k), 2))

    def products(w: Tensor) -> Iterator[Tensor]:
        residual = wide(w)
        codes = []
        for amplitude in amplitudes:
            codes.append(sign(residual))
            residual = residual - amplitude * codes[-1]
        yield from (code * wide(w) for code in codes)
        yield from (codes[i] * codes[j] for i, j in pairs)

    sums = x.sums(products)
    with_weights, of_pairs = torch.stack(sums[:k], -1), sums[k:]
    gram = torch.diag_embed((torch.zeros_like(sums[0]) + x.counts).unsqueeze(-1).expand(with_weights.shape).contiguous())
    for (i, j), value in zip(pairs, of_pairs, strict=True):
        gram[..., i, j] = gram[..., j, i] = value
    return _least_squares(gram, with_weights)


def _from_nearest(x: Groups, amplitudes: Fitted, dtype: torch.dtype) -> Tensor:
    """Amplitudes ``(..., k)`` by least squares over the codes of the nearest values, float64.

    By symmetry |w| and the values' upper half suffice, and of those how many weights each has and what they sum to.
    """
    magnitudes, codes = _magnitudes(amplitudes)
    x, size = _sizes(x)
    boundaries = [boundary.to(dtype) for boundary in _between(tuple(magnitudes))]

    def from_each_on(w: Tensor) -> Iterator[Tensor]:
        magnitude = size(w)
        yield magnitude
        for boundary in boundaries:
            beyond = at_least(magnitude, boundary)
            yield beyond
            yield beyond.mul_(magnitude)

    total, *beyond = x.sums(from_each_on)
    nothing = [torch.zeros_like(total)]
    sums, counts = [total, *beyond[1::2]], [nothing[0] + x.counts, *beyond[0::2]]
    in_each = [torch.stack([a - b for a, b in zip(v, v[1:] + nothing, strict=True)], -1) for v in (sums, counts)]
    of_weights, of_values = in_each
    codes = codes.double()
    gram = torch.einsum("...l,...li,...lj->...ij", of_values, codes, codes)
    return _least_squares(gram, torch.einsum("...l,...li->...i", of_weights, codes))


def _least_squares(gram: Tensor, with_weights: Tensor) -> Tensor:
    """The solution of ``gram a = with_weights`` that has the smallest norm, ``(..., k)``; gram may be singular."""
    if gram.shape[-1] == 1:
        return with_weights / gram[..., 0].clamp(min=1)
    if gram.shape[-1] == 2:  # the same in closed form: (1, 1) and (1, -1) are the directions that are apart
        equal, opposite = gram[..., 0, 0] + gram[..., 0, 1], gram[..., 0, 0] - gram[..., 0, 1]
        along = with_weights.sum(-1) / 2 / torch.where(equal > 0, equal, torch.inf)
        across = (with_weights[..., 0] - with_weights[..., 1]) / 2 / torch.where(opposite > 0, opposite, torch.inf)
        return torch.stack([along + across, along - across], -1)
    with_weights = with_weights.unsqueeze(-1)
    if gram.device.type != "cpu":
        return (torch.linalg.pinv(gram, hermitian=True) @ with_weights).squeeze(-1)
    # Pseudoinverses of many rows' matrices take longer than all else: they are for those that are singular, or nearly so.
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    singular = (failed != 0) | (pivots.amin(-1) < 1e-3 * pivots.amax(-1))
    solution = torch.cholesky_solve(with_weights, factor)
    if singular.any():
        solution[singular] = torch.linalg.pinv(gram[singular], hermitian=True) @ with_weights[singular]
    return solution.squeeze(-1)


def greedy_median(w: Tensor, bits: int = 1, by_row: bool = False) -> Tensor:
    """See ``GreedyMedian``."""
    return GreedyMedian(bits, by_row)(w)


def greedy_mean(w: Tensor, bits: int = 1, by_row: bool = False) -> Tensor:
    """See ``GreedyMean``."""
    return GreedyMean(bits, by_row)(w)


def alternating(w: Tensor, bits: int = 2, by_row: bool = False, rounds: int = 3) -> Tensor:
    """See ``Alternating``."""
    return Alternating(bits, by_row, rounds)(w)


def uniform(w: Tensor, bits: int = 4, by_row: bool = False) -> Tensor:
    """See ``Uniform``."""
    return Uniform(bits, by_row)(w)
