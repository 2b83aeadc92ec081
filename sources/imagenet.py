"""ImageNet as class folders, decoded in worker processes."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import DecompressionBombError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from sources.batches import EVERYTHING, MEAN, STD, Share, generator
from sources.images import hold_out
from utils import UsageError, reading

FOLDERS = ("imagenet", "ImageNet", "Imagenet", ".")


def load_imagenet(
    data_dir: Path, device: torch.device, batch_size: int, seed: int, workers: int, input_size: int, share: Share, holdout: int
) -> tuple["FolderBatches", "FolderBatches", int, str, str]:
    """Training batches, validation batches, number of classes, source and the images' names, from ``train/<class>/*`` and
    ``val/<class>/*``.

    The arguments are those of ``data.load``.

    Raises:
        UsageError: if a folder is missing, empty or may not be read, or the splits differ in their classes.
    """
    with reading("--data_dir", data_dir):
        folder = next((data_dir / name for name in FOLDERS if (data_dir / name / "train").is_dir()), None)
    if folder is None:
        looked = ", ".join(str(data_dir / name / "train") for name in FOLDERS)
        raise UsageError(f"--data_dir {data_dir}: no ImageNet there; looked for {looked} (train/<class>/*, val/<class>/*)")
    finish = [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float32), transforms.Normalize(MEAN, STD)]
    augment = [transforms.RandomResizedCrop(input_size), transforms.RandomHorizontalFlip()]
    center = [transforms.Resize(input_size * 256 // 224), transforms.CenterCrop(input_size)]
    try:
        train = ImageFolder(folder / "train", transforms.Compose(augment + finish))
        validation = ImageFolder(folder / ("train" if holdout else "val"), transforms.Compose(center + finish))
    except OSError as error:
        raise UsageError(f"--data_dir {data_dir}: {' '.join(str(error).split())}") from None
    if train.classes != validation.classes:
        differing = sorted(set(train.classes) ^ set(validation.classes))
        raise UsageError(f"--data_dir: {folder} has the class {differing[0]!r} in only one of train and val")
    names = "\n".join(path.removeprefix(str(split.root)) for split in (train, validation) for path, _ in split.samples)
    if holdout:
        kept, held = hold_out(len(train), holdout)
        train.samples, validation.samples = [train.samples[i] for i in kept], [train.samples[i] for i in held]
    shared = {"batch_size": batch_size, "seed": seed, "device": device, "workers": workers, "share": share}
    return (
        FolderBatches(train, shuffled=True, **shared),
        FolderBatches(validation, shuffled=False, **shared),
        len(train.classes),
        f"class folders in {folder}",
        names,
    )


class _Seeded(Dataset):
    """Items by (seed of the item's augmentation, index), so that no worker's history matters."""

    def __init__(self, images: ImageFolder) -> None:
        self.images = images

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        seed, index = key
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return self.images[index]
            except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
                path = self.images.samples[index][0]
                raise UsageError(f"--data_dir: the image {path} cannot be read ({' '.join(str(error).split())})") from None


class FolderBatches:
    """A split of class folders in batches; see ``sources.batches.Batches``.

    Of several processes each takes its part of every batch if ``shuffled`` (training), else whole batches in turn.
    """

    def __init__(
        self,
        images: ImageFolder,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int,
        shuffled: bool,
        share: Share = EVERYTHING,
    ) -> None:
        self.samples, self.batch_size, self.share = len(images), batch_size, share
        self._images, self._seed = _Seeded(images), seed
        self._device, self._workers, self._shuffled = device, workers, shuffled
        parts = [slice(first, min(first + batch_size, self.samples)) for first in range(0, self.samples, batch_size)]
        if shuffled:
            self._parts = [share.part(part.start, part.stop) for part in parts]
        else:
            self._parts = parts[share.rank :: share.count]

    def __len__(self) -> int:
        return len(self._parts)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from step ``start`` on."""
        random = generator(self._seed, epoch)
        order = torch.randperm(self.samples, generator=random) if self._shuffled else torch.arange(self.samples)
        seeds = torch.randint(0, 2**62, (self.samples,), generator=random)
        keys = list(zip(seeds.tolist(), order.tolist(), strict=True))
        batches = [keys[part] for part in self._parts[start:]]
        pinned = self._device.type == "cuda"
        loader = DataLoader(
            self._images, batch_sampler=batches, num_workers=self._workers, pin_memory=pinned, worker_init_fn=_leave_signals
        )
        try:
            for images, labels in loader:
                images = images.to(self._device, non_blocking=True, memory_format=torch.channels_last)
                yield images, labels.to(self._device, non_blocking=True)
        except UsageError as error:  # from a worker it comes with the worker's traceback before it
            raise UsageError(str(error).strip().splitlines()[-1].split("UsageError: ")[-1]) from None


def _leave_signals(worker: int) -> None:
    """A signal to the whole group of processes is the run's to answer: it still needs its workers to finish the step and save."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """Ends the workers that are left when Python ends, whatever ended it.

    An error keeps its loader alive, and with it its workers; Python would then send them SIGTERM, which they ignore, and wait.
    """
    left = [child for child in multiprocessing.active_children() if child.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for an accident
    for worker in left:
        worker.kill()
