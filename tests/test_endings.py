"""Whatever ends a run ends all its processes, with the right status and one line that says why."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import MAIN, ROOT

import models

IMAGENET = ("--dataset", "imagenet", "--input_size", 40, "--workers", 2, "--batch-size", 50, "--precision", "fp32", "--epochs", 2)


def run_to_the_end(*arguments: object) -> tuple[int, str]:
    """Status and standard error; returns only when every process that holds the output has ended, the workers too."""
    command = list(map(str, [sys.executable, MAIN, *arguments]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        said = process.communicate(timeout=120)[1]
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        pytest.fail("processes are left behind")


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_unreadable_image_ends_all_processes(imagenet, tmp_path, split):
    shutil.copytree(imagenet, tmp_path / "data")
    bad = tmp_path / "data" / "imagenet" / split / "n02" / "7.jpg"
    bad.write_bytes(b"no image")
    options = (*IMAGENET, "--data_dir", tmp_path / "data", "--results_dir", tmp_path / "results", "--save", "run")
    if split == "val":
        checkpoint = tmp_path / "network.pth.tar"
        torch.save({"state_dict": models.resnet("imagenet", 18, 4).state_dict()}, checkpoint)
        options = (*options, "--evaluate", checkpoint)
    status, said = run_to_the_end(*options)
    assert status == 2
    assert len(said.splitlines()) == 1
    assert str(bad) in said


def test_a_diverging_run_ends_all_processes(imagenet, tmp_path):
    options = ("--data_dir", imagenet, "--results_dir", tmp_path, "--save", "run", "--lr", "1e30", "--print-freq", 1)
    status, said = run_to_the_end(*IMAGENET, *options)
    assert status == 1
    assert "the training loss is" in said
