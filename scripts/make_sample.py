"""Makes the embedded sample from the whole of Fashion-MNIST: the first 600 training and 100 test images of each class.

    python scripts/make_sample.py FOLDER_WITH_THE_IDX_GZ_FILES

Needs only numpy. The result is the same file, byte for byte, wherever it is made from the same four files.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

SAMPLE = Path(__file__).parent.parent / "sample" / "fashion-mnist-7000.npz"
PER_CLASS = {"train": 600, "t10k": 100}


def read_idx(path: Path) -> np.ndarray:
    """An array from a gzipped idx file: two zero bytes, type, number of dimensions, sizes as big-endian int32, data."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("make_sample.py: error: one folder with the four idx.gz files of Fashion-MNIST is needed")
    source = Path(sys.argv[1])
    arrays = {}
    for split, per_class in PER_CLASS.items():
        images = read_idx(source / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{split}-labels-idx1-ubyte.gz")
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
        name = "train" if split == "train" else "test"
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[chosen], labels[chosen]
    SAMPLE.parent.mkdir(exist_ok=True)
    np.savez_compressed(SAMPLE, **arrays)
    print(f"{SAMPLE}: {SAMPLE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
