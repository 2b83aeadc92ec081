"""Data: the batched augmentation against torchvision's per-image transforms, and every way that data on disk can be wrong."""

import errno
import fcntl
import gzip
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_class_folders
from PIL import Image

import data
from sources import batches
from sources.images import CACHE, Split, hold_out
from utils import UsageError

CPU = torch.device("cpu")


def split(images: int = 40) -> Split:
    random = np.random.default_rng(0)
    return Split(random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), np.arange(images) % 10)


def load(name: str, folder: Path, said: list[str] | None = None, **options) -> data.Data:
    said = [] if said is None else said
    return data.load(name, folder, CPU, options.pop("batch_size", 16), 0, said.append, **options)


def published_views(image: np.ndarray, mirror: bool) -> dict[bytes, tuple[int, int, bool]]:
    """Every image that pad 4, crop and mirror can make of one, through torchvision's own functions."""
    from torchvision.transforms import functional as TF

    padded = TF.pad(Image.fromarray(image), 4)
    views = {}
    for dy in range(9):
        for dx in range(9):
            crop = TF.crop(padded, dy, dx, 32, 32)
            for mirrored in (False, True) if mirror else (False,):
                views[np.asarray(TF.hflip(crop) if mirrored else crop).tobytes()] = (dy, dx, mirrored)
    return views


@pytest.mark.parametrize("mirror", [True, False])
def test_augmentation_is_uniform_over_the_published_views(mirror):
    """One image, many epochs: each of its 162 (or 81) views comes, each about equally often, and nothing else."""
    one = Split(np.repeat(split(1).images, 500, axis=0), np.zeros(500, dtype=np.int64))
    views = published_views(one.images[0], mirror)
    source = batches.TrainingBatches(one, 500, 0, CPU, mirror)
    counts = dict.fromkeys(views.values(), 0)
    epochs = 40
    for epoch in range(epochs):
        order, dy, dx, mirrored = source._draw(epoch)
        for pixels in source._crop(order, dy, dx, mirrored).numpy():
            counts[views[pixels.tobytes()]] += 1
    expected = 500 * epochs / len(views)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    degrees = len(views) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5


def test_draws_of_an_epoch_are_independent():
    """Offsets, mirrorings and order are uncorrelated, within an image and between neighbours."""
    source = batches.TrainingBatches(Split(split(1).images.repeat(4000, 0), np.zeros(4000, np.int64)), 128, 0, CPU)
    columns = [drawn.double() for drawn in source._draw(3)]
    columns += [torch.roll(drawn, 1) for drawn in columns]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(8)
    assert correlation.abs().max() < 5 / 4000**0.5


def test_normalization_is_torchvisions():
    from torchvision import transforms

    images = split()
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    source = batches.ValidationBatches(images, CPU)
    found, labels = next(iter(source.epoch()))
    expected = torch.stack([normalize(image) for image in images.images])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert labels.tolist() == images.labels.tolist()
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch_size", [1, 16, 40, 64])
def test_an_epoch_has_every_image_once(batch_size):
    images = split()
    images = Split(images.images, np.arange(40))
    source = batches.TrainingBatches(images, batch_size, 0, CPU)
    seen = [labels for _, labels in source.epoch(0)]
    assert len(seen) == len(source) == -(-40 // batch_size)
    assert sorted(torch.cat(seen).tolist()) == list(range(40))
    assert torch.cat(seen).tolist() != torch.cat([labels for _, labels in source.epoch(1)]).tolist() or batch_size == 1


def test_a_batch_follows_from_seed_epoch_and_step_alone():
    first, second = (batches.TrainingBatches(split(), 16, 7, CPU) for _ in range(2))
    list(first.epoch(0))
    torch.manual_seed(99)
    whole = list(first.epoch(5))
    rest = list(second.epoch(5, start=1))
    assert len(rest) == len(whole) - 1
    for (images, labels), (other_images, other_labels) in zip(whole[1:], rest, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    other_seed = next(batches.TrainingBatches(split(), 16, 8, CPU).epoch(5))[1]
    assert not torch.equal(other_seed, whole[0][1])


def test_the_sample_is_in_the_repository():
    sets = load("sample", Path("nowhere"))
    assert (sets.train.samples, sets.validation.samples, sets.classes) == (6000, 1000, 10)
    labels = torch.cat([labels for _, labels in sets.validation.epoch()])
    assert labels.bincount().tolist() == [100] * 10


# Class folders and their cache.


@pytest.mark.parametrize("extension", ["png", "jpg", "JPEG"])
def test_class_folders(tmp_path, extension):
    make_class_folders(tmp_path / "CIFAR10", extension=extension)
    sets = load("cifar10", tmp_path)
    assert (sets.train.samples, sets.validation.samples, sets.classes) == (80, 30, 10)
    path = tmp_path / "CIFAR10" / "test" / "bird" / f"0001.{extension}"
    with Image.open(path) as image:
        assert np.array_equal(sets.validation._images[2 * 3 + 1].numpy(), np.asarray(image.convert("RGB")))


def test_class_folders_are_decoded_once(tmp_path, monkeypatch):
    make_class_folders(tmp_path / "CIFAR10")
    first = load("cifar10", tmp_path)
    monkeypatch.setattr("sources.images._decode", lambda paths, name: pytest.fail("decoded again"))
    second = load("cifar10", tmp_path)
    assert torch.equal(first.validation._images, second.validation._images)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "pickle", "labels"])
def test_a_damaged_cache_is_said_and_made_again(tmp_path, damage):
    make_class_folders(tmp_path / "CIFAR10")
    good = load("cifar10", tmp_path).validation._images
    cache = tmp_path / "CIFAR10" / CACHE
    content = bytearray(cache.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 3] ^= 1
    elif damage == "empty":
        content = b""
    elif damage == "text":
        content = b"not an archive"
    elif damage == "pickle":
        np.savez(cache, fingerprint=np.array([{"a": 1}], dtype=object))
        content = cache.read_bytes()
    else:
        with np.load(cache) as archive:
            arrays = dict(archive)
        arrays["test_labels"] = arrays["test_labels"] + 5
        np.savez(cache, **arrays)
        content = cache.read_bytes()
    cache.write_bytes(content)
    said = []
    assert torch.equal(load("cifar10", tmp_path, said).validation._images, good)
    assert len(said) == 1  # though it is looked at twice
    assert "damaged" in said[0]
    assert str(cache) in said[0]
    said.clear()
    load("cifar10", tmp_path, said)
    assert said == []


def test_changed_images_are_decoded_again(tmp_path):
    make_class_folders(tmp_path / "CIFAR10")
    load("cifar10", tmp_path)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(tmp_path / "CIFAR10" / "test" / "dog" / "9999.png")
    said = []
    assert load("cifar10", tmp_path, said).validation.samples == 31
    assert len(said) == 1
    assert "changed" in said[0]


def test_decoded_images_are_read_without_the_lock(tmp_path, monkeypatch):
    make_class_folders(tmp_path / "CIFAR10")
    first = load("cifar10", tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: pytest.fail("locked"))
    said = []
    assert torch.equal(load("cifar10", tmp_path, said).validation._images, first.validation._images)
    assert said == []


def without_locks(monkeypatch, number: int) -> None:
    """As on a file system that answers a lock with this error."""

    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK, errno.EBADF], ids=errno.errorcode.get)
def test_images_are_decoded_where_there_are_no_locks(tmp_path, monkeypatch, number):
    make_class_folders(tmp_path / "CIFAR10")
    without_locks(monkeypatch, number)
    said = []
    first = load("cifar10", tmp_path, said)
    assert len(said) == 1
    assert f"{tmp_path / 'CIFAR10'} cannot be locked" in said[0]
    assert os.strerror(number) in said[0]
    said.clear()
    assert torch.equal(load("cifar10", tmp_path, said).validation._images, first.validation._images)
    assert said == []


HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_that_decodes_is_waited_for_which_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "CIFAR10"
    make_class_folders(folder)
    first = load("cifar10", tmp_path)
    (folder / CACHE).rename(tmp_path / "kept")
    said, flock = [], fcntl.flock
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"

        def say(line: str) -> None:
            """The one that decodes is done as soon as somebody says that he waits for it."""
            said.append(line)
            (tmp_path / "kept").rename(folder / CACHE)
            holder.communicate()

        def not_without_a_word(descriptor: int, operation: int) -> None:
            if not said and not operation & fcntl.LOCK_NB:
                holder.kill()
                pytest.fail("waits without a word")
            flock(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", not_without_a_word)
        monkeypatch.setattr("sources.images._decode", lambda paths, name: pytest.fail("decoded again"))
        second = data.load("cifar10", tmp_path, CPU, 16, 0, say)
    assert torch.equal(first.validation._images, second.validation._images)
    assert len(said) == 1
    assert f"another process is decoding or downloading images in {folder}: waiting" in said[0]


def test_a_folder_that_cannot_be_written_works_without_cache(tmp_path, monkeypatch):
    make_class_folders(tmp_path / "CIFAR10")

    def refuse(path, write):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sources.images.write_whole", refuse)
    said = []
    assert load("cifar10", tmp_path, said).train.samples == 80
    assert "Permission denied" in said[0]


def break_folders(folder: Path, fault: str) -> str:
    """Damages class folders; returns what the error must name."""
    if fault == "missing class":
        for image in (folder / "test" / "frog").iterdir():
            image.unlink()
        (folder / "test" / "frog").rmdir()
        return "frog"
    if fault == "empty class":
        for image in (folder / "train" / "ship").iterdir():
            image.unlink()
        return "ship"
    if fault == "unknown class":
        (folder / "train" / "zebra").mkdir()
        return "zebra"
    path = folder / "train" / "cat" / "0003.png"
    if fault == "unreadable image":
        path.write_bytes(path.read_bytes()[:60])
    elif fault == "link to nowhere":
        path.unlink()
        path.symlink_to("gone.png")
    elif fault == "no image":
        path.write_bytes(b"hello")
    else:
        Image.new("RGB", (33, 32)).save(path)
    return str(path)


@pytest.mark.parametrize(
    "fault", ["missing class", "empty class", "unknown class", "unreadable image", "no image", "wrong size", "link to nowhere"]
)
def test_faulty_class_folders_are_named(tmp_path, fault):
    make_class_folders(tmp_path / "CIFAR10")
    named = break_folders(tmp_path / "CIFAR10", fault)
    with pytest.raises(UsageError) as caught:
        load("cifar10", tmp_path)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "CIFAR10" / CACHE).exists()


# torchvision's own layouts.


def lay_down_cifar(root: Path, monkeypatch, name: str) -> np.ndarray:
    """Ten images in torchvision's files of CIFAR-10 or CIFAR-100, with its checksums set to theirs."""
    import hashlib

    import torchvision.datasets as vision

    kind = getattr(vision, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(file_name: str, content: dict) -> str:
        (folder / file_name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file_name).read_bytes()).hexdigest()

    label_key, names_key = ("labels", "label_names") if name == "CIFAR10" else ("fine_labels", "fine_label_names")
    classes = 10 if name == "CIFAR10" else 100
    lists = {}
    for which in ("train_list", "test_list"):
        lists[which] = []
        for file_name, _ in getattr(kind, which):
            pixels = random.integers(0, 256, (2, 3072), dtype=np.uint8)
            lists[which].append((file_name, write(file_name, {"data": pixels, label_key: [0, classes - 1]})))
        monkeypatch.setattr(kind, which, lists[which])
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {names_key: [f"class {index}" for index in range(classes)]})
    monkeypatch.setattr(kind, "meta", meta)
    return pixels.reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("place", [".", "published"])
@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_torchvisions_cifar(tmp_path, monkeypatch, name, place):
    last = lay_down_cifar(tmp_path / (name if place == "published" else "."), monkeypatch, name)
    sets = load(name.lower(), tmp_path)
    assert sets.classes == (10 if name == "CIFAR10" else 100)
    assert sets.train.samples == (10 if name == "CIFAR10" else 2)
    assert np.array_equal(sets.validation._images.numpy(), last)


def write_idx(path: Path, array: np.ndarray, compress: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_torchvisions_mnist(tmp_path, name):
    random = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = random.integers(0, 256, (12, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / name / "raw" / f"{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / name / "raw" / f"{prefix}-labels-idx1-ubyte", np.arange(12, dtype=np.uint8) % 10)
    sets = load(name.lower(), tmp_path)
    assert sets.classes == 10
    found = sets.validation._images.numpy()
    assert np.array_equal(found[:, 2:30, 2:30, 1], images)
    assert found[:, :2].max() == 0
    mirrored = torch.cat([sets.train._draw(epoch)[3] for epoch in range(5)])
    assert mirrored.any() == (name == "FashionMNIST")


@pytest.mark.parametrize("damage", ["cut in the header", "cut", "fewer labels"])
def test_damaged_files_of_torchvision_are_named(tmp_path, damage):
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte", np.zeros((12, 28, 28), np.uint8))
        labels = 9 if damage == "fewer labels" else 12
        write_idx(tmp_path / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", np.zeros(labels, np.uint8))
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[: {"cut in the header": 6, "cut": 3000}.get(damage)])
    with pytest.raises(UsageError, match=r"MNIST in .* is damaged") as caught:
        load("mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    def broken(*given, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("torchvision.datasets.MNIST", broken)
    with pytest.raises(UsageError, match=r"MNIST in .* cannot be read \(Input/output error\)$"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashionmnist", "mnist"])
def test_absent_and_not_to_be_had(tmp_path, monkeypatch, name):
    import urllib.request

    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    said = []
    with pytest.raises(UsageError) as caught:
        load(name, tmp_path / "data", said)
    message = str(caught.value)
    assert str(tmp_path / "data") in message
    assert "torchvision" in message
    assert "\n" not in message
    assert ("class folders" in message) == (name == "cifar10")
    assert "downloading" in said[0]
    assert not (tmp_path / "data").exists()


def test_without_locks_a_data_set_is_downloaded(tmp_path, monkeypatch):
    import urllib.request

    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    without_locks(monkeypatch, errno.ENOSYS)
    said = []
    with pytest.raises(UsageError, match="cannot be downloaded"):
        load("mnist", tmp_path, said)
    assert f"{tmp_path} cannot be locked" in said[0]
    assert "downloading" in said[1]


# ImageNet.


@pytest.fixture
def imagenet(tmp_path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("n01", "n02", "n03"):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = random.integers(40, 90, 2)
                Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_imagenet_batches(imagenet, workers):
    sets = load("imagenet", imagenet, batch_size=5, workers=workers, input_size=32)
    assert (sets.classes, sets.train.samples, sets.validation.samples) == (3, 18, 9)
    whole = list(sets.train.epoch(2))
    assert [len(labels) for _, labels in whole] == [5, 5, 5, 3]
    assert whole[0][0].shape == (5, 3, 32, 32)
    again = list(load("imagenet", imagenet, batch_size=5, workers=0, input_size=32).train.epoch(2, start=2))
    for (images, labels), (other_images, other_labels) in zip(whole[2:], again, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert torch.cat([labels for _, labels in sets.validation.epoch()]).tolist() == [0] * 3 + [1] * 3 + [2] * 3


def test_of_several_processes_each_takes_its_share_of_imagenet(imagenet):
    whole = load("imagenet", imagenet, batch_size=5, input_size=32)
    parts = [load("imagenet", imagenet, batch_size=5, input_size=32, share=batches.Share(rank, 2)) for rank in (0, 1)]
    assert len(parts[0].train) == len(parts[1].train) == len(whole.train)
    for (images, labels), *shares in zip(whole.train.epoch(1), *(part.train.epoch(1) for part in parts), strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)
    validated = [labels for part in parts for _, labels in part.validation.epoch()]
    assert sorted(torch.cat(validated).tolist()) == [0] * 3 + [1] * 3 + [2] * 3


def test_held_out_imagenet(imagenet):
    sets = load("imagenet", imagenet, batch_size=5, input_size=32, holdout=4)
    assert (sets.train.samples, sets.validation.samples) == (14, 4)
    paths = [path for split in (sets.train, sets.validation) for path, _ in split._images.images.samples]
    assert len(set(paths)) == 18
    assert all("train" in path for path in paths)


def test_held_out_images_are_always_the_same_ones():
    train, held = hold_out(40, 15)
    assert sorted([*train, *held]) == list(range(40))
    assert held.tolist() != sorted(held)
    assert np.array_equal(held[5:], hold_out(40, 10)[1])
    with pytest.raises(UsageError, match="--holdout 40"):
        hold_out(40, 40)


def test_imagenet_faults(imagenet):
    bad = imagenet / "imagenet" / "train" / "n02" / "1.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(UsageError, match="n02"):
        list(load("imagenet", imagenet, workers=2, input_size=32).train.epoch(0))
    (imagenet / "imagenet" / "train" / "n04").mkdir()
    with pytest.raises(UsageError, match="n04"):
        load("imagenet", imagenet)
    with pytest.raises(UsageError, match="train/<class>"):
        load("imagenet", imagenet / "imagenet" / "val")


def test_the_training_set_is_not_on_the_device_before_an_epoch_begins():
    """An evaluation needs none of it there."""
    split = Split(np.zeros((500, 32, 32, 3), np.uint8), np.zeros(500, np.int64))
    source = batches.TrainingBatches(split, 50, 0, torch.device("meta"))
    assert sum(value.numel() for value in vars(source).values() if isinstance(value, torch.Tensor)) < 500


def test_imagenet_is_the_same_wherever_its_folder_is_named(imagenet, tmp_path, monkeypatch):
    """Also with a name that is no UTF-8; another image is another set."""
    shutil.copytree(imagenet, tmp_path / "other")
    images = tmp_path / "other" / "imagenet" / "train" / "n01"
    shutil.copy(images / "0.jpg", os.fsencode(images) + b"/caf\xe9.jpg")
    monkeypatch.chdir(tmp_path / "other" / "imagenet")

    def digest(place):
        return data.load("imagenet", Path(place), torch.device("cpu"), 2, 0, print).digest

    assert digest(".") == digest("..") == digest(tmp_path / "other")
    assert digest(imagenet) != digest(".")
