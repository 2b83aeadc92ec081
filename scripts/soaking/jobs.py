"""Commands of this repository as processes that can be killed: started as a user does, or forked from this process.

A fork has torch imported already, which is most of what a start costs; the script's own ``main`` runs in it as in any process.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Protocol

_PATIENCE = 5  # seconds that those have who are asked to end
ROOT = Path(__file__).parent.parent.parent


class Job(Protocol):
    """Attributes:
    pids: of the processes that run the script, as far as they have been started; torchrun's own before those that it starts.
    """

    pids: list[int]

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status once all have ended, -9 after a kill; None if that takes longer than so many seconds."""
        ...

    def kill(self, which: int | None = None) -> None:
        """SIGKILL to one of the processes, or to all."""
        ...


class Started:
    """A command as a user starts it; more than one process by torchrun, which are killed together."""

    def __init__(self, script: Path, words: Sequence[str], output: Path, count: int = 1) -> None:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
        with open(output, "a") as file:
            command = [sys.executable, *several, str(script), *words]
            self._process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self._workers: list[int] = []

    @property
    def pids(self) -> list[int]:
        """Also of workers that have ended: what they left bears their numbers."""
        self._workers += [pid for pid in _children(self._process.pid) if pid not in self._workers]
        return [self._process.pid, *self._workers]

    def wait(self, seconds: float | None = None) -> int | None:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, which: int | None = None) -> None:
        # Torchrun's workers have sessions of their own, and outlive it. Held still, it starts no more of them meanwhile.
        os.kill(self._process.pid, signal.SIGSTOP)
        for pid in (*_children(self._process.pid), self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class Forked:
    """The same in forks of this process, which must not have started threads; more than one without torchrun between them."""

    def __init__(self, script: Path, words: Sequence[str], output: Path, count: int = 1) -> None:
        port = _free_port() if count > 1 else 0
        fork = multiprocessing.get_context("fork")
        self._all: list[ForkProcess] = []
        for rank in range(count):
            environment = {} if count == 1 else {
                "TORCHELASTIC_RUN_ID": "soak", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            process = fork.Process(target=_run, args=(script, list(words), output, environment))
            process.start()
            self._all.append(process)
        self.pids = [process.pid for process in self._all]

    def wait(self, seconds: float | None = None) -> int | None:
        if not connection.wait([process.sentinel for process in self._all], seconds):
            return None
        failed = [process.exitcode for process in self._all if process.exitcode]
        if failed:  # as torchrun does: one that waits for a lost one may wait for minutes
            for process in self._all:
                process.terminate()
            for process in self._all:
                process.join(_PATIENCE)
                process.kill()
        for process in self._all:
            process.join()
        ended = [process.exitcode for process in self._all]
        return min(failed or [status for status in ended if status] or [0])

    def kill(self, which: int | None = None) -> None:
        for process in self._all if which is None else [self._all[which]]:
            process.kill()


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += map(int, tasks.read_text().split())
    return found


def _run(script: Path, words: list[str], output: Path, environment: dict[str, str]) -> None:
    """In the fork: the script's ``main``, with its output in a file."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    sys.argv = [str(script), *words]
    sys.exit(module_of(script).main(words))


def module_of(script: Path):
    """The script as a module; also what is imported before the first fork."""
    if str(script.parent) not in sys.path:
        sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
