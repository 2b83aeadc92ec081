"""A run's folder: its name, its lock, its arguments, its log, its results and its checkpoints."""

import contextlib
import csv
import fcntl
import io
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from training import checkpoints
from training.arguments import DERIVED
from training.tasks import task_of
from utils import UsageError, write_text

# What may differ between a run and its continuation: where the folder lies, and what changes no number.
_FREE = {"results_dir", "save", "overwrite", "gpus", "workers", "print_freq", "checkpoint_minutes", "evaluate"}

log = logging.getLogger("proxquant")


class _LogFile(logging.FileHandler):
    """A log file whose failures, a full disk say, are the run's and not a traceback on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise  # the error that the logging is handling just now


class Run:
    """The folder of one run, locked by this process from ``open`` to ``close``.

    Attributes:
        folder: where it lies; made by ``open``.
        state: the latest good checkpoint's content where the run is continued, else None.
        saved_at: monotonic time of the last checkpoint, or of the start.
        writes: False in all but one of several processes: then nothing is written, made or locked here.
    """

    def __init__(self, args: Namespace, writes: bool = True) -> None:
        """Looks, and writes nothing: finds out whether the run is new, to be continued, or not allowed.

        Raises:
            UsageError: if the folder holds a run of other arguments, or cannot be written.
        """
        self._arguments = _comparable(args)
        self._columns = task_of(args.dataset).columns
        self._overwrite, self._typed = args.overwrite, args.typed
        self._named = args.save is not None
        results = Path(args.results_dir)
        self.folder = results / (args.save or time.strftime("%Y-%m-%d_%H-%M-%S"))
        self.state: dict[str, Any] | None = None
        self.saved_at = time.monotonic()
        self.writes = writes
        self._lock: int | None = None
        _check_writable(self.folder if self._named else results)
        if self._named:
            self._look()

    def _look(self) -> None:
        self._differing = self._compare()
        if self._differing and not self._overwrite:
            raise UsageError(
                f"--save {self.folder.name}: {self.folder} holds a run of other arguments ({'; '.join(self._differing)}); "
                "choose another name, or --overwrite to start anew"
            )
        if not self._differing:
            self.state = self._read_state()

    def _compare(self) -> list[str]:
        path = self.folder / "args.json"
        try:
            old = json.loads(path.read_text())["arguments"]
        except FileNotFoundError:
            left = any((self.folder / name).exists() for name in (checkpoints.LATEST, checkpoints.PREVIOUS))
            return ["no args.json, but a checkpoint"] if left else []
        except (ValueError, KeyError, TypeError, OSError):
            return ["its args.json cannot be read"]
        # A flag that is newer than the run counts only where the user typed it.
        names = sorted((set(old) | (set(self._arguments) & self._typed)) - _FREE)
        differing = [name for name in names if old.get(name) != self._arguments.get(name)]
        if "epochs" in differing and isinstance(old.get("epochs"), int) and old["epochs"] < self._arguments["epochs"]:
            differing.remove("epochs")  # a run may be made longer when it is continued
        return [f"--{name} {old.get(name)} there, {self._arguments.get(name)} here" for name in differing]

    def _read_state(self) -> dict[str, Any] | None:
        """The latest checkpoint that can be read; a damaged one is said and passed over. None where the run has none yet."""
        paths = [self.folder / name for name in (checkpoints.LATEST, checkpoints.PREVIOUS) if (self.folder / name).exists()]
        for path in paths:
            try:
                content = checkpoints.read(path)
                if not isinstance(content.get("epoch"), int) or not isinstance(content.get("history"), list):
                    raise checkpoints.UnreadableCheckpoint(f"{path}: not the checkpoint of a run that can be continued")
                broken = checkpoints.not_finite(content)
                if broken:
                    raise checkpoints.UnreadableCheckpoint(f"{path}: {broken} is not finite")
                return content
            except checkpoints.UnreadableCheckpoint as error:
                log.warning(f"warning: {error}; looking for an older one")
        if paths and not self._overwrite:
            raise UsageError(f"--save {self.folder.name}: no checkpoint in {self.folder} can be read; --overwrite starts anew")
        return None

    @property
    def finished(self) -> bool:
        """True where all epochs have been trained already."""
        return self.state is not None and self.state["epoch"] >= self._arguments["epochs"]

    def finish(self) -> None:
        """Makes up for a process that died between the last checkpoint and the end."""
        if not self.writes:
            return
        rows, path = self.state["history"], self.folder / "results.csv"
        if not path.exists() or path.read_text().count("\n") <= len(rows):
            self.write_results(rows)

    def open(self, facts: dict[str, Any]) -> None:
        """Makes and locks the folder, and writes ``args.json`` there: the arguments, and facts about machine and program.

        Raises:
            UsageError: if the folder cannot be made or written, or another process works in it.
        """
        if not self.writes:
            if self._named:
                self._look()  # again: the process that writes has opened it now
            return
        try:
            self.folder = self._make_folder()
            self._take_lock()
            if self._named:
                self._look()  # again: the process that had the lock may have changed it
                if self._differing:
                    self._clear()
            self._write_arguments(facts)
            self._open_log()
        except OSError as error:
            raise UsageError(f"--results_dir: {self.folder} cannot be written ({error.strerror or error})") from None

    def _write_arguments(self, facts: dict[str, Any]) -> None:
        path, content = self.folder / "args.json", {"arguments": self._arguments, **facts}
        if self.state is not None and path.exists():
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
        self.state = None

    def _open_log(self) -> None:
        path = self.folder / "log.txt"
        if self.state is not None and path.exists():
            # What was logged after the checkpoint is about to happen again.
            os.truncate(path, min(self.state["log_bytes"], path.stat().st_size))
        elif path.exists():
            path.unlink()
        self._log_handler = _LogFile(path, encoding="utf-8")
        self._log_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.addHandler(self._log_handler)

    def save_state(self, content: dict[str, Any], keep: bool = False) -> None:
        """Writes the latest checkpoint and keeps the one before; ``keep`` also leaves a copy of its own for this epoch."""
        self.saved_at = time.monotonic()
        if not self.writes:
            return
        self._log_handler.flush()
        content["log_bytes"] = (self.folder / "log.txt").stat().st_size
        latest = self.folder / checkpoints.LATEST
        fresh = self.folder / f"{checkpoints.LATEST}.new"
        checkpoints.save(fresh, content)
        if latest.exists():
            os.replace(latest, self.folder / checkpoints.PREVIOUS)
        os.replace(fresh, latest)
        if keep:
            checkpoints.save(self.folder / f"checkpoint_epoch_{content['epoch']}.pth.tar", content)

    def save_best(self, content: dict[str, Any]) -> None:
        """Writes the best network so far."""
        if self.writes:
            checkpoints.save(self.folder / checkpoints.BEST, content)

    def write_results(self, history: list[dict[str, Any]]) -> None:
        """Writes ``results.csv``: one line an epoch, empty where nothing was measured."""
        if not self.writes:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / "results.csv", text.getvalue())

    def close(self) -> None:
        """Ends the log and gives the lock back."""
        if self._lock is not None:
            if hasattr(self, "_log_handler"):
                log.removeHandler(self._log_handler)
                with contextlib.suppress(OSError):  # what a full disk did not take is reported already
                    self._log_handler.close()
            os.close(self._lock)
            self._lock = None


def log_to_terminal(level: int = logging.INFO) -> None:
    """Sends the log's lines from ``level`` on to standard output; the run's file gets every line."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(level)
    log.handlers = [handler]


def facts_of_machine(device: torch.device) -> dict[str, Any]:
    """Versions, device and revision, for ``args.json``."""
    names = ("torchvision", "numpy", "tensorboardX")
    here = Path(__file__).parent.parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **{name: _version(name) for name in names}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "git_revision": git.stdout.strip() or None,
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


def _check_writable(folder: Path) -> None:
    """Raises UsageError where a folder cannot be made or written, without touching anything."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"--results_dir: {folder} cannot be written: {place} is {'read-only' if place.is_dir() else 'no folder'}")
