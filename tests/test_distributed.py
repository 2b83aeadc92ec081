"""Several processes that train one network: shares of the data, equal gradients, equal weights, lost processes, signals."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import worker
from conftest import PATIENCE, ROOT, run_main, until
from hypothesis import given
from hypothesis import strategies as st

import utils
from sources import batches
from sources.images import Split
from training.processes import ALONE, check_synchronized, synchronized
from utils import UsageError

CPU = torch.device("cpu")
WORKER = ROOT / "tests" / "worker.py"
NETWORK = ("--model_config", "{'depth': 8}", "--dataset", "cifar10", "--batch-size", "27", "--precision", "fp32", "--device", "cpu")
LAZY = ("--projection_mode", "lazy", "--optimizer", "Adam", "--lr", "0.01", "--epochs", "4", "--freeze_epoch", "2")


def torchrun(
    script: Path, *arguments: object, options: tuple[str, ...] = (), fault: str = "", python: str | None = None, count: int = 2
) -> subprocess.CompletedProcess:
    python = python or forks.python()
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count]
    command = [python, *several, *options, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python, "FAULT": fault}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, env=environment)


def train_two(out: Path, results: Path, data: Path, save: str, **more: object) -> subprocess.CompletedProcess:
    out.mkdir(exist_ok=True)
    arguments = (*NETWORK, *LAZY, "--data_dir", data, "--results_dir", results, "--save", save, "--print-freq", "2")
    return torchrun(WORKER, out, "train", *arguments, **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_data) -> tuple[Path, Path]:
    """Results and notes of a run in two processes."""
    results, out = tmp_path_factory.mktemp("results"), tmp_path_factory.mktemp("notes")
    done = train_two(out, results, tiny_data, "whole", python=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done, best error") == 1  # said by one process
    return results, out


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pth.tar", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    first, second = checkpoint(one), checkpoint(other)
    assert first["epoch"] == second["epoch"]
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    tables = [[line.split(",") for line in (run / "results.csv").read_text().splitlines()] for run in (one, other)]
    seconds = tables[0][0].index("seconds")
    for row, same in zip(*tables, strict=True):
        assert [v for i, v in enumerate(row) if i != seconds] == [v for i, v in enumerate(same) if i != seconds]


@given(st.integers(1, 70), st.integers(1, 9), st.integers(0, 1000))
def test_shares_are_a_partition_and_their_weighted_means_are_the_mean(samples, count, first):
    losses = np.random.default_rng(samples).normal(size=first + samples)
    seen, mean = [], 0.0
    for rank in range(count):
        share = batches.Share(rank, count)
        part = losses[share.part(first, first + samples)]
        assert len(part) >= 1
        mean += share.weight(samples) * part.mean() / count
        if share.weight(samples):
            seen += part.tolist()
    assert seen == losses[first:].tolist()
    assert mean == pytest.approx(losses[first:].mean(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("samples", [1, 499, 500, 501, 2600])
def test_several_processes_validate_each_image_once(samples):
    split = Split(np.zeros((samples, 32, 32, 3), np.uint8), np.arange(samples))
    labels = []
    for rank in range(3):
        source = batches.ValidationBatches(split, CPU, batches.Share(rank, 3))
        found = [batch.tolist() for _, batch in source.epoch()]
        assert len(found) == len(source)
        labels += [label for batch in found for label in batch]
    assert sorted(labels) == list(range(samples))


def test_the_gradient_of_two_processes_is_that_of_one(tmp_path):
    done = torchrun(WORKER, tmp_path, "gradients")
    assert done.returncode == 0, done.stderr
    alone = worker.gradients(ALONE)
    one, two = (torch.load(tmp_path / f"gradients-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(alone) > 100
    for name, expected in alone.items():
        assert torch.equal(one[name], two[name]), name
        torch.testing.assert_close(one[name], expected, rtol=1e-11, atol=1e-13)
    assert any(alone[name].abs().max() > 1e-3 for name in alone if name.startswith("1 "))


def test_two_processes_hold_the_same_weights_to_the_last_bit(undisturbed):
    _, out = undisturbed
    for epoch in range(4):
        one, two = (torch.load(out / f"weights-{rank}-{epoch}.pt", weights_only=True) for rank in (0, 1))
        assert any(name.startswith("latent") for name in one)
        for name, value in one.items():
            assert torch.equal(value, two[name]), (epoch, name)


def test_another_machines_rounding_is_not_taken_for_weights_that_somebody_wrote(tmp_path, tiny_data, monkeypatch):
    """Learned levels drift in the second process, and it shows other digits: the first one's must not become its latent weights."""
    monkeypatch.setenv("ROUNDS_OTHERWISE", "1")
    more = ("--projection_mode", "ttq", "--lr", "0.1", "--epochs", "3")
    done = torchrun(WORKER, tmp_path, "train", *NETWORK, *more, "--data_dir", tiny_data, "--results_dir", tmp_path, "--save", "ttq")
    assert done.returncode == 0, done.stderr
    for epoch in range(3):
        one, two = (torch.load(tmp_path / f"weights-{rank}-{epoch}.pt", weights_only=True) for rank in (0, 1))
        latent = [name for name in one if name.startswith("latent")]
        assert latent
        for name in latent:
            assert torch.equal(one[name], two[name]), (epoch, name)
            assert len(two[name].unique()) > 100
            assert not torch.equal(*(weights[name.removeprefix("latent ")] for weights in (one, two)))


def assert_no_thread_left(out: Path) -> None:
    """One of gloo's that still runs while Python ends aborts the process now and then."""
    for rank in (0, 1):
        threads = (out / f"threads-{rank}").read_text()
        assert threads
        assert "gloo" not in threads


def test_no_thread_is_left_at_the_end(undisturbed):
    assert_no_thread_left(undisturbed[1])


def test_the_recorded_score_is_that_of_one_process(undisturbed, tiny_data):
    results, _ = undisturbed
    best = torch.load(results / "whole" / "model_best.pth.tar", weights_only=True)
    done = run_main("--evaluate", results / "whole", "--data_dir", tiny_data, "--precision", "fp32")
    assert f"hard-quantized: loss {best['results']['val_loss_bin']:.6f}" in done.stdout
    assert f"top-1 error {100 - best['best_prec1']:.2f}%" in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_the_same_command_continues(undisturbed, tiny_data, tmp_path, rank):
    whole, _ = undisturbed
    broken = train_two(tmp_path / "notes", tmp_path, tiny_data, "broken", fault=f"{rank} 4")
    assert broken.returncode != 0
    assert (tmp_path / "notes" / "fault-has-happened").exists()
    assert checkpoint(tmp_path / "broken")["epoch"] == 1
    again = train_two(tmp_path / "notes", tmp_path, tiny_data, "broken")
    assert again.returncode == 0, again.stderr
    assert "continuing in epoch 2" in again.stdout
    assert_same_run(whole / "whole", tmp_path / "broken")


def test_torchrun_restarts_a_job_by_itself(undisturbed, tiny_data, tmp_path):
    whole, _ = undisturbed
    done = train_two(tmp_path / "notes", tmp_path, tiny_data, "broken", fault="1 8", options=("--max-restarts", "1"))
    assert done.returncode == 0, done.stderr
    assert "continuing in epoch 3" in done.stdout
    assert_same_run(whole / "whole", tmp_path / "broken")


@pytest.mark.parametrize("count", [3, 4])
def test_more_than_two_processes_continue_inside_an_epoch_to_the_same_end(tiny_data, tmp_path, count):
    """More than two sum in an order that depends on where DistributedDataParallel has laid a gradient."""
    arguments = (*NETWORK, "--batch-size", "16", "--epochs", "1", "--data_dir", tiny_data, "--results_dir", tmp_path)
    arguments = (tmp_path, "train", *arguments, "--checkpoint_minutes", "0.00001", "--save")
    whole = torchrun(WORKER, *arguments, "whole", count=count)
    assert whole.returncode == 0, whole.stderr
    broken = torchrun(WORKER, *arguments, "broken", count=count, fault="2 4", options=("--max-restarts", "1"))
    assert broken.returncode == 0, broken.stderr
    assert "continuing in epoch 1, after step 3/5" in broken.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_processes_that_do_not_see_one_folder_stop(undisturbed, tiny_data, tmp_path):
    """As on machines that do not share their disks: one would begin anew beside one that continues."""
    whole, _ = undisturbed
    shutil.copytree(whole, tmp_path / "0" / "results")
    (tmp_path / "1").mkdir()
    arguments = (*NETWORK, *LAZY, "--epochs", "5", "--data_dir", tiny_data, "--save", "whole")
    done = torchrun(WORKER, tmp_path, "apart", *arguments)
    assert done.returncode != 0
    assert "do not all see the same" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]
    assert checkpoint(tmp_path / "0" / "results" / "whole")["epoch"] == 4


def test_a_signal_saves_in_all_processes_at_one_step(undisturbed, tiny_data, tmp_path):
    """Through ``launch``, which is what --gpus 0,1 does."""
    whole, _ = undisturbed
    arguments = (*NETWORK, *LAZY, "--data_dir", tiny_data, "--results_dir", tmp_path, "--save", "stopped", "--print-freq", "2")
    code = "import sys; from training.processes import launch; sys.exit(launch(sys.argv[1:], 2))"
    command = list(map(str, [sys.executable, "-c", code, WORKER, tmp_path, "train", *arguments]))
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": forks.python()}
    process = subprocess.Popen(command, cwd=ROOT, env={**environment, "WAIT": "0 5"}, **output)
    until((tmp_path / "waits").exists, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert "stopped by SIGTERM in epoch" in output
    saved = checkpoint(tmp_path / "stopped")
    assert (saved["epoch"], saved["step"]) == (1, 2)
    assert_no_thread_left(tmp_path)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_same_run(whole / "whole", tmp_path / "stopped")


def test_each_process_takes_its_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(utils, "count_gpus", lambda device: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert utils.select_device("auto", [3, 1], True, local=1)[0] == torch.device("cuda", 1)
    assert utils.select_device("auto", [0], False, local=2)[0] == torch.device("cuda", 2)
    assert chosen == [1, 2]
    with pytest.raises(UsageError, match="more processes"):
        utils.select_device("auto", [3, 1], True, local=2)
    with pytest.raises(UsageError, match="GPUs 0 to 3"):
        utils.select_device("auto", [4], True)


def test_synchronized_statistics_need_gpus():
    with pytest.raises(UsageError, match="--sync_bn"):
        synchronized(torch.nn.BatchNorm2d(3), CPU)


def test_synchronized_statistics_need_a_sample_in_every_process():
    for samples, batch_size in ((80, 40), (82, 40), (3, 40), (81, 9)):
        check_synchronized(samples, batch_size, 2)
    for samples, batch_size in ((81, 40), (1, 40), (80, 1)):
        with pytest.raises(UsageError, match=f"--sync_bn: of {samples} samples in batches of {batch_size}"):
            check_synchronized(samples, batch_size, 2)
