"""Checkpoint files: written whole, read as tensors and plain values only. A packed network is read as a checkpoint too."""

import hashlib
import io
import math
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize import PackedError, packing
from utils import UsageError, reading, write_whole

LATEST = "checkpoint.pth.tar"
PREVIOUS = "checkpoint.previous.pth.tar"
BEST = "model_best.pth.tar"


class UnreadableCheckpoint(UsageError):
    """A file that is no checkpoint, is damaged, or would run code when loaded."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain values. Raises OSError where it cannot; an older file is then untouched."""
    buffer = io.BytesIO()  # first into memory: torch.save answers a full disk with errors of its own making
    torch.save(content, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def read(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, or a packed network as one, onto the CPU, after comparing the archive's checksums.

    Raises:
        UnreadableCheckpoint: if it is missing, damaged, not a checkpoint, or holds anything but tensors and plain values.
    """
    try:
        if packing.is_packed(path):
            packed = packing.unpack(path.read_bytes())
            facts = {"projection_mode": packed.mode, **packed.facts}
            return {**facts, "hard_quantized": True, "frozen": True, "state_dict": packed.state_dict()}
        source, records = path, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the forms of pickle; what cannot be read is said below
            if zipfile.is_zipfile(path):
                source, records = _verified(path)
            content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UnreadableCheckpoint(f"{path}: no such checkpoint") from None
    except PermissionError as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
    except pickle.UnpicklingError:
        raise UnreadableCheckpoint(f"{path}: refused, it holds more than tensors and plain values, or is damaged") from None
    except PackedError as error:
        raise UnreadableCheckpoint(f"{path}: {error}") from None
    except UsageError:
        raise
    except Exception as error:  # a damaged file can fail in any layer that reads it; all that matters is that it does
        raise UnreadableCheckpoint(f"{path}: damaged or not a checkpoint ({_first_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UnreadableCheckpoint(f"{path}: not a checkpoint, it has no state_dict")
    _require_plain(content, path, records)
    return content


def _verified(path: Path) -> tuple[io.BytesIO, Counter[int]]:
    """The archive anew, of nothing but the records whose checksums are right: torch reads fields that this library passes over.

    Also how many records there are of each size.
    """
    whole, sizes = io.BytesIO(), Counter()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(whole, "w") as anew:
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise UnreadableCheckpoint(f"{path}: refused, its archive unpacks to more than the file; none of torch's does")
        for entry in archive.infolist():
            anew.writestr(entry.filename, archive.read(entry))  # raises BadZipFile on a wrong checksum
            sizes[entry.file_size] += 1
    whole.seek(0)
    return whole, sizes


# Far above any run's; they bound what a file can make of lists that hold each other, or themselves.
_MOST_VALUES, _DEEPEST = 10_000_000, 30
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = frozenset({*_WHOLE, torch.float16, torch.bfloat16, torch.float32, torch.float64})


def _require_plain(content: dict[str, Any], path: Path, records: Counter[int] | None) -> None:
    """Raises UnreadableCheckpoint on tensors that no run saves: sparse, quantized, without memory, or larger than their memory.

    Args:
        content: of a checkpoint.
        path: of its file.
        records: how many of each size its archive holds, where it is one: each storage is one of them. Some versions of torch take
            a storage's size from what the pickle says, and read beyond its end.
    """
    waiting: list[tuple[Any, int]] = [(content, 0)]
    values, storages = 0, {}
    while waiting:
        value, depth = waiting.pop()
        values += 1
        if values > _MOST_VALUES or depth > _DEEPEST:
            raise UnreadableCheckpoint(f"{path}: not a checkpoint, its values are nested too deep or too many")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, Tensor):
            if not _holds_its_values(value):
                raise UnreadableCheckpoint(f"{path}: not a checkpoint, it holds a tensor of another kind ({value.dtype})")
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    if records is not None and Counter(size for size in storages.values() if size) - records:
        raise UnreadableCheckpoint(f"{path}: damaged, a tensor is larger than what the file holds of it")


def _holds_its_values(value: Tensor) -> bool:
    dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_nested and value.dtype in _DTYPES
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def sha256_of_weights(content: dict[str, Any]) -> str:
    """Of a checkpoint's ``state_dict``: names without ``module.``, kinds, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    weights = {name.removeprefix("module."): value for name, value in content["state_dict"].items() if isinstance(name, str)}
    for name, value in sorted(weights.items()):
        plain = value.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\0".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def not_finite(content: dict[str, Any]) -> str | None:
    """The first thing that is not finite among a checkpoint's weights, optimizer state and loss: no run could train on with it.

    Validation losses are left out: that of a hard-quantized network may be beyond all numbers before the freeze.
    """
    parts = ((name, content.get(name)) for name in ("state_dict", "optimizer", "meter", "carried"))
    return next((name for part, value in parts for name in _not_finite(value, part)), None)


def _not_finite(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _not_finite(inner, f"{name} {key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{name} {index}")
    elif (isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all()) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        yield name


def locate(flag: str, path: Path) -> Path:
    """The checkpoint file that a flag's path names: itself, or in a run's folder its best network.

    Raises:
        UnreadableCheckpoint: if there is none.
        UsageError: if this user may not look there.
    """
    with reading(flag, path):
        if path.is_dir():
            best = path / BEST
            if not best.is_file():
                raise UnreadableCheckpoint(f"{flag} {path}: this folder holds no {BEST}")
            return best
        if not path.is_file():
            raise UnreadableCheckpoint(f"{flag} {path}: no such checkpoint file or run folder")
        return path


def load_weights(model: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Puts a checkpoint's weights into a network, whole or not at all; raises UsageError where ``fitting`` does."""
    model.load_state_dict(fitting(model, content, path))


def fitting(model: nn.Module, content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights for a network, which may be a sketch without memory (on torch's device ``meta``).

    Names may carry the prefix ``module.`` of a network that was trained on several GPUs.

    Raises:
        UsageError: if the checkpoint is of another network; says of which.
    """
    given = {name.removeprefix("module."): value for name, value in content["state_dict"].items() if isinstance(name, str)}
    wanted = model.state_dict()
    if not all(isinstance(value, Tensor) for value in given.values()):
        raise UnreadableCheckpoint(f"{path}: not a checkpoint, its state_dict holds more than tensors")
    for fact, words in ((_depth, "of depth {}"), (_classes, "for {} classes")):
        theirs, ours = fact(given), fact(wanted)
        if theirs != ours and theirs is not None:
            raise UsageError(f"{path}: a network {words.format(theirs)}, and this run's is {words.format(ours)}")
    # BatchNorm's counter of batches came to torch later than the published checkpoints.
    counters = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    given = {**counters, **given}
    differing = sorted(set(given) ^ set(wanted)) or [name for name in wanted if not _alike(given[name], wanted[name])]
    if differing:
        raise UsageError(f"{path}: a checkpoint of another network, they differ in {differing[0]!r}")
    broken = [name for name, value in given.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UsageError(f"{path}: {broken[0]!r} holds values that are not finite numbers")
    return given


def _alike(given: Tensor, wanted: Tensor) -> bool:
    kind = given.is_floating_point() == wanted.is_floating_point() and not given.is_complex()
    return kind and given.shape == wanted.shape and given.layout == torch.strided


def _depth(state: dict[str, Tensor]) -> int:
    """Layers with weights on the longest path: every convolution outside of shortcuts, and the classifier."""
    return sum(value.dim() in (2, 4) and name.endswith(".weight") and "downsample" not in name for name, value in state.items())


def _classes(state: dict[str, Tensor]) -> int | None:
    return len(state["fc.weight"]) if "fc.weight" in state and state["fc.weight"].dim() == 2 else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
