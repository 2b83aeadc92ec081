"""Tensors that are sharded over processes (FSDP2): each process works on its own part, and no weights travel.

What combines values over the parts is a call that all processes make, in the same order.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quantize.groups import Reduce


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's distributed tensors."""
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies tensors into others of the same form, each process its own parts."""
    if targets:
        torch._foreach_copy_([local(target) for target in targets], [local(source) for source in sources])


def has_whole_rows(tensor: Tensor) -> bool:
    """Whether a sharded tensor is cut between its rows only."""
    return all(placement.is_replicate() or placement.dim == 0 for placement in tensor.placements)


def part(tensor: Tensor) -> tuple[int, ...]:
    """Which part of a tensor is here: its place among the shards of each dimension that is cut, nothing where it is whole."""
    if not is_sharded(tensor):
        return ()
    return tuple(tensor.device_mesh.get_local_rank(dimension) for dimension in _cut(tensor))


def over_all(tensor: Tensor, value: Tensor, how: str) -> Tensor:
    """The sum or maximum (``how``) of a value over all who hold a part of a tensor; the value itself where it is whole."""
    return over_shards(tensor)(value, how) if is_sharded(tensor) else value


def over_group(tensor: Tensor, by_row: bool, values: Tensor, how: str) -> Tensor:
    """The sum or maximum of one value for the whole tensor, or of one for each row here, over all who hold parts of the same."""
    return over_shards(tensor, by_row)(values, how) if is_sharded(tensor) else values


def over_shards(tensor: Tensor, of_rows: bool = False) -> Reduce:
    """Combines a value over all who hold a part of a sharded tensor; with ``of_rows`` one for each row here, over all who hold a
    part of the same rows."""
    cut = [dimension for dimension in _cut(tensor) if not (of_rows and tensor.placements[dimension].dim == 0)]
    groups = [tensor.device_mesh.get_group(dimension) for dimension in cut]

    def combined(value: Tensor, how: str) -> Tensor:
        value = value.clone()
        for group in groups:
            dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group)
        return value

    return combined


def _cut(tensor: Tensor) -> list[int]:
    """The dimensions of the processes' mesh over which a tensor is cut."""
    # Not is_shard(): it is False of the shards that FSDP2 cuts out of those of tensor parallelism.
    return [dimension for dimension, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def is_first(tensors: Iterable[Any]) -> bool:
    """Whether this process is the first of those that hold a part of them; so it is where none is sharded."""
    return not any(any(tensor.device_mesh.get_coordinate() or ()) for tensor in tensors if is_sharded(tensor))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor in each process; itself where it is not sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
