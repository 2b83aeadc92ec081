"""Where a step's work is done: the weights of a network in blocks, each treated as a whole and in pieces of cache size.

Small tensors are copied side by side into one block; a large one is worked on where it lies. Nothing of a model's size is held.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from quantize.groups import Groups, Layout, OneTensor, Rows, is_dense
from quantize.shards import has_whole_rows, is_sharded, local, over_shards

# Entries, by device type. On a CPU a piece and its temporaries stay in a core's cache; on a GPU few launches count.
PIECE = {"cpu": 2**18}
SMALL = {"cpu": 2**16}  # tensors below are laid side by side ...
SIDE_BY_SIDE = {"cpu": 2**19}  # ... up to so many entries in a block
ELSEWHERE = 2**24


class Block(Protocol):
    """Some of a network's tensors, or a part of one.

    Attributes:
        indices: the places of its tensors in the list that ``read`` and ``write`` are given.
    """

    indices: list[int]

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        """Its weights in groups: views of the tensors, or copies."""
        ...

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        """Puts weights into the tensors, where they are not there already."""
        ...


class SmallTensors:
    """Many small tensors, side by side in a copy."""

    def __init__(self, indices: Sequence[int], tensors: Sequence[Tensor]) -> None:
        self.indices = list(indices)
        self._layout = Layout([tensors[index] for index in indices])

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        return self._layout.read([tensors[index] for index in self.indices])

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_([tensors[index] for index in self.indices], self._layout.views(x.pieces[0]))


class LargeTensor:
    """One tensor with one set of levels, in pieces; a part of it where it is sharded over processes."""

    def __init__(self, index: int) -> None:
        self.indices = [index]
        self._index = index

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        tensor = tensors[self._index]
        pieces = list(in_memory_order(local(tensor)).split(piece_size(tensor.device)))
        if not is_sharded(tensor):
            return OneTensor(pieces)
        return OneTensor(pieces, tensor.numel(), over_shards(tensor))

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        _copy_elsewhere(x, self.read(tensors))


class SomeEntries:
    """Entries of one tensor, each to be treated by itself."""

    def __init__(self, index: int, first: int, last: int) -> None:
        self.indices = [index]
        self._index, self._entries = index, slice(first, last)

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        return OneTensor([in_memory_order(tensors[self._index])[self._entries]])

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        _copy_elsewhere(x, self.read(tensors))


class SomeRows:
    """Rows of one tensor, each with levels of its own; of a sharded tensor all rows, and of each the part that is here."""

    def __init__(self, index: int, first: int, last: int) -> None:
        self.indices = [index]
        self._index, self._rows = index, slice(first, last)

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        tensor, here = tensors[self._index], local(tensors[self._index])
        matrix = in_memory_order(here).view(len(here), here.numel() // max(1, len(here)))[self._rows]
        if not is_sharded(tensor) or has_whole_rows(tensor):
            return Rows(matrix)
        return Rows(matrix, tensor.numel() // max(1, len(tensor)), over_shards(tensor, of_rows=True))

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        _copy_elsewhere(x, self.read(tensors))


class ScatteredTensor:
    """One tensor whose entries have gaps between them or overlap in memory: worked on in a copy."""

    def __init__(self, index: int, by_row: bool) -> None:
        self.indices = [index]
        self._index, self._by_row = index, by_row

    def read(self, tensors: Sequence[Tensor]) -> Groups:
        copy = tensors[self._index].detach().clone(memory_format=torch.contiguous_format)
        return Rows(copy.view(len(copy), -1)) if self._by_row else OneTensor([copy])

    def write(self, x: Groups, tensors: Sequence[Tensor]) -> None:
        tensors[self._index].copy_(x.pieces[0].view(tensors[self._index].shape))


def _copy_elsewhere(x: Groups, places: Groups) -> None:
    for piece, place in zip(x.pieces, places.pieces, strict=True):
        if piece.data_ptr() != place.data_ptr():
            place.copy_(piece)


def blocks_of(tensors: Sequence[Tensor], by_row: bool, fits: bool) -> list[Block]:
    """The blocks of the tensors; those of one block are of one device and dtype.

    Args:
        tensors: the parameters.
        by_row: whether each row has levels of its own.
        fits: whether levels are taken from the weights at all; else each part of a tensor is a block of its own.
    """
    small: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    blocks: list[Block] = []
    for index, tensor in enumerate(tensors):
        by_rows = by_row and tensor.dim() > 0
        if is_sharded(tensor):
            here = local(tensor)
            if not by_rows:
                blocks.append(LargeTensor(index))
            elif has_whole_rows(tensor):
                blocks += _rows(index, here)
            else:  # all rows at once: every process then takes part in each sum
                blocks.append(SomeRows(index, 0, len(here)))
        elif not is_dense(tensor) or (by_rows and not _rows_in_order(tensor)):
            blocks.append(ScatteredTensor(index, by_rows))
        elif by_rows:
            blocks += _rows(index, tensor)
        elif tensor.numel() < SMALL.get(tensor.device.type, ELSEWHERE):
            small.setdefault((tensor.device, tensor.dtype), []).append(index)
        elif fits:
            blocks.append(LargeTensor(index))
        else:
            blocks += [SomeEntries(index, *part) for part in _parts(tensor.numel(), piece_size(tensor.device))]
    for (device, _), together in small.items():
        limit, part, filled = SIDE_BY_SIDE.get(device.type, ELSEWHERE), [], 0
        for index in together:
            if part and filled + tensors[index].numel() > limit:
                blocks.append(SmallTensors(part, tensors))
                part, filled = [], 0
            part.append(index)
            filled += tensors[index].numel()
        blocks.append(SmallTensors(part, tensors))
    return blocks


def _rows(index: int, tensor: Tensor) -> list[Block]:
    length = max(1, tensor.numel() // max(1, len(tensor)))
    return [SomeRows(index, *part) for part in _parts(len(tensor), max(1, piece_size(tensor.device) // length))]


def _parts(count: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def piece_size(device: torch.device) -> int:
    """Entries that are worked on at a time."""
    return PIECE.get(device.type, ELSEWHERE)


def in_memory_order(tensor: Tensor) -> Tensor:
    """All entries of a dense tensor as one dimension, a view."""
    return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())


def _rows_in_order(tensor: Tensor) -> bool:
    """Whether the first dimension is the outermost in memory, as in contiguous and in channels_last tensors."""
    return len(tensor) < 2 or tensor.stride(0) * len(tensor) == tensor.numel()
