"""A fork is to its caller as a new Python is: what the other tests prove of forks holds of the program as users start it."""

import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from conftest import PATIENCE, ROOT, run_main

ENVIRONMENT = {**os.environ, **forks.OF_ALL, "PYTHONPATH": "elsewhere", "GIVEN": "a\nb"}
SAY = "import atexit, os, sys; atexit.register(print, 'last'); print(sys.argv, os.getcwd(), os.environ['GIVEN'], sys.path[:2]); "


def ended(python: str, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Status, output, and the last line of the errors."""
    process = subprocess.run([python, *arguments], cwd=folder, env=ENVIRONMENT, input="in", capture_output=True, text=True)
    return process.returncode, process.stdout, process.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    "code",
    [
        "",
        "sys.exit(7)",
        "sys.exit('why')",
        "sys.exit()",
        "1 / 0",
        "print(input())",
        "sys.stdout.flush(); os.kill(os.getpid(), 9)",
        "signal = __import__('signal'); signal.raise_signal(signal.SIGTERM)",
        "raise KeyboardInterrupt",
    ],
)
def test_it_ends_as_a_new_python_does(code, tmp_path):
    forked, new = (ended(python, tmp_path, "-c", SAY + code, "x y", "") for python in (forks.python(), sys.executable))
    assert forked == new


def test_it_runs_scripts_and_modules(tmp_path):
    for name in ("script.py", "module.py"):
        (tmp_path / name).write_text(
            f"own = 3; {SAY}\nprint(__name__, __file__, sys.modules['__main__'].own, 'module' in sys.modules)"
        )
    for arguments in (("script.py", "1"), ("-u", "script.py"), ("-m", "module", "2")):
        forked, new = (ended(python, tmp_path, *arguments) for python in (forks.python(), sys.executable))
        assert forked == new
        assert new[0] == 0


@pytest.mark.parametrize("number", forks.PASSED_ON)
def test_signals_reach_it(number, tmp_path):
    code = "import signal, sys; signal.signal(int(sys.argv[1]), lambda *_: sys.exit(3)); print('waits', flush=True); signal.pause()"
    for python in (forks.python(), sys.executable):
        command = [python, "-c", code, str(int(number))]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waits\n"
        process.send_signal(number)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 3


def test_a_new_python_runs_the_program_too(tiny_data, tmp_path):
    """And imports nothing that takes long before it is needed: torch's compiler takes as long as torch."""
    (done,) = {run_main("--help", python=python).stdout for python in (forks.python(), sys.executable)}
    assert "--projection_mode" in done
    listed = "import sys, main_binary_reg; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", listed], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "quantize", "training.loops"} <= set(found)
    assert not {"torch._dynamo", "torch.distributed.fsdp", "torchvision", "PIL", "safetensors"} & set(found)
    options = ("--model_config", "{'depth': 8}", "--data_dir", tiny_data, "--results_dir", tmp_path, "--epochs", 1, "--save", "run")
    assert "done, best error" in run_main(*options, python=sys.executable).stdout
    assert "complete" in run_main(*options, python=sys.executable).stdout
    refused = run_main(*options, "--lr", 3, python=sys.executable, check=2)
    assert "--lr" in refused.stderr
