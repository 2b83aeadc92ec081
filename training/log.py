"""The log: lines on the terminal, every line in the run's file, and the warnings once more for ``args.json``."""

import contextlib
import logging
import os
import sys
from logging.handlers import MemoryHandler
from pathlib import Path

from utils import CannotWrite

log = logging.getLogger("proxquant")


class _Early(MemoryHandler):
    """Keeps the lines that come before the run's file is open."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().removeprefix("warning: "))


class _Terminal(logging.StreamHandler):
    """Standard output, for as long as somebody reads it: a closed pipe or terminal ends no run, its file gets every line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        # What Python still holds for it is not to fail at the end either. Without a file behind it each line is lost by itself.
        with contextlib.suppress(OSError), open(os.devnull, "wb") as nobody:
            os.dup2(nobody.fileno(), self.stream.fileno())


class LogFile(logging.FileHandler):
    """The run's ``log.txt``, from ``start`` to ``end``: every line, those that came before it was open too.

    Raises:
        CannotWrite: wherever a line is logged that cannot be written; a full disk is the run's and no traceback on the terminal.
    """

    def __init__(self, path: Path, keep: int | None = None) -> None:
        """Appends to the first ``keep`` bytes of what is there, or starts anew."""
        if keep is not None and path.exists():
            os.truncate(path, min(keep, path.stat().st_size))
        super().__init__(path, mode="w" if keep is None else "a", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        for early in [handler for handler in log.handlers if isinstance(handler, _Early)]:
            log.removeHandler(early)
            early.setTarget(self)
            early.flush()
        log.addHandler(self)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]  # what the logging is handling just now
        raise CannotWrite(self.baseFilename, error) from error

    def end(self) -> None:
        """Closes the file."""
        log.removeHandler(self)
        with contextlib.suppress(OSError):  # what a full disk did not take is reported already
            self.close()


def log_to_terminal(level: int = logging.INFO) -> None:
    """Sends the log's lines from ``level`` on to standard output; the run's file gets every line."""
    _open_closed_streams()
    log.setLevel(logging.DEBUG)
    log.propagate = False
    handler = _Terminal(sys.stdout)
    handler.setLevel(level)
    log.handlers = [handler, _Early(), _Warnings()]


def _open_closed_streams() -> None:
    """A stream that the shell closed (``2>&-``) goes nowhere instead.

    Python has None for it, which what draws bars does not expect. And its number would be given to the next file that is opened:
    what a library prints would then be written into a checkpoint.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    while nowhere <= 2:
        os.set_inheritable(nowhere, True)  # to the processes of a run, too
        nowhere = os.dup(nowhere)
    sys.stdout = sys.stdout or os.fdopen(os.dup(nowhere), "w")
    sys.stderr = sys.stderr or os.fdopen(os.dup(nowhere), "w")
    os.close(nowhere)


def warn(line: str) -> None:
    """A line that starts with ``warning:``."""
    log.warning(f"warning: {line}")


def warnings_so_far() -> list[str]:
    """All warnings of this process, in order."""
    return [line for handler in log.handlers if isinstance(handler, _Warnings) for line in handler.lines]
