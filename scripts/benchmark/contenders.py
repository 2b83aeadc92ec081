"""The training steps that are measured: ours, the conventional pipeline, and the floor."""

import functools
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize
import utils
from models import resnet
from sources import batches
from sources.images import Split
from training import captured, computing, loops, regimes
from training.tasks import IMAGES

ADAM = {"optimizer": "Adam", "lr": 0.01}
STRENGTH = {"none": 0.0, "lazy": 1.0, "prox": 0.01, "prox_ternary": 0.01}
Step = Callable[[], None]


class Setting:
    """Device, data and precision of a measurement."""

    def __init__(self, device: torch.device, precision: str, depth: int = 20, batch_size: int = 128, images: int = 6000) -> None:
        self.device, self.depth, self.batch_size = device, depth, batch_size
        self.precision = computing.select_precision(precision, device, tf32=False)
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
    network = computing.CompiledNetwork(model, setting.batch_size) if compiled else model
    step = functools.partial(loops.train_step, IMAGES, network, optimizer, setting.precision, meter, [])
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
    kept = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(Images(), setting.batch_size, shuffle=True, drop_last=True, num_workers=workers, **kept)

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
