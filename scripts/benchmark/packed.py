"""What a packed network costs beside the float network: on disk, to load, in memory and to run."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import quantize
from benchmark.contenders import Setting, interleaved
from models import resnet
from training import checkpoints

NETWORKS = {  # name: network, and the batch of one and of many that it is run on
    "ResNet-20": (lambda: resnet(depth=20), (3, 32, 32), 128),
    "ResNet-18, ImageNet": (lambda: resnet("imagenet", depth=18, num_classes=1000), (3, 224, 224), 8),
}


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def report_packed(setting: Setting, count: int) -> dict[str, dict[str, float]]:
    """Prints and returns, for each network and mode, sizes in bytes, seconds to load and milliseconds of a forward pass."""
    table = {}
    for name, (build, image, batch) in NETWORKS.items():
        for mode_name in ("prox", "prox_ternary"):
            table[f"{name}, {mode_name}"] = row = _measure(setting, build, image, batch, mode_name, count)
            print(f"\n{name}, {mode_name}, float beside packed ({setting.precision.name})")
            for words, unit, scale in (("file", "bytes", 1), ("load", "ms", 1000), ("memory", "bytes", 1), ("run 1", "ms", 1000)):
                _say(words, row, unit, scale)
            _say(f"run {batch}", row, "ms", 1000)
    return table


def _say(words: str, row: dict[str, float], unit: str, scale: float) -> None:
    plain, packed = row[f"{words} float"], row[f"{words} packed"]
    figures = f"{scale * plain:>14,.1f}{scale * packed:>14,.1f}" if scale > 1 else f"{plain:>14,}{packed:>14,}"
    print(f"  {words:10}{figures} {unit:6}{packed / plain:>8.2f} times")


def _measure(
    setting: Setting, build: Callable[[], nn.Module], image: tuple[int, ...], batch: int, mode_name: str, count: int
) -> dict[str, float]:
    torch.manual_seed(0)
    mode = quantize.MODES[mode_name]

    def network() -> nn.Module:
        return build().to(setting.device, memory_format=torch.channels_last).eval()

    plain, packed = network(), network()
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(plain.parameters(), lr=0.1), mode.select(plain), mode)
    optimizer.freeze()
    row: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, file = Path(folder, "float.pth.tar"), Path(folder, "packed.safetensors")
        checkpoints.save(checkpoint, {"state_dict": plain.state_dict()})
        quantize.save_packed(file, plain, optimizer)
        quantize.load_packed_layers(file, packed)
        row |= {"file float": checkpoint.stat().st_size, "file packed": file.stat().st_size}
        readers = {"float": lambda: checkpoints.read(checkpoint), "packed": lambda: quantize.load_packed(file)}
        for name, reader in readers.items():
            row[f"load {name}"] = _median(reader, count)
    row |= {"memory float": held(plain), "memory packed": held(packed)}
    for size in (1, batch):
        x = torch.randn(size, *image, device=setting.device).contiguous(memory_format=torch.channels_last)
        steps = {"float": lambda x=x: _run(setting, plain, x), "packed": lambda x=x: _run(setting, packed, x)}
        assert torch.equal(steps["float"](), steps["packed"]())
        for name, seconds in interleaved(setting, steps, count, 1).items():
            row[f"run {size} {name}"] = statistics.median(seconds)
    return row


@torch.inference_mode()
def _run(setting: Setting, model: nn.Module, x: Tensor) -> Tensor:
    with setting.precision.autocast():
        return model(x)


def _median(action: Callable[[], object], count: int) -> float:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
