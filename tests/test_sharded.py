"""Networks that FSDP2 shards over processes: trained, saved and continued as in one piece."""

import os
import re
import signal
import subprocess
import warnings

import forks
from conftest import PATIENCE, ROOT

import quantize


def in_processes(count: int, *arguments: object) -> set[str]:
    """What sharded_worker.py did: the modes that it went through, without a difference."""
    command = [
        forks.python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        count,
        ROOT / "tests" / "sharded_worker.py",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": forks.python()}
    command = [*map(str, (*command, *arguments))]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment)
        if not re.search(rf"exitcode *: -({signal.SIGABRT:d}|{signal.SIGSEGV:d})\b", done.stderr):
            break
        # Seen once: "malloc(): unaligned tcache chunk detected" beside gloo's threads. What fails in Python ends otherwise.
        warnings.warn(done.stdout + done.stderr, stacklevel=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return {word for line in done.stdout.splitlines() for word in line.split()[:1] if word in quantize.MODES}  # gloo may print too


def test_shards_train_as_the_whole_and_two_processes_continue_as_three(tmp_path):
    """Float64, 20 steps, in each mode and quantizer; see sharded_worker.py, which compares and raises."""
    sums_suffice = {name for name, mode in quantize.MODES.items() if not mode.quantizer.gathers and mode.drawn is None}
    assert in_processes(2, tmp_path, "save") == sums_suffice
    assert in_processes(3, tmp_path, "load") == sums_suffice


def test_shards_of_a_mesh_have_the_levels_of_the_whole(tmp_path):
    """Sums over some of those who hold a part used to give several levels to one tensor, in silence."""
    assert in_processes(4, tmp_path, "mesh") == set()
