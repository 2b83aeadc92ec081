"""What TensorBoard shows of a run."""

import contextlib
import json
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from torch import Tensor

from training.arguments import DERIVED
from training.tasks import Task
from utils import writing

_SIDES = ("positive", "negative")
HISTOGRAMS = 20  # about so many over a run: enough to see the weights split, small enough to load quickly
BINS = 80
# The page "custom scalars", beside the task's own charts: those that tell how a quantized training goes. Tags are regular
# expressions.
_LAYOUT = {
    "quantization": {
        "mean distance of weights from -1 and +1": ["Multiline", ["^binary_mean$"]],
        "quantization error, relative": ["Multiline", ["^quant_error_mean$"]],
        "strength": ["Multiline", ["^strength$"]],
    },
    "sign changes": {
        "share of signs changed since the start": ["Multiline", ["^sign_change_mean$"]],
        "the same by parameter": ["Multiline", ["^sign_change/"]],
    },
}
_HPARAMS = ("model", "dataset", "projection_mode", "optimizer", "lr", "batch_size", "epochs", "freeze_epoch", "reg_rate", "seed")


class Board:
    """The event file of one run. Steps are epochs trained.

    Events are written when they are added, and not by a thread later as SummaryWriter does: after ``flush`` they are in the file,
    so that a checkpoint written then has all its points there.

    Args:
        task: of the run.
        folder: where the file is written; None: nothing is.
        purged_from: what an earlier process wrote of this step and later ones is taken back: 0 for a new run.

    Raises:
        CannotWrite: here and in every method, if the file cannot be written.
    """

    def __init__(self, task: Task, folder: Path | None, purged_from: int) -> None:
        self._task, self._folder, self._events = task, folder, None
        if folder is None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self._write(Event(wall_time=time.time(), step=purged_from, session_log=SessionLog(status=SessionLog.START)))

    def add_start(self, args: Namespace, weights: Mapping[str, Tensor], epoch: int) -> None:
        """The arrangement of the charts, the arguments as text, and the weights before the first step."""
        charts = {title: ["Multiline", [f"^{name}$" for name in names]] for title, names in self._task.charts.items()}
        self._add(summary.custom_scalars({"error": charts, **_LAYOUT}), epoch)
        shown = {name: value for name, value in sorted(vars(args).items()) if name not in DERIVED}
        self._add(summary.text("arguments", "\n".join(f"    {name} = {json.dumps(value)}" for name, value in shown.items())), epoch)
        self.add_histograms(weights, epoch)
        self.flush()

    def add_epoch(self, row: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> None:
        """The epoch's results, each parameter's metrics, and their means over the parameters."""
        curves = [name for name in self._task.columns if name not in ("epoch", "seconds", *metrics)]
        values = {name: row[name] for name in curves if row.get(name) is not None}
        for metric, by_parameter in metrics.items():
            values[f"{metric}_mean"] = row[metric]
            values |= {f"{metric}/{parameter}": value for parameter, value in by_parameter.items()}
        self._add_scalars(values, row["epoch"])

    def add_levels(self, levels: Mapping[str, Tensor], epoch: int) -> None:
        """Learned levels by parameter: the positive and the negative one."""
        sides = [(f"ternary_value/{name}/{side}", both[i]) for name, both in levels.items() for i, side in enumerate(_SIDES)]
        self._add_scalars({tag: value.item() for tag, value in sides}, epoch)

    def add_histograms(self, weights: Mapping[str, Tensor], epoch: int) -> None:
        """The distribution of each quantized parameter's latent weights."""
        for name, weight in weights.items():
            self._add(summary.histogram(f"weights/{name}", weight.float().cpu().numpy(), BINS), epoch)

    def add_final(self, args: Namespace, row: Mapping[str, Any], best: float) -> None:
        """The hyper-parameters beside the final figures, for the hparams page."""
        chosen = {name: _plain(getattr(args, name)) for name in _HPARAMS} | {f"model_{k}": v for k, v in args.model_config.items()}
        final = {f"hparam/{name}": row[name] for name in self._task.final if row.get(name) is not None}
        final |= {f"hparam/{name}": value for name, value in self._task.best_figure(best).items()}
        for part in summary.hparams(chosen, final):
            self._add(part, 0)
        self._add_scalars(final, row["epoch"])

    def flush(self) -> None:
        """Hands everything so far to the system: a killed process loses none of it."""
        if self._events is not None:
            with writing(self._folder):
                self._events.flush()

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # everything that counts was flushed, or its failure reported
                self._events.close()

    def _add_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]), step)

    def _add(self, content: Summary, step: int) -> None:
        if self._events is not None:
            self._write(Event(wall_time=time.time(), step=step, summary=content))

    def _write(self, event: Event) -> None:
        with writing(self._folder):
            self._events.write_event(event)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
