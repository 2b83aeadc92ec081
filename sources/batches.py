"""Batches of normalized images on the device.

Small-image sets lie on the device as one uint8 tensor and are augmented there in a few batched operations. The order and the
augmentation of a batch follow from (seed, epoch, step) alone.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from sources.images import SIDE, Split

# The ImageNet statistics, for every data set: so did the published runs (RGB, of pixels in [0, 1]).
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
PAD = 4  # pixels on each side before the random crop


@dataclass(frozen=True)
class Share:
    """What one of several processes takes of the data: process ``rank`` of ``count``; by default everything."""

    rank: int = 0
    count: int = 1

    def part(self, first: int, last: int) -> slice:
        """Of the samples ``first`` to ``last`` of a batch, this process's. Never empty, since a network needs some input:
        where there are fewer samples than processes, some take the first one too, with ``weight`` 0."""
        begin, end = self._bounds(last - first)
        return slice(first + begin, first + end) if end > begin else slice(first, first + 1)

    def weight(self, samples: int) -> float:
        """What this process's mean loss over its part of so many samples must be multiplied by, so that the mean over all
        processes is the mean over the samples."""
        begin, end = self._bounds(samples)
        return self.count * (end - begin) / samples

    def _bounds(self, samples: int) -> tuple[int, int]:
        return samples * self.rank // self.count, samples * (self.rank + 1) // self.count


EVERYTHING = Share()


class Batches(Protocol):
    """One split in batches. Images are ``(N, 3, H, W)`` float32 in channels_last, labels int64 ``(N,)``, both on the device.

    Attributes:
        samples: in an epoch, over all processes.
        batch_size: over all processes; the last batch may be smaller.
        share: what of each training batch, or which validation batches, this process takes.
    """

    samples: int
    batch_size: int
    share: Share

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from step ``start`` on."""
        ...


def generator(seed: int, epoch: int) -> torch.Generator:
    """Random numbers that depend on the seed and the epoch and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


class Normalize:
    """uint8 ``(N, H, 32, 3)`` pixels to float32 ``(N, 3, H, 32)``: (x / 255 - mean) / std, channels_last."""

    def __init__(self, device: torch.device) -> None:
        mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
        # Whole image rows at once: an inner dimension of 3 channels would be too short for vector units.
        self._scale = (1 / (255 * std)).repeat(SIDE).float().to(device)
        self._shift = (-mean / std).repeat(SIDE).float().to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        rows = pixels.flatten(2).float().mul_(self._scale).add_(self._shift)
        return rows.view(pixels.shape).permute(0, 3, 1, 2)


class TrainingBatches:
    """A shuffled, augmented training split: black frame of 4 pixels, random 32x32 crop, mirrored half of the time."""

    def __init__(
        self, split: Split, batch_size: int, seed: int, device: torch.device, mirror: bool = True, share: Share = EVERYTHING
    ) -> None:
        self.samples = len(split.labels)
        self.batch_size = batch_size
        self.share = share
        self._seed, self._device, self._mirror = seed, device, mirror
        self._normalize = Normalize(device)
        self._side = SIDE + 2 * PAD
        self._rows = torch.arange(SIDE, device=device)
        self._split: Split | None = split

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor]:
        """Windows and labels, made where an epoch begins: an evaluation needs none of them there.

        Entry (image row, dx) of the windows is the row's 32 pixels from column dx on, as a view: a crop is 32 contiguous copies.
        """
        split, self._split, side = self._split, None, self._side
        framed = torch.zeros(self.samples, side, side, 3, dtype=torch.uint8, device=self._device)
        framed[:, PAD:-PAD, PAD:-PAD] = torch.from_numpy(split.images).to(self._device)
        windows = framed.view(self.samples * side, side * 3).unfold(1, SIDE * 3, 3)
        return windows, torch.from_numpy(split.labels).to(self._device)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch, from step ``start`` on."""
        _, labels = self._on_device
        order, dy, dx, mirrored = self._draw(epoch)
        for first in range(start * self.batch_size, self.samples, self.batch_size):
            part = self.share.part(first, min(first + self.batch_size, self.samples))
            pixels = self._crop(order[part], dy[part], dx[part], mirrored[part])
            yield self._normalize(pixels), labels[order[part]]

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        """The epoch's order, crop offsets and mirrorings, drawn on the CPU so that every device gets the same ones."""
        random = generator(self._seed, epoch)
        order = torch.randperm(self.samples, generator=random)
        offsets = torch.randint(0, 2 * PAD + 1, (2, self.samples), generator=random)
        mirrored = torch.randint(0, 2, (self.samples,), generator=random).bool() & self._mirror
        return tuple(drawn.to(self._device) for drawn in (order, offsets[0], offsets[1], mirrored))

    def _crop(self, images: Tensor, dy: Tensor, dx: Tensor, mirrored: Tensor) -> Tensor:
        rows = (images * self._side + dy)[:, None] + self._rows
        windows, _ = self._on_device
        pixels = windows[rows, dx[:, None].expand_as(rows)].view(-1, SIDE, SIDE, 3)
        return torch.where(mirrored[:, None, None, None], pixels.flip(2), pixels)


class ValidationBatches:
    """A split as it is, in order; of several processes each takes whole batches in turn."""

    batch_size = 500  # images: changes the figures by rounding only

    def __init__(self, split: Split, device: torch.device, share: Share = EVERYTHING) -> None:
        self.samples = len(split.labels)
        self.share = share
        self._normalize = Normalize(device)
        self._images = torch.from_numpy(split.images).to(device)
        self._labels = torch.from_numpy(split.labels).to(device)

    def __len__(self) -> int:
        return len(self._firsts())

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, the same in every epoch."""
        for first in self._firsts()[start:]:
            part = slice(first, first + self.batch_size)
            yield self._normalize(self._images[part]), self._labels[part]

    def _firsts(self) -> range:
        return range(self.share.rank * self.batch_size, self.samples, self.share.count * self.batch_size)
