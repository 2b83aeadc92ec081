"""Weights in groups that share their levels: one tensor, its rows, or many tensors side by side.

A quantizer takes its levels from sums and means over each group and then treats every weight by itself. It says so once, in
functions of the weights, and works on whatever arrangement they are in: ``pieces`` are the weights in parts of cache size,
``counts`` says how many each group has (at least 1), and what ``sums`` and the others return has one value a group, in a shape
that broadcasts against each piece.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
Functions = Callable[[Tensor], Iterable[Tensor]]  # several functions of the weights: yields the values of each
Reduce = Callable[[Tensor, str], Tensor]  # a value a process and "sum" or "max", to that over all processes

IN_PARTS = "the median of a tensor whose parts lie in several processes cannot be taken there: choose greedy_mean or alternating"


class OneTensor:
    """One group: a whole tensor, in one piece or several.

    Args:
        pieces: views that together hold each weight once.
        count: of the weights, where others hold more of the tensor (a sharded one).
        reduce: combines a value over all who hold a part of it.
    """

    def __init__(self, pieces: Sequence[Tensor], count: int | None = None, reduce: Reduce | None = None) -> None:
        self.pieces = list(pieces)
        self.counts = max(sum(piece.numel() for piece in pieces) if count is None else count, 1)
        self._reduce = reduce

    def holding(self, pieces: Sequence[Tensor]) -> "OneTensor":
        """The same groups with other weights."""
        return OneTensor(pieces, self.counts, self._reduce)

    def sums(self, functions: Functions) -> list[Tensor]:
        """Sums of several functions of the weights over each group, float64. A function's values may be changed here."""
        # Within short rows in their own precision, which is faster, and only then in float64.
        parts = [torch.stack([_by_short_rows(v) for v in functions(piece)]).sum(1, dtype=torch.float64) for piece in self.pieces]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return list((self._reduce(total, "sum") if self._reduce else total).unbind())

    def mean(self, function: Function) -> Tensor:
        """Mean of a function of the weights over each group, float64; 0 where a group is empty."""
        return self.sums(lambda w: (function(w),))[0] / self.counts

    def median(self, function: Function) -> Tensor:
        """Lower median of a non-negative function of the weights over each group; 0 where it is empty."""
        if self._reduce:
            raise ValueError(IN_PARTS)
        if len(self.pieces) > 1 and self.pieces[0].device.type == "cpu":
            return _median_of_many(self.pieces, function)
        values = torch.cat([function(piece).flatten() for piece in self.pieces])
        return values.median() if values.numel() else values.new_zeros(())

    def max(self, function: Function) -> Tensor:
        """Maximum of a non-negative function of the weights over each group; 0 where it is empty."""
        found = [function(piece).max() for piece in self.pieces if piece.numel()]
        largest = torch.stack(found).max() if found else self.pieces[0].new_zeros(())
        return self._reduce(largest, "max") if self._reduce else largest

    def spread(self, values: Tensor) -> Tensor:
        """One value a tensor, to one a group: here a single value."""
        return values[0]

    def by_tensor(self, values: Tensor) -> Tensor:
        """One value a group, to one a tensor, ``(tensors,)``."""
        return values.reshape(1)


class Rows:
    """A group for each row of a matrix ``(rows, n)``; values have the shape ``(rows, 1)``.

    Args:
        matrix: the weights.
        length: of a row, where others hold more of each (a sharded tensor).
        reduce: combines values over all who hold a part of each row.
    """

    def __init__(self, matrix: Tensor, length: int | None = None, reduce: Reduce | None = None) -> None:
        self.pieces = [matrix]
        self.counts = max(matrix.shape[1] if length is None else length, 1)
        self._reduce = reduce

    def holding(self, pieces: Sequence[Tensor]) -> "Rows":
        """The same groups with other weights."""
        return Rows(pieces[0], self.counts, self._reduce)

    def sums(self, functions: Functions) -> list[Tensor]:
        """As ``OneTensor.sums``. A row is short enough to be summed in its own precision, which is faster."""
        found = [value.sum(1, keepdim=True).double() for value in functions(self.pieces[0])]
        return list(self._reduce(torch.stack(found), "sum").unbind()) if self._reduce else found

    def mean(self, function: Function) -> Tensor:
        """As ``OneTensor.mean``."""
        return self.sums(lambda w: (function(w),))[0] / self.counts

    def median(self, function: Function) -> Tensor:
        """As ``OneTensor.median``."""
        if self._reduce:
            raise ValueError(IN_PARTS)
        values = function(self.pieces[0])
        if not values.shape[1]:
            return values.new_zeros(len(values), 1)
        # Where it also finds the medians' places, CUDA's median is refused under deterministic algorithms.
        return values.median(1, keepdim=True).values if values.device.type == "cpu" else _median_by_sorting(values)

    def max(self, function: Function) -> Tensor:
        """As ``OneTensor.max``."""
        values = function(self.pieces[0])
        largest = values.amax(1, keepdim=True) if values.shape[1] else values.new_zeros(len(values), 1)
        return self._reduce(largest, "max") if self._reduce else largest

    def spread(self, values: Tensor) -> Tensor:
        """As ``OneTensor.spread``: all rows are of one tensor."""
        return values[0]


class SideBySide:
    """A group for each of many small tensors, laid side by side into the rows of one matrix: few operations in place of hundreds.

    Each tensor fills whole rows and the rest of its last row is zero, so that a sum within each tensor is a sum over its rows.
    Values are columns: one a row, equal within a tensor.
    """

    def __init__(self, layout: "Layout", rows: Tensor) -> None:
        self._layout = layout
        self.pieces = [rows]
        self.counts = layout.counts

    def holding(self, pieces: Sequence[Tensor]) -> "SideBySide":
        """The same groups with other weights; what lies between the tensors is made zero again."""
        return SideBySide(self._layout, self._layout.zero_between(pieces[0]))

    def sums(self, functions: Functions) -> list[Tensor]:
        """As ``OneTensor.sums``. A row is short enough to be summed in its own precision, which is faster."""
        return [self._layout.over_tensors(self._inside(value).sum(1).double(), "sum") for value in functions(self.pieces[0])]

    def mean(self, function: Function) -> Tensor:
        """As ``OneTensor.mean``."""
        return self.sums(lambda w: (function(w),))[0] / self.counts

    def median(self, function: Function) -> Tensor:
        """As ``OneTensor.median``."""
        views = self._layout.views(function(self.pieces[0]))
        return self.spread(torch.stack([view.median() if view.numel() else view.new_zeros(()) for view in views]))

    def max(self, function: Function) -> Tensor:
        """As ``OneTensor.max``."""
        return self._layout.over_tensors(self._inside(function(self.pieces[0])).amax(1), "max")

    def spread(self, values: Tensor) -> Tensor:
        """One value a tensor, as a column."""
        return self._layout.column(values)

    def by_tensor(self, values: Tensor) -> Tensor:
        """As ``OneTensor.by_tensor``."""
        return self._layout.first_of_each(values)

    def _inside(self, values: Tensor) -> Tensor:
        """A function's values, zero again between the tensors, where it need not be zero at zero."""
        return values if values is self.pieces[0] else self._layout.zero_between(values)


def _median_by_sorting(rows: Tensor) -> Tensor:
    """Lower median of each row, ``(rows, 1)``; NaN where a row has one."""
    ordered = rows.sort(1).values  # NaN last
    return torch.where(ordered[:, -1:].isnan(), torch.nan, ordered[:, [(rows.shape[1] - 1) // 2]])


def _by_short_rows(values: Tensor) -> Tensor:
    """Sums of all within short rows, one dimension; all as they are, in float64, where they do not fill such rows."""
    if values.numel() % Layout.ROW or not values.is_contiguous():
        return values.sum(dtype=torch.float64).view(1)
    return values.view(-1, Layout.ROW).sum(1)


_DIGIT = 16  # bits
_WHOLE = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}  # numbers of the same bits, and how many bits


def _median_of_many(pieces: Sequence[Tensor], function: Function) -> Tensor:
    """Lower median of a non-negative function's values, float32 or float64, of many pieces: counted, where selecting would gather.

    The bits of non-negative floats, read as whole numbers, are in the floats' order. The median's are found digit by digit.
    """
    dtype = function(pieces[0][:0]).dtype
    whole, bits = _WHOLE[dtype]
    rank = (sum(piece.numel() for piece in pieces) - 1) // 2
    places = 2**_DIGIT + 2  # one for each digit, and on either side one for numbers whose first digits are not those found
    found = 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(places, dtype=torch.int64, device=pieces[0].device)
        for piece in pieces:
            number = function(piece).flatten().view(whole)
            place = (number >> shift if shift else number).sub((found << _DIGIT) - 1).clamp_(0, places - 1)
            counts += torch.bincount(place, minlength=places)
        found = (found << _DIGIT) - 1 + int(torch.searchsorted(counts.cumsum(0), rank, right=True))
    return torch.tensor(found, dtype=whole, device=pieces[0].device).view(dtype)


Groups = OneTensor | Rows | SideBySide


class Layout:
    """Where tensors of one device and dtype lie side by side in the rows of a matrix."""

    ROW = 256  # entries: short enough that the smallest convolution wastes little, long enough for vector units

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        counts = [tensor.numel() for tensor in tensors]
        lengths = [max(1, -(-count // self.ROW)) for count in counts]
        device = tensors[0].device
        self.shape = (sum(lengths), self.ROW)
        self._lengths = torch.tensor(lengths, device=device)
        self._tensor_of_row = torch.repeat_interleave(torch.arange(len(tensors), device=device), self._lengths)
        self._first_rows = self._lengths.cumsum(0) - self._lengths
        self.counts = self.column(torch.tensor(counts, dtype=torch.float64, device=device).clamp(min=1))
        self._places = []
        first = 0
        for tensor, count, length in zip(tensors, counts, lengths, strict=True):
            # The strides of the tensor itself, so that copying to and from a channels_last weight is a plain copy.
            strides = tensor.stride() if is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            self._places.append((tensor.shape, strides, first * self.ROW, count, length * self.ROW))
            first += length

    def read(self, tensors: Sequence[Tensor]) -> SideBySide:
        """The tensors' weights, copied into a new matrix."""
        rows = torch.empty(self.shape, dtype=tensors[0].dtype, device=tensors[0].device)
        self.zero_between(rows)
        torch._foreach_copy_(self.views(rows), list(tensors))
        return SideBySide(self, rows)

    def views(self, rows: Tensor) -> list[Tensor]:
        """The tensors inside a matrix, each in its own shape."""
        return [torch.as_strided(rows, shape, strides, offset) for shape, strides, offset, _, _ in self._places]

    def zero_between(self, rows: Tensor) -> Tensor:
        """Makes zero, in place, what lies between the tensors."""
        gaps = [torch.as_strided(rows, (end - count,), (1,), at + count) for _, _, at, count, end in self._places if end > count]
        if gaps:
            torch._foreach_zero_(gaps)
        return rows

    def column(self, values: Tensor) -> Tensor:
        """One value a tensor, as a column of one value a row."""
        return values[self._tensor_of_row].unsqueeze(1)

    def first_of_each(self, column: Tensor) -> Tensor:
        """A column's value in the first row of each tensor."""
        return column[self._first_rows, 0]

    def over_tensors(self, of_rows: Tensor, how: str) -> Tensor:
        """One value a row, to their sum or maximum over each tensor's rows, as a column."""
        return self.column(torch.segment_reduce(of_rows, how, lengths=self._lengths, unsafe=True))


def is_dense(tensor: Tensor) -> bool:
    """True where the strides cover the tensor's entries without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
