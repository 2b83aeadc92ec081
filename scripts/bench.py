"""Measures a training step against the conventional pipeline and against the floor, all in one interleaved run.

    python scripts/bench.py [--task images|text] [--device auto|cpu|cuda] [--quick] [--compile] [--json FILE]
    python scripts/bench.py --packed | --projection [--largest M] [--json FILE]

conventional: a DataLoader with torchvision's per-image transforms, float32 in NCHW, many small kernels in the projection.
ours:         what main_binary_reg.py does, per mode and precision.
floor:        the network's convolutions alone, forward and backward, in the same precision.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmark import language
from benchmark.contenders import STRENGTH, Setting, Step, conventional, floor, interleaved, ours
from benchmark.packed import report_packed
from benchmark.processes import ONLY, compiling_seconds, peak_memory, rate_together
from benchmark.projection import report_projection

import quantize
import utils
from sources import batches
from training import computing, loops
from training.tasks import IMAGES


def shares(setting: Setting, mode_name: str, count: int) -> dict[str, float]:
    """Parts of a step in median milliseconds, each waited for: data, forward and backward, optimizer, projection."""
    model, source, meter = setting.network(), setting.batches(), utils.Meter(setting.device)
    optimizer = setting.optimizer(model, mode_name)
    base = optimizer.base_optimizer
    inner: list[float] = []
    base_step = base.step

    def timed_base_step() -> None:
        setting.synchronize()
        began = time.perf_counter()
        base_step()
        setting.synchronize()
        inner.append(time.perf_counter() - began)

    base.step = timed_base_step
    parts: dict[str, list[float]] = {"data": [], "forward and backward": [], "optimizer": [], "projection": []}
    for _ in range(count + 3):
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            setting.synchronize()
            times.append(time.perf_counter())

        images, labels = next(source)
        lap()
        optimizer.zero_grad()
        with setting.precision.autocast():
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        meter.update(logits, labels, loss)
        lap()
        optimizer.step()
        lap()
        fetch, compute, both = (after - before for before, after in itertools.pairwise(times))
        for name, value in zip(parts, (fetch, compute, inner[-1], both - inner[-1]), strict=True):
            parts[name].append(value)
    return {name: 1000 * statistics.median(values[3:]) for name, values in parts.items()}


def validation_rate(setting: Setting, count: int) -> float:
    """Validation images a second, in the median of so many validations after a first one."""
    images, model = batches.ValidationBatches(setting.split, setting.device), setting.network()
    rates = []
    for _ in range(count + 1):
        began = time.perf_counter()
        loops.validate(IMAGES, model, images, utils.Meter(setting.device), setting.precision)
        rates.append(images.samples / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def projection_against_tensors(setting: Setting, mode_name: str, tensors: int, count: int) -> float:
    """Milliseconds of projection and clip over so many tensors of 16x16x3x3 (the base optimizer does nothing)."""
    parameters = [nn.Parameter(torch.randn(16, 16, 3, 3, device=setting.device) / 10) for _ in range(tensors)]
    named = [(str(index), parameter) for index, parameter in enumerate(parameters)]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(parameters, lr=0.01), named, quantize.MODES[mode_name])
    optimizer.set_strength(1.0)
    seconds = interleaved(setting, {"step": optimizer.step}, 1, count)["step"]
    return 1000 * statistics.median(seconds)


def figures(seconds: list[float], batch_size: int) -> dict[str, float]:
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    low, middle, high = tenths[0], statistics.median(seconds), tenths[-1]
    return {
        "ms": 1000 * middle,
        "ms_p10": 1000 * low,
        "ms_p90": 1000 * high,
        "images_per_second": batch_size / middle,
        "steps": len(seconds),
    }


def report_speed(
    device: torch.device, precisions: list[str], rounds: int, block: int, compiled: bool
) -> dict[str, dict[str, float]]:
    """The main table."""
    settings = {name: Setting(device, name) for name in precisions}
    steps: dict[str, Step] = {"conventional prox fp32": conventional(settings["fp32"])}
    for precision, setting in settings.items():
        steps |= {f"ours {mode} {precision}": ours(setting, mode) for mode in STRENGTH}
        if compiled:
            steps[f"ours prox compiled {precision}"] = ours(setting, "prox", compiled=True)
        if device.type == "cuda":
            steps |= {f"ours {mode} captured {precision}": ours(setting, mode, capture=True) for mode in STRENGTH}
            if compiled:
                steps[f"ours prox compiled captured {precision}"] = ours(setting, "prox", compiled=True, capture=True)
        steps[f"floor {precision}"] = floor(setting)
    found = interleaved(settings["fp32"], steps, rounds, block)
    table = {name: figures(seconds, 128) for name, seconds in found.items()}
    baseline = table["conventional prox fp32"]["ms"]
    print(f"\n{'ResNet-20, batch 128, one step':32}{'ms median (10%-90%)':>28}{'images/s':>10}{'vs conv.':>10}{'vs floor':>10}")
    for name, row in table.items():
        row["speedup"] = baseline / row["ms"]
        row["against_floor"] = row["ms"] / table[f"floor {name.split()[-1]}"]["ms"]
        spread = f"{row['ms']:.1f} ({row['ms_p10']:.1f}-{row['ms_p90']:.1f})"
        print(f"{name:32}{spread:>28}{row['images_per_second']:>10.0f}{row['speedup']:>9.2f}x{row['against_floor']:>9.2f}x")
    for precision in precisions if compiled else ():
        row = table[f"ours prox compiled {precision}"]
        seconds, gain = compiling_seconds(device.type, precision), table[f"ours prox {precision}"]["ms"] - row["ms"]
        row["compiling_seconds"], row["pays_off_after_steps"] = seconds, 1000 * seconds / gain if gain > 0 else None
        paid = f"{1000 * seconds / gain:.0f} steps" if gain > 0 else "no number of steps"
        print(f"compiling, {precision}: {seconds:.0f} s before the first step, which {paid} make up for")
    return table


def report_language_model(device: torch.device, precisions: list[str], rounds: int, block: int) -> dict[str, dict[str, float]]:
    """A step of the language model, with and without a projection to 2 bits by row."""
    settings = {name: language.Setting(device, name) for name in precisions}
    steps: dict[str, Step] = {"conventional fp32": language.conventional(settings["fp32"])}
    for precision, setting in settings.items():
        steps |= {f"ours {mode} {precision}": language.ours(setting, mode) for mode in language.MODES}
        steps[f"floor {precision}"] = language.floor(setting)
        steps[f"decoder's products {precision}"] = language.floor(setting, decoder_alone=True)
    found = interleaved(settings["fp32"], steps, rounds, block)
    words = language.text.STEPS * language.STREAMS
    table = {name: figures(seconds, words) for name, seconds in found.items()}
    print(f"\n{'LSTM 300, 10,000 words, one step':34}{'ms median (10%-90%)':>28}{'words/s':>10}{'vs conv.':>10}{'vs floor':>10}")
    for name, row in table.items():
        row["words_per_second"] = row.pop("images_per_second")
        row["speedup"] = table["conventional fp32"]["ms"] / row["ms"]
        row["against_floor"] = row["ms"] / table[f"floor {name.split()[-1]}"]["ms"]
        spread = f"{row['ms']:.1f} ({row['ms_p10']:.1f}-{row['ms_p90']:.1f})"
        print(f"{name:34}{spread:>28}{row['words_per_second']:>10.0f}{row['speedup']:>9.2f}x{row['against_floor']:>9.2f}x")
    for precision in precisions:
        plain, projected = (table[f"ours {mode} {precision}"]["ms"] for mode in ("none", "prox_alt"))
        print(f"projection to 2 bits by row, {precision}: {(projected - plain) / projected:.0%} of a step of prox_alt")
    return table


def report_shares(setting: Setting, count: int) -> dict[str, dict[str, float]]:
    print(f"\nshares of a step ({setting.precision.name}), each part waited for")
    table = {}
    for mode in STRENGTH:
        table[mode] = shares(setting, mode, count)
        total = sum(table[mode].values())
        print(f"  {mode:14}" + ", ".join(f"{name} {ms:.2f} ms ({ms / total:.1%})" for name, ms in table[mode].items()))
    return table


def report_growth(device: torch.device, precision: str, count: int) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {"depth": {}, "batch size": {}}
    for depth in (20, 32, 44, 56):
        setting = Setting(device, precision, depth=depth)
        table["depth"][str(depth)] = figures(interleaved(setting, {"": ours(setting, "prox")}, 1, count)[""], 128)["ms"]
    for size in (32, 128, 512):
        setting = Setting(device, precision, batch_size=size)
        table["batch size"][str(size)] = figures(interleaved(setting, {"": ours(setting, "prox")}, 1, count)[""], size)["ms"]
    setting = Setting(device, precision)
    for mode in quantize.MODES:
        name = f"projection of tensors, {mode}"
        table[name] = {str(n): projection_against_tensors(setting, mode, n, 5 * count) for n in (10, 40, 160)}
    print(f"\ngrowth ({setting.precision.name}), median ms")
    for name, row in table.items():
        print(f"  {name:36}" + ", ".join(f"{key}: {ms:.2f}" for key, ms in row.items()))
    return table


def report_together(device: torch.device, precision: str) -> dict[str, float]:
    """Several runs at once against one: on a GPU, which a small network leaves idle, or each on its share of a CPU's cores."""
    several = (2, 4, 8) if device.type == "cuda" else (torch.get_num_threads(),)
    table = {str(runs): rate_together(device.type, precision, runs) for runs in (1, *several)}
    rates = (f"{runs}: {rate:.0f} images/s ({rate / table['1']:.2f}x)" for runs, rate in table.items())
    print(f"\nruns at once ({precision}, prox), together: " + ", ".join(rates))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--task", choices=("images", "text"), default="images", help="text: the language model (default: images)")
    parser.add_argument("--quick", action="store_true", help="fewer steps: under two minutes on two cores")
    parser.add_argument("--compile", action="store_true", help="also measure compiled networks (compiling takes a minute or two)")
    parser.add_argument("--packed", action="store_true", help="only packed networks beside float ones: size, loading, memory, time")
    parser.add_argument("--projection", action="store_true", help="only the projection, by mode and by the size of the network")
    parser.add_argument("--largest", type=float, default=170.0, metavar="M", help="of --projection: million weights (default: 170)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--precision", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=ONLY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    if args.json and args.json.is_dir():
        parser.error(f"--json {args.json}: a file is needed, not a folder")
    computing.keep_freed_memory()
    try:
        device, _ = utils.select_device(args.device, [0], gpus_typed=False)
    except utils.UsageError as error:
        parser.error(str(error))
    if args.only:
        ONLY[args.only](device, args.precision)
        return
    auto = computing.select_precision("auto", device, tf32=False).name
    precisions = ["fp32"] if auto == "fp32" else ["fp32", auto]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    found: dict = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "auto": auto}
    print(f"{name}; torch {torch.__version__}; auto precision is {auto}")

    rounds, block, count = (4, 2, 6) if args.quick else (12, 4, 20)

    def measured(name: str, value: Any) -> None:
        found[name] = value
        if args.json:  # after each: what stops the next does not take it back
            utils.write_text(args.json, json.dumps(found, indent=2) + "\n")

    if args.projection:
        measured("projection", report_projection(device, count, args.largest))
        return
    if args.packed:
        measured("packed", report_packed(Setting(device, "fp32"), count))
        return
    if args.task == "text":
        measured("speed", report_language_model(device, precisions, rounds, block))
        return
    measured("speed", report_speed(device, precisions, rounds, block, args.compile))
    setting = Setting(device, auto)
    measured("shares_ms", report_shares(setting, count))
    measured("validation_images_per_second", validation_rate(setting, 1 if args.quick else 5))
    print(f"\nvalidation: {found['validation_images_per_second']:.0f} images/s ({auto})")
    measured("growth_ms", report_growth(device, auto, count))
    measured("images_per_second_together", report_together(device, auto))
    measured("peak_memory_gb", peak_memory(args.device, auto))
    print(f"\npeak resident memory, 50,000 training images: {found['peak_memory_gb']:.2f} GB ({auto})")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
