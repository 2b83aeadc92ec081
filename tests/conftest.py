"""Shared by all tests: the real command line in a subprocess, and a tiny data set in class folders."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import forks
import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from sources.images import CIFAR10_CLASSES

ROOT = Path(__file__).parent.parent
MAIN = ROOT / "main_binary_reg.py"
PATIENCE = 900  # seconds: nothing takes so long on a busy machine, and a defect must not hang for ever

settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("default")


def until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits for what a process is about to do."""
    began = time.monotonic()
    while not condition():
        assert process.poll() is None, "it has ended"
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.02)


def run_main(*arguments: object, cwd: Path = ROOT, check: int | None = 0, python: str | None = None) -> subprocess.CompletedProcess:
    """Runs the script as a user does; fails the test if the exit status is not ``check``."""
    process = start_main(*arguments, cwd=cwd, python=python, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    printed, said = process.communicate(timeout=PATIENCE)
    if check is not None:
        assert process.returncode == check, f"{' '.join(process.args)}\n{printed}\n{said}"
    return subprocess.CompletedProcess(process.args, process.returncode, printed, said)


def start_main(*arguments: object, python: str | None = None, cwd: Path = ROOT, **options: object) -> subprocess.Popen:
    """Starts the script; by a fork, see ``forks``, where ``python`` is not given."""
    command = [python or forks.python(), str(MAIN), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def make_class_folders(folder: Path, train: int = 8, test: int = 3, extension: str = "png") -> None:
    """A CIFAR-10 of a few images a class, each a noisy patch of its class's colour, so that there is something to learn."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 200, (len(CIFAR10_CLASSES), 1, 1, 3))
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(CIFAR10_CLASSES):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = (colours[label] + random.integers(0, 55, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index:04d}.{extension}")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A data folder with 80 + 30 images in CIFAR-10's class folders."""
    data_dir = tmp_path_factory.mktemp("data")
    make_class_folders(data_dir / "CIFAR10")
    return data_dir


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A data folder with 48 + 32 images of many sizes in ImageNet's class folders."""
    data, random = tmp_path_factory.mktemp("imagenet_data"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 8)):
        for index, name in enumerate(("n01", "n02", "n03", "n04")):
            folder = data / "imagenet" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = random.integers(40, 120, 2)
                pixels = random.integers(60 * index, 60 * index + 60, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    return data


@pytest.fixture(scope="session")
def ordinary_user() -> list[str]:
    """The words before a command that make it one of a user whom a folder's mode holds off, as it does not root."""
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    words = words if os.geteuid() == 0 else []
    if words and not shutil.which("setpriv"):
        pytest.skip("root, and no setpriv to give its rights away")
    with tempfile.TemporaryDirectory() as closed:
        Path(closed).chmod(0)
        look = [*words, sys.executable, "-c", f"import os; os.listdir({closed!r})"]
        done = subprocess.run(look, capture_output=True, text=True, check=False)
    if "PermissionError" not in done.stderr:
        pytest.skip("this user may enter every folder, and setpriv cannot drop that")
    return words
