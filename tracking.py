"""What TensorBoard shows of a run."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from torch import Tensor

HISTOGRAMS = 20  # about so many over a run: enough to see the weights split, small enough to load quickly
_CURVES = ("train_loss", "val_loss", "train_error1", "val_error1", "train_error5", "val_error5",
           "val_loss_bin", "val_error1_bin", "val_error5_bin", "lr", "strength")  # fmt: skip
_HPARAMS = ("model", "dataset", "projection_mode", "optimizer", "lr", "batch_size", "epochs", "freeze_epoch", "reg_rate", "seed")


class Board:
    """The event file of one run. Steps are epochs trained.

    Args:
        folder: where it is written.
        continued_from: epochs that were trained before; points beyond them, from an interrupted process, are purged.
    """

    def __init__(self, folder: Path, continued_from: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=continued_from + 1)

    def add_start(self, args: Namespace, weights: Mapping[str, Tensor], epoch: int) -> None:
        """The arguments as text, and the weights before the first step."""
        shown = {name: value for name, value in sorted(vars(args).items()) if name != "typed"}
        self._writer.add_text("arguments", "\n".join(f"    {name} = {json.dumps(value)}" for name, value in shown.items()), 0)
        self.add_histograms(weights, epoch)

    def add_epoch(self, row: Mapping[str, Any], metrics: Mapping[str, Mapping[str, float]]) -> None:
        """The epoch's results, each parameter's metrics, and their means over the parameters."""
        epoch = row["epoch"]
        for name in _CURVES:
            if row.get(name) is not None:
                self._writer.add_scalar(name, row[name], epoch)
        for metric, values in metrics.items():
            self._writer.add_scalar(f"{metric}_mean", row[metric], epoch)
            for parameter, value in values.items():
                self._writer.add_scalar(f"{metric}/{parameter}", value, epoch)

    def add_histograms(self, weights: Mapping[str, Tensor], epoch: int) -> None:
        """The distribution of each quantized parameter's latent weights."""
        for name, weight in weights.items():
            self._writer.add_histogram(f"weights/{name}", weight.float().cpu().numpy(), epoch, bins="auto")

    def add_final(self, args: Namespace, row: Mapping[str, Any], best_error1: float) -> None:
        """The hyper-parameters beside the final figures, for the hparams page."""
        chosen = {name: _plain(getattr(args, name)) for name in _HPARAMS} | {f"model_{k}": v for k, v in args.model_config.items()}
        final = {f"hparam/{name}": row[name] for name in ("val_error1", "val_error1_bin") if row.get(name) is not None}
        final["hparam/best_error1"] = best_error1
        for summary in hparams(chosen, final):
            self._writer.file_writer.add_summary(summary)
        for name, value in final.items():
            self._writer.add_scalar(name, value, row["epoch"])

    def flush(self) -> None:
        """Everything so far reaches the file."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
