"""Made-up run folders whose figures are known, for the tests of the report, and the report on them."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import forks
import numpy as np
import torch
from conftest import PATIENCE, ROOT
from reporting import groups, runs

from training import tracking
from training.tasks import IMAGES

ERRORS = {
    "lazy": {0: 19.5, 1: 19.1, 2: 19.4, 3: 19.9},
    "prox": {0: 18.2, 1: 18.0, 2: 18.1, 3: 18.9},
    "prox_ternary": {0: 17.4, 1: 17.9},
}
SIGNS = {"lazy": 0.26, "prox": 0.17, "prox_ternary": 0.29}
HELD_OUT = {"source": "class folders in /a/b", "samples": "images", "training": 45000, "validation": 5000}
START = 17.32  # best error of the warm start
T_3 = 3.182446305284263  # Student's t, 97.5%, 3 degrees of freedom, from a textbook's table
LAYERS = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")


def make_run(
    folder: Path, mode: str | None, seed: int, error: float, epochs: int = 6, rows: int | None = None, rate: float = 0.01, **more
) -> Path:
    """A run folder as the program writes it; ``more`` are further arguments."""
    arguments = {"dataset": "cifar10", "model": "resnet", "model_config": {"depth": 20}, "epochs": epochs, "batch_size": 128,
                 "freeze_epoch": 4 if mode else -1, "seed": seed, "projection_mode": mode, "resume": None, "optimizer": "Adam",
                 "lr": rate, "regime": None, "reg_rate": 0.07 if mode and mode != "lazy" else 0.0, "binary_reg": 0.0,
                 "precision": "auto", "results_dir": "results", "data_dir": "/somewhere/private/Datasets", "tb_dir": None,
                 **more}  # fmt: skip
    quantized = {None: (0, 0), "prox_ternary": (267264, 18)}.get(mode, (268336, 20))
    facts = {
        "regime": {"0": {"optimizer": "Adam", "lr": rate}, "3": {"lr": rate / 10}},
        "data": {"source": "class folders in /somewhere/private/CIFAR10", "samples": "images", "training": 50000,
                 "validation": 10000},
        "parameters": 272474, "quantized": {"weights": quantized[0], "tensors": quantized[1]},
        "compiled": True, "captured": False,
        "command": ["/home/someone/secret/main_binary_reg.py", "--save", folder.name, "--data_dir", "/home/someone/secret/Datasets",
                    "--resume=/home/someone/results/fp_run_0", "--model_config", "{'depth': 20}", "--seed", str(seed)],
        "versions": {"python": "3.11.7", "torch": "2.14.1"}, "device": "cpu, 1 threads", "git_revision": "abc1234",
        "precision": "bf16",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, **facts}))
    (folder / "log.txt").write_text("")
    table = [row_after(epoch, epochs, mode, error, rate) for epoch in range(1, (epochs if rows is None else rows) + 1)]
    write_rows(folder, table)
    return folder


def row_after(epoch: int, epochs: int, mode: str | None, error: float, rate: float) -> dict:
    """A falling error that ends at ``error`` + 0.5 after its best, ``error``, one epoch before."""
    now = error + (0.5 if epoch == epochs else 2.0 * (epochs - 1 - epoch))
    row = {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.1, "train_error1": 20.0, "val_error1": now, "train_error5": 1.0,
           "val_error5": 1.0, "lr": rate if epoch <= 3 else rate / 10, "strength": 0.0, "seconds": 10.0}  # fmt: skip
    if mode:
        row |= {"val_loss_bin": 1.2, "val_error1_bin": now, "val_error1": now - 5, "val_error5_bin": 1.0, "binary": 0.5 / epoch}
        row |= {"quant_error": 0.4, "sign_change": SIGNS[mode] + 0.01 * (epoch - 4)}
        row["strength"] = 1.0 if mode == "lazy" else 0.07 * (epoch - 1)
    return row


def add_facts(folder: Path, **facts) -> Path:
    """Puts more into args.json, beside the arguments."""
    path = folder / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, IMAGES.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_events(folder: Path, continued: bool = False) -> np.ndarray:
    """Histograms as the program writes them: weights that lie evenly at first, some beyond 1, are at the levels at the freeze."""
    start = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    with tracking.Board(IMAGES, folder, 0) as board:
        board.add_histograms(dict.fromkeys(LAYERS, start), 0)
        if continued:
            board.add_histograms(dict.fromkeys(LAYERS, start * 0 + 0.3), 3)
        board.add_histograms(dict.fromkeys(LAYERS, start.sign()), 4)
    if continued:  # after epoch 2: what was written of epochs 3 and 4 is of a process that was killed
        with tracking.Board(IMAGES, folder / "later", 2) as board:
            board.add_histograms(dict.fromkeys(LAYERS, start.sign()), 4)
        shutil.move(next((folder / "later").iterdir()), folder / "events.out.tfevents.9999999999.later")
    return start.numpy()


def damage(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def run_report(*arguments: object, cwd: Path = ROOT, under: Sequence[str] = ()) -> subprocess.CompletedProcess:
    python = sys.executable if under else forks.python()  # a fork has the rights of what it was forked from
    command = [*under, python, str(ROOT / "scripts" / "report.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=environment)


def collected(*folders: Path) -> tuple[list[groups.Group], list[groups.LeftOut]]:
    return groups.collect([runs.read(folder) for folder in folders])


def make_text_run(folder: Path, mode: str | None, seed: int, perplexity: float, **more) -> Path:
    """A run of a language model, whose validation perplexity falls to ``perplexity``; on the test data it is 5 lower."""
    make_run(folder, mode, seed, 0.0, dataset="ptb", model="lstm", model_config={}, **more)
    rows = []
    for epoch in range(1, 7):
        now = perplexity * (7 - epoch)
        row = {"epoch": epoch, "train_loss": 5.0, "val_loss": math.log(now), "train_ppl": now, "val_ppl": now, "lr": 20.0}
        if mode:
            row |= {"val_ppl_bin": "inf" if epoch < 4 else now + 1, "quant_error": 0.3, "sign_change": 0.1, "binary": 0.2}
        rows.append(row | {"strength": 0.0, "seconds": 1.0, "test_ppl": perplexity - 5 if epoch == 6 else ""})
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return add_facts(folder, data={"source": "ptb in /x/y", "samples": "tokens", "training": 929589, "validation": 73760})
