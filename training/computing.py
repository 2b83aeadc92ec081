"""How a run is computed: the precision of its passes, whether its network is compiled, and what it asks of the machine."""

import contextlib
import ctypes
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training import batch_norm, bf16
from training.processes import Processes
from utils import UsageError


def be_deterministic() -> None:
    """Has torch take only operations whose results repeat to the last bit (it raises RuntimeError where it has none)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)


@dataclass(frozen=True)
class Precision:
    """How forward passes are computed. Latent weights, BatchNorm statistics and optimizer state are float32 either way.

    Attributes:
        name: ``fp32`` or ``bf16``.
        device_type: ``cpu`` or ``cuda``.
        reason: why it was chosen, in words.
        by_rounding: whether float32 has to stand in for bf16, see ``training/bf16.py``: on a CPU that has no native bf16.
    """

    name: str
    device_type: str
    reason: str = "as asked"
    by_rounding: bool = False

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context that forward pass and loss run in."""
        return bf16.autocast(self.device_type, self.by_rounding) if self.name == "bf16" else contextlib.nullcontext()

    @property
    def in_words(self) -> str:
        """The name, and what stands in for bf16 where the CPU has none."""
        return f"{self.name}, by rounding float32" if self.name == "bf16" and self.by_rounding else self.name


def select_precision(requested: str, device: torch.device, tf32: bool) -> Precision:
    """``fp32``, ``bf16``, or for ``auto`` bf16 where the hardware computes it natively. Without ``tf32``, fp32 is exact on CUDA."""
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        reason = "compute capability 8.0 or higher" if native else "compute capability below 8.0"
    else:
        native = bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
        reason = "this CPU computes bf16 natively" if native else "this CPU has no native bf16"
    if requested == "auto":
        requested = "bf16" if native else "fp32"
    else:
        reason = "as asked"
    return Precision(requested, device.type, reason, by_rounding=device.type == "cpu" and not native)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":", 1)[1].split()}


# On two CPU cores compiling ResNet-20 takes 38 s, which 1,200 steps make up for; a freeze compiles once more; the rest is margin.
COMPILE_PAYS_OFF = 4000


def select_compile(requested: str, device: torch.device, steps: int) -> bool:
    """Whether to compile the network for training.

    Args:
        requested: ``on``, ``off``, or ``auto``: on a CPU, where a C++ compiler is there and the run is long enough.
        device: of the run.
        steps: of the whole run, however often it is interrupted, so that its continuations decide alike.

    Raises:
        UsageError: if ``on`` is asked for on a CPU without a C++ compiler that works.
    """
    if requested == "on" and (reason := _cannot_compile(device.type)):
        raise UsageError(f"--compile on: {reason}; install what is missing, or use --compile off")
    return requested == "on" or (
        requested == "auto" and device.type == "cpu" and steps >= COMPILE_PAYS_OFF and not _cannot_compile(device.type)
    )


_TRIAL = "#include <Python.h>\n#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"


def _cannot_compile(device_type: str) -> str | None:
    """Why there is not what compiling takes, on a CPU a C++ compiler that can build an extension of Python; None where it is."""
    compiler = os.environ.get("CXX", "g++")
    if device_type != "cpu":
        return None
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler} is not there"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "trial.cpp"
            source.write_text(_TRIAL)
            places = ["-I", sysconfig.get_path("include"), str(source), "-o", str(source.with_suffix(".so"))]
            done = subprocess.run([compiler, "-shared", "-fPIC", "-fopenmp", *places], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"the C++ compiler {compiler} cannot be tried ({error.strerror or error})"
    if done.returncode == 0:
        return None
    lines = done.stderr.splitlines() or ["it says nothing"]
    said = next((line for line in lines if "error" in line), lines[-1])
    return f"the C++ compiler {compiler} cannot build an extension of Python ({said.partition('error: ')[2] or said})"


def decide(
    precision: Precision, compiled: bool, args: Namespace, place: str, before: dict[str, Any], processes: Processes
) -> tuple[Precision, dict[str, Any], list[str]]:
    """How a run is computed, the same in all its processes and to its end, and warnings about what differs from before.

    Args:
        precision, compiled: what ``select_precision`` and ``select_compile`` say of this machine.
        args: ``precision`` and ``compile``, which may be ``auto``, and ``capture``.
        place: the device in words.
        before: the values of this function in the checkpoint that is continued from, or none.
        processes: that train together.

    Returns:
        The precision; ``precision``, ``compile`` (on or off), ``steps`` (captured or plain), ``device`` (its type), ``place`` and
        ``processes``, which belong to the checkpoint; and the warnings.
    """
    # Where it is to be compiled here, that has been tried.
    unable = not compiled and before.get("compile") == "on" and _cannot_compile(precision.device_type) is not None
    exact, eager, unable = processes.largest(int(precision.name == "fp32"), int(not compiled), int(unable))
    warnings = []
    if args.precision == "auto":
        here = precision.name
        if exact and here == "bf16":
            precision = replace(precision, name="fp32", reason="another process of this run has no native bf16")
        if before.get("precision", precision.name) != precision.name:
            precision = replace(precision, name=before["precision"], reason="as the run was begun")
            warnings.append(f"continued in {precision.name}, as the run was begun; auto on this machine would be {here}")
    compiled = compiled and not eager
    if args.compile == "auto" and "compile" in before:
        compiled = before["compile"] == "on" and not unable
    computed = {
        "precision": precision.name,
        "compile": "on" if compiled else "off",
        "steps": "captured" if args.capture else "plain",
        "device": precision.device_type,
        "place": place,
        "processes": processes.share.count,
    }
    for name, words in (("place", "on {}"), ("processes", "{} processes"), ("compile", "--compile {}"), ("steps", "{} steps")):
        if before.get(name, computed[name]) != computed[name]:
            effect = "sums round differently"
            if name == "processes" and not args.sync_bn:
                effect += ", and BatchNorm's statistics are of another share of each batch"
            warnings.append(f"{words.format(before[name])} before, {words.format(computed[name])} now: {effect}")
    return precision, computed, warnings


def shared_cores(threads: int, cores: int, load: float, worked: float, seconds: float) -> str | None:
    """What to say where a run shares the machine's cores with other work and would be faster with one thread; else None.

    A thread that has done its part of an operation spins until the others have done theirs. Where one of those waits for a core,
    all wait for it: a small network's steps become tens of times slower.

    Args:
        threads: that an operation is divided among.
        cores: of the machine.
        load: how many threads wanted to run on the machine in the last minute, this run's among them.
        worked: seconds of all this process's threads on a core.
        seconds: that passed meanwhile. The load says nothing of less than a few.
    """
    got = worked / max(seconds, 1e-9)
    if threads == 1 or seconds < 5 or load < 1.25 * cores or got > 0.8 * threads:
        return None
    return (
        f"this run shares its cores: {load:.1f} threads want to run on {cores}, and its {threads} had {got:.1f} of them; "
        "OMP_NUM_THREADS=1 makes a small network faster then"
    )


class CompiledNetwork(nn.Module):
    """A network's training forward pass, compiled for inputs of one length; those of another go through the network itself.

    The smaller last batch of an epoch would cost a second compilation for a few milliseconds of gain. On a CPU the network's batch
    normalization compiles to faster loops from here on, see ``batch_norm``.
    """

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model, self._length = model, length
        if next(model.parameters()).device.type == "cpu":
            batch_norm.swap_in(model)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
        self._compiled = [torch.compile(model, dynamic=False)]  # in a list: not a second copy of the parameters

    def forward(self, inputs: Tensor, *carried: Tensor) -> Any:
        """What the network makes of the inputs, and of what is carried from batch to batch."""
        return (self._compiled[0] if len(inputs) == self._length else self.model)(inputs, *carried)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next step instead of returning it to the system.

    Every step allocates the same activations again; fetching their pages anew took a sixth of a ResNet-20 step on two cores.
    Does nothing on other C libraries.
    """
    trim_threshold, mmap_threshold = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    # Older ones refuse more than 32 MiB. Where both are refused nothing else may be set: any setting ends glibc's own adjustment.
    if mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20):
        mallopt(trim_threshold, 2**31 - 1)
