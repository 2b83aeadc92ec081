"""How the weights of a layer lie, from the start of a run to its freeze: out of checkpoints, or out of TensorBoard's events."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

import quantize
from reporting.runs import Run
from training import checkpoints

EDGES = np.linspace(-1, 1, 41)  # of the bins that are shown
STRIPS = 5  # so many epochs are shown
_TAG = "weights/"  # see tracking.Board.add_histograms

Shares = dict[int, np.ndarray]  # by epoch: the share of the weights in each bin, percent


def layers(run: Run) -> list[str]:
    """The names of the quantized parameters whose histograms a run has, in the network's order."""
    return list(_histograms(run)) or _layers_of_checkpoint(run)


def shares(run: Run, layer: str, freeze_epoch: int) -> Shares:
    """A layer's weights at up to STRIPS epochs from the start to just before the freeze; empty where nothing is known."""
    kept = {
        epoch: path for epoch in range(freeze_epoch + 1) if (path := run.folder / f"checkpoint_epoch_{epoch}.pth.tar").is_file()
    }
    found = _histograms(run).get(layer, {})
    found = {epoch: share for epoch, share in found.items() if epoch <= freeze_epoch}
    epochs = _spaced(sorted({*kept, *found}))
    result = {}
    for epoch in epochs:
        share = _share_of_checkpoint(kept[epoch], layer) if epoch in kept else None
        share = found.get(epoch) if share is None else share
        if share is not None:
            result[epoch] = share
    return result


def _spaced(epochs: list[int]) -> list[int]:
    """STRIPS of them, the first and the last included."""
    places = np.linspace(0, len(epochs) - 1, min(STRIPS, len(epochs)))
    return [epochs[round(place)] for place in places]


def _share_of_checkpoint(path: Path, layer: str) -> np.ndarray | None:
    weights = _latent(path).get(layer)
    if weights is None:
        return None
    counts, _ = np.histogram(np.clip(weights.float().numpy(), EDGES[0], EDGES[-1]), EDGES)
    return 100 * counts / max(1, counts.sum())


def _latent(path: Path) -> dict[str, Any]:
    """The latent weights in a checkpoint; nothing where it cannot be read."""
    try:
        content = checkpoints.read(path)
        return quantize.latent_in(content["optimizer"]) or content["state_dict"]
    except (checkpoints.UnreadableCheckpoint, KeyError, TypeError, IndexError, AttributeError):
        return {}


def near_their_level(run: Run, near: float) -> float | None:
    """Share of the quantized weights that the freeze moved by at most ``near``; None where it is not known.

    It takes the checkpoint just before the freeze, which ``--save_all`` keeps, and the run's last one.
    """
    before = run.folder / f"checkpoint_epoch_{run.freeze_epoch}.pth.tar"
    if not run.freeze_epoch or not before.is_file():
        return None
    try:
        last, latent = checkpoints.read(run.folder / checkpoints.LATEST), _latent(before)
        moved = [(latent[name] - last["state_dict"][name]).abs() <= near for name in last["start_signs"]]
        return sum(int(one.sum()) for one in moved) / sum(one.numel() for one in moved)
    except (checkpoints.UnreadableCheckpoint, KeyError, TypeError, ValueError, RuntimeError, ZeroDivisionError):
        return None


def _layers_of_checkpoint(run: Run) -> list[str]:
    if not any(run.folder.glob("checkpoint_epoch_*.pth.tar")):
        return []
    try:
        return list(checkpoints.read(run.folder / checkpoints.LATEST)["start_signs"])
    except (checkpoints.UnreadableCheckpoint, KeyError, TypeError):
        return []


def _histograms(run: Run) -> dict[str, Shares]:
    """By layer: what TensorBoard has."""
    found: dict[str, Shares] = {}
    for tag in run.board.Tags()["histograms"] if run.board else []:
        by_epoch = {event.step: _share(event.histogram_value) for event in run.board.Histograms(tag)}
        by_epoch = {epoch: share for epoch, share in by_epoch.items() if share is not None}
        if tag.startswith(_TAG) and by_epoch:
            found[tag.removeprefix(_TAG)] = by_epoch
    return found


def learned_levels(run: Run) -> dict[str, dict[str, dict[int, float]]]:
    """By parameter and side, ``positive`` and ``negative``: the learned level after each epoch; empty where none is learned."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for tag in run.board.Tags()["scalars"] if run.board else []:
        if match := re.fullmatch(r"ternary_value/(.+)/(positive|negative)", tag):
            by_epoch = {event.step: event.value for event in run.board.Scalars(tag) if math.isfinite(event.value)}
            found.setdefault(match[1], {})[match[2]] = by_epoch
    return found


def _share(histogram: Any) -> np.ndarray | None:
    """TensorBoard's bins on ours, as if weights lay evenly inside a bin. The outer bins hold what is beyond the edges."""
    limits, counts = np.array(histogram.bucket_limit), np.array(histogram.bucket)
    if len(limits) != len(counts) or len(limits) < 2 or not (np.diff(limits) > 0).all() or not counts.sum() > 0:
        return None
    below = np.cumsum(counts) / counts.sum()  # the first bin only marks where the second begins: it is empty
    at_edges = np.interp(EDGES, limits, below)
    at_edges[0], at_edges[-1] = 0, 1
    return 100 * np.diff(at_edges)
