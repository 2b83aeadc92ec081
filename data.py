"""Data sets by name: found or downloaded, and made into batches on the device."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sources.batches import EVERYTHING, Batches, Share, TrainingBatches, ValidationBatches
from sources.digest import digest_of
from sources.images import READERS, Say, hold_out, read_small_images
from sources.text import FILES, read_text, training_windows, validation_windows

TEXTS = tuple(FILES)
DATASETS = (*READERS, "imagenet", *TEXTS)
MIRRORED = {"mnist": False}  # digits are the one set here whose mirror images are of no class


@dataclass(frozen=True)
class Data:
    """The splits of a data set, its number of classes, where it came from in words, what tells it from another, as a sha256 in
    hexadecimal digits; and of a text, its test split and its words."""

    train: Batches
    validation: Batches
    classes: int
    source: str
    digest: str
    test: Batches | None = None
    words: tuple[str, ...] = ()


def load(
    name: str,
    data_dir: Path,
    device: torch.device,
    batch_size: int,
    seed: int,
    say: Say,
    workers: int = 0,
    input_size: int | None = None,
    holdout: int = 0,
    share: Share = EVERYTHING,
) -> Data:
    """Finds (or downloads) a data set and makes its batches.

    Args:
        name: one of ``DATASETS``.
        data_dir: the folder that data sets lie in.
        device: where the batches are wanted.
        batch_size: training images in a batch; the last batch of an epoch may be smaller. Of a text: streams side by side.
        seed: of order and augmentation.
        say: is given lines about what is being done.
        workers: processes that decode images (imagenet only).
        input_size: side of the network's input in pixels (imagenet only; the other sets are 32).
        holdout: so many training images are validated on, in place of the data set's own validation images.
        share: what this process, of several, takes.

    Raises:
        UsageError: if the data set is not there and cannot be had, or is damaged.
    """
    if name in TEXTS:
        text = read_text(name, data_dir)
        validation, test = (validation_windows(tokens, device) for tokens in (text.validation, text.test))
        train = training_windows(text.train, batch_size, device)
        digest = digest_of(text.train.numpy(), text.validation.numpy(), text.test.numpy(), "\n".join(text.words))
        return Data(train, validation, len(text.words), text.source, digest, test, text.words)
    if name == "imagenet":
        from sources.imagenet import load_imagenet  # on first use: it needs torchvision, which is slow to import

        *found, names = load_imagenet(data_dir, device, batch_size, seed, workers, input_size or 224, share, holdout)
        return _named(Data(*found, digest_of(names)), holdout)
    images = read_small_images(name, data_dir, say)
    train, validation = images.train, images.test
    digest = digest_of(*(array for split in (train, validation) for array in (split.images, split.labels)))
    if holdout:
        kept, held = hold_out(len(train.labels), holdout)
        train, validation = train.take(kept), train.take(held)
    batches = TrainingBatches(train, batch_size, seed, device, MIRRORED.get(name, True), share)
    return _named(Data(batches, ValidationBatches(validation, device, share), images.classes, images.source, digest), holdout)


def _named(data: Data, holdout: int) -> Data:
    source = f"{data.source}, validated on {holdout} held out training images" if holdout else data.source
    return replace(data, source=source)
