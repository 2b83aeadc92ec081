"""Data sets by name: found or downloaded, and made into batches on the device."""

from dataclasses import dataclass
from pathlib import Path

import torch

from batches import Batches, TrainingBatches, ValidationBatches
from datasets import READERS, Say, read_small_images

DATASETS = (*READERS, "imagenet")
MIRRORED = {"mnist": False}  # digits are the one set here whose mirror images are of no class


@dataclass(frozen=True)
class Data:
    """The two splits of a data set, its number of classes, and where it came from in words."""

    train: Batches
    validation: Batches
    classes: int
    source: str


def load(
    name: str,
    data_dir: Path,
    device: torch.device,
    batch_size: int,
    seed: int,
    say: Say,
    workers: int = 0,
    input_size: int | None = None,
) -> Data:
    """Finds (or downloads) a data set and makes its batches.

    Args:
        name: one of ``DATASETS``.
        data_dir: the folder that data sets lie in.
        device: where the batches are wanted.
        batch_size: training images in a batch; the last batch of an epoch may be smaller.
        seed: of order and augmentation.
        say: is given lines about what is being done.
        workers: processes that decode images (imagenet only).
        input_size: side of the network's input in pixels (imagenet only; the other sets are 32).

    Raises:
        UsageError: if the data set is not there and cannot be had, or is damaged.
    """
    if name == "imagenet":
        from imagenet import load_imagenet  # on first use: it needs torchvision, which is slow to import

        return Data(*load_imagenet(data_dir, device, batch_size, seed, workers, input_size or 224))
    images = read_small_images(name, data_dir, say)
    return Data(
        TrainingBatches(images.train, batch_size, seed, device, mirror=MIRRORED.get(name, True)),
        ValidationBatches(images.test, device),
        images.classes,
        images.source,
    )
