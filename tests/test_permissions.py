"""What this user may not look at, as on a cluster another user's folders: one line that says so, exit status 2, nothing written."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MAIN, PATIENCE, make_class_folders, run_main

TINY = ["--device", "cpu", "--dataset", "sample", "--model_config", "{'depth': 8}", "--epochs", "1"]
Run = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def without_rights(ordinary_user) -> Run:
    """Runs the script as a user whom a folder's mode holds off."""

    def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
        command = [*ordinary_user, sys.executable, str(MAIN), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A working folder with a folder that may not be entered, and class folders one of which may not."""
    place = tmp_path_factory.mktemp("permissions")
    (place / "locked" / "sub").mkdir(parents=True)
    make_class_folders(place / "images" / "CIFAR10", train=1, test=1)
    closed = [place / "locked", place / "images" / "CIFAR10" / "train" / "dog"]
    for one in closed:
        one.chmod(0)
    yield place
    for one in closed:
        one.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "option", "path"),
    [
        (["--evaluate", "locked/sub"], "--evaluate", "locked/sub"),
        (["--resume", "locked/sub"], "--resume", "locked/sub"),
        (["--results_dir", "locked/sub"], "--results_dir", "locked/sub/run"),
        (["--tb_dir", "locked/sub"], "--tb_dir", "locked/sub"),
        (["--dataset", "cifar10", "--data_dir", "locked/sub"], "--data_dir", "locked/sub"),
        (["--dataset", "mnist", "--data_dir", "locked/sub"], "--data_dir", "locked/sub"),
        (["--dataset", "imagenet", "--model_config", "{'depth': 18}", "--data_dir", "locked/sub"], "--data_dir", "locked/sub"),
        (["--dataset", "text", "--model", "lstm", "--model_config", "{}", "--data_dir", "locked/sub"], "--data_dir", "locked/sub"),
        (["--dataset", "cifar10", "--data_dir", "images"], "--data_dir", "images/CIFAR10/train/dog"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_line_that_permission_is_denied(folder, without_rights, arguments, option, path):
    before = sorted(folder.rglob("*"))
    done = without_rights(*TINY, "--save", "run", *arguments, cwd=folder)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    for words in ("main_binary_reg.py: error: ", option, path, "Permission denied", "must be allowed"):
        assert words in lines[0]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["args.json", "checkpoint.pth.tar"])
def test_a_run_that_may_not_be_read_is_not_to_be_overwritten(tmp_path, without_rights, name):
    run = [*TINY, "--save", "run", "--epochs"]
    run_main(*run, 2, cwd=tmp_path)  # the checkpoint of the first epoch must not be taken in the latest one's place
    closed = tmp_path / "results" / "run" / name
    content, mode = closed.read_bytes(), closed.stat().st_mode
    closed.chmod(0)
    done = without_rights(*run, 3, cwd=tmp_path)
    closed.chmod(mode)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1
    for words in ("--save run", str(Path("results", "run", name)), "Permission denied"):
        assert words in done.stderr
    assert "--overwrite" not in done.stderr
    assert "looking for an older one" not in done.stdout
    assert closed.read_bytes() == content


def test_images_in_a_folder_that_may_not_be_listed_are_decoded_without_a_lock(tmp_path, without_rights):
    images = tmp_path / "CIFAR10"
    make_class_folders(images, train=1, test=1)
    images.chmod(0o311)
    cifar10 = ["--dataset", "cifar10", "--data_dir", tmp_path, "--save", "run"]
    done = without_rights(*TINY, *cifar10, cwd=tmp_path)
    images.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert f"warning: {images} cannot be locked" in done.stdout
