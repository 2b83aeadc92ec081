"""Reads a packed network (docs/packed-format.md) with numpy alone: python scripts/read_packed.py network.safetensors"""

import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np

TYPES = {"codes": "u1", "crc32": "u1", "bool": "?", "bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float64": "<f8"}


def unpack_codes(data: np.ndarray, coding: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of a tensor whose bytes come first, and the bytes after its own."""
    if coding == "base3":
        size = math.ceil(count / 5)
        return (data[:size, None] // 3 ** np.arange(5) % 3).reshape(-1)[:count], data[size:]
    width = 1 if coding == "sign" else int(coding[-1])
    bits = np.unpackbits(data, bitorder="little", count=count * width).reshape(count, width)
    return bits @ (1 << np.arange(width)), data[math.ceil(count * width / 8) :]


def read(path: str) -> dict[str, np.ndarray]:
    """All tensors by name; bfloat16, which numpy has not, as float32 of the same values."""
    content = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    table = json.loads(header.pop("__metadata__")["proxquant"])
    assert table["version"] == 1, table["version"]
    data = {name: content[start:][slice(*entry["data_offsets"])] for name, entry in header.items()}
    checksum = start + header["crc32"]["data_offsets"][0]
    content[checksum : checksum + 4] = bytes(4)
    assert zlib.crc32(content) == int.from_bytes(data["crc32"], "little"), "damaged"
    arrays = {name: np.frombuffer(part, TYPES.get(name, name)) for name, part in data.items()}
    if "bfloat16" in arrays:
        arrays["bfloat16"] = (arrays["bfloat16"].astype("<u4") << 16).view("<f4")
    tensors = {}
    for layer, (last, dtype, shape, *coded) in ((a, m) for names, members in table["layers"] for a in names for m in members):
        count, stored = math.prod(shape), arrays.get(dtype, np.empty(0))
        used = count
        if coded:
            coding, groups, values = coded
            codes, arrays["codes"] = unpack_codes(arrays["codes"], coding, count)
            codes = codes.astype(int).reshape(shape[0] if groups == "row" else 1, -1)
            used = 0 if coding == "sign" else len(codes) * values
            levels = np.array([[-1.0, 1.0]]) if coding == "sign" else stored[:used].reshape(len(codes), values)
            tensor = np.take_along_axis(levels, codes, 1).astype({"bfloat16": "<f4"}.get(dtype, dtype))
        else:
            tensor = stored[:count]
        arrays[dtype] = stored[used:]
        tensors[f"{layer}.{last}" if layer else last] = tensor.reshape(shape)
    return tensors


if __name__ == "__main__":
    for name, tensor in read(sys.argv[1]).items():
        print(f"{name:40} {tensor.dtype!s:8} {list(tensor.shape)}")
