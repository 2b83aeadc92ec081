"""Reads a packed network (docs/packed-format.md) with numpy alone: python scripts/read_packed.py network.safetensors"""

import io
import itertools
import json
import math
import signal
import sys
import zlib
from pathlib import Path
from urllib.parse import unquote

import numpy as np

TYPES = {"BOOL": "?", "U8": "u1", "BF16": "<u2"}  # numpy has no bfloat16: they are read as float32 of the same values
TYPES |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IF" for size in (1, 2, 4, 8)}


def numbers(data: io.BytesIO, dtype: str, count: int) -> np.ndarray:
    found = np.frombuffer(data.read(count * np.dtype(TYPES[dtype]).itemsize), TYPES[dtype])
    return (found.astype("<u4") << 16).view("<f4") if dtype == "BF16" else found


def read_one(data: io.BytesIO, dtype: str, shape: list[int], levels: str = "", *options: str) -> np.ndarray:
    count, rows = math.prod(shape), shape[0] if "row" in options else 1
    if not levels:
        return numbers(data, dtype, count).reshape(shape)
    values, stored = (2, 0) if levels == "sign" else (int(levels), int(levels) // (2 if "upper" in options else 1))
    table = numbers(data, dtype, rows * stored).reshape(rows, stored)
    if "upper" in options:
        table = np.hstack([-table[:, ::-1], np.zeros((rows, values % 2), table.dtype), table])
    table = np.array([[-1, 1]], table.dtype) if levels == "sign" else table
    if values == 3:
        codes = (numbers(data, "U8", math.ceil(count / 5))[:, None] // 3 ** np.arange(5) % 3).reshape(-1)[:count]
    else:
        width = max(1, (values - 1).bit_length())
        packed = numbers(data, "U8", math.ceil(count * width / 8))
        codes = np.unpackbits(packed, bitorder="little", count=count * width).reshape(count, width) @ (1 << np.arange(width))
    return np.take_along_axis(table, codes.reshape(rows, -1), 1).reshape(shape)


def read(path: str) -> dict[str, np.ndarray]:
    content, tensors = Path(path).read_bytes(), {}
    if len(content) < 12 or zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError(f"{path}: damaged, or no packed network")
    start = 8 + int.from_bytes(content[:8], "little")
    metadata, data = json.loads(content[8:start]).get("__metadata__", {}), io.BytesIO(content[start:-4])
    if metadata.get("proxquant") != "2":
        raise ValueError(f"{path}: no packed network of version 2")
    for line in filter(None, metadata["tensors"].split("\n")):
        kind, sides, lasts, *layers = line.split(" ")
        (dtype, *coded), shape = kind.split("/"), [int(side) for side in sides.split(",") if side != "-"]
        words = [one for layer in layers for one in itertools.product(*(part.split("|") for part in layer.split(".")))]
        names = [unquote(".".join([*one, last])) for one in words or [()] for last in lasts.split("|")]
        found = read_one(data, dtype, shape) if coded == ["once"] else None
        tensors |= {name: read_one(data, dtype, shape, *coded) if found is None else found for name in names}
    return tensors


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # under `| head` the end of it is no error
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        found = read(sys.argv[1])
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, tensor in found.items():
        print(f"{name:40} {tensor.dtype!s:8} {list(tensor.shape)}")
