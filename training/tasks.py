"""The task of a run: what a batch is, its loss, the figures that are counted, and what is carried from batch to batch.

Loops, epoch, state, folder and boards ask the task, and know neither images nor text.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
from sources.batches import Batches
from sources.text import NO_TARGET, same_words
from training.cross_entropy import cross_entropy
from utils import Meter, UsageError

Network = Callable[..., Any]
Row = Mapping[str, Any]  # of results.csv
Total = Callable[[Tensor], Tensor]

# What follows a task's own columns in results.csv.
_EVERY_RUNS = ("lr", "strength", "seconds", "binary", "quant_error", "sign_change")


class Task(Protocol):
    """What a run learns to do.

    Attributes:
        models: names of the networks that can learn it.
        defaults: values of flags, in the place of the parser's own defaults.
        gains_by_compiling: whether a compiled network makes faster steps, on a CPU at least.
        samples: what is counted, in the plural.
        figures: names of the figures of one pass over data; ``train_``, ``val_`` and for the hard-quantized network ``val_*_bin``
            are columns of results.csv.
        columns: of results.csv.
        charts: for TensorBoard, titles and the columns whose curves they show.
        final: the columns that TensorBoard's page of hyper-parameters shows.
        best_key: the name of the best score in checkpoints.
    """

    models: tuple[str, ...]
    defaults: Mapping[str, Any]
    gains_by_compiling: bool
    samples: str
    figures: tuple[str, ...]
    columns: tuple[str, ...]
    charts: Mapping[str, tuple[str, ...]]
    final: tuple[str, ...]
    best_key: str

    def check(self, args: Namespace, several: bool) -> None:
        """Raises UsageError on flags, or several processes, that the task has no use for."""
        ...

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

    def best_in_words(self, best: float, row: Row) -> str:
        """The best score of a finished run, and what its last row of results says of it."""
        ...


class Images:
    """Classification of images: ``(N, 3, H, W)`` images and ``(N,)`` labels, cross-entropy, top-1 and top-5 errors in percent."""

    models = ("resnet",)
    defaults: ClassVar = {}
    gains_by_compiling = True
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

    def check(self, args: Namespace, several: bool) -> None:
        if args.input_size is not None and args.input_size < 40 and args.dataset == "imagenet":
            raise UsageError(f"--input_size {args.input_size}: nothing is left of smaller images than 40 in the last layers")
        if args.input_size is not None and args.dataset != "imagenet" and args.input_size != 32:
            raise UsageError(f"--input_size {args.input_size}: {args.dataset} is 32 pixels wide; only imagenet takes another size")

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

    def best_in_words(self, best: float, row: Row) -> str:
        return f"best error {100 - best:.2f}%"


class TokenMeter(Meter):
    """Mean loss over the words that are predicted, and its exponential, the perplexity."""

    def __init__(self, device: torch.device, total: Total = lambda counts: counts) -> None:
        super().__init__(device, total, sums=1)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts a window: the mean loss over those of its ``labels`` that are not ``NO_TARGET``."""
        words = (labels != NO_TARGET).sum()
        self._count(words, [loss.double() * words])

    def _figures(self, sums: list[float], samples: int) -> dict[str, float]:
        loss = sums[0] / samples if samples else math.nan
        return {"loss": loss, "ppl": perplexity(loss)}


def perplexity(loss: float) -> float:
    """exp(loss); infinite where that is beyond all numbers."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Text:
    """Prediction of each next word: ``(steps, streams)`` words and the words that follow, cross-entropy, perplexity.

    The network's states are carried from window to window, cut from the graph.
    """

    models = ("lstm",)
    defaults: ClassVar = {"model": "lstm", "batch_size": 20, "epochs": 80, "lr": 20.0, "momentum": 0.0, "weight_decay": 0.0}
    gains_by_compiling = False  # torch leaves the LSTM uncompiled, and the rest is matrix products
    samples = "words"
    figures = ("loss", "ppl")
    columns = (
        "epoch", "train_loss", "val_loss", "train_ppl", "val_ppl", "val_loss_bin", "val_ppl_bin", "test_ppl", *_EVERY_RUNS,
    )  # fmt: skip
    charts: ClassVar = {
        "validation perplexity (bin: hard-quantized)": ("val_ppl", "val_ppl_bin"),
        "training perplexity": ("train_ppl",),
        "loss": ("train_loss", "val_loss", "val_loss_bin"),
    }
    final = ("val_ppl", "val_ppl_bin", "test_ppl")
    best_key = "best_ppl"

    def check(self, args: Namespace, several: bool) -> None:
        if several or len(args.gpus) > 1:
            asked = "torchrun" if several else f"--gpus {','.join(map(str, args.gpus))}"
            raise UsageError(f"{asked}: a text is for one process, since each window goes on where the one before it ended")
        if args.input_size is not None:
            raise UsageError(f"--input_size {args.input_size}: a text has no pixels; only imagenet takes a size")
        if args.holdout:
            raise UsageError(f"--holdout {args.holdout}: no part of a text is held out, its validation part is for tuning")
        if args.recalibrate:
            raise UsageError(f"--recalibrate {args.recalibrate}: the networks for text have no BatchNorm; leave it out")
        if args.capture:
            raise UsageError("--capture: a step on text is not captured; leave it out")
        if args.sync_bn:
            raise UsageError("--sync_bn: the networks for text have no BatchNorm; leave it out")

    def meter(self, device: torch.device, total: Total = lambda counts: counts) -> Meter:
        return TokenMeter(device, total)

    def carried(self, model: nn.Module, batches: Batches) -> list[Tensor]:
        return model.start(batches.streams)

    def forward(self, network: Network, inputs: Tensor, targets: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        # Clones: the backward pass needs the states that the window began with.
        logits, states = network(inputs, *(state.clone() for state in carried))
        for state, new in zip(carried, states, strict=True):
            state.copy_(new.detach())
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten(), NO_TARGET)

    def length(self, batches: Batches) -> int:
        return batches.batch_size // batches.streams

    def score(self, row: Row) -> float:
        return row.get("val_ppl_bin", row["val_ppl"])

    def better(self, score: float, best: float) -> bool:
        return score < best

    def in_words(self, figures: Row) -> str:
        return f"loss {figures['loss']:.4f}, perplexity {figures['ppl']:.2f}"

    def epoch_in_words(self, row: Row) -> str:
        words = f"train loss {row['train_loss']:.4f} perplexity {row['train_ppl']:.2f}, "
        words += f"validation loss {row['val_loss']:.4f} perplexity {row['val_ppl']:.2f}"
        if "val_ppl_bin" in row:
            words += f", quantized {row['val_loss_bin']:.4f} {row['val_ppl_bin']:.2f}"
        if "test_ppl" in row:
            words += f", test perplexity of the best {row['test_ppl']:.2f}"
        return words

    def evaluation_in_words(self, figures: Row) -> str:
        return f"loss {figures['loss']:.6f}, perplexity {figures['ppl']:.2f}"

    def best_figure(self, best: float) -> dict[str, float]:
        return {self.best_key: best}

    def best_in_words(self, best: float, row: Row) -> str:
        tested = f", test perplexity there {row['test_ppl']:.2f}" if "test_ppl" in row else ""
        return f"best validation perplexity {best:.2f}{tested}"


IMAGES, TEXT = Images(), Text()


def task_of(dataset: str) -> Task:
    """The task that a data set sets."""
    return TEXT if dataset in data.TEXTS else IMAGES


def set_defaults(args: Namespace, dataset: str) -> None:
    """Gives the flags that the user has not typed the values that the task has for them."""
    for name, value in task_of(dataset).defaults.items():
        if name not in args.typed:
            setattr(args, name, value)


def check_model(model: str, dataset: str) -> None:
    """Raises UsageError where a network cannot learn what a data set is for."""
    task = task_of(dataset)
    if model not in task.models:
        fitting = ", ".join(name for name in data.DATASETS if model in task_of(name).models)
        raise UsageError(
            f"--model {model} --dataset {dataset}: {dataset} is {'text' if task is TEXT else 'images'}, "
            f"for {', '.join(task.models)}; {model} takes {fitting}"
        )


def check_words(content: Mapping[str, Any], words: Sequence[str], place: object) -> None:
    """Raises UsageError where a checkpoint is of another vocabulary than this run's text; one of no text is left to others."""
    theirs = content.get("words")
    if words and isinstance(theirs, list):
        texts = all(isinstance(word, str) for word in theirs)
        difference = same_words(words, theirs) if texts else "what it has for words are none"
        if difference:
            raise UsageError(f"{place}: a network of another vocabulary than this text's: {difference}")


def check_data(content: Mapping[str, Any], digest: str, data_dir: str, folder: object) -> None:
    """Raises UsageError where a run's checkpoint is of other data than are here; one of before says nothing of them."""
    if content.get("data", digest) != digest:
        raise UsageError(
            f"--data_dir {data_dir}: holds other samples than {folder} was trained on, or has them in another order; with the "
            "same ones it can be continued, or --save another name for a new run"
        )
