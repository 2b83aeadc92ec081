"""How a run ends early: what is said on standard error, and the exit status."""

import sys

from training.folder import Run
from training.loops import Interrupted
from training.processes import Processes, lost_another
from training.state import Diverged
from utils import CannotWrite, UsageError


def status_of(error: BaseException, run: Run | None, processes: Processes) -> int:
    """The exit status after an error, with one line on standard error; 1 failed, 2 bad input, 128 + n ended by signal n.

    Raises:
        BaseException: the error itself, where it is none of those that a run may meet: a fault of the program has its traceback.
    """
    words = " ".join(str(error).split())
    kept = "the last good checkpoint is kept" if run is not None and run.kept else "there is no checkpoint yet"
    if isinstance(error, Interrupted):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):  # before the first step, with nothing to save
        return 130
    if isinstance(error, UsageError):
        return _say(words, 2)
    if isinstance(error, Diverged):
        return _say(f"{words}: stopped, {kept}; a smaller --lr may help", 1)
    if isinstance(error, CannotWrite):
        return _say(f"{words}: stopped, {kept}", 1)
    if isinstance(error, RuntimeError) and "use_deterministic_algorithms" in words:
        return _say(f"--deterministic: torch cannot do without an operation of another kind ({words.split('.')[0]})", 2)
    if isinstance(error, RuntimeError) and "DataLoader worker" in words:
        return _say(f"a process that decodes images is gone ({words}): stopped, {kept}", 1)
    if isinstance(error, RuntimeError) and processes.several and lost_another(error):
        return _say(f"another process of this run cannot be reached ({words[:300]}): stopped, {kept}", 1)
    raise error


def _say(message: str, status: int) -> int:
    print(f"main_binary_reg.py: error: {message}", file=sys.stderr)
    return status
