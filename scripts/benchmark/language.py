"""The language model's training steps: ours, the conventional loop, and the floor."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quantize
from benchmark.contenders import Step
from models import lstm
from sources import text
from training import captured, computing, loops, regimes
from training.tasks import TEXT

WORDS, HIDDEN, STREAMS = 10_000, 300, text.STREAMS
# What trains to few bits: 2, by row.
MODES = {"none": quantize.FULL_PRECISION} | {name: quantize.mode(name, bits=2, by_row=True) for name in ("lazy_alt", "prox_alt")}


class Setting:
    """Device, text and precision of a measurement: the size of Penn Treebank, with words drawn at random."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device = device
        self.precision = computing.select_precision(precision, device, tf32=False)
        tokens = torch.randint(0, WORDS, (30_000,), generator=torch.Generator().manual_seed(0))
        self.windows = text.training_windows(tokens, STREAMS, device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Whole windows without end."""
        while True:
            yield from (window for window in self.windows.epoch() if len(window[0]) == text.STEPS)

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return lstm(hidden=HIDDEN, num_classes=WORDS).to(self.device).train()


def ours(setting: Setting, mode_name: str) -> Step:
    """A step of main_binary_reg.py."""
    model, mode, source = setting.network(), MODES[mode_name], setting.batches()
    base = regimes.build_optimizer(model.parameters(), regimes.settings_at(model.regime, 0))
    optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode)
    if mode_name == "prox_alt":
        optimizer.set_strength(1e-5)
    meter, carried = TEXT.meter(setting.device), TEXT.carried(model, setting.windows)
    step = functools.partial(loops.train_step, TEXT, model, optimizer, setting.precision, meter, carried)
    return lambda: step(*next(source))


def conventional(setting: Setting) -> Step:
    """A step as language-model examples have it, in float32: a loop over the parameters, and the loss looked at in each step."""
    model, source = setting.network(), setting.batches()
    states = model.start(STREAMS)

    def step() -> None:
        nonlocal states
        inputs, targets = next(source)
        model.zero_grad()
        states = [state.detach() for state in states]
        logits, states = model(inputs, *states)
        loss = F.cross_entropy(logits.view(-1, WORDS), targets.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-20.0)
        loss.item()

    return step


def floor(setting: Setting, decoder_alone: bool = False) -> Step:
    """The step's matrix products alone: each layer's output, and the gradients of its input and its weight."""
    dtype = torch.bfloat16 if setting.precision.name == "bf16" else torch.float32

    def layer(outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        shapes = ((text.STEPS * STREAMS, HIDDEN), (outputs, HIDDEN), (text.STEPS * STREAMS, outputs))
        return tuple(torch.randn(shape, device=setting.device).to(dtype) for shape in shapes)

    def products(inputs: Tensor, weight: Tensor, gradient: Tensor, steps: int = 1) -> None:
        for part in inputs.chunk(steps):  # the recurrence: a word after the other
            part @ weight.t()
        for part in gradient.chunk(steps):
            part @ weight
        gradient.t() @ inputs

    decoder, gates, recurrent = layer(WORDS), layer(4 * HIDDEN), layer(4 * HIDDEN)

    def step() -> None:
        products(*decoder)
        if not decoder_alone:
            products(*gates)
            products(*recurrent, steps=text.STEPS)

    return step if setting.device.type == "cpu" else captured.recorded(step)  # a GPU's floor must not wait for Python
