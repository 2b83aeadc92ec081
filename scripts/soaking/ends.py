"""What a disturbed run ends with, beside an undisturbed one."""

import csv
from pathlib import Path
from typing import Any

import torch


def differences(whole: Path, broken: Path) -> list[str]:
    """What differs between a disturbed run and the undisturbed one."""
    found = []
    for file_name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, other = (torch.load(run / file_name, weights_only=True) for run in (whole, broken))
        for key in ("epoch", "best_prec1", "best_ppl", "state_dict", "optimizer"):
            found += [f"{file_name}: {place}" for place in differing(one.get(key), other.get(key), key)]
    if table(whole) != table(broken):
        found.append("results.csv")
    if points(whole) != points(broken):
        found.append("TensorBoard")
    return found


def differing(one: Any, other: Any, place: str) -> list[str]:
    """Where two nested dicts and lists of tensors and plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key, value in one.items() for found in differing(value, other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for key, pair in enumerate(zip(one, other, strict=True)) for found in differing(*pair, f"{place}.{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    return [] if one == other else [place]


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), {"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
