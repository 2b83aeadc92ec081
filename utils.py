"""What every part may know and is small: the user's error, files that are whole or not there, the device, the seeds, counting."""

import contextlib
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor


class UsageError(Exception):
    """Bad input, said in one line that names the option or file, what it holds and what would be accepted."""


def is_finite(number: int | float) -> bool:
    """Whether it is a finite float, or a whole number that one can come near to."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


class CannotWrite(Exception):
    """A file of the run that cannot be written: why, and which."""

    def __init__(self, path: Path | str, error: BaseException | None) -> None:
        reason = getattr(error, "strerror", None) or error
        super().__init__(f"{reason}: {getattr(error, 'filename', None) or path}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which a file that cannot be written raises CannotWrite; ``path`` is named where the system names no file."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(path, error) from error


@contextlib.contextmanager
def reading(option: str, path: Path) -> Iterator[None]:
    """A context in which an OSError raises UsageError that names the option; ``path`` is named where the system names no file.

    ``Path.exists``, ``is_dir`` and ``is_file`` are False where nothing is there, and raise where that cannot be known: below a
    folder that this user may not enter, say.
    """
    try:
        yield
    except OSError as error:
        needed = "; this user must be allowed to read it, and to enter every folder above it"
        words = f"{option}: {error.filename or path} cannot be read ({error.strerror or error})"
        raise UsageError(words + (needed if isinstance(error, PermissionError) else "")) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it to ``path``.

    Whoever reads ``path`` sees the old file or the new one, never a part, also after a crash or a power failure.

    Raises:
        OSError: if the folder is gone, cannot be written, or the disk is full; ``path`` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_left_over(folder: Path) -> None:
    """Removes the temporary files of ``write_whole`` that killed processes of this machine have left in a folder.

    Nothing is written in the folder by this process meanwhile: what bears its number is left over too.
    """
    for path in folder.iterdir():
        named = re.fullmatch(r"\..+\.([0-9]+)\.tmp", path.name)
        if named and (int(named[1]) == os.getpid() or not _lives(int(named[1]))):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True


def write_text(path: Path, text: str) -> None:
    """``write_whole`` for text in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk with its folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to save and end; SIGHUP, of a terminal that closes, unless ``nohup`` has had it ignored."""
    kept = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, *kept]


def count_gpus(device: str) -> int:
    """How many GPUs a run may choose from with ``--device``."""
    return torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0


def select_device(device: str, gpus: list[int], gpus_typed: bool, local: int = 0) -> tuple[torch.device, str | None]:
    """The device of a process, and a warning where it is not what the user asked for.

    Args:
        device: ``cpu``, ``cuda`` or ``auto`` (a GPU where there is one).
        gpus: indices of GPUs.
        gpus_typed: True where the user named the GPUs.
        local: number of this process on its machine; it takes the GPU at this place of ``gpus``, or if none were named, this one.

    Raises:
        UsageError: if CUDA was asked for explicitly and is not there, or the machine has no GPU of that index.
    """
    count = count_gpus(device)
    if device == "cuda" and not count:
        raise UsageError("--device cuda: this machine has no CUDA device that torch can use; cpu or auto is accepted here")
    if not count:
        asked = gpus_typed and device == "auto"
        warning = f"--gpus {','.join(map(str, gpus))}: no CUDA device here, running on the CPU" if asked else None
        return torch.device("cpu"), warning
    if gpus_typed and local >= len(gpus):
        raise UsageError(f"--gpus {','.join(map(str, gpus))}: names {len(gpus)}, and there are more processes on this machine")
    gpu = gpus[local] if gpus_typed else local
    check_gpu(gpu, count)
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu), None


def check_gpu(gpu: int, count: int) -> None:
    """Raises UsageError on the index of a GPU that a machine with so many has not."""
    if gpu >= count:
        raise UsageError(f"--gpus {gpu}: this machine has the GPUs 0 to {count - 1}")


def seed_everything(seed: int) -> None:
    """Seeds every generator that a run draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Meter:
    """Mean loss and top-1 and top-5 errors over samples, counted on the device: reading it is the only synchronization.

    Args:
        device: of the counts.
        total: sums the counts over the processes of a run; then all of them must read, save and load at the same time.
        sums: how many are counted, beside the samples: loss, top-1 hits, top-5 hits.
    """

    def __init__(self, device: torch.device, total: Callable[[Tensor], Tensor] = lambda counts: counts, sums: int = 3) -> None:
        self._counts = torch.zeros(sums + 1, dtype=torch.float64, device=device)  # the samples last
        self._total = total

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts a batch: ``(N, classes)`` logits, ``(N,)`` labels and their mean loss. With under 5 classes top-5 is all."""
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = best == labels[:, None]
        self._count(len(labels), [loss.double() * len(labels), hits[:, 0].sum(), hits.sum()])

    def _count(self, samples: int | Tensor, sums: list[Tensor]) -> None:
        self._counts[:-1] += torch.stack(sums)
        self._counts[-1] += samples

    def read(self) -> dict[str, float]:
        """``loss`` (mean cross-entropy), ``error1`` and ``error5`` (percent); NaN before the first sample."""
        counts = self.state_dict()
        return self._figures(counts["sums"], counts["samples"])

    def _figures(self, sums: list[float], samples: int) -> dict[str, float]:
        loss, top1, top5 = sums
        if not samples:
            return {"loss": float("nan"), "error1": float("nan"), "error5": float("nan")}
        return {"loss": loss / samples, "error1": 100 * (samples - top1) / samples, "error5": 100 * (samples - top5) / samples}

    def state_dict(self) -> dict[str, Any]:
        """The counts so far, over all processes."""
        *sums, samples = self._total(self._counts).tolist()
        return {"sums": sums, "samples": int(samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a ``state_dict``; of several processes only one may, since its counts are all of theirs."""
        self._counts.copy_(torch.tensor([*state["sums"], state["samples"]], dtype=torch.float64))

    def reset(self) -> None:
        """Forgets everything."""
        self._counts.zero_()
