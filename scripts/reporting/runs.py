"""Run folders, finished and unfinished, as they are on disk. Whatever a folder holds, reading it ends in a ``Run``."""

import ast
import csv
import json
import math
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from training import checkpoints

_MARKS = ("args.json", "results.csv", checkpoints.LATEST)  # a folder with one of them is a run's
KEPT = ".part_of_the_repository"  # marks a folder whose runs are nobody's but the repository's
_LOST = re.compile(r"(.+_run_\d+)\.out")  # what scripts/seeds.sh keeps of a run's output, beside its folder
# The arguments without which nothing can be said about a run, and their kinds.
_NEEDED = {"dataset": str, "model": str, "model_config": dict, "epochs": int, "batch_size": int, "freeze_epoch": int, "seed": int}
_INDISPENSABLE = ("train_loss", "val_loss", "val_error1")

Row = dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        arguments: those of the command line, as args.json has them.
        facts: the rest of args.json: command, versions, device, precision, git revision.
        rows: results.csv as numbers, None where a cell is empty.
        regime: the regime that the log says was used, None where it says none.
        data: what the log says about the images, without the place that they were read from.
        computed: how the log says that the run was computed: device, precision, compiled or not.
        problem: why the run cannot count, None if it can.
    """

    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    regime: dict[int, dict[str, Any]] | None = None
    data: str | None = None
    computed: str | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        return short_path(str(self.folder.resolve()))

    @property
    def mode(self) -> str | None:
        return self.arguments.get("projection_mode")

    @property
    def score(self) -> str:
        """The column of the network that is judged: hard-quantized where the run quantizes."""
        return "val_error1" if self.mode is None else "val_error1_bin"

    @property
    def final_error(self) -> float:
        """Top-1 error in percent after the last epoch."""
        return self.rows[-1][self.score]

    @cached_property
    def best_error(self) -> float:
        """Top-1 error in percent of the epoch with the lowest one, which is the network in model_best.pth.tar."""
        return min(row[self.score] for row in self.rows if row[self.score] is not None)

    def at(self, epoch: int, column: str) -> float | None:
        """A figure of the row after so many epochs; None where there is none."""
        return next((row.get(column) for row in self.rows if row["epoch"] == epoch), None)


def find(path: Path) -> list[Path]:
    """The run folders at or below a path, and those of runs that left only their output; the least deep first, then by name.

    A path may also be such an output. What is part of the repository is found by a path of its own alone.
    """
    if lost := _LOST.fullmatch(path.name):
        return [path.with_name(lost[1])] if path.is_file() else []
    found = []
    for folder, folders, files in os.walk(path):
        if KEPT in files and Path(folder) != path:
            folders.clear()
            continue
        if any(mark in files for mark in _MARKS):
            found.append(Path(folder))
            folders.clear()  # what lies in a run's folder is the run's
        names = [match[1] for match in map(_LOST.fullmatch, files) if match]
        found += [Path(folder) / name for name in names if name not in folders]
    # Of two runs with one seed the first counts: rather the one in the experiment's folder than a copy somewhere below.
    return sorted(found, key=lambda run: (len(run.parts), natural_order(run)))


def natural_order(path: Path) -> list[tuple[int, str]]:
    """For sorting: run_2 comes before run_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read(folder: Path) -> Run:
    """Reads a run's folder; what is wrong with it is its ``problem``."""
    if not os.path.isdir(folder):  # which, unlike Path.is_dir, takes any text for a name
        return Run(folder, problem="it never began: there is only its output, a .out file, and no folder")
    try:
        content = json.loads((folder / "args.json").read_text())
        arguments = content.pop("arguments")
        wrong = _wrong_argument(arguments)
    except FileNotFoundError:
        return Run(folder, problem="no args.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Run(folder, problem="its args.json cannot be read")
    if wrong:
        return Run(folder, problem=f"its args.json is not understood: {wrong}")
    regime, data, computed = _read_log(folder / "log.txt")
    try:
        rows, problem = _read_rows(folder / "results.csv"), None
    except FileNotFoundError:
        rows, problem = (), "no results.csv"
    except (OSError, ValueError, csv.Error) as error:
        reason = error if type(error) is ValueError else "damaged"  # a word of ours, or of whatever failed
        rows, problem = (), f"its results.csv cannot be read: {reason}"
    run = Run(folder, arguments, content, rows, regime, data, computed, problem)
    return run if problem else Run(folder, arguments, content, rows, regime, data, computed, _shortcoming(run))


def _wrong_argument(arguments: dict[str, Any]) -> str | None:
    for name, kind in _NEEDED.items():
        value = arguments.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{name} {value!r}"
    if not isinstance(arguments.get("projection_mode"), str | None):
        return f"projection_mode {arguments['projection_mode']!r}"
    depth = arguments["model_config"].get("depth", 20)
    return None if isinstance(depth, int) and not isinstance(depth, bool) else f"depth {depth!r}"


def _read_rows(path: Path) -> tuple[Row, ...]:
    """Raises ValueError with the place of a cell that is no number, and on a row that is longer than the heading."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for number, cells in enumerate(csv.DictReader(file, restval=""), 1):
            if None in cells:
                raise ValueError(f"line {number + 1} is longer than the heading")
            row = {}
            for column, cell in cells.items():
                try:
                    row[column] = float(cell) if cell else None
                except ValueError:
                    raise ValueError(f"line {number + 1} has no number in {column}") from None
            rows.append(row)
    return tuple(rows)


def _shortcoming(run: Run) -> str | None:
    """Why the figures of a run cannot count."""
    start, epochs = run.arguments.get("start_epoch", 0), run.arguments["epochs"]
    start = start if isinstance(start, int) else 0
    for epoch, row in enumerate(run.rows, start + 1):
        if row.get("epoch") != epoch:
            return f"its results.csv has no line of epoch {epoch} where it should be"
        for column in _INDISPENSABLE:
            if row.get(column) is None:
                return f"no {column} in epoch {epoch}"
        # The loss of the hard-quantized network may be beyond all numbers before the freeze: that is the method.
        broken = [column for column, value in row.items() if column != "val_loss_bin" and not math.isfinite(value or 0)]
        if broken:
            return f"{broken[0]} is not a number in epoch {epoch}"
    trained = start + len(run.rows)
    if trained < epochs:
        return f"unfinished: {trained} of {epochs} epochs"
    if trained > epochs:
        return f"its results.csv has {trained} epochs and its arguments {epochs}"
    if not run.rows or run.rows[-1].get(run.score) is None:
        return f"no {run.score} after the last epoch"
    return None


def _read_log(path: Path) -> tuple[dict[int, dict[str, Any]] | None, str | None, str | None]:
    """Regime, data and computation as the log has them; of a continued run, as its last process has them."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None, None
    lines = {name: re.findall(rf"^\S+ \S+ {name}: (.*)$", text, re.MULTILINE) for name in ("regime", "data", "run")}
    data = computed = None
    if lines["data"]:
        source, _, counts = lines["data"][-1].partition("; ")
        data = f"{re.sub(r'( in)? [^ ]*/.*$', '', source)}; {counts}"
    if lines["run"]:
        match = re.search(r" on (.*), seed \d+$", lines["run"][-1])
        computed = match[1] if match else None
    return _regime(lines["regime"][-1]) if lines["regime"] else None, data, computed


def _regime(text: str) -> dict[int, dict[str, Any]] | None:
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    sound = isinstance(value, dict) and value and all(isinstance(epoch, int) and _is_settings(value[epoch]) for epoch in value)
    return value if sound else None


def _is_settings(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(name, str) for name in entry)


def short_path(text: str) -> str:
    """The last two components of an absolute path, so that a report does not show how a machine is set up; else the text."""
    return "/".join(Path(text).parts[-2:]) if text.startswith("/") else text


def launch_folder(run: Run) -> Path | None:
    """The folder that a run was started in, which its relative paths begin at: where it lies, less ``--results_dir``."""
    results = Path(os.path.normpath(str(run.arguments.get("results_dir", "results"))))
    parent = run.folder.resolve().parent
    if results.is_absolute() or ".." in results.parts:
        return None
    length = len(results.parts)
    if parent.parts[len(parent.parts) - length :] != results.parts:
        return None
    return Path(*parent.parts[: len(parent.parts) - length])


def candidates(run: Run, text: str) -> list[Path]:
    """Where a path among a run's arguments may lie now, best first; results that were moved as a whole are found too."""
    beside = [run.folder.resolve().parent / Path(*Path(text).parts[-length:]) for length in (1, 2)]
    base = launch_folder(run)
    if base or text.startswith("/"):
        return [(base or Path()) / text, *beside]  # base / an absolute path is that path
    return [*beside, Path(text)]  # moved: what has this name where the report is made may be another run
