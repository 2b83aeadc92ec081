"""Python as the tests start it most often: a fork of one that has imported torch already, which saves the seconds of importing it.

``python()`` is a command like ``sys.executable``. What it starts is a process of its own, with its own number, arguments, folder,
environment and output, which reads its script anew and ends as Python ends. A signal to it is passed on, unless that is one which
no process can catch: who kills or stops a process, or looks at how Python itself starts, takes ``sys.executable``.

    python forks.py serve SOCKET                     imports, and forks for whoever asks, until its standard input ends
    python forks.py ask SOCKET ARGUMENTS...          asks for ``python ARGUMENTS...``, and ends as that ends
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
OF_ALL = {"OMP_NUM_THREADS": "1"}  # what is read while torch is imported, and therefore cannot differ between the forks
IMPORTED = ("torch._dynamo", "torch.distributed.run", "main_binary_reg", "sources.imagenet")
KNOWN = ("-c", "-m", "-u")  # as the first argument, beside a script
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def python() -> str:
    """A command that runs as ``sys.executable`` does; that itself where there are no forks."""
    return str(_server()[1]) if hasattr(os, "pidfd_open") else sys.executable


@functools.cache
def _server() -> tuple[subprocess.Popen, Path]:
    """The process that forks, which ends with this one, and the command that asks it to."""
    place = Path(tempfile.mkdtemp(prefix="forks-"))
    path = place / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" ask "{place}/socket" "$@"\n')
    path.chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, __file__, "serve", place / "socket"]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **OF_ALL}, start_new_session=True, **pipes)
    assert server.stdout.readline() == b"ready\n"
    atexit.register(server.communicate)  # closes its standard input, which ends it
    return server, path


def end_as(status: int) -> None:
    """Ends this process with a status as subprocess gives it, below 0 by a signal."""
    if status < 0:
        with contextlib.suppress(OSError):  # those that cannot be caught
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


# The one that asks. It imports nothing of ours: it should cost next to nothing.


def ask(address: str, arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in KNOWN) or OF_ALL.items() - os.environ.items():
        os.execv(sys.executable, [sys.executable, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the request is sent
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(request)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))  # one that is ignored the fork ignores too
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for number in (0, 1, 2):
        os.close(number)  # who reads until the end must not wait for this process
    status = int(connection.makefile().readline())
    end_as(status)


# The one that forks.


def serve(address: str) -> None:
    """Returns in each fork what is left for it to do, and otherwise when standard input ends."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(64)
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in the forks"
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, reap)
    while listener in select.select([listener, 0], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return follow(connection)
        connection.close()
    shutil.rmtree(Path(address).parent)
    os._exit(0)


def reap(number: int, frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def follow(connection: socket.socket) -> None:
    """Returns in the fork; in the process that waits for it, never."""
    size, places, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(connection.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
    number = os.fork()
    if number == 0:
        connection.close()
        for target, place in enumerate(places):
            os.dup2(place, target)
            os.close(place)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = request["arguments"]
        return
    for place in (0, 1, 2, *places):
        os.close(place)
    end = os.pidfd_open(number)
    while end not in select.select([end, connection], [], [])[0]:
        for passed in connection.recv(1) or [signal.SIGKILL]:  # who asked is gone
            signal.pidfd_send_signal(end, passed)
            if passed == signal.SIGKILL:
                os._exit(0)
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
    os._exit(0)


class Fork:
    """Runs what the arguments say as Python would, and ends as it does, but for the tearing down of its modules, which takes longer
    than most tests. Made before anything is imported: what is registered first for the end comes last."""

    def __init__(self) -> None:
        self.status = 0
        atexit.register(self._end)

    def run(self) -> None:
        try:
            self._run()
        except SystemExit as end:
            self.status = end.code if isinstance(end.code, int) else int(end.code is not None)
            raise
        except KeyboardInterrupt:
            self.status = -signal.SIGINT
            raise
        except BaseException:
            self.status = 1
            raise

    def _end(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError, ValueError):
                stream.flush()
        end_as(self.status)

    def _run(self) -> None:
        sys.path[:1] = [os.path.abspath(part) for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        if sys.argv[0] == "-u":
            sys.argv.pop(0)
            sys.stdout.reconfigure(write_through=True)
        first, *rest = sys.argv
        if first == "-m":
            sys.path.insert(0, os.getcwd())
            sys.argv = rest
            sys.modules.pop(rest[0], None)  # imported already, which a module that is run should not be
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
            return
        if first == "-c":
            sys.path.insert(0, "")
            name, text, sys.argv = "<string>", rest[0], ["-c", *rest[1:]]
        else:
            sys.path.insert(0, os.path.dirname(os.path.realpath(first)))
            name, text = os.path.abspath(first), Path(first).read_bytes()
        module = types.ModuleType("__main__")
        module.__file__ = name
        sys.modules["__main__"] = module
        exec(compile(text, name, "exec"), module.__dict__)


if __name__ == "__main__":
    if sys.argv[1] == "ask":
        ask(sys.argv[2], sys.argv[3:])
    else:
        fork = Fork()
        sys.path[:1] = [str(ROOT)]
        for name in IMPORTED:
            importlib.import_module(name)
        gc.freeze()  # the forks need not look at all this
        serve(sys.argv[2])
        fork.run()
