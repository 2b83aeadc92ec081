"""The table of a packed file: a line for all tensors of one kind and shape, see docs/packed-format.md."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

import torch
from torch import Tensor

from quantize import codes
from quantize.codes import MOST_VALUES, Coded

# The container's words for types of numbers.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}

# Far above any network's; they bound what reading a hostile table costs.
_MOST_TENSORS, _MOST_LENGTH = 100_000, 1 << 40


class PackedError(ValueError):
    """What cannot be packed, or is no packed network, said in one line."""


@dataclass(frozen=True)
class Line:
    """A line of the table: tensors of one kind and shape. As text: kind, shape, last words of the names, patterns of the layers.

    Attributes:
        dtype, shape: of each tensor.
        last: the last words of the names, separated by ``|``.
        layers: patterns of the layers that hold tensors of these names; none for names without a layer.
        once: all hold the same number, which is stored once.
        levels: of coded tensors: how many a table has, which says the coding, or "sign"; None of others.
        by_row, upper: whether each row has a table, and whether only the upper half of a symmetric table is stored.
    """

    dtype: str
    shape: tuple[int, ...]
    last: str
    layers: tuple[str, ...]
    once: bool = False
    levels: int | str | None = None
    by_row: bool = False
    upper: bool = False

    def __str__(self) -> str:
        kind = self.dtype + ("/once" if self.once else "")
        if self.levels is not None:
            kind += f"/{self.levels}" + ("/row" if self.by_row else "") + ("/upper" if self.upper else "")
        return " ".join((kind, ",".join(map(str, self.shape)) or "-", self.last, *self.layers))

    @classmethod
    def of(cls, text: str) -> "Line":
        """Raises PackedError where it is no line that ``pack`` writes."""
        found = _LINE.fullmatch(text)
        if found is None:
            raise PackedError(f"damaged: {text[:100]!r} in its table describes no tensors")
        dtype, once, levels, by_row, upper, sides, last, layers = found.groups()
        shape = tuple(int(side) for side in sides.split(",")) if sides != "-" else ()
        if levels not in (None, "sign"):
            levels = int(levels)
        line = cls(dtype, shape, last, tuple(layers.split(" ")[1:]), bool(once), levels, bool(by_row), bool(upper))
        if not line._sound():
            raise PackedError(f"damaged: {text[:100]!r} in its table describes no tensors")
        return line

    def _sound(self) -> bool:
        good = self.dtype in DTYPES and len(self.shape) <= 64 and math.prod(max(side, 1) for side in self.shape) <= _MOST_LENGTH
        if self.once:
            return good and math.prod(self.shape) == 1
        if self.levels is None:
            return good
        good = good and self.dtype in FLOATS and 0 not in self.shape
        if self.levels == "sign":
            return good and not self.by_row and not self.upper
        good = good and (not self.by_row or (len(self.shape) > 1 and self.shape[0] > 1))
        return good and (2 if self.upper else 1) <= self.levels <= MOST_VALUES

    def sizes(self) -> Iterator[tuple[int, int]]:
        """How many tensors each pattern stands for, and how many letters their names have at most, without making any."""
        lasts = self.last.split("|")
        for pattern in self.layers or ("",):
            words = [part.split("|") for part in pattern.split(".")]
            count = math.prod(map(len, words)) * len(lasts)
            yield count, count * (sum(max(map(len, part)) + 1 for part in words) + max(map(len, lasts)))

    def names(self) -> list[str]:
        """Of all its tensors, in the order in which the file holds them."""
        lasts = list(map(unquote, self.last.split("|")))
        if not self.layers:
            return lasts
        spelled = (itertools.product(*(words.split("|") for words in pattern.split("."))) for pattern in self.layers)
        return [f"{layer}.{last}" for words in spelled for one in words for layer in [unquote(".".join(one))] for last in lasts]

    @property
    def _coding(self) -> tuple[str, int, int]:
        """The coding, and how many tables of how many stored levels there are."""
        coding, values = ("sign", 2) if self.levels == "sign" else (codes.coding_for(self.levels), self.levels)
        return coding, self.shape[0] if self.by_row else 1, codes.stored_values(coding, values, self.upper)

    @property
    def nbytes(self) -> int:
        """Bytes that one of the tensors takes."""
        count, size = math.prod(self.shape), DTYPES[self.dtype].itemsize
        if self.levels is None:
            return count * size
        coding, tables, stored = self._coding
        return tables * stored * size + codes.packed_bytes(coding, count)

    def read(self, data: memoryview) -> Tensor | Coded:
        """A tensor, from its bytes; raises ValueError on codes or levels that cannot be."""
        dtype = DTYPES[self.dtype]
        if self.levels is None:
            found = _tensor(data, torch.uint8 if dtype is torch.bool else dtype)
            if dtype is torch.bool and (found > 1).any():
                raise ValueError("an entry is neither 0 nor 1")
            return found.view(dtype).view(self.shape)
        coding, tables, stored = self._coding
        begin = tables * stored * dtype.itemsize
        levels = codes.signs(dtype) if coding == "sign" else _tensor(data[:begin], dtype).view(tables, stored)
        if self.upper:
            levels = codes.mirror(levels, self.levels)
        packed = _tensor(data[begin:], torch.uint8)
        coded = Coded(torch.Size(self.shape), dtype, coding, packed, levels, self.upper)
        codes.check(coded)
        return coded


# Kind (dtype, or with what else belongs to it), shape, last words, layers. Numbers are bounded before they are read.
_LINE = re.compile(
    r"([A-Z0-9]+)(?:(/once)|/(sign|[0-9]{1,3})(/row)?(/upper)?)? (-|[0-9]{1,13}(?:,[0-9]{1,13}){0,63}) ([^ ]*)((?: [^ ]*)*)",
    re.ASCII,
)


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A tensor of its own memory, on the CPU; numbers are little-endian, as on every machine that torch runs on."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0, dtype=dtype, device="cpu")


def lines_of(tensors: Mapping[str, Tensor | Coded]) -> Iterator[Line]:
    """The table of tensors."""
    numbers: dict[tuple, list[str]] = {}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            bits = tuple(value.flatten().view(torch.uint8).tolist())
            numbers.setdefault((value.dtype, value.shape, bits), []).append(name)
    once = {name: number for number, names in enumerate(numbers.values()) if len(names) > 1 for name in names}
    alike: dict[tuple, dict[str, list[str]]] = {}
    for name, value in tensors.items():
        kind: tuple = ()
        if isinstance(value, Coded):
            kind = ("sign" if value.coding == "sign" else value.levels.shape[1], value.by_row, value.symmetric)
        layer, last = _split(name)
        key = (WORDS[value.dtype], tuple(value.shape), once.get(name), kind, layer is None)
        alike.setdefault(key, {}).setdefault(last, []).append(layer)
    # Wide numbers and what is not coded come first, so that all of these lie at multiples of their width.
    order = sorted(alike.items(), key=lambda item: (item[0][3] != (), -DTYPES[item[0][0]].itemsize))
    for (dtype, shape, number, kind, top), members in order:
        together: dict[tuple, list[str]] = {}
        for last, layers in members.items():
            together.setdefault(tuple(layers), []).append(_quote(last))
        for layers, lasts in together.items():
            patterns = () if top else tuple(_patterns(layers))
            yield Line(dtype, shape, "|".join(lasts), patterns, number is not None, *kind)


def _split(name: str) -> tuple[str | None, str]:
    layer, point, last = name.rpartition(".")
    return (layer if point else None), last


def _patterns(layers: Iterable[str]) -> Iterator[str]:
    """Names as ``layer1.0|1.conv1|conv2``: those that differ in one place only have the words there together."""
    found = [tuple((_quote(word),) for word in layer.split(".")) for layer in layers]
    for place in reversed(range(max(map(len, found)))):
        merged: dict[tuple, list[str]] = {}
        for words in found:
            before, here, after = words[:place], words[place : place + 1], words[place + 1 :]
            merged.setdefault((before, len(here), after), []).extend(word for part in here for word in part)
        found = [(*before, tuple(here), *after) if there else before for (before, there, after), here in merged.items()]
    for words in found:
        yield ".".join("|".join(part) for part in words)


def _quote(word: str) -> str:
    """With the characters that patterns are made of, and those beyond ASCII, written as in the addresses of pages."""
    return quote(word, safe="!\"#$&'()*+,/:;<=>?@[\\]^`{}")


def check_sizes(lines: Iterable[Line], size: int) -> None:
    """Raises PackedError where lines stand for more tensors, or longer names, than a file of such a size may have."""
    tensors = letters = 0
    for line in lines:
        for count, length in line.sizes():
            tensors, letters = tensors + count, letters + length
            if tensors > min(_MOST_TENSORS, 4096 + size) or letters > (1 << 20) + 16 * size:
                raise PackedError(f"{tensors} tensors in a file of {size} bytes: that is beyond what is accepted")
