"""A tensor of few values as codes of a few bits and a table of levels, to the last bit.

The byte layout is stated in docs/packed-format.md. Codes count the levels of a table from its smallest; a tensor has one table,
or each of its rows (the first dimension, the rest flattened) has its own.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_VALUES = 256

# Values that a code can take. "sign" has the levels -1 and +1, which are not stored.
CODINGS = {"sign": 2, "base3": 3, **{f"bits{k}": 2**k for k in range(1, 9)}}

# Floating-point numbers, read as integers of their width, are in order once the negative ones are turned round.
_INTEGERS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Coded:
    """A tensor of few values.

    Attributes:
        shape, dtype: of the tensor.
        coding: one of ``CODINGS``.
        codes: uint8, ``(packed_bytes(coding, count),)``.
        levels: ``(tables, values)`` of the tensor's dtype, ascending; one table, or one for each row. In the coding "sign"
            ``[[-1, 1]]``.
        symmetric: whether each table is its upper half, mirrored, with a 0 between the halves if the number of levels is odd.
    """

    shape: torch.Size
    dtype: torch.dtype
    coding: str
    codes: Tensor
    levels: Tensor
    symmetric: bool = False

    @property
    def by_row(self) -> bool:
        """Whether each row has a table of its own."""
        return len(self.levels) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of codes and of the levels that are stored."""
        return self.codes.nbytes + self.stored_levels.nbytes

    @property
    def stored_levels(self) -> Tensor:
        """``(tables, stored)``: the levels that the others follow from, none in the coding "sign"."""
        return self.levels[:, self.levels.shape[1] - stored_values(self.coding, self.levels.shape[1], self.symmetric) :]


def encode(w: Tensor, most: int = MOST_VALUES, by_row: bool = True) -> Coded:
    """Codes and levels of a tensor: those of the whole tensor or of its rows, whichever take fewer bytes.

    Args:
        w: floating-point, of any shape, not empty.
        most: distinct values that a table may have.
        by_row: False refuses tables by row.

    Raises:
        ValueError: if the tensor holds more values, or one that is not a finite number. The line is about "it".
    """
    if w.dtype not in _INTEGERS or not w.numel():
        raise ValueError(f"it is of dtype {w.dtype} and shape {tuple(w.shape)}: floating-point numbers are needed")
    w = w.detach().cpu().contiguous()
    if not w.isfinite().all():
        raise ValueError("it holds values that are not finite numbers")
    if bool((w.abs() == 1).all()):
        return Coded(w.shape, w.dtype, "sign", _pack((w > 0).flatten().to(torch.uint8), "sign"), signs(w.dtype))
    keys = _ordered(w.view(_INTEGERS[w.dtype]) if w.dim() else w.view(1).view(_INTEGERS[w.dtype]))
    tables = {"the tensor": _distinct(keys.reshape(1, -1))}
    if by_row and w.dim() > 1 and len(w) > 1 and not 1 <= tables["the tensor"].shape[1] <= 2:
        tables["a row"] = _distinct(keys.reshape(len(w), -1))
    fitting = [found for found in tables.values() if found.shape[1] and _count(found, w.dtype) <= most]
    if not fitting:
        held = " and ".join(f"{_said(found, w.dtype)} in {words}" for words, found in tables.items())
        raise ValueError(f"it holds {held} where at most {most} distinct values are expected")
    candidates = [(found, False) for found in fitting]
    candidates += [(found, True) for table in fitting if (found := _mirrored(table)) is not None]
    table, symmetric = min(candidates, key=lambda found: _bytes(*found, w))
    codes = torch.searchsorted(table, keys.reshape(len(table), -1)).to(torch.uint8).flatten()
    coding = coding_for(table.shape[1])
    return Coded(w.shape, w.dtype, coding, _pack(codes, coding), _ordered(table).view(w.dtype), symmetric)


def mirror(upper: Tensor, values: int) -> Tensor:
    """``(tables, values)`` levels of symmetric tables, from their upper halves."""
    middle = upper.new_zeros(len(upper), values % 2)
    return torch.cat((-upper.flip(1), middle, upper), dim=1)


def stored_values(coding: str, values: int, symmetric: bool) -> int:
    """How many of a table's levels are stored: the greatest, of which the others follow."""
    return 0 if coding == "sign" else values // 2 if symmetric else values


def decode(coded: Coded) -> Tensor:
    """The tensor, bit for bit that which was encoded, on the device of the codes."""
    count, values = math.prod(coded.shape), coded.levels.shape[1]
    base, each = _digits_of(coded.coding)
    if not coded.by_row and each:  # by far the most frequent: a byte's values are looked up at once
        found = coded.levels[0][_digits(base, each, coded.codes.device).clamp(max=values - 1).int()]
        return found.index_select(0, coded.codes.int()).flatten()[:count].view(coded.shape)
    codes = _unpack(coded.codes, coded.coding, count).int().view(len(coded.levels), -1)
    codes += torch.arange(0, coded.levels.numel(), values, dtype=torch.int32, device=codes.device)[:, None]
    return coded.levels.flatten().index_select(0, codes.flatten()).view(coded.shape)


def check(coded: Coded) -> None:
    """Raises ValueError where codes or levels are none that ``encode`` makes; the line is about "it"."""
    if not coded.levels.isfinite().all() or (coded.levels.diff(dim=1) < 0).any():
        raise ValueError("its levels are not finite numbers in ascending order")
    (base, each), count, values = _digits_of(coded.coding), math.prod(coded.shape), coded.levels.shape[1]
    if each and int(coded.codes.max()) >= base**each:
        raise ValueError(f"its codes go beyond {base**each - 1} in a byte")
    left = base ** (count % each) if each else 2 ** (count * (base.bit_length() - 1) % 8)  # values of what the last byte holds
    if left > 1 and int(coded.codes[-1]) >= left:
        raise ValueError(f"its codes go beyond its {count} values")
    if values < base and int(_unpack(coded.codes, coded.coding, count).max()) >= values:
        raise ValueError(f"its codes go beyond its {values} levels")


def coding_for(values: int) -> str:
    """The coding for so many levels."""
    return "base3" if values == 3 else f"bits{max(1, math.ceil(math.log2(values)))}"


def packed_bytes(coding: str, count: int) -> int:
    """Bytes that so many codes take."""
    base, each = _digits_of(coding)
    return -(-count // each) if each else -(-count * (base.bit_length() - 1) // 8)


def signs(dtype: torch.dtype) -> Tensor:
    """The levels of the coding "sign", on the CPU."""
    return torch.tensor([[-1.0, 1.0]], dtype=dtype, device="cpu")


def _digits_of(coding: str) -> tuple[int, int]:
    """Values of a code, and how many codes a byte holds; 0 of them where codes reach over the edges of bytes."""
    base = CODINGS[coding]
    return base, {2: 8, 3: 5, 4: 4, 16: 2, 256: 1}.get(base, 0)


@functools.lru_cache(maxsize=64)
def _digits(base: int, each: int, device: torch.device) -> Tensor:
    """``(256, each)`` uint8: the codes that each byte holds, the first one its lowest digit."""
    powers = torch.tensor([base**place for place in range(each)], device=device)
    return (torch.arange(256, device=device)[:, None] // powers % base).to(torch.uint8)


def _pack(codes: Tensor, coding: str) -> Tensor:
    base, each = _digits_of(coding)
    if not each:
        bits = codes[:, None] >> torch.arange(base.bit_length() - 1, dtype=torch.uint8, device=codes.device) & 1
        return _pack(bits.flatten(), "bits1")
    padded = torch.nn.functional.pad(codes, (0, -len(codes) % each)).view(-1, each)
    powers = torch.tensor([base**place for place in range(each)], dtype=torch.uint8, device=codes.device)
    return (padded * powers).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, coding: str, count: int | None = None) -> Tensor:
    """The first ``count`` codes; with None all, those that fill up the last bytes too."""
    base, each = _digits_of(coding)
    if each:
        return _digits(base, each, packed.device).index_select(0, packed.int()).flatten()[:count]
    width = base.bit_length() - 1
    bits = _unpack(packed, "bits1")
    whole = torch.nn.functional.pad(bits, (0, -len(bits) % width)).view(-1, width)
    return (whole << torch.arange(width, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)[:count]


def _ordered(integers: Tensor) -> Tensor:
    """From floats read as integers to integers in the floats' order, -0.0 before 0.0, and back."""
    return torch.where(integers < 0, integers ^ torch.iinfo(integers.dtype).max, integers)


def _distinct(rows: Tensor) -> Tensor:
    """``(rows, values)``: each row's distinct entries, ascending, the last one repeated; no values if they are too many."""
    ordered = rows.sort(dim=1).values
    place = torch.zeros_like(ordered, dtype=torch.int32)
    place[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1, dtype=torch.int32)
    values = int(place[:, -1].max()) + 1
    if values > MOST_VALUES:
        return ordered[:, :0]
    return ordered[:, -1:].repeat(1, values).scatter_(1, place.long(), ordered)


def _count(table: Tensor, dtype: torch.dtype) -> int:
    """Distinct numbers in a row of a table at most; -0.0 and 0.0 are one."""
    numbers = _ordered(table).view(dtype)
    return int((numbers.diff(dim=1) > 0).sum(1).max()) + 1


def _said(table: Tensor, dtype: torch.dtype) -> str:
    return str(_count(table, dtype)) if table.shape[1] else f"more than {MOST_VALUES}"


def _mirrored(table: Tensor) -> Tensor | None:
    """Symmetric tables that have all the entries of the given ones; None if codes would grow. Here ~key is the key of -x."""
    positive = torch.where(table < 0, ~table, table)
    zero = positive == 0
    if bool((zero & (table == 0)).any()) and not bool((table == -1).any()):  # 0.0 stands in the middle; -0.0 cannot
        positive = torch.where(zero, positive.amax(1, keepdim=True), positive)  # a row of zeros has zeros at its ends too
        middle = table.new_zeros(len(table), 1)
    else:
        middle = table[:, :0]
    upper = _distinct(positive)
    found = torch.cat((~upper.flip(1), middle, upper), dim=1)
    return found if coding_for(found.shape[1]) == coding_for(table.shape[1]) else None


def _bytes(table: Tensor, symmetric: bool, w: Tensor) -> int:
    coding, values = coding_for(table.shape[1]), table.shape[1]
    return packed_bytes(coding, w.numel()) + len(table) * stored_values(coding, values, symmetric) * w.element_size()
