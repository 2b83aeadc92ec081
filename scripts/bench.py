"""Measures a training step against the conventional pipeline and against the floor, all in one interleaved run.

    python scripts/bench.py [--device auto|cpu|cuda] [--quick] [--compile] [--json FILE]

conventional: a DataLoader with torchvision's per-image transforms, float32 in NCHW, many small kernels in the projection.
ours:         what main_binary_reg.py does, per mode and precision.
floor:        the network's convolutions alone, forward and backward, in the same precision.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import batches
import captured
import loops
import quantize
import regimes
import utils
from datasets import Split
from models import resnet

ADAM = {"optimizer": "Adam", "lr": 0.01}
STRENGTH = {"none": 0.0, "lazy": 1.0, "prox": 0.01, "prox_ternary": 0.01}
SECONDS_TOGETHER = 10.0
Step = Callable[[], None]


class Setting:
    """Device, data and precision of a measurement."""

    def __init__(self, device: torch.device, precision: str, depth: int = 20, batch_size: int = 128, images: int = 6000) -> None:
        self.device, self.depth, self.batch_size = device, depth, batch_size
        self.precision = utils.select_precision(precision, device, tf32=False)
        random = np.random.default_rng(0)
        self.split = Split(random.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, images))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Full training batches without end."""
        source, epoch = batches.TrainingBatches(self.split, self.batch_size, 0, self.device), 0
        while True:
            yield from (batch for batch in source.epoch(epoch) if len(batch[1]) == self.batch_size)
            epoch += 1

    def network(self, memory_format: torch.memory_format = torch.channels_last) -> nn.Module:
        torch.manual_seed(0)
        return resnet(depth=self.depth).to(self.device, memory_format=memory_format).train()

    def optimizer(self, model: nn.Module, mode_name: str, capture: bool = False) -> quantize.ProjectedOptimizer:
        mode = quantize.MODES.get(mode_name, quantize.FULL_PRECISION)
        base = regimes.build_optimizer(model.parameters(), ADAM)
        if capture:
            regimes.make_capturable(base, self.device)
        optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode, capturable=capture)
        optimizer.set_strength(STRENGTH[mode_name])
        return optimizer


def ours(setting: Setting, mode_name: str, compiled: bool = False, capture: bool = False) -> Step:
    """A step of main_binary_reg.py."""
    model = setting.network()
    optimizer, meter, source = setting.optimizer(model, mode_name, capture), utils.Meter(setting.device), setting.batches()
    network = utils.CompiledNetwork(model, setting.batch_size) if compiled else model
    step = functools.partial(loops.train_step, network, optimizer, setting.precision, meter)
    if capture:
        step = captured.CapturedStep(step, optimizer, setting.batch_size)
    return lambda: step(*next(source), 1.0)


def conventional(setting: Setting) -> Step:
    """A step of ProxQuant-binary as training scripts are commonly written. No workers on a CPU: they would take its cores."""
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    class Images(Dataset):
        transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(batches.MEAN, batches.STD),
            ]
        )

        def __len__(self) -> int:
            return len(setting.split.labels)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.transform(Image.fromarray(setting.split.images[index])), int(setting.split.labels[index])

    workers = 0 if setting.device.type == "cpu" else min(8, os.cpu_count() or 1)
    loader = DataLoader(
        Images(), setting.batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    model = setting.network(torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), lr=ADAM["lr"])
    selected = [parameter for _, parameter in quantize.select_all_layers(model)]
    source = endless()

    def step() -> None:
        images, labels = (tensor.to(setting.device) for tensor in next(source))
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight in selected:
                excess = weight.abs() - 1
                soft = excess.sign() * (excess.abs() - ADAM["lr"] * STRENGTH["prox"]).clamp(min=0)
                weight.copy_(weight.sign() * (1 + soft))
                weight.clamp_(-1, 1)
        loss.item()
        (logits.topk(5).indices == labels[:, None]).sum().item()

    return step


def floor(setting: Setting) -> Step:
    """The network's convolutions alone, forward and backward."""
    dtype = torch.bfloat16 if setting.precision.name == "bf16" else torch.float32
    calls: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    model = setting.network()

    def remember(layer: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, inputs[0].detach().to(dtype), torch.randn_like(output).to(dtype)))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(remember)
    with torch.no_grad():
        model(next(setting.batches())[0])
    weights = [layer.weight.detach().to(dtype) for layer, _, _ in calls]

    def step() -> None:
        for index, ((layer, inputs, gradient), weight) in enumerate(zip(calls, weights, strict=True)):
            stride, padding = layer.stride, layer.padding
            F.conv2d(inputs, weight, None, stride, padding)
            needed = [index > 0, True, False]  # of inputs, weight, bias: nobody needs the gradient of the images
            torch.ops.aten.convolution_backward(gradient, inputs, weight, None, stride, padding, (1, 1), False, [0, 0], 1, needed)

    return step if setting.device.type == "cpu" else captured.recorded(step)  # a GPU's floor must not wait for Python


def interleaved(setting: Setting, steps: dict[str, Step], rounds: int, block: int) -> dict[str, list[float]]:
    """Seconds of each contender's steps; rounds of small blocks, so that a noisy moment hits all of them."""
    for step in steps.values():
        for _ in range(captured.WARM_UP + 1):  # a recording is made by the last of them
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(block):
                setting.synchronize()
                began = time.perf_counter()
                step()
                setting.synchronize()
                seconds[name].append(time.perf_counter() - began)
    return seconds


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
    """Validation images a second."""
    images, model = batches.ValidationBatches(setting.split, setting.device), setting.network()
    rates = []
    for _ in range(count):
        began = time.perf_counter()
        loops.validate(model, images, utils.Meter(setting.device), setting.precision)
        rates.append(images.samples / (time.perf_counter() - began))
    return statistics.median(rates)


def projection_against_tensors(setting: Setting, mode_name: str, tensors: int, count: int) -> float:
    """Milliseconds of projection and clip over so many tensors of 16x16x3x3 (the base optimizer does nothing)."""
    parameters = [nn.Parameter(torch.randn(16, 16, 3, 3, device=setting.device) / 10) for _ in range(tensors)]
    named = [(str(index), parameter) for index, parameter in enumerate(parameters)]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(parameters, lr=0.01), named, quantize.MODES[mode_name])
    optimizer.set_strength(1.0)
    seconds = interleaved(setting, {"step": optimizer.step}, 1, count)["step"]
    return 1000 * statistics.median(seconds)


def compiling_seconds(device: str, precision: str) -> float:
    """Seconds until a process that begins with nothing compiled has made its first step, less those of its second."""
    with tempfile.TemporaryDirectory() as empty:
        return _only("compiling", device, precision, TORCHINDUCTOR_CACHE_DIR=empty)


def peak_memory(device: str, precision: str) -> float:
    """Peak resident memory in GB of a process that trains on 50,000 images, the size of CIFAR-10, for a few steps."""
    return _only("memory", device, precision)


def _only(what: str, device: str, precision: str, **environment: str) -> float:
    """One figure, from a process of its own."""
    command = [sys.executable, __file__, "--only", what, "--device", device, "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return float(done.stdout.split()[-1])


def only_compiling(device: torch.device, precision: str) -> None:
    step, seconds = ours(Setting(device, precision), "prox", compiled=True), []
    for _ in range(2):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    print(seconds[0] - seconds[1])


def only_memory(device: torch.device, precision: str) -> None:
    setting = Setting(device, precision, images=50_000)
    step = ours(setting, "prox")
    for _ in range(5):
        step()
    validation = batches.ValidationBatches(Split(setting.split.images[:10_000], setting.split.labels[:10_000]), device)
    loops.validate(setting.network(), validation, utils.Meter(device), setting.precision)
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9)


def only_rate(device: torch.device, precision: str) -> None:
    """Images a second over some seconds, which begin when the process that started this one says so."""
    setting = Setting(device, precision)
    step, steps = ours(setting, "prox", capture=device.type == "cuda"), 0
    for _ in range(captured.WARM_UP + 2):
        step()
    print("ready", flush=True)
    sys.stdin.readline()
    setting.synchronize()
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS_TOGETHER:
        for _ in range(10):  # training too waits for the device about so often, to print
            step()
        setting.synchronize()
        steps += 10
    print(steps * setting.batch_size / (time.perf_counter() - began))


def rate_together(device: str, precision: str, runs: int) -> float:
    """Images a second of so many runs at once, each a process of its own; on a CPU each with its share of the threads."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // runs))} if device == "cpu" else {}
    command = [sys.executable, __file__, "--only", "rate", "--device", device, "--precision", precision]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **threads}}
    processes = [subprocess.Popen(command, **pipes) for _ in range(runs)]
    for process in processes:
        process.stdout.readline()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in processes)


def figures(seconds: list[float], batch_size: int) -> dict[str, float]:
    low, middle, high = (
        statistics.quantiles(seconds, n=10)[0],
        statistics.median(seconds),
        statistics.quantiles(seconds, n=10)[-1],
    )
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
    parser.add_argument("--quick", action="store_true", help="fewer steps: under two minutes on two cores")
    parser.add_argument("--compile", action="store_true", help="also measure compiled networks (compiling takes a minute or two)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--precision", default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("memory", "compiling", "rate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    utils.keep_freed_memory()
    device, _ = utils.select_device(args.device, [0], gpus_typed=False)
    if args.only:
        {"memory": only_memory, "compiling": only_compiling, "rate": only_rate}[args.only](device, args.precision)
        return
    auto = utils.select_precision("auto", device, tf32=False).name
    precisions = ["fp32"] if auto == "fp32" else ["fp32", auto]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    found: dict = {"device": name, "torch": torch.__version__, "python": platform.python_version(), "auto": auto}
    print(f"{name}; torch {torch.__version__}; auto precision is {auto}")

    rounds, block, count = (4, 2, 6) if args.quick else (12, 4, 20)
    found["speed"] = report_speed(device, precisions, rounds, block, args.compile)
    setting = Setting(device, auto)
    found["shares_ms"] = report_shares(setting, count)
    found["validation_images_per_second"] = validation_rate(setting, 1 if args.quick else 5)
    print(f"\nvalidation: {found['validation_images_per_second']:.0f} images/s ({auto})")
    found["growth_ms"] = report_growth(device, auto, count)
    found["images_per_second_together"] = report_together(device, auto)
    found["peak_memory_gb"] = peak_memory(args.device, auto)
    print(f"\npeak resident memory, 50,000 training images: {found['peak_memory_gb']:.2f} GB ({auto})")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


if __name__ == "__main__":
    main()
