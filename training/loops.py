"""One pass over the data: training, or validation. Neither knows which projection mode runs."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantize import ProjectedOptimizer
from sources.batches import Batches
from training.computing import Precision
from training.log import log
from training.state import Diverged, State
from training.tasks import Network, Task
from utils import Meter, stop_signals

Step = Callable[[Tensor, Tensor, float], None]  # inputs, targets, weight


class Interrupted(Exception):
    """A signal asked the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns a signal to stop into ``Interrupted`` at the next step boundary; a second one of the same kind acts at once.

    Attributes:
        number: of the signal that has come, 0 before.
    """

    def __init__(self) -> None:
        self.number = 0
        for number in stop_signals():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def answer(self, number: int) -> None:
        """Raises Interrupted for the number of a signal, not for 0. The number may be that of another process's signal."""
        if number:
            raise Interrupted(number)


class Progress:
    """How far an epoch is: a bar on a terminal, a line every so many steps in the log. A context that ends with the epoch."""

    def __init__(self, words: str, batches: Batches, state: State, print_freq: int, shown: bool = True) -> None:
        self._words, self._batches, self._state, self._print_freq = words, batches, state, print_freq
        self._began, self._begun_at = time.perf_counter(), state.step
        hidden = None if shown else True  # None: where there is no terminal
        self._bar = tqdm(total=len(batches), initial=state.step, desc=words, unit="step", leave=False, disable=hidden)

    def step(self) -> None:
        """Shows a step that is done, where it is time to; raises Diverged on a loss that is not finite."""
        self._bar.update()
        done, meter = self._state.step, self._state.meter
        if done % self._print_freq and done != len(self._batches):
            return
        figures = meter.read()
        if not math.isfinite(figures["loss"]):
            raise Diverged(f"{self._words}, step {done}: the training loss is {figures['loss']}")
        samples = min(done * self._batches.batch_size, self._batches.samples) - self._begun_at * self._batches.batch_size
        rate = samples / (time.perf_counter() - self._began)
        shown = f"{self._state.task.in_words(figures)}, {rate:.0f} {self._state.task.samples}/s"
        self._bar.set_postfix_str(shown)
        log.debug(f"{self._words}, step {done}/{len(self._batches)}: {shown}")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


def train_step(
    task: Task,
    network: Network,
    optimizer: ProjectedOptimizer,
    precision: Precision,
    meter: Meter,
    carried: Sequence[Tensor],
    inputs: Tensor,
    targets: Tensor,
    weight: float = 1.0,
) -> None:
    """One step on one batch. Nothing in here waits for the device.

    ``carried`` is what the task carries from batch to batch; it is kept up to date.
    ``weight`` is that of this process's share of the batch, see ``sources.batches.Share``; with 0 the batch is not counted.
    """
    optimizer.zero_grad()
    with precision.autocast():
        output, loss = task.forward(network, inputs, targets, carried)
    (loss if weight == 1.0 else loss * weight).backward()
    optimizer.step()
    if weight:
        meter.update(output, targets, loss)


def rehearse(state: State, network: Network, precision: Precision, batches: Batches) -> None:
    """Forward and backward of the next batch, and nothing of it is kept: for several processes that go on inside an epoch.

    After its first step DistributedDataParallel lays the gradients out anew, in the order in which they came, and where an entry
    lies decides in which order more than two processes sum it. This makes the layout that the undisturbed run has by then.
    """
    buffers = [(buffer, buffer.clone()) for buffer in state.model.buffers()]
    state.model.train()
    with torch.random.fork_rng(), contextlib.closing(batches.epoch(state.epoch, state.step)) as following:
        inputs, targets = next(following)
        with precision.autocast():
            _, loss = state.task.forward(network, inputs, targets, [tensor.clone() for tensor in state.carried])
        loss.backward()
    state.optimizer.zero_grad()
    for buffer, before in buffers:
        buffer.copy_(before)


def train(state: State, step: Step, batches: Batches, between_steps: Callable[[], None]) -> None:
    """Trains on an epoch's batches from ``state.step`` on, and keeps ``state`` up to date.

    ``step(inputs, targets, weight)`` makes one step, see ``train_step``. ``between_steps`` is called after each, when ``state``
    can be saved; what it raises ends the epoch there.
    """
    state.model.train()
    for inputs, targets in batches.epoch(state.epoch, state.step):
        samples = min(batches.batch_size, batches.samples - state.step * batches.batch_size)
        step(inputs, targets, batches.share.weight(samples))
        state.step += 1
        between_steps()


@torch.inference_mode()
def validate(
    task: Task,
    model: nn.Module,
    batches: Batches,
    meter: Meter,
    precision: Precision,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The task's figures of the network as it is, counted by ``meter``.

    ``between_batches`` is called as often in all processes, also where one has a batch less; what it raises ends the validation.
    """
    model.eval()
    carried = task.carried(model, batches)
    for inputs, targets in batches.epoch(0):
        with precision.autocast():
            output, loss = task.forward(model, inputs, targets, carried)
        meter.update(output, targets, loss)
        between_batches()
    rounds = math.ceil(math.ceil(batches.samples / batches.batch_size) / batches.share.count)
    for _ in range(rounds - len(batches)):
        between_batches()
    return meter.read()
