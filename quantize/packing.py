"""Trained networks as a file of bits: quantized tensors as codes and levels, everything else as it is.

The container is safetensors; docs/packed-format.md states the format to the bit. All tensors lie in one array, and the table says
once what many have in common, since an entry for each would be a fifth of a small network's file. Reading gives back every tensor
bit for bit, and takes nothing on trust: a file that is damaged, or was made to do harm, is refused before anything of the size
that it claims is made.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import codes
from quantize.codes import MOST_VALUES, Coded
from quantize.finished import NotQuantized
from quantize.optimizer import ProjectedOptimizer
from quantize.packed_table import DTYPES, WORDS, Line, PackedError, check_sizes, lines_of
from quantize.shards import is_first, whole

VERSION = "2"
KEY = "proxquant"  # of the version in the container's metadata, which also holds mode, facts and table
ARRAY = "tensors"  # the container's only one
_ORDER = {"bit_order": "lowest first"}

# Values that a tensor has in the modes whose quantizer is fixed; a further one is an error there and no reason for more bits.
VALUES = {"lazy": 2, "prox": 2, "stoch_bin": 2, "prox_ternary": 3, "ttq": 3}

_MOST_HEADER = 1 << 22  # far above any network's; it bounds what reading a hostile file costs
_CHECKSUM = 4  # bytes at the end


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
        path: of the file; it is written whole or not at all. Of a sharded model all processes call it, and the first one writes.
        model: whose state_dict is packed. It may be in training, and is left as it is.
        optimizer: over parameters of this model, under the names that they have in its state_dict.
        facts: plain values to be kept beside it, see ``Packed``.

    Raises:
        PackedError: if a name is not the model's, a parameter holds a number that is not finite or a quantized tensor more values
            than its mode has.
        OSError: if the file cannot be written.
    """
    try:
        held, quantized = model.state_dict(keep_vars=True), optimizer.quantized()
    except NotQuantized as error:
        raise PackedError(str(error)) from None
    missing = [name for name in quantized if name not in held]
    if missing:
        raise PackedError(f"{missing[0]!r}, which the optimizer quantizes, is no name in the model's state_dict")
    parameters = optimizer.parameters
    for name in quantized:
        if held[name] is not parameters[name]:
            raise PackedError(f"{name!r} is not the parameter that the optimizer quantizes: it was replaced, or is another model's")
    of_parameter = {id(held[name]): name for name in quantized}  # one that layers share is quantized under all its names
    state, coded = {}, []
    for name, value in held.items():
        source = of_parameter.get(id(value))
        state[name] = whole(value if source is None else quantized[source])
        if isinstance(value, nn.Parameter) and not state[name].isfinite().all():
            raise PackedError(f"{name!r}: it holds values that are not finite numbers")
        coded += [] if source is None else [name]
    modes = ",".join(dict.fromkeys(mode.name for mode in optimizer.modes))
    content = pack(state, coded, modes, facts)
    if is_first(held.values()):
        _write_whole(Path(path), content)


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
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.dtype not in WORDS:
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise PackedError(f"{name!r}: a {kind} cannot be packed; dense tensors of {', '.join(DTYPES)} can")
        if name in quantized and value.numel():
            try:
                tensors[name] = codes.encode(value, most, by_row)
            except ValueError as error:
                raise PackedError(f"{name!r}: {error} (mode {mode})") from None
        else:
            tensors[name] = value.detach().cpu().contiguous()
    lines = list(lines_of(tensors))
    try:
        kept = json.dumps(dict(facts or {}), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PackedError(f"facts: {error}; plain values can be kept") from None
    parts = []
    for line in lines:
        for name in line.names()[: 1 if line.once else None]:
            stored = tensors[name]
            parts += [stored.stored_levels, stored.codes] if isinstance(stored, Coded) else [stored]
    flat = [part.contiguous().flatten().view(torch.uint8) for part in parts]
    whole = torch.cat([torch.empty(0, dtype=torch.uint8, device="cpu"), *flat])
    size = len(whole) + _CHECKSUM
    metadata = {KEY: VERSION, "mode": mode, **_ORDER, "facts": kept, "tensors": "\n".join(map(str, lines))}
    # Written here, since the library puts metadata in an order of chance: the same network is to be the same file.
    array = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, ARRAY: array}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _MOST_HEADER:
        raise PackedError(f"the names and facts take {len(header)} bytes: at most {_MOST_HEADER} can be kept")
    content = bytearray(len(header).to_bytes(8, "little") + header + bytes(size))
    check_sizes(lines, len(content))  # nothing is written that would not be read
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
    lines = [Line.of(line) for line in metadata["tensors"].split("\n") if line]
    check_sizes(lines, len(content))
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
