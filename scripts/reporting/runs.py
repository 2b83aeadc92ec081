"""Run folders, finished and unfinished, as they are on disk. Whatever a folder holds, reading it ends in a ``Run``."""

import csv
import json
import logging
import math
import os
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, SCALARS, EventAccumulator

from reporting.facts import from_facts, from_log, parts
from reporting.measures import ERROR, PERPLEXITY, Measure
from training import checkpoints, regimes

_MARKS = ("args.json", "results.csv", checkpoints.LATEST)  # a folder with one of them is a run's
KEPT = ".part_of_the_repository"  # marks a folder whose runs are nobody's but the repository's
_LOST = re.compile(r"(.+_run_\d+)\.out")  # what scripts/seeds.sh keeps of a run's output, beside its folder
_NAMED = re.compile(r".+_run_\d+")  # as scripts/seeds.sh names a run's folder
# The arguments without which nothing can be said about a run, and their kinds.
_NEEDED = {"dataset": str, "model": str, "model_config": dict, "epochs": int, "batch_size": int, "freeze_epoch": int, "seed": int}

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of restarts, which are as they should be

Row = dict[str, float | None]


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: where it lies.
        arguments: those of the command line, as args.json has them.
        facts: the rest of args.json: command, versions, device, precision, git revision, what it started from; see ``latest``.
        rows: results.csv as numbers, None where a cell is empty.
        regime: the regime that was used, None where nothing says it.
        data: the samples that were read, without the place that they were read from.
        computed: precision, compiled or not, and what else is known of how the run was computed.
        parameters: how many the network has.
        quantized: how many weights in how many tensors are quantized.
        problem: why the run cannot count, None if it can.
    """

    folder: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()
    regime: dict[int, dict[str, Any]] | None = None
    data: str | None = None
    computed: str | None = None
    parameters: int | None = None
    quantized: tuple[int, int] | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        return short_path(str(self.folder.resolve()))

    @property
    def mode(self) -> str | None:
        return self.arguments.get("projection_mode")

    @property
    def freeze_epoch(self) -> int | None:
        """Epochs before the freeze; None where it never came, as a regime can end a run before."""
        epoch, trained = self.arguments["freeze_epoch"], self.rows[-1]["epoch"] if self.rows else 0
        return epoch if self.mode is not None and 0 <= epoch < (trained or 0) else None

    @property
    def unfrozen(self) -> bool:
        """True where the final network is judged, and was to be quantized and is not: there is no figure of the method."""
        return self.mode is not None and self.freeze_epoch is None and self.measure.judged == "final"

    @property
    def measure(self) -> Measure:
        return PERPLEXITY if any(row.get(PERPLEXITY.column) is not None for row in self.rows) else ERROR

    @property
    def score(self) -> str:
        """The column of the network that is judged: hard-quantized where the run quantizes."""
        return self.measure.column if self.mode is None else f"{self.measure.column}_bin"

    @property
    def final(self) -> float:
        """The measure after the last epoch."""
        return self.rows[-1][self.score]

    @cached_property
    def best(self) -> float:
        """The measure of the best epoch, which is the network in model_best.pth.tar."""
        return min(row[self.score] for row in self.rows if row[self.score] is not None)

    @property
    def judged(self) -> float:
        """The measure that the run is judged by."""
        return self.best if self.measure.judged == "best" else self.final

    @cached_property
    def board(self) -> EventAccumulator | None:
        """What TensorBoard has of the run; None where there is nothing."""
        given = self.arguments.get("tb_dir")
        places = candidates(self, given, here=_lies_where_it_ran(self)) if isinstance(given, str) else [self.folder / "tb"]
        folder = next((place for place in places if _has_events(place)), None)
        # What an interrupted process wrote beyond its last checkpoint was trained, and written, again: this reader takes it back.
        return folder and EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0, SCALARS: 0}).Reload()

    @property
    def warm_start(self) -> dict[str, Any]:
        """What is written of the weights that it started from: path, epoch, score, sha256, finished; empty where nothing is."""
        found = self.facts.get("warm_start")
        return found if isinstance(found, dict) else {}

    @property
    def digest(self) -> str | None:
        """The sha256 of the samples that were read, in their order; None where it is not written."""
        found = [part["data"].get("sha256") for part in parts(self.facts) if isinstance(part.get("data"), dict)]
        return next((digest for digest in found if isinstance(digest, str)), None)

    def at(self, epoch: int, column: str) -> float | None:
        """A figure of the row after so many epochs; None where there is none."""
        return next((row.get(column) for row in self.rows if row["epoch"] == epoch), None)


def find(path: Path) -> list[Path]:
    """The run folders at or below a path, the least deep first, then by name; those of runs that left but output or a log, too.

    A path may also be such an output. What is part of the repository is found by a path of its own alone. Folders below the path
    that may not be read are among the runs: what is in them is not known, and ``read`` says so.

    Raises:
        OSError: if the path itself is not there, or may not be read or entered.
    """
    if os.path.isfile(path):
        lost = _LOST.fullmatch(path.name)
        return [path.with_name(lost[1])] if lost else []
    os.listdir(os.path.join(path, "."))  # with the dot it also takes the right to enter
    found: list[Path] = []
    unreadable: list[OSError] = []
    seen: set[str] = set()  # a link may lead back
    for folder, folders, files in os.walk(path, onerror=unreadable.append, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or (KEPT in files and Path(folder) != path):
            folders.clear()
            continue
        seen.add(real)
        if any(mark in files for mark in _MARKS):
            found.append(Path(folder))
            folders.clear()  # what lies in a run's folder is the run's
        elif "log.txt" in files and _NAMED.fullmatch(Path(folder).name):
            found.append(Path(folder))  # it ended before it wrote a mark
        found += [Path(folder) / match[1] for match in map(_LOST.fullmatch, files) if match]
    found += [Path(error.filename) for error in unreadable]
    if not found and _NAMED.fullmatch(path.name):
        found.append(path)
    # Of two runs with one seed the first counts: rather the one in the experiment's folder than a copy somewhere below.
    return sorted(set(found), key=lambda run: (len(run.parts), natural_order(run)))


def natural_order(path: Path) -> list[tuple[int, str]]:
    """For sorting: run_2 comes before run_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def read(folder: Path) -> Run:
    """Reads a run's folder; what is wrong with it is its ``problem``."""
    try:
        files = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return Run(folder, problem="it never began: there is only its output, a .out file, and no folder")
    except (OSError, ValueError) as error:  # ValueError: a text that can be no path, as a warm start's may be
        reason = getattr(error, "strerror", None) or error
        return Run(folder, problem=f"its folder cannot be read ({reason}): whether runs are in it is not known")
    if not any(mark in files for mark in _MARKS):
        return Run(folder, problem=f"it ended before it began to train: none of {', '.join(_MARKS)} is in its folder")
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
    run = Run(folder, arguments, content, **{**from_log(folder / "log.txt"), **from_facts(content)})
    try:
        run = replace(run, rows=_read_rows(folder / "results.csv"))
        return replace(run, problem=_shortcoming(run))
    except FileNotFoundError:
        return replace(run, problem="no results.csv")
    except (OSError, ValueError, csv.Error) as error:
        reason = error if type(error) is ValueError else "damaged"  # a word of ours, or of whatever failed
        return replace(run, problem=f"its results.csv cannot be read: {reason}")


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


def _ended_by_its_regime(run: Run, trained: int) -> bool:
    try:
        return run.regime is not None and regimes.ended(run.regime, trained, run.rows)
    except (KeyError, TypeError, ZeroDivisionError, OverflowError):  # it says so of no run that it does not understand
        return False


def _shortcoming(run: Run) -> str | None:
    """Why the figures of a run cannot count."""
    start, epochs = run.arguments.get("start_epoch", 0), run.arguments["epochs"]
    start = start if isinstance(start, int) else 0
    for epoch, row in enumerate(run.rows, start + 1):
        if row.get("epoch") != epoch:
            return f"its results.csv has no line of epoch {epoch} where it should be"
        for column in ("train_loss", "val_loss", run.measure.column):
            if row.get(column) is None:
                return f"no {column} in epoch {epoch}"
        # Loss and perplexity of the hard-quantized network may be beyond all numbers before the freeze: that is the method.
        unbound = ("val_loss_bin", f"{PERPLEXITY.column}_bin")
        broken = [column for column, value in row.items() if column not in unbound and not math.isfinite(value or 0)]
        if broken:
            return f"{broken[0]} is not a number in epoch {epoch}"
    trained = start + len(run.rows)
    if trained < epochs and not _ended_by_its_regime(run, trained):
        return f"unfinished: {trained} of {epochs} epochs"
    if trained > epochs:
        return f"its results.csv has {trained} epochs and its arguments {epochs}"
    if not run.rows or run.rows[-1].get(run.score) is None:
        return f"no {run.score} after the last epoch"
    return None


def _has_events(folder: Path) -> bool:
    try:
        return any(folder.glob("events.out.tfevents.*"))
    except (OSError, ValueError):
        return False


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


def _lies_where_it_ran(run: Run) -> bool:
    """Whether ``--results_dir`` leads from the current folder to where the run lies."""
    return Path(os.path.abspath(str(run.arguments.get("results_dir", "results")))) == run.folder.resolve().parent


def candidates(run: Run, text: str, here: bool = True) -> list[Path]:
    """Where a path among a run's arguments may lie now, best first; results that were moved as a whole are found too.

    Where the folder that the run was started in is not known, the last one is the path as it is in the current folder: what has
    this name there may be another run's, and with ``here`` False it is left out.
    """
    parent = run.folder.resolve().parent
    beside = [parent / Path(*Path(text).parts[-length:]) for length in (1, 2)]
    base = launch_folder(run)
    if base or text.startswith("/"):
        return [(base or Path()) / text, *beside]  # base / an absolute path is that path
    return [*beside, parent.parent / text, *([Path(text)] if here else [])]
