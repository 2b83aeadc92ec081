"""The projection alone, by the size of the network: time in passes over the weights, and copies of them held.

A pass is ``p.mul_(1.0)`` over tensors of the weights' sizes; the base optimizer does nothing. Copies are the peak of memory beyond
parameters and gradients, in a process of its own.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import quantize
from training import computing

# Transformer-like tensors, but for the first, which is ResNet-20: (copies of a block, its shapes).
NETWORKS = {
    0.27: [(7, [(16, 16, 3, 3)]), (6, [(32, 32, 3, 3)]), (6, [(64, 64, 3, 3)]), (1, [(10, 64), (16, 3, 3, 3)])],
    4.0: [(1, [(4000, 256)]), (4, [(768, 256), (256, 256), (1024, 256), (256, 1024)])],
    42.0: [(1, [(32000, 512)]), (8, [(1536, 512), (512, 512), (2048, 512), (512, 2048)])],
    170.0: [(1, [(50000, 1024)]), (9, [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)])],
}
MODES: dict[str, Callable[[], quantize.ProjectionMode]] = {name: lambda name=name: quantize.mode(name) for name in quantize.MODES}
MODES |= {
    f"{name}, {bits} bits by row": lambda name=name, bits=bits: quantize.mode(name, bits=bits, by_row=True)
    for name in ("lazy_alt", "prox_alt")
    for bits in (2, 4)
}


class Nothing(torch.optim.Optimizer):
    """A base optimizer whose step leaves the weights as they are."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.01})

    def step(self, closure: None = None) -> None:
        """Nothing."""


def parameters_of(millions: float, device: torch.device) -> list[nn.Parameter]:
    """Parameters with gradients."""
    random = torch.Generator().manual_seed(0)
    shapes = [shape for copies, block in NETWORKS[millions] for _ in range(copies) for shape in block]
    found = [nn.Parameter((torch.randn(shape, generator=random) * 0.05).to(device)) for shape in shapes]
    for parameter in found:
        parameter.grad = torch.zeros_like(parameter)
    return found


def wrapped(mode_name: str, parameters: list[nn.Parameter]) -> quantize.ProjectedOptimizer:
    mode = MODES[mode_name]()
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    optimizer = quantize.ProjectedOptimizer(Nothing(parameters), named, mode)
    optimizer.set_strength(0.5)
    return optimizer


def seconds_of(step: Callable[[], object], device: torch.device, count: int) -> Iterator[float]:
    # Of one thread the processor's time, which other work on the machine does not count into.
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for _ in range(count + 1):
        began = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        yield clock() - began


def passes(mode_name: str, parameters: list[nn.Parameter], device: torch.device, count: int) -> dict[str, float]:
    """Median, least and most passes of a step, each against a pass timed beside it."""

    def one_pass() -> None:
        for parameter in parameters:
            parameter.grad.mul_(
                1.0
            )  # the weights' size; a write to the weights themselves would be one by others, to be taken over

    steps, units = seconds_of(wrapped(mode_name, parameters).step, device, count), seconds_of(one_pass, device, count)
    ratios = [step / unit for step, unit in itertools.islice(zip(steps, units, strict=True), 1, None)]
    return {"passes": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def copies(mode_name: str, millions: float) -> float:
    """Copies of the weights held at the peak of three steps beyond parameters and gradients; on the CPU."""
    command = [sys.executable, __file__, mode_name, str(millions)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def only_copies(mode_name: str, millions: float) -> None:
    """Prints ``copies``; for a process of its own."""
    parameters = parameters_of(millions, torch.device("cpu"))
    wrapped("prox", parameters[:1]).step()  # what is loaded at first use
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    optimizer = wrapped(mode_name, parameters)
    for _ in range(3):
        optimizer.step()
    peak = int(status.read_text().split("VmHWM:")[1].split()[0])
    print((peak - before) * 1024 / sum(4 * parameter.numel() for parameter in parameters))


def report_projection(device: torch.device, count: int, largest: float) -> dict[str, dict[str, dict[str, float]]]:
    """The table of all modes by size."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for millions in (size for size in NETWORKS if size <= largest):
        parameters = parameters_of(millions, device)
        total = sum(parameter.numel() for parameter in parameters)
        print(f"\n{total:,} weights in {len(parameters)} tensors: passes over the weights (least-most), copies held at the peak")
        rows = table[f"{total}"] = {}
        for name in MODES:
            rows[name] = passes(name, parameters, device, count)
            words = f"{rows[name]['passes']:8.1f} ({rows[name]['least']:.1f}-{rows[name]['most']:.1f})"
            if device.type == "cpu" and total > 10**7:  # below, the process itself takes more
                rows[name]["copies"] = copies(name, millions)
                words += f"  {rows[name]['copies']:5.2f}"
            print(f"  {name:24}{words}", flush=True)
    return table


if __name__ == "__main__":
    computing.keep_freed_memory()
    only_copies(sys.argv[1], float(sys.argv[2]))
