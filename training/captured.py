"""A training step as one CUDA graph: recorded once, then replayed without Python and without a launch for every kernel.

A small network's step is hundreds of short kernels, which a GPU runs faster than Python can launch them.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from quantize import ProjectedOptimizer
from training import regimes
from training.loops import Step
from utils import UsageError

Replay = Callable[[], None]
WARM_UP = 3  # steps before a recording: libraries choose their algorithms, the optimizer makes its state


class CapturedStep:
    """Makes the same steps as ``step``: a few as they are, then by replaying a recording of one.

    A recording is good until the optimizer drops parameters (the freeze) or its settings change, but for the learning rate and
    the strength: those are tensors on the device, which a replay reads. A batch of another size, the smaller last one of an
    epoch, is not recorded.

    Args:
        step: one training step, as ``loops.train_step``; nothing in it may wait for the device.
        optimizer: that it steps; capturable, see ``ProjectedOptimizer`` and ``regimes.make_capturable``.
        batch_size: of the batches to be replayed.
        stream: that recordings are made on (default: a new one).
    """

    def __init__(self, step: Step, optimizer: ProjectedOptimizer, batch_size: int, stream: "Stream | None" = None) -> None:
        self._step, self._optimizer, self._batch_size = step, optimizer, batch_size
        self._stream = stream or Stream()
        self._recorded_with: tuple[Any, ...] | None = None
        self._warm = 0
        self._replay: Replay | None = None

    def __call__(self, images: Tensor, labels: Tensor, weight: float = 1.0) -> None:
        """One step; ``(N, 3, H, W)`` images and ``(N,)`` labels on the device. ``weight`` is 1: nobody else has a share."""
        if len(images) != self._batch_size:
            self._step(images, labels, weight)
            return
        if self._recorded_with != self._settings():
            self._recorded_with, self._warm, self._replay = self._settings(), 0, None
        if self._replay is None and self._warm < WARM_UP:
            self._warm += 1
            with self._stream.aside():
                self._step(images, labels, weight)
            return
        if self._replay is None:
            self._images, self._labels = images.clone(), labels.clone()  # clone keeps channels_last
            self._replay = self._stream.record(lambda: self._step(self._images, self._labels, weight))
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._replay()

    def _settings(self) -> tuple[Any, ...]:
        """What a recording holds: plain values, and the places of the learning rates."""
        base = self._optimizer.base_optimizer
        groups = [
            (len(group["params"]), group["lr"].data_ptr(), *(group[name] for name in group if name not in ("params", "lr")))
            for group in base.param_groups
        ]
        return base, self._optimizer.frozen, *groups


class Stream:
    """A CUDA stream of its own for the steps before a recording, as torch wants it, and for the recording."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in here is done on this stream, after all before and before all after it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Replay:
        """Records what ``run`` does on the GPU as a CUDA graph, without doing it."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads that load data may go on allocating.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


def recorded(run: Callable[[], None]) -> Replay:
    """``run`` as a CUDA graph, after it has been done a few times."""
    stream = Stream()
    for _ in range(WARM_UP):
        with stream.aside():
            run()
    return stream.record(run)


def prepare(step: Step, optimizer: ProjectedOptimizer, batch_size: int, device: torch.device) -> CapturedStep:
    """``step`` to be captured, with an optimizer whose learning rates lie where a recording reads them."""
    regimes.make_capturable(optimizer.base_optimizer, device)
    return CapturedStep(step, optimizer, batch_size)


def check_place(gpu: bool, several: bool) -> None:
    """Raises UsageError where no run's steps can be captured: without a GPU, and with several processes."""
    if not gpu:
        raise UsageError("--capture: CUDA graphs need a GPU, and this run has none")
    if several:
        raise UsageError("--capture: a step that several processes share cannot be captured; one GPU is accepted")


def check_regime(regime: regimes.Regime, epochs: int) -> None:
    """Raises UsageError at the first of a run's epochs whose optimizer's steps cannot be captured."""
    for epoch in (epoch for epoch in regime if epoch < epochs):
        settings = regimes.settings_at(regime, epoch)
        if not regimes.capturable(settings):
            kinds = ", ".join(kind.__name__ for kind in regimes.FUSED)
            named = [name for name in ("dampening", "clip_norm") if settings.get(name)]
            what = settings["optimizer"] + (f" with {' and '.join(named)}" if named else "")
            raise UsageError(f"--capture: {what} (epoch {epoch}) cannot be captured; {kinds} without dampening or clip_norm can")
