"""The task of a run: what a batch is, its loss, the figures that are counted, and what is carried from batch to batch.

Loops, epoch, state, folder and boards ask the task, and know neither images nor text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sources.batches import Batches
from utils import Meter

Network = Callable[..., Any]
Row = Mapping[str, Any]  # of results.csv
Total = Callable[[Tensor], Tensor]

# What follows a task's own columns in results.csv.
_EVERY_RUNS = ("lr", "strength", "seconds", "binary", "quant_error", "sign_change")


class Task(Protocol):
    """What a run learns to do.

    Attributes:
        samples: what is counted, in the plural.
        figures: names of the figures of one pass over data; ``train_``, ``val_`` and for the hard-quantized network ``val_*_bin``
            are columns of results.csv.
        columns: of results.csv.
        charts: for TensorBoard, titles and the columns whose curves they show.
        final: the columns that TensorBoard's page of hyper-parameters shows.
        best_key: the name of the best score in checkpoints.
    """

    samples: str
    figures: tuple[str, ...]
    columns: tuple[str, ...]
    charts: Mapping[str, tuple[str, ...]]
    final: tuple[str, ...]
    best_key: str

    def meter(self, device: torch.device, total: Total) -> Meter:
        """A meter of the figures; for ``total`` see ``utils.Meter``."""
        ...

    def carried(self, model: nn.Module, batches: Batches) -> list[Tensor]:
        """What is carried from batch to batch, as it is before the first batch of an epoch: zeros."""
        ...

    def forward(self, network: Network, inputs: Tensor, targets: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Output and mean loss of a batch; ``carried`` is overwritten with what the next batch needs."""
        ...

    def length(self, batches: Batches) -> int:
        """Of the first dimension of this process's part of a whole batch."""
        ...

    def score(self, row: Row) -> float:
        """By which the best epoch is chosen: of the hard-quantized network where there is one."""
        ...

    def better(self, score: float, best: float) -> bool:
        """Whether a score is better than the best so far."""
        ...

    def in_words(self, figures: Row) -> str:
        """The figures of a pass while it is going on."""
        ...

    def epoch_in_words(self, row: Row) -> str:
        """The figures of an epoch."""
        ...

    def evaluation_in_words(self, figures: Row) -> str:
        """The figures of a validation, all of them."""
        ...

    def best_figure(self, best: float) -> dict[str, float]:
        """The best score as a figure with its name, for TensorBoard's page of hyper-parameters."""
        ...

    def best_in_words(self, best: float) -> str:
        """The best score of a finished run."""
        ...


class Images:
    """Classification of images: ``(N, 3, H, W)`` images and ``(N,)`` labels, cross-entropy, top-1 and top-5 errors in percent."""

    samples = "images"
    figures = ("loss", "error1", "error5")
    columns = (
        "epoch", "train_loss", "val_loss", "train_error1", "val_error1", "train_error5", "val_error5",
        "val_loss_bin", "val_error1_bin", "val_error5_bin", *_EVERY_RUNS,
    )  # fmt: skip
    charts: ClassVar = {
        "validation top-1 error, % (bin: hard-quantized)": ("val_error1", "val_error1_bin"),
        "training top-1 error, %": ("train_error1",),
        "loss": ("train_loss", "val_loss", "val_loss_bin"),
    }
    final = ("val_error1", "val_error1_bin")
    best_key = "best_prec1"  # as in the published checkpoints: top-1 accuracy in percent

    def meter(self, device: torch.device, total: Total = lambda counts: counts) -> Meter:
        return Meter(device, total)

    def carried(self, model: nn.Module, batches: Batches) -> list[Tensor]:
        return []

    def forward(self, network: Network, inputs: Tensor, targets: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        logits = network(inputs)
        return logits, F.cross_entropy(logits, targets)

    def length(self, batches: Batches) -> int:
        part = batches.share.part(0, batches.batch_size)
        return part.stop - part.start

    def score(self, row: Row) -> float:
        return 100 - row.get("val_error1_bin", row["val_error1"])

    def better(self, score: float, best: float) -> bool:
        return score > best

    def in_words(self, figures: Row) -> str:
        return f"loss {figures['loss']:.4f}, error {figures['error1']:.2f}%"

    def epoch_in_words(self, row: Row) -> str:
        words = f"train loss {row['train_loss']:.4f} error {row['train_error1']:.2f}%, "
        words += f"validation loss {row['val_loss']:.4f} error {row['val_error1']:.2f}%"
        if "val_error1_bin" in row:
            words += f", quantized {row['val_loss_bin']:.4f} {row['val_error1_bin']:.2f}%"
        return words

    def evaluation_in_words(self, figures: Row) -> str:
        return f"loss {figures['loss']:.6f}, top-1 error {figures['error1']:.2f}%, top-5 error {figures['error5']:.2f}%"

    def best_figure(self, best: float) -> dict[str, float]:
        return {"best_error1": 100 - best}

    def best_in_words(self, best: float) -> str:
        return f"best error {100 - best:.2f}%"


IMAGES = Images()


def task_of(dataset: str) -> Task:
    """The task that a data set sets."""
    return IMAGES
