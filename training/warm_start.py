"""What a run started from: recorded in ``args.json`` and in its checkpoints, so that two runs' starts can be compared."""

import csv
import json
from pathlib import Path
from typing import Any

from torch import nn

from data import Data
from training import checkpoints, regimes
from training.log import warn
from training.tasks import Task, check_words
from utils import is_finite


def load(model: nn.Module, resume: str, task: Task, sets: Data, holdout: int) -> dict[str, Any]:
    """Puts the weights of a checkpoint into a network; warns where they are those of an unfinished run, or have been trained on
    images that are held out here.

    Args:
        model: of the run that starts.
        resume: a checkpoint file, or a run's folder.
        task: of the run that starts.
        sets: its data.
        holdout: how many training images it holds out.

    Returns:
        ``path`` as the user gave it; ``epoch``, how many that network was trained; ``score``, its best score (for images top-1
        accuracy in percent); ``sha256`` of its weights; ``finished``, whether the run that it is of was trained to its end, and
        ``of_epochs``, how long that is. None where it cannot be known.
    """
    path = checkpoints.locate("--resume", Path(resume))
    content = checkpoints.read(path)
    check_words(content, sets.words, path)
    checkpoints.load_weights(model, content, path)
    held = content.get("holdout")
    same_data = content.get("data", sets.digest) == sets.digest
    # ImageNet's is of the files in both splits, which are others where one of them is held out of the training images.
    same_data = same_data or (held == 0 and content.get("dataset") == "imagenet")
    if isinstance(held, int) and holdout > held and same_data:
        warn(f"--holdout {holdout}: {held} images were held out of the training of --resume {resume}; it was trained on the others")
    epoch, score = content.get("epoch"), content.get(task.best_key)
    finished, trained, of_epochs = _progress(path.parent)
    if finished is False:
        warn(f"--resume {resume}: that run is unfinished, it has trained {trained} of {of_epochs} epochs")
    return {
        "path": resume,
        "epoch": epoch if isinstance(epoch, int) else None,
        "score": score if isinstance(score, int | float) and is_finite(score) else None,
        "sha256": checkpoints.sha256_of_weights(content),
        "finished": finished,
        "of_epochs": of_epochs,
    }


def _progress(folder: Path) -> tuple[bool | None, int | None, int | None]:
    """Whether the run of a folder has trained all its epochs, how many it has, and how many they are; None without a run."""
    try:
        content = json.loads((folder / "args.json").read_text())
        wanted = int(content["arguments"]["epochs"])
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
        trained = int(max((row["epoch"] for row in rows), default=0))
        ended = "regime" in content and regimes.ended(regimes.from_json(content["regime"]), trained, rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, csv.Error):
        return None, None, None
    return trained >= wanted or ended, trained, wanted
