"""Many tensors in one buffer, so that a step over a whole network is a few large operations and not hundreds of small ones."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class OneTensor:
    """Means within one whole tensor: what a quantizer uses unless it is told otherwise."""

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of ``x``, or of the entries of ``x`` where ``mask`` is 1 and not 0 (0 where none is); float64, so that no sum
        overflows and counts are exact."""
        if mask is None:
            return x.sum(dtype=torch.float64) / max(x.numel(), 1)
        return (x * mask).sum(dtype=torch.float64) / mask.sum(dtype=torch.float64).clamp(min=1)


ONE_TENSOR = OneTensor()


class SideBySide:
    """Tensors of one device and one dtype, laid side by side into the rows of one matrix.

    Each tensor fills whole rows and the rest of its last row is zero, so that an elementwise operation on ``rows`` treats all
    tensors at once and a sum within each tensor is a sum over its rows. Tensors are copied in and out
    through ``views``. The zeros between them must not be relied on after an operation.
    """

    ROW = 256  # entries: short enough that the smallest convolution wastes little, long enough for vector units

    def __init__(self, like: Sequence[Tensor]) -> None:
        counts = [tensor.numel() for tensor in like]
        lengths = [max(1, -(-count // self.ROW)) for count in counts]
        device = like[0].device
        self.shape = (sum(lengths), self.ROW)
        self._counts = torch.tensor(counts, dtype=torch.float64, device=device)
        self._lengths = torch.tensor(lengths, device=device)
        self._tensor_of_row = torch.repeat_interleave(torch.arange(len(like), device=device), self._lengths)
        self._layout = []
        first = 0
        for tensor, length in zip(like, lengths, strict=True):
            # The strides of the tensor itself, so that copying to and from a channels_last weight is a plain copy.
            strides = tensor.stride() if _is_dense(tensor) else torch.empty(tensor.shape, device="meta").stride()
            self._layout.append((tensor.shape, strides, first * self.ROW))
            first += length

    def empty(self, like: Tensor) -> Tensor:
        """A new matrix of zeros with the dtype and device of ``like``."""
        return torch.zeros(self.shape, dtype=like.dtype, device=like.device)

    def views(self, rows: Tensor) -> list[Tensor]:
        """The tensors inside the matrix ``rows``, each in its own shape."""
        return [torch.as_strided(rows, shape, strides, offset) for shape, strides, offset in self._layout]

    def spread(self, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
        """One value a tensor, as a column that broadcasts against the matrix."""
        column = torch.as_tensor(values, dtype=like.dtype, device=like.device)
        return column[self._tensor_of_row].unsqueeze(1)

    def mean(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As ``OneTensor.mean``, within each tensor: a column with the mean of the tensor that the row belongs to.

        Without a mask the zeros between tensors must still be zero.
        """
        if mask is None:
            return self._column(self._sums(x) / self._counts.clamp(min=1))
        return self._column(self._sums(x * mask) / self._sums(mask).clamp(min=1))

    def _sums(self, x: Tensor) -> Tensor:
        in_rows = x.sum(dim=1).double()  # a row is short enough to be summed in its own precision, which is faster
        return torch.segment_reduce(in_rows, "sum", lengths=self._lengths, unsafe=True)

    def _column(self, values: Tensor) -> Tensor:
        return values[self._tensor_of_row].unsqueeze(1)

    def apply(self, function: Callable[..., Tensor], rows: Tensor, *arguments: float | Tensor, together: bool) -> Tensor:
        """``function(tensor, *arguments)`` for every tensor in ``rows``; a new matrix.

        Args:
            function: a quantizer or proximal operator of one tensor.
            rows: the tensors, as a matrix of this layout.
            arguments: numbers, tensors of no dimension, or columns made by ``spread``.
            together: True calls ``function`` once on the whole matrix with ``within=self``; False calls it tensor by tensor.
        """
        if together:
            return function(rows, *arguments, within=self)
        result = torch.zeros_like(rows)
        starts = [offset // self.ROW for _, _, offset in self._layout]
        for start, tensor, place in zip(starts, self.views(rows), self.views(result), strict=True):
            own = [argument[start, 0] if isinstance(argument, Tensor) and argument.dim() else argument for argument in arguments]
            place.copy_(function(tensor, *own))
        return result


Within = OneTensor | SideBySide


def _is_dense(tensor: Tensor) -> bool:
    """True where the strides cover the tensor's entries without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
