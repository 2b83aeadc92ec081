"""Data sets from disk (or the network) into arrays of small images."""

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from utils import UsageError, reading, write_whole

Say = Callable[[str], object]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CACHE = "decoded-images.npz"
SAMPLE = Path(__file__).parent.parent / "sample" / "fashion-mnist-7000.npz"
SIDE = 32  # pixels


@dataclass(frozen=True)
class Split:
    """Images as uint8 ``(N, 32, 32, 3)`` and their labels as int64 ``(N,)``."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "Split":
        """The images of these indices."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class SmallImages:
    """A data set of small images. ``source`` says in words where it was read."""

    train: Split
    test: Split
    classes: int
    source: str


def read_small_images(name: str, data_dir: Path, say: Say) -> SmallImages:
    """Reads one of the data sets in ``READERS``; downloads it where it is absent and can be downloaded.

    Args:
        name: a key of ``READERS``.
        data_dir: the folder that data sets lie in.
        say: is given lines about what is being done.

    Raises:
        UsageError: if it is not there and cannot be had, or what is there is incomplete or damaged.
    """
    return READERS[name](data_dir, say)


def hold_out(samples: int, held: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training images that stay, and of those to validate on: the last of a permutation that never changes.

    Raises:
        UsageError: if none would stay.
    """
    if held >= samples:
        raise UsageError(f"--holdout {held}: there are {samples} training images; a smaller number is needed")
    order = np.random.RandomState(0).permutation(samples)  # whose numbers no version of numpy may change
    return order[:-held], order[-held:]


def _read_sample(data_dir: Path, say: Say) -> SmallImages:
    try:
        with np.load(SAMPLE, allow_pickle=False) as arrays:
            train = Split(_from_grey(arrays["train_images"]), arrays["train_labels"].astype(np.int64))
            test = Split(_from_grey(arrays["test_images"]), arrays["test_labels"].astype(np.int64))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"the embedded sample {SAMPLE} cannot be read ({error}): restore it from the repository") from None
    return SmallImages(train, test, 10, "the sample in the repository (a part of Fashion-MNIST)")


def _from_grey(images: np.ndarray) -> np.ndarray:
    """``(N, 28, 28)`` grey to ``(N, 32, 32, 3)``, with a black frame."""
    framed = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return np.repeat(framed[..., None], 3, axis=3)


def _read_with_torchvision(class_name: str, folders: tuple[str, ...], data_dir: Path, say: Say) -> SmallImages:
    import torchvision.datasets as vision  # on first use: importing it takes longer than reading the sample

    dataset = getattr(vision, class_name)

    def read_present() -> SmallImages | None:
        for root in (data_dir / folder for folder in folders):
            try:
                return _from_torchvision(dataset(root, train=True), dataset(root, train=False), f"{class_name} in {root}")
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can fail in any layer that reads it
                if isinstance(error, OSError) and error.errno is not None:
                    raise UsageError(f"--data_dir {data_dir}: {class_name} in {root} cannot be read ({error.strerror})") from None
                if not (isinstance(error, RuntimeError) and "not found" in str(error)):  # its words for what is not there
                    words = f"--data_dir {data_dir}: {class_name} in {root} is damaged ({_one_line(error)}); remove it"
                    raise UsageError(words) from None
        return None

    found = read_present()
    if found is not None:
        return found
    root = data_dir / folders[0]
    with reading("--data_dir", data_dir):
        made = _missing_folders(root)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(data_dir, say):  # runs that start together download once
            found = read_present()
            if found is None:
                say(f"{class_name} is not in {data_dir}: downloading it to {root}")
                train = dataset(root, train=True, download=True)
                test = dataset(root, train=False, download=True)
                found = _from_torchvision(train, test, f"{class_name} in {root}, just downloaded")
            return found
    except (RuntimeError, OSError) as error:
        for folder in [root / class_name / "raw", root / class_name, *made]:
            with contextlib.suppress(OSError):  # removed only where the attempt made it and left it empty
                folder.rmdir()
        places = ", ".join(str(data_dir / folder) for folder in folders)
        raise UsageError(
            f"--data_dir {data_dir}: {class_name} is not there and cannot be downloaded ({_one_line(error)}); looked in {places} "
            f"for the files of torchvision's {class_name}{_class_folder_hint(class_name, data_dir)}"
        ) from None


def _from_torchvision(train: object, test: object, source: str) -> SmallImages:
    def split(dataset: object) -> Split:
        images = np.asarray(dataset.data)
        labels = np.asarray(dataset.targets, dtype=np.int64)
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels")
        return Split(images if images.ndim == 4 else _from_grey(images), labels)

    return SmallImages(split(train), split(test), len(train.classes), source)


def _class_folder_hint(class_name: str, data_dir: Path) -> str:
    if class_name != "CIFAR10":
        return ""
    return f", and in {data_dir / 'CIFAR10'} for class folders (train/<class>/*.png or .jpg, test/<class>/*)"


def _missing_folders(path: Path) -> list[Path]:
    """The folders that ``mkdir -p path`` would make, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _read_cifar10(data_dir: Path, say: Say) -> SmallImages:
    folder = data_dir / "CIFAR10"
    with reading("--data_dir", data_dir):
        in_class_folders = (folder / "train").is_dir() or (folder / "test").is_dir()
    if in_class_folders:
        return _read_class_folders(folder, say)
    return _read_with_torchvision("CIFAR10", ("CIFAR10", "."), data_dir, say)


# Class folders: decoded once, then read from one file.


def _read_class_folders(folder: Path, say: Say) -> SmallImages:
    with reading("--data_dir", folder):
        files = {split: _list_class_folders(folder / split) for split in ("train", "test")}
    fingerprint = _fingerprint(folder, files)
    cache, say_once = folder / CACHE, functools.cache(say)
    arrays = _read_cache(cache, fingerprint, say_once)  # without the lock: it is whole whenever it is there
    if arrays is None:
        with _locked(folder, say):
            arrays = _read_cache(cache, fingerprint, say_once)  # again: another run may have made it while this one waited
            if arrays is None:
                arrays = _decode_all(files)
                try:
                    write_whole(cache, lambda file: np.savez(file, fingerprint=np.array(fingerprint), **arrays))
                except OSError as error:
                    words = f"the decoded images cannot be kept in {cache} ({_one_line(error)})"
                    say(f"warning: {words}: the next run decodes them again")
    train, test = (Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("train", "test"))
    return SmallImages(train, test, len(CIFAR10_CLASSES), f"class folders in {folder}")


def _list_class_folders(folder: Path) -> list[tuple[Path, int, tuple[int, int]]]:
    """All images of a split as (path, label, (size, modification time)), in a fixed order."""
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []
    for name in CIFAR10_CLASSES:
        if name not in found:
            raise UsageError(f"--data_dir: {folder} has no class folder {name!r}; these are needed: {', '.join(CIFAR10_CLASSES)}")
    unknown = [name for name in found if name not in CIFAR10_CLASSES]
    if unknown:
        raise UsageError(f"--data_dir: {folder / unknown[0]} is no class of CIFAR-10; these are: {', '.join(CIFAR10_CLASSES)}")
    listed = []
    for label, name in enumerate(CIFAR10_CLASSES):
        images = [entry for entry in os.scandir(folder / name) if entry.name.lower().endswith((".png", ".jpg", ".jpeg"))]
        if not images:
            raise UsageError(f"--data_dir: the class folder {folder / name} holds no .png or .jpg image")
        for entry in sorted(images, key=lambda entry: entry.name):
            try:
                status = entry.stat()
            except OSError as error:  # a link to nowhere
                raise UsageError(f"--data_dir: the image {entry.path} cannot be read ({_one_line(error)})") from None
            listed.append((Path(entry.path), label, (status.st_size, status.st_mtime_ns)))
    return listed


def _fingerprint(folder: Path, files: dict[str, list[tuple[Path, int, tuple[int, int]]]]) -> str:
    digest = hashlib.sha256()
    for listed in files.values():
        for path, label, (size, modified) in listed:
            digest.update(f"{os.path.relpath(path, folder)}\0{label}\0{size}\0{modified}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _read_cache(cache: Path, fingerprint: str, say: Say) -> dict[str, np.ndarray] | None:
    """The arrays of a cache that is intact and of these files, else None (the archive carries a checksum of each array)."""
    try:
        with np.load(cache, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        if str(arrays.pop("fingerprint")) != fingerprint:
            say(f"the images beside {cache} have changed: decoding them again")
            return None
        for split in ("train", "test"):
            images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3) or labels.shape != images.shape[:1]:
                raise ValueError("arrays of another form")
            if labels.dtype != np.int64 or labels.min() < 0 or labels.max() >= len(CIFAR10_CLASSES):
                raise ValueError("labels out of range")
        return arrays
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged archive can fail in any layer that reads it; all that matters is that it does
        what = "cannot be read" if isinstance(error, PermissionError) else "is damaged"
        say(f"warning: {cache} {what} ({_one_line(error)}): decoding the images again")
        return None


def _decode_all(files: dict[str, list[tuple[Path, int, tuple[int, int]]]]) -> dict[str, np.ndarray]:
    """The arrays of a cache, from the images themselves."""
    arrays = {}
    for split, listed in files.items():
        arrays[f"{split}_images"] = _decode([path for path, _, _ in listed], split)
        arrays[f"{split}_labels"] = np.array([label for _, label, _ in listed], dtype=np.int64)
    return arrays


def _decode(paths: list[Path], split: str) -> np.ndarray:
    from tqdm import tqdm

    images = np.empty((len(paths), SIDE, SIDE, 3), dtype=np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(_decode_one, paths, chunksize=64)
        for index, image in enumerate(tqdm(decoded, f"decoding {split} images", len(paths), unit=" images", disable=None)):
            images[index] = image
    return images


def _decode_one(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"--data_dir: the image {path} cannot be read ({_one_line(error)})") from None
    if pixels.shape != (SIDE, SIDE, 3):
        raise UsageError(f"--data_dir: the image {path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, not {SIDE}x{SIDE}")
    return pixels


@contextlib.contextmanager
def _locked(folder: Path, say: Say) -> Iterator[None]:
    """Runs that start together decode or download once: the others say that they wait here, and then read what is there.

    Not every file system has locks, and not every folder may be opened: then each run does it, which is said.
    """
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"another process is decoding or downloading images in {folder}: waiting until it is done")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            words = "going on without, and runs that start together each decode or download them"
            say(f"warning: {folder} cannot be locked while its images are made ready ({_one_line(error)}): {words}")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


READERS: dict[str, Callable[[Path, Say], SmallImages]] = {
    "cifar10": _read_cifar10,
    "cifar100": partial(_read_with_torchvision, "CIFAR100", ("CIFAR100", ".")),
    "fashionmnist": partial(_read_with_torchvision, "FashionMNIST", (".",)),
    "mnist": partial(_read_with_torchvision, "MNIST", (".",)),
    "sample": _read_sample,
}
