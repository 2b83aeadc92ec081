"""Whatever ends a run ends all its processes, with the right status and one line that says why."""

import os
import shutil
import subprocess
import sys

import forks
import pytest
import torch
from conftest import MAIN, PATIENCE, ROOT

import models

IMAGENET = ("--dataset", "imagenet", "--input_size", 40, "--workers", 2, "--batch-size", 12, "--precision", "fp32", "--epochs", 2)


def run_to_the_end(*arguments: object) -> tuple[int, str]:
    """Status and standard error; returns only when every process that holds the output has ended, the workers too."""
    command = list(map(str, [sys.executable, MAIN, *arguments]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        said = process.communicate(timeout=PATIENCE)[1]
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


# A process that sends itself SIGTERM after step 5 of epoch 2, when the weights are not finite and nobody has looked at the loss.
SIGNALLED = """
import os, signal, sys
import main_binary_reg
from training import epoch

between_steps = epoch.between_steps

def signalled(job, state, progress):
    if (state.epoch, state.step) == (1, 5):
        os.kill(os.getpid(), signal.SIGTERM)
    between_steps(job, state, progress)

epoch.between_steps = signalled
sys.exit(main_binary_reg.main())
"""


@pytest.mark.parametrize("saved_by", ["time", "signal"])
def test_what_is_saved_of_a_diverging_run_is_finite_and_the_same_command_works_again(tiny_data, tmp_path, saved_by):
    options = ["--model_config", "{'depth': 8}", "--data_dir", tiny_data, "--results_dir", tmp_path, "--save", "run", "--epochs", 3]
    options += ["--batch-size", 4, "--print-freq", 1000, "--regime", "{0: {'lr': 0.01}, 1: {'lr': 1e30}}", "--precision", "fp32"]
    options += ["--checkpoint_minutes", "1e-9" if saved_by == "time" else "0"]
    script = [MAIN] if saved_by == "time" else ["-c", SIGNALLED]
    for attempt in range(2):
        command = list(map(str, [forks.python(), *script, *options]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "finite" in done.stderr
        assert ("continuing in epoch 2" in done.stdout) == (attempt == 1)
        for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar", "model_best.pth.tar"):
            if (tmp_path / "run" / name).exists():
                content = torch.load(tmp_path / "run" / name, weights_only=True)
                assert all(value.isfinite().all() for value in content["state_dict"].values())
                assert content["epoch"] >= 1 or content["step"] >= 1
