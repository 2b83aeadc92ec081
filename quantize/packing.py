"""Trained networks as a file of bits: quantized tensors as codes and levels, everything else as it is.

The container is safetensors; docs/packed-format.md states the format to the bit. All tensors lie in one array, and the table says
once what many have in common, since an entry for each would be a fifth of a small network's file. Reading gives back every tensor
bit for bit, and takes nothing on trust: a file that is damaged, or was made to do harm, is refused before anything of the size
that it claims is made.
"""

import contextlib
import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from quantize import codes
from quantize.codes import MOST_VALUES, Coded
from quantize.optimizer import ProjectedOptimizer

VERSION = "2"
KEY = "proxquant"  # of the version in the container's metadata, which also holds mode, facts and table
ARRAY = "tensors"  # the container's only one
_ORDER = {"bit_order": "lowest first"}

# Values that a tensor has in the modes whose quantizer is fixed; a further one is an error there and no reason for more bits.
VALUES = {"lazy": 2, "prox": 2, "stoch_bin": 2, "prox_ternary": 3, "ttq": 3}

# The container's words for types of numbers.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = _FLOATS | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}

# Far above any network's; they bound what reading a hostile file costs.
_MOST_HEADER, _MOST_TENSORS, _MOST_LENGTH = 1 << 22, 100_000, 1 << 40
_CHECKSUM = 4  # bytes at the end


class PackedError(ValueError):
    """What cannot be packed, or is no packed network, said in one line."""


@dataclass(frozen=True)
class Packed:
    """A packed network.

    Attributes:
        mode: name of the projection mode; of several, all with commas.
        facts: plain values about the network, as they were given to ``pack``.
        tensors: by name, the quantized ones as codes and levels.
    """

    mode: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor | Coded]

    def state_dict(self) -> dict[str, Tensor]:
        """All as tensors, bit for bit those that were packed."""
        return {name: codes.decode(value) if isinstance(value, Coded) else value for name, value in self.tensors.items()}


def save_packed(
    path: str | os.PathLike, model: nn.Module, optimizer: ProjectedOptimizer, facts: Mapping[str, Any] | None = None
) -> None:
    """Writes the finished network: what the optimizer quantizes hard-quantized (frozen or not), the rest of the model as it is.

    Args:
        path: of the file; it is written whole or not at all.
        model: whose state_dict is packed. It may be in training, and is left as it is.
        optimizer: over parameters of this model, under the names that they have in its state_dict.
        facts: plain values to be kept beside it, see ``Packed``.

    Raises:
        PackedError: if a name is not the model's, a parameter holds a number that is not finite or a quantized tensor more values
            than its mode has.
        OSError: if the file cannot be written.
    """
    held, quantized = model.state_dict(keep_vars=True), optimizer.quantized()
    missing = [name for name in quantized if name not in held]
    if missing:
        raise PackedError(f"{missing[0]!r}, which the optimizer quantizes, is no name in the model's state_dict")
    of_parameter = {id(held[name]): name for name in quantized}  # one that layers share is quantized under all its names
    state, coded = {}, []
    for name, value in held.items():
        if isinstance(value, nn.Parameter) and not value.isfinite().all():
            raise PackedError(f"{name!r}: it holds values that are not finite numbers")
        source = of_parameter.get(id(value))
        state[name] = value if source is None else quantized[source]
        coded += [] if source is None else [name]
    modes = ",".join(dict.fromkeys(mode.name for mode in optimizer.modes))
    _write_whole(Path(path), pack(state, coded, modes, facts))


def load_packed(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state_dict of a packed network, as float tensors on the CPU.

    Raises:
        PackedError: if the file is damaged or no packed network.
        OSError: if it cannot be read.
    """
    return unpack(Path(path).read_bytes()).state_dict()


def pack(state_dict: Mapping[str, Tensor], quantized: Collection[str], mode: str, facts: Mapping[str, Any] | None = None) -> bytes:
    """The content of a file.

    Args:
        state_dict: finished weights.
        quantized: names of the tensors to be coded. What they hold decides how.
        mode: name of the projection mode; ``VALUES`` says what a tensor may hold in some.
        facts: plain values to be kept.

    Raises:
        PackedError: naming the tensor that cannot be packed.
    """
    most, by_row = (VALUES[mode], False) if mode in VALUES else (MOST_VALUES, True)
    tensors: dict[str, Tensor | Coded] = {}
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in _WORDS:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise PackedError(f"{name!r}: a {kind} cannot be packed; dense tensors of {', '.join(_DTYPES)} can")
        if name in quantized and value.numel():
            try:
                tensors[name] = codes.encode(value, most, by_row)
            except ValueError as error:
                raise PackedError(f"{name!r}: {error} (mode {mode})") from None
        else:
            tensors[name] = value.detach().cpu().contiguous()
    lines = list(_lines(tensors))
    try:
        kept = json.dumps(dict(facts or {}), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PackedError(f"facts: {error}; plain values can be kept") from None
    parts = []
    for line in lines:
        for name in line.names()[: 1 if line.once else None]:
            stored = tensors[name]
            parts += [stored.stored_levels, stored.codes] if isinstance(stored, Coded) else [stored]
    whole = torch.cat([torch.empty(0, dtype=torch.uint8), *(part.contiguous().flatten().view(torch.uint8) for part in parts)])
    size = len(whole) + _CHECKSUM
    metadata = {KEY: VERSION, "mode": mode, **_ORDER, "facts": kept, "tensors": "\n".join(map(str, lines))}
    # Written here, since the library puts metadata in an order of chance: the same network is to be the same file.
    array = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, ARRAY: array}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MOST_HEADER:
        raise PackedError(f"the names and facts take {len(header)} bytes: at most {_MOST_HEADER} can be kept")
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(size))
    _check_sizes(lines, len(content))  # nothing is written that would not be read
    if len(whole):
        torch.frombuffer(content, dtype=torch.uint8, count=len(whole), offset=8 + len(header)).copy_(whole)
    content[-_CHECKSUM:] = zlib.crc32(memoryview(content)[:-_CHECKSUM]).to_bytes(_CHECKSUM, "little")
    return bytes(content)


def is_packed(path: Path) -> bool:
    """Whether a file looks like a packed network, by its name or its first bytes."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MOST_HEADER


def unpack(content: bytes) -> Packed:
    """Reads the content of a file.

    Raises:
        PackedError: if it is damaged or no packed network.
    """
    metadata, data = _read_header(content)
    facts = _parse(metadata["facts"], "its facts")
    if not isinstance(facts, dict):
        raise PackedError("damaged: its facts are no JSON object")
    lines = [_Line.of(line) for line in metadata["tensors"].split("\n") if line]
    _check_sizes(lines, len(content))
    named = [(line, line.names()) for line in lines]
    if len({name for _, names in named for name in names}) < sum(len(names) for _, names in named):
        raise PackedError("damaged: a tensor comes twice in its table")
    taken = sum((1 if line.once else len(names)) * line.nbytes for line, names in named)
    if taken != len(data):
        raise PackedError(f"damaged: its table takes {taken} of the {len(data)} bytes of its tensors")
    tensors, place = {}, 0
    for line, names in named:
        for name in names:
            try:
                tensors[name] = line.read(data[place : place + line.nbytes])
            except ValueError as error:
                raise PackedError(f"damaged: {name[:100]!r}: {error}") from None
            place += 0 if line.once else line.nbytes
        place += line.nbytes if line.once else 0
    return Packed(metadata["mode"], facts, tensors)


@dataclass(frozen=True)
class _Line:
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
    def of(cls, text: str) -> "_Line":
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
        good = self.dtype in _DTYPES and len(self.shape) <= 64 and math.prod(max(side, 1) for side in self.shape) <= _MOST_LENGTH
        if self.once:
            return good and math.prod(self.shape) == 1
        if self.levels is None:
            return good
        good = good and self.dtype in _FLOATS and 0 not in self.shape
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
        count, size = math.prod(self.shape), _DTYPES[self.dtype].itemsize
        if self.levels is None:
            return count * size
        coding, tables, stored = self._coding
        return tables * stored * size + codes.packed_bytes(coding, count)

    def read(self, data: memoryview) -> Tensor | Coded:
        """A tensor, from its bytes; raises ValueError on codes or levels that cannot be."""
        dtype = _DTYPES[self.dtype]
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
    """A tensor of its own memory; numbers are little-endian, as on every machine that torch runs on."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


def _lines(tensors: Mapping[str, Tensor | Coded]) -> Iterator[_Line]:
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
        key = (_WORDS[value.dtype], tuple(value.shape), once.get(name), kind, layer is None)
        alike.setdefault(key, {}).setdefault(last, []).append(layer)
    # Wide numbers and what is not coded come first, so that all of these lie at multiples of their width.
    order = sorted(alike.items(), key=lambda item: (item[0][3] != (), -_DTYPES[item[0][0]].itemsize))
    for (dtype, shape, number, kind, top), members in order:
        together: dict[tuple, list[str]] = {}
        for last, layers in members.items():
            together.setdefault(tuple(layers), []).append(_quote(last))
        for layers, lasts in together.items():
            patterns = () if top else tuple(_patterns(layers))
            yield _Line(dtype, shape, "|".join(lasts), patterns, number is not None, *kind)


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


def _read_header(content: bytes) -> tuple[dict[str, str], memoryview]:
    """The metadata, and the bytes of the tensors, of a file whose length and checksum are right."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or length > len(content) - 8:
        claim = f"a header of {length} bytes in a file of {len(content)}"
        raise PackedError(f"truncated, or no packed network: {claim}")
    if length > _MOST_HEADER:
        raise PackedError(f"a header of {length} bytes: at most {_MOST_HEADER} is accepted")
    header = _parse(content[8 : 8 + length], "its header")
    if not isinstance(header, dict):
        raise PackedError("damaged: its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise PackedError(f"no packed network: its metadata has no {KEY!r}")
    version = "1" if metadata[KEY].startswith("{") else metadata[KEY]
    if version != VERSION:
        raise PackedError(f"version {version[:20]!r} of the packed format: this program reads version {VERSION}")
    if (
        not all(isinstance(metadata.get(key), str) for key in ("mode", "facts", "tensors"))
        or not _ORDER.items() <= metadata.items()
    ):
        raise PackedError("damaged: its metadata lacks mode, order of bits, facts or tensors")
    size = len(content) - 8 - length
    if header != {ARRAY: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}} or size < _CHECKSUM:
        raise PackedError(f"truncated or damaged: its header does not describe one array {ARRAY!r} of the {size} bytes that follow")
    view = memoryview(content)
    if zlib.crc32(view[:-_CHECKSUM]) != int.from_bytes(view[-_CHECKSUM:], "little"):
        raise PackedError("damaged: its checksum is not that of its content")
    return metadata, view[8 + length : -_CHECKSUM]


def _check_sizes(lines: Iterable[_Line], size: int) -> None:
    """Raises PackedError where lines stand for more tensors, or longer names, than a file of such a size may have."""
    tensors = letters = 0
    for line in lines:
        for count, length in line.sizes():
            tensors, letters = tensors + count, letters + length
            if tensors > min(_MOST_TENSORS, 4096 + size) or letters > (1 << 20) + 16 * size:
                raise PackedError(f"{tensors} tensors in a file of {size} bytes: that is beyond what is accepted")


def _parse(text: str | bytes, words: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key comes twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise PackedError(f"damaged: {words} cannot be read ({' '.join(str(error).split())[:100]})") from None


def _write_whole(path: Path, content: bytes) -> None:
    """The whole file or none of it, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.ExitStack() as clean_up:
        clean_up.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file)
        temporary.replace(path)
