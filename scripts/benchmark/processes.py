"""Figures that take a process of their own: bench.py started once more with ``--only``."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import utils
from benchmark.contenders import Setting, ours
from sources import batches
from sources.images import Split
from training import captured, loops
from training.tasks import IMAGES

SECONDS_TOGETHER = 10.0


def compiling_seconds(device: str, precision: str) -> float:
    """Seconds until a process that begins with nothing compiled has made its first step, less those of its second."""
    with tempfile.TemporaryDirectory() as empty:
        return _only("compiling", device, precision, TORCHINDUCTOR_CACHE_DIR=empty)


def peak_memory(device: str, precision: str) -> float:
    """Peak resident memory in GB of a process that trains on 50,000 images, the size of CIFAR-10, for a few steps."""
    return _only("memory", device, precision)


def _only(what: str, device: str, precision: str, **environment: str) -> float:
    """One figure, from a process of its own."""
    command = [sys.executable, sys.argv[0], "--only", what, "--device", device, "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return float(done.stdout.split()[-1])


def only_compiling(device: torch.device, precision: str) -> None:
    step, seconds = ours(Setting(device, precision), "prox", compiled=True), []
    for _ in range(2):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(seconds[0] - seconds[1])


def only_memory(device: torch.device, precision: str) -> None:
    setting = Setting(device, precision, images=50_000)
    step = ours(setting, "prox")
    for _ in range(5):
        step()
    validation = batches.ValidationBatches(Split(setting.split.images[:10_000], setting.split.labels[:10_000]), device)
    loops.validate(IMAGES, setting.network(), validation, utils.Meter(device), setting.precision)
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)


def only_rate(device: torch.device, precision: str) -> None:
    """Images a second over some seconds, which begin when the process that started this one says so."""
    setting = Setting(device, precision)
    step, steps = ours(setting, "prox", capture=device.type == "cuda"), 0
    for _ in range(captured.WARM_UP + 2):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    setting.synchronize()
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS_TOGETHER:
        for _ in range(10):  # training too waits for the device about so often, to print
            step()
        setting.synchronize()
        steps += 10
    print(steps * setting.batch_size / (time.perf_counter() - began))


def rate_together(device: str, precision: str, runs: int) -> float:
    """Images a second of so many runs at once, each a process of its own; on a CPU each with its share of the threads."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // runs))} if device == "cpu" else {}
    command = [sys.executable, sys.argv[0], "--only", "rate", "--device", device, "--precision", precision]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **threads}}
    processes = [subprocess.Popen(command, **pipes) for _ in range(runs)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


ONLY = {"memory": only_memory, "compiling": only_compiling, "rate": only_rate}
