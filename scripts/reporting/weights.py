"""How the weights of a layer lie, from the start of a run to its freeze: out of checkpoints, or out of TensorBoard's events."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tensorboardX.proto.event_pb2 import Event, SessionLog

from reporting.runs import Run, candidates
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
        return content["optimizer"]["latent"] or content["state_dict"]
    except (checkpoints.UnreadableCheckpoint, KeyError, TypeError):
        return {}


def _layers_of_checkpoint(run: Run) -> list[str]:
    if not any(run.folder.glob("checkpoint_epoch_*.pth.tar")):
        return []
    try:
        return list(checkpoints.read(run.folder / checkpoints.LATEST)["start_signs"])
    except (checkpoints.UnreadableCheckpoint, KeyError, TypeError):
        return []


def _histograms(run: Run) -> dict[str, Shares]:
    """By layer: what TensorBoard has."""
    given = run.arguments.get("tb_dir")
    places = candidates(run, given) if isinstance(given, str) else [run.folder / "tb"]
    folder = next((place for place in places if _event_files(place)), None)
    found: dict[str, Shares] = {}
    for path in _event_files(folder) if folder else []:
        for event in _events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                # What an interrupted process wrote beyond its last checkpoint was trained, and written, again.
                found = {layer: {e: share for e, share in by.items() if e < event.step} for layer, by in found.items()}
            for value in event.summary.value:
                if value.HasField("histo") and value.tag.startswith(_TAG) and (share := _share(value.histo)) is not None:
                    found.setdefault(value.tag.removeprefix(_TAG), {})[event.step] = share
    return {layer: by for layer, by in found.items() if by}


def _event_files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.glob("events.out.tfevents.*"))
    except (OSError, ValueError):
        return []


def _events(path: Path) -> Iterator[Event]:
    """The events of a file, up to the first damage. A record is its length, a checksum, the event and a checksum."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    place = 0
    while place + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        record = content[place + 12 : place + 12 + length]
        if len(record) < length:
            return  # a process was killed while it wrote
        try:
            yield Event.FromString(record)
        except DecodeError:
            return
        place += 16 + length


def _share(histogram: Any) -> np.ndarray | None:
    """TensorBoard's bins on ours, as if weights lay evenly inside a bin. The outer bins hold what is beyond the edges."""
    limits, counts = np.array(histogram.bucket_limit), np.array(histogram.bucket)
    if len(limits) != len(counts) or len(limits) < 2 or not (np.diff(limits) > 0).all() or not counts.sum() > 0:
        return None
    below = np.cumsum(counts) / counts.sum()  # the first bin only marks where the second begins: it is empty
    at_edges = np.interp(EDGES, limits, below)
    at_edges[0], at_edges[-1] = 0, 1
    return 100 * np.diff(at_edges)
