"""A run's folder: its name, its lock, its arguments, its log, its results and its checkpoints."""

import contextlib
import csv
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from training import checkpoints
from training.arguments import DERIVED, MAY_CHANGE
from training.log import LogFile, log, warn, warnings_so_far
from training.state import NETWORK_KEYS, computed_before
from training.tasks import task_of
from utils import UsageError, reading, remove_left_over, write_text, writing

# What a machine decides where the flag is "auto", and no continuation may change: the checkpoint has what was decided.
_DECIDED = ("device", "precision")

# Of these the default, typed, may mean something else than the same value untyped: a regime's or a mode's own gives way to it.
_SAY_MORE_WHERE_TYPED = frozenset({"optimizer", "lr", "momentum", "weight_decay", "reg_rate", "binary_reg"})


@dataclass(frozen=True)
class _Found:
    """What a look into a run's folder found: how its arguments differ, its latest good checkpoint, and which files these were."""

    differing: tuple[str, ...] = ()
    checkpoint: dict[str, Any] | None = None
    files: tuple[Any, ...] = ()


class Run:
    """The folder of one run, locked by this process from ``open`` to ``close``.

    Attributes:
        folder: where it lies; made by ``open``.
        saved_at: monotonic time of the last checkpoint, or of the start.
        writes: False in all but one of several processes: then nothing is written, made or locked here.
    """

    def __init__(self, args: Namespace, writes: bool = True) -> None:
        """Looks, and writes nothing: finds out whether the run is new, to be continued, or not allowed.

        Raises:
            UsageError: if the folder holds a run of other arguments, or cannot be written.
        """
        self._arguments = _comparable(args)
        self._task = task_of(args.dataset)
        self._overwrite, self._typed = args.overwrite, args.typed
        self._until_the_freeze = args.mode.schedule.every_step
        self._named = args.save is not None
        results = Path(args.results_dir)
        self.folder = results / (args.save or time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.saved_at = time.monotonic()
        self.writes = writes
        self._tb_dir = args.tb_dir
        self._damaged = False  # the latest checkpoint, in whose place the one before it was taken
        self._lock: int | None = None
        self._log: LogFile | None = None
        _check_writable("--results_dir", self.folder if self._named else results)
        if args.tb_dir:
            _check_writable("--tb_dir", Path(args.tb_dir))
        self._found = self._look(_Found()) if self._named else _Found()
        resumed = Path(os.path.realpath(args.resume)) if args.resume and self._found.differing else None
        if resumed and resumed.is_relative_to(os.path.realpath(self.folder)):
            raise UsageError(
                f"--resume {args.resume}: it lies in {self.folder}, which --overwrite would delete; choose another --save"
            )

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """The latest good checkpoint's content where the run is continued, else None."""
        return self._found.checkpoint

    @property
    def kept(self) -> bool:
        """True where there is a checkpoint to go back to."""
        return any((self.folder / name).exists() for name in (checkpoints.LATEST, checkpoints.PREVIOUS))

    @property
    def tb_dir(self) -> Path:
        """The folder of the TensorBoard events."""
        return Path(self._tb_dir) if self._tb_dir else self.folder / "tb"

    def _look(self, before: _Found) -> _Found:
        """Compares the arguments, and reads the checkpoint unless it is the one that was found before.

        Raises:
            UsageError: if it is a run of other arguments, or one whose checkpoints are gone or cannot be read, and may not be
                overwritten.
        """
        if not self._overwrite:
            self._check_readable()
        record = self._read_record()
        broken = record if isinstance(record, str) else None
        differing = self._compare(record) if broken is None else []
        content, files = None, tuple(filter(None, map(_stamp, self._checkpoints())))
        if not broken and not differing:
            content = before.checkpoint if files == before.files else self._read_checkpoint()
            if content is None and files:
                broken = "none of its checkpoints can be read"
            elif content is None and self._epochs_there():  # a row is written after its epoch's checkpoint
                broken = "its checkpoint is gone"
        if content is not None:
            decided = computed_before(content)
            begun = {**record["arguments"], **{name: decided[name] for name in _DECIDED if name in decided}}
            differing = self._compare({**record, "arguments": begun})
        if (broken or differing) and not self._overwrite:
            which = f"that cannot be continued ({broken})" if broken else f"of other arguments ({'; '.join(differing)})"
            raise UsageError(
                f"--save {self.folder.name}: {self.folder} holds a run {which}; choose another name, or --overwrite, {self._loss()}"
            )
        return _Found((broken,) if broken else tuple(differing), None if differing else content, files)

    def _check_readable(self) -> None:
        """Raises UsageError where this user may not read what the run has written: --overwrite would be wrong advice."""
        for path in (self.folder / name for name in ("args.json", checkpoints.LATEST, checkpoints.PREVIOUS)):
            try:
                path.open("rb").close()
            except PermissionError as error:
                raise UsageError(
                    f"--save {self.folder.name}: {path} cannot be read ({error.strerror}); this user must be allowed to read a run "
                    "that is to be continued; or choose another name"
                ) from None
            except OSError:
                pass  # missing or damaged: said where it is read

    def _read_record(self) -> dict[str, Any] | str:
        """What args.json says of the run that is there, no arguments where there is no run; or why it cannot be known."""
        try:
            record = json.loads((self.folder / "args.json").read_text())
            return {"arguments": dict(record["arguments"]), "typed": record.get("typed")}
        except FileNotFoundError:
            there = self.kept or (self.folder / checkpoints.BEST).exists()
            return "no args.json, but a checkpoint" if there else {"arguments": {}, "typed": None}
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            return "its args.json cannot be read"

    def _compare(self, record: dict[str, Any]) -> list[str]:
        """In words, where arguments differ in a way that makes another run of it."""
        old, here = record["arguments"], self._arguments
        if not old:
            return []
        # A flag that is newer than the run counts only where the user typed it.
        both = sorted((set(old) | (set(here) & self._typed)) - MAY_CHANGE)
        differing = [name for name in both if not _agree(name, old.get(name), here.get(name))]
        words = [f"--{name} {old.get(name)} there, {here.get(name)} here" for name in differing]
        typed = record["typed"]
        if isinstance(typed, list):  # older runs do not say
            given = {True: "given", False: "not given"}
            words += [
                f"--{name} {here[name]} {given[name in typed]} there, {given[name in self._typed]} here"
                for name in sorted(_SAY_MORE_WHERE_TYPED - set(differing))
                if (name in typed) != (name in self._typed)
            ]
        if self._until_the_freeze and "epochs" not in differing and _end_of_pull(old) != _end_of_pull(here):
            reason = "up to its last epoch its pull grows, and would begin anew"
            words.append(f"--epochs {old['epochs']} there, {here['epochs']} here: {reason}")
        return words

    def _checkpoints(self) -> list[Path]:
        return [self.folder / name for name in (checkpoints.LATEST, checkpoints.PREVIOUS) if (self.folder / name).exists()]

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """The latest checkpoint that can be read; a damaged one is said and passed over. None where the run has none yet."""
        paths, self._damaged = self._checkpoints(), False
        for path in paths:
            try:
                content = checkpoints.read(path)
                if not self._can_be_continued(content):
                    raise checkpoints.UnreadableCheckpoint(f"{path}: not the checkpoint of a run that can be continued")
                broken = checkpoints.not_finite(content)
                if broken:
                    raise checkpoints.UnreadableCheckpoint(f"{path}: {broken} is not finite")
                return content
            except checkpoints.UnreadableCheckpoint as error:
                warn(f"{error}; looking for an older one")
                self._damaged = True
        if paths and not self._overwrite:
            raise UsageError(
                f"--save {self.folder.name}: no checkpoint in {self.folder} can be read; --overwrite starts anew, {self._loss()}"
            )
        return None

    def _can_be_continued(self, content: dict[str, Any]) -> bool:
        """Whether what says how far the run is makes sense; the network and the optimizer look at what is theirs."""
        counts = [content.get(name) for name in ("epoch", "step", "log_bytes")]
        rows, ended = content.get("history"), content.get("ended", False)
        if not all(isinstance(count, int) and count >= 0 for count in counts) or not isinstance(rows, list):
            return False
        if not isinstance(ended, bool) or (not rows and (ended or counts[0] >= self._arguments["epochs"])):
            return False
        try:
            return all(isinstance(row["epoch"], int) and isinstance(self._task.score(row), int | float) for row in rows)
        except (LookupError, TypeError):
            return False

    def _loss(self) -> str:
        """What --overwrite would cost."""
        epochs = self._epochs_there()
        done = f"the {epochs} epochs that are trained there and " if epochs else ""
        return f"which deletes {done}everything else in that folder"

    def _epochs_there(self) -> int:
        """How many epochs results.csv has; 0 where it cannot be read."""
        try:
            return max(0, (self.folder / "results.csv").read_text().count("\n") - 1)
        except (OSError, ValueError):
            return 0

    @property
    def finished(self) -> bool:
        """True where all epochs have been trained already, or as many as the run's regime lets it train."""
        trained = self.checkpoint
        return trained is not None and (trained["epoch"] >= self._arguments["epochs"] or trained.get("ended", False))

    def finish(self) -> None:
        """Makes up for a process that died between the last checkpoint and the end, and for files that were deleted since."""
        if not self.writes:
            return
        rows = self.checkpoint["history"]
        if self._epochs_there() < len(rows):
            self.write_results(rows)
        if not (self.folder / checkpoints.BEST).exists():
            self._restore_best(rows)

    def _restore_best(self, rows: list[dict[str, Any]]) -> None:
        best = rows[0]
        for row in rows:
            best = row if self._task.better(self._task.score(row), self._task.score(best)) else best
        for path in (self.folder / checkpoints.LATEST, self._copy(best["epoch"])):
            with contextlib.suppress(checkpoints.UnreadableCheckpoint):
                content = checkpoints.read(path)
                # Before the freeze it is the hard-quantized network that was scored, and a run's state is the other one.
                scored = content.get("projection_mode") is None or content.get("hard_quantized")
                if content["epoch"] == best["epoch"] and not content["step"] and scored:
                    kept = {name: content[name] for name in content if name in NETWORK_KEYS or name == self._task.best_key}
                    self.save_best({**kept, "results": best})
                    log.info(f"{self.folder / checkpoints.BEST} was gone: made again from {path.name}")
                    return
        warn(
            f"{self.folder / checkpoints.BEST} is gone, and the best network, after epoch {best['epoch']}, is in no other file; "
            f"{checkpoints.LATEST} holds the one after epoch {rows[-1]['epoch']}"
        )

    def open(self) -> None:
        """Makes and locks the folder and opens the log.

        Raises:
            UsageError: if the folder cannot be made or written, or another process works in it.
        """
        if not self.writes:
            if self._named:
                self._found = self._look(self._found)  # again: the process that writes has opened it now
            return
        try:
            self.folder = self._make_folder()
            self._take_lock()
            remove_left_over(self.folder)
            if self._named:
                self._found = self._look(self._found)  # again: the process that had the lock may have changed it
                if self._found.differing:
                    self._clear()
            if self._tb_dir and self.checkpoint is None and any(self.tb_dir.glob("events*")):
                words = "events of another run, or of an earlier start of this one, are there: TensorBoard shows both as one curve"
                warn(f"--tb_dir {self._tb_dir}: {words}")
            # What was logged after the checkpoint is about to happen again.
            self._log = LogFile(self.folder / "log.txt", keep=self.checkpoint["log_bytes"] if self.checkpoint else None)
        except OSError as error:
            self.close()
            raise UsageError(f"--results_dir: {self.folder} cannot be written ({error.strerror or error})") from None

    def record(self, facts: dict[str, Any]) -> None:
        """Writes ``args.json``: the arguments, and facts about machine, program and start, with all warnings so far."""
        if not self.writes:
            return
        facts = {**facts, "warnings": warnings_so_far()}
        typed = sorted(_SAY_MORE_WHERE_TYPED & self._typed)
        path, content = self.folder / "args.json", {"arguments": self._arguments, "typed": typed, **facts}
        with writing(path):
            if self.checkpoint is not None and path.exists():
                first = json.loads(path.read_text())
                content = {**first, "arguments": self._arguments, "continued": [*first.get("continued", []), facts]}
            write_text(path, json.dumps(content, indent=2) + "\n")

    def _make_folder(self) -> Path:
        if self._named:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self.folder
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        candidate, number = self.folder, 1
        while True:  # mkdir is atomic: whoever makes the folder has it
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                number += 1
                candidate = self.folder.with_name(f"{self.folder.name}-{number}")

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Not flock: the processes that decode images would inherit it, and hold it when this one is killed.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(self._lock)
            self._lock = None
            raise UsageError(f"--save {self.folder.name}: another process is working in {self.folder}") from None

    def _clear(self) -> None:
        # The arguments last: a folder that is cleared in part must not pass for a run that never began.
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name == "args.json"):
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def save_checkpoint(self, content: dict[str, Any], keep: bool = False) -> None:
        """Writes the latest checkpoint and keeps the one before; ``keep`` also leaves a copy of its own for this epoch."""
        self.saved_at = time.monotonic()
        if not self.writes:
            return
        with writing(self.folder):
            self._log.flush()
            content["log_bytes"] = (self.folder / "log.txt").stat().st_size
            latest = self.folder / checkpoints.LATEST
            fresh = self.folder / f"{checkpoints.LATEST}.new"
            checkpoints.save(fresh, content)
            if keep:  # before the run has this epoch behind it: a process that dies here makes it once more, and its copy
                checkpoints.save(self._copy(content["epoch"]), content)
            if latest.exists() and not self._damaged:  # a damaged one is not to take the place of the only good one
                os.replace(latest, self.folder / checkpoints.PREVIOUS)
            os.replace(fresh, latest)
            self._damaged = False

    def _copy(self, epoch: int) -> Path:
        return self.folder / f"checkpoint_epoch_{epoch}.pth.tar"

    def save_best(self, content: dict[str, Any]) -> None:
        """Writes the best network so far."""
        if self.writes:
            with writing(self.folder / checkpoints.BEST):
                checkpoints.save(self.folder / checkpoints.BEST, content)

    def write_results(self, history: list[dict[str, Any]]) -> None:
        """Writes ``results.csv``: one line an epoch, empty where nothing was measured."""
        if not self.writes:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self._task.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        with writing(self.folder / "results.csv"):
            write_text(self.folder / "results.csv", text.getvalue())

    def close(self) -> None:
        """Ends the log and gives the lock back."""
        if self._log is not None:
            self._log.end()
            self._log = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def facts_of_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and revision, for ``args.json``."""
    names = ("torchvision", "numpy", "tensorboardX")
    here = Path(__file__).parent.parent
    revision = None
    with contextlib.suppress(FileNotFoundError):  # git itself
        command = ["git", "-C", here, "describe", "--always", "--dirty"]
        revision = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **{name: _version(name) for name in names}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "git_revision": revision,
    }


def _cpu_name() -> str:
    name = platform.machine() or "cpu"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
    return f"{name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _comparable(args: Namespace) -> dict[str, Any]:
    """The arguments as JSON gives them back."""
    return json.loads(json.dumps({name: value for name, value in sorted(vars(args).items()) if name not in DERIVED}))


def _agree(name: str, old: Any, new: Any) -> bool:
    """Whether a run of one value may be continued with another."""
    if name in _DECIDED and "auto" in (old, new):
        return True
    if name == "epochs" and isinstance(old, int):
        return old <= new  # it may be made longer
    if name == "resume" and isinstance(old, str) and isinstance(new, str):
        return _place_of(old) == _place_of(new)
    return old == new


def _place_of(checkpoint: str) -> str:
    """One name for a run's folder and the file in it that stands for it, from wherever it is named."""
    return os.path.realpath(checkpoint).removesuffix(os.sep + checkpoints.BEST)


def _end_of_pull(arguments: dict[str, Any]) -> Any:
    """The epoch that a pull which grows at every step is complete at: the freeze, or else the run's end."""
    epochs, freeze = arguments.get("epochs"), arguments.get("freeze_epoch")
    return freeze if isinstance(freeze, int) and isinstance(epochs, int) and 0 <= freeze < epochs else epochs


def _stamp(path: Path) -> tuple[str, int, int, int] | None:
    """Differs once a file has been replaced; None while it is just being renamed."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns


def _check_writable(flag: str, folder: Path) -> None:
    """Raises UsageError where a folder cannot be made or written, without touching anything."""
    place = folder
    with reading(flag, folder):
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(f"{flag}: {folder} cannot be written: {place} is {'read-only' if place.is_dir() else 'no folder'}")
