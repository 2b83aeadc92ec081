"""Trained networks as a file of bits: quantized tensors as codes and levels, everything else as it is.

The container is safetensors; docs/packed-format.md states the format to the bit. All tensors of a kind lie in one array, since a
header with an entry for each would be a fifth of a small network's file. Reading gives back every tensor bit for bit, and takes
nothing on trust: a file that is damaged, or was made to do harm, is refused before anything of the size that it claims is made.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import codes
from quantize.codes import CODINGS, MOST_VALUES, Coded
from quantize.optimizer import ProjectedOptimizer

VERSION = 1
KEY = "proxquant"  # of the table in the container's metadata

# Values that a tensor has in the modes whose quantizer is fixed; a further one is an error there and no reason for more bits.
VALUES = {"lazy": 2, "prox": 2, "stoch_bin": 2, "prox_ternary": 3, "ttq": 3}

# Arrays that the container may hold: their type there, and torch's.
_ARRAYS = {
    "codes": ("U8", torch.uint8),
    "crc32": ("U8", torch.uint8),
    "bool": ("BOOL", torch.bool),
    "uint8": ("U8", torch.uint8),
    "int8": ("I8", torch.int8),
    "int16": ("I16", torch.int16),
    "int32": ("I32", torch.int32),
    "int64": ("I64", torch.int64),
    "float16": ("F16", torch.float16),
    "bfloat16": ("BF16", torch.bfloat16),
    "float32": ("F32", torch.float32),
    "float64": ("F64", torch.float64),
}
_DTYPES = {name: dtype for name, (_, dtype) in _ARRAYS.items() if name not in ("codes", "crc32")}

# Far above any network's; they bound what reading a hostile file costs.
_MOST_HEADER, _MOST_TENSORS, _MOST_LENGTH = 1 << 22, 100_000, 1 << 40


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
        if not isinstance(value, Tensor) or value.layout != torch.strided or str(value.dtype).split(".")[1] not in _DTYPES:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise PackedError(f"{name!r}: a {kind} cannot be packed; dense tensors of {', '.join(_DTYPES)} can")
        if name in quantized and value.numel():
            try:
                tensors[name] = codes.encode(value, most, by_row)
            except ValueError as error:
                raise PackedError(f"{name!r}: {error} (mode {mode})") from None
        else:
            tensors[name] = value.detach().cpu().contiguous()
    if len(tensors) > _MOST_TENSORS:
        raise PackedError(f"{len(tensors)} tensors: at most {_MOST_TENSORS} can be packed")

    arrays: dict[str, list[Tensor]] = {}
    layers = _layers(tensors)
    for name, entry in _entries(layers):
        stored = tensors[name]
        if isinstance(stored, Coded):
            arrays.setdefault("codes", []).append(stored.codes)
            stored = stored.levels[:0] if stored.coding == "sign" else stored.levels
        if stored.numel():
            arrays.setdefault(entry.dtype, []).append(stored.flatten())
    try:
        table = {"version": VERSION, "mode": mode, "bit_order": "lowest first", "facts": dict(facts or {}), "layers": layers}
        text = json.dumps(table, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PackedError(f"facts: {error}; plain values can be kept") from None
    import safetensors.torch  # on first use: the rest of this package needs torch alone

    whole = {name: torch.cat(parts) for name, parts in arrays.items()} | {"crc32": torch.zeros(4, dtype=torch.uint8)}
    content = bytearray(safetensors.torch.save(whole, {KEY: text}))
    header = int.from_bytes(content[:8], "little")
    if header > _MOST_HEADER:
        raise PackedError(f"the names and facts take {header} bytes: at most {_MOST_HEADER} can be kept")
    begin = 8 + header + json.loads(content[8 : 8 + header])["crc32"]["data_offsets"][0]
    content[begin : begin + 4] = zlib.crc32(content).to_bytes(4, "little")
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
    text, arrays = _read_header(content)
    table = _parse(text, "its table")
    if not isinstance(table, dict):
        raise PackedError("damaged: its table is no JSON object")
    version = table.get("version")
    if version != VERSION or isinstance(version, bool):
        raise PackedError(f"version {str(version)[:20]!r} of the packed format: this program reads version {VERSION}")
    mode, facts, layers = (table.get(key) for key in ("mode", "facts", "layers"))
    if not (isinstance(mode, str) and isinstance(facts, dict) and table.get("bit_order") == "lowest first"):
        raise PackedError("damaged: its table lacks mode, facts or the order of bits")
    _check_layers(layers, len(content))

    taken = dict.fromkeys(arrays, 0)
    entries = dict(_entries(layers))
    if len(entries) < sum(len(names) * len(members) for names, members in layers):
        raise PackedError("damaged: a tensor comes twice in its table")
    for array, count in (need for entry in entries.values() for need in entry.needs()):
        taken[array] = taken.get(array, 0) + count
    held = {array: count for array, count in arrays.items() if array != "crc32"}
    taken.pop("crc32", None)
    differing = [array for array in {**held, **taken} if held.get(array, 0) != taken.get(array, 0)]
    if differing:
        array = differing[0]
        raise PackedError(f"damaged: its table takes {taken.get(array, 0)} of the {held.get(array, 0)} entries of {array!r}")

    import safetensors.torch

    try:
        stored = safetensors.torch.load(content)
    except Exception as error:  # whatever is wrong that was not found above, it is the file
        raise PackedError(f"damaged: {' '.join(str(error).split())[:200]}") from None
    if "bool" in stored and (stored["bool"].view(torch.uint8) > 1).any():
        raise PackedError("damaged: an entry of 'bool' is neither 0 nor 1")
    place = dict.fromkeys(stored, 0)

    def take(array: str, count: int) -> Tensor:
        begin = place.get(array, 0)
        place[array] = begin + count
        return stored[array][begin : begin + count] if count else torch.empty(0, dtype=_ARRAYS[array][1])

    tensors = {}
    for name, entry in entries.items():
        try:
            tensors[name] = entry.read(take)
        except ValueError as error:
            raise PackedError(f"damaged: {name[:100]!r}: {error}") from None
    return Packed(mode, facts, tensors)


@dataclass(frozen=True)
class _Entry:
    """What the table says of one tensor: as ``[name, dtype, shape]``, and if it is coded also coding, "tensor" or "row", levels."""

    dtype: str
    shape: list[int]
    coding: str | None = None
    groups: str = "tensor"
    values: int = 0

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def tables(self) -> int:
        return self.shape[0] if self.groups == "row" else 1

    def needs(self) -> Iterator[tuple[str, int]]:
        """Which arrays it takes how many entries of."""
        if self.coding is None:
            yield self.dtype, self.count
            return
        yield "codes", codes.packed_bytes(self.coding, self.count)
        if self.coding != "sign":
            yield self.dtype, self.tables * self.values

    def read(self, take: Callable[[str, int], Tensor]) -> Tensor | Coded:
        """The tensor, from ``take(array, count)``; raises ValueError on codes or levels that cannot be."""
        dtype = _DTYPES[self.dtype]
        if self.coding is None:
            return take(self.dtype, self.count).clone().view(self.shape)
        packed = take("codes", codes.packed_bytes(self.coding, self.count)).clone()
        if self.coding == "sign":
            levels = codes.signs(dtype)
        else:
            levels = take(self.dtype, self.tables * self.values).clone().view(self.tables, self.values)
        coded = Coded(torch.Size(self.shape), dtype, self.coding, packed, levels)
        codes.check(coded)
        return coded


def _layers(tensors: Mapping[str, Tensor | Coded]) -> list[list[list]]:
    """The table: layers that hold tensors of the same names and kinds together, as ``[[layer, …], [[name, dtype, …], …]]``."""
    members: dict[str, list[list]] = {}
    for name, value in tensors.items():
        layer, last = _split(name)
        entry = [last, str(value.dtype).split(".")[1], list(value.shape)]
        if isinstance(value, Coded):
            entry += [value.coding, "row" if value.by_row else "tensor", value.levels.shape[1]]
        members.setdefault(layer, []).append(entry)
    alike: dict[str, list[list]] = {}
    for layer, entries in members.items():
        alike.setdefault(json.dumps(entries), [[], entries])[0].append(layer)
    return list(alike.values())


def _split(name: str) -> tuple[str, str]:
    layer, _, last = name.rpartition(".")
    return (layer, last) if layer else ("", name)


def _entries(layers: list) -> Iterator[tuple[str, _Entry]]:
    """Names and entries of a table, in the order in which the file holds them."""
    for names, members in layers:
        for layer in names:
            for last, *entry in members:
                yield f"{layer}.{last}" if layer else last, _Entry(*entry)


def _read_header(content: bytes) -> tuple[str, dict[str, int]]:
    """The table's text, and the arrays with their number of entries, of a file whose length and checksum are right."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or length > len(content) - 8:
        raise PackedError("truncated, or no packed network")
    if length > _MOST_HEADER:
        raise PackedError(f"a header of {length} bytes: at most {_MOST_HEADER} is accepted")
    header = _parse(content[8 : 8 + length], "its header")
    if not isinstance(header, dict):
        raise PackedError("damaged: its header is no JSON object")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str):
        raise PackedError(f"no packed network: its metadata has no {KEY!r}")
    arrays, spans = {}, []
    for name, entry in header.items():
        if name not in _ARRAYS:
            raise PackedError(f"damaged: an array {name[:100]!r} is not known")
        kind, dtype = _ARRAYS[name]
        shape, span = (entry.get("shape"), entry.get("data_offsets")) if isinstance(entry, dict) else (None, None)
        if not (_counts(shape, 1) and _counts(span, 2) and entry.get("dtype") == kind):
            raise PackedError(f"damaged: the array {name!r} is described by {str(entry)[:100]!r}")
        if span[1] - span[0] != shape[0] * dtype.itemsize:
            raise PackedError(f"damaged: {shape[0]} entries of {name!r} in {span[1] - span[0]} bytes")
        arrays[name] = shape[0]
        spans.append(tuple(span))
    spans.sort()
    if [begin for begin, _ in spans] + [len(content) - 8 - length] != [0, *(end for _, end in spans)]:
        raise PackedError("truncated or damaged: its arrays overlap, leave gaps or do not end with the file")
    if arrays.get("crc32") != 4:
        raise PackedError("damaged: it has no checksum")
    begin = 8 + length + header["crc32"]["data_offsets"][0]
    view = memoryview(content)
    found = zlib.crc32(view[begin + 4 :], zlib.crc32(bytes(4), zlib.crc32(view[:begin])))
    if found != int.from_bytes(view[begin : begin + 4], "little"):
        raise PackedError("damaged: its checksum is not that of its content")
    return metadata[KEY], arrays


def _check_layers(layers: Any, size: int) -> None:
    """Raises PackedError where the table's layers are not of the form of ``_layers``, or more than a file of such a size holds."""
    tensors = length = 0
    if not isinstance(layers, list):
        raise PackedError("damaged: its table has no layers")
    for kind in layers:
        if not (isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, list) for part in kind)):
            raise PackedError(f"damaged: {str(kind)[:100]!r} in its table are no layers")
        names, members = kind
        if not all(isinstance(name, str) for name in names):
            raise PackedError("damaged: the name of a layer in its table is no text")
        for member in members:
            _check_member(member)
        tensors += len(names) * len(members)
        length += sum(map(len, names)) * len(members) + sum(len(member[0]) for member in members) * len(names)
    if tensors > min(_MOST_TENSORS, size) or length > 16 * size:
        raise PackedError(f"damaged: {tensors} tensors in a file of {size} bytes")


def _check_member(member: Any) -> None:
    good = isinstance(member, list) and len(member) in (3, 6) and all(isinstance(word, str) for word in (*member[:2], *member[3:5]))
    good = good and member[1] in _DTYPES and _counts(member[2]) and math.prod(max(size, 1) for size in member[2]) <= _MOST_LENGTH
    if good and len(member) == 6:
        _, dtype, shape, coding, groups, values = member
        good = dtype in ("float16", "bfloat16", "float32", "float64") and coding in CODINGS and 0 not in shape
        good = good and (groups == "tensor" or (groups == "row" and len(shape) > 1 and shape[0] > 1 and coding != "sign"))
        good = good and _counts([values]) and 1 <= values <= CODINGS[coding]
        good = good and ((coding == "sign" and values == 2) or coding == codes.coding_for(values))
    if not good:
        raise PackedError(f"damaged: {str(member)[:100]!r} in its table is no tensor")


def _counts(values: Any, length: int | None = None) -> bool:
    """Whether it is a list (of this length) of whole numbers that can be sizes."""
    good = isinstance(values, list) and len(values) <= 64 and length in (None, len(values))
    return good and all(type(value) is int and 0 <= value <= _MOST_LENGTH for value in values)


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
