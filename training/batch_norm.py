"""Batch normalization with formulas of its own, for networks that are compiled for training on a CPU; and its averages anew.

What torch.compile makes of ``nn.BatchNorm2d`` there takes the variance by Welford's recurrence, each element waiting for the one
before it, and keeps mean and deviation for the backward pass in the activations' precision, which under autocast is bf16. Here
the sums are independent of each other and everything but the activations is float32: ResNet-20 in bf16 trained 8% faster.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

_EACH_CHANNEL = (0, 2, 3)


def swap_in(network: nn.Module) -> None:
    """Has a network's ``nn.BatchNorm2d`` layers normalize by these formulas where they are compiled in training.

    Each layer stays the object that it is, so its parameters, buffers and their names do, for optimizers and checkpoints. Layers
    without weights or running averages, and subclasses, which may compute something else, are left as they are.
    """
    for layer in network.modules():
        if type(layer) is nn.BatchNorm2d and layer.affine and layer.track_running_stats and layer.momentum is not None:
            layer.__class__ = BatchNorm


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d``: its statistics and results, up to rounding; not compiled or in evaluation, to the last bit."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        if not (self.training and torch.compiler.is_compiling() and count > 1):
            return super().forward(x)
        y, mean, variance = normalize(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        return y


@torch.no_grad()
def re_estimate(network: nn.Module, passes: Iterable[object]) -> int:
    """Takes all running averages anew, as the plain mean over some batches, and leaves the network in evaluation.

    Args:
        network: with the weights that the averages are to be of.
        passes: each step of the iteration passes one batch through the network.

    Returns:
        How many layers have such averages.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    layers = [layer for layer in network.modules() if isinstance(layer, kinds) and layer.track_running_stats]
    momenta = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for the plain mean
        layer.train()
    try:
        for _ in passes if layers else ():
            pass
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        network.eval()
    return len(layers)


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` with each channel's mean and (biased) variance, and these two.

    Args:
        x: ``(N, C, H, W)``; the result has its dtype. Sums are at least float32.
        weight, bias: ``(C,)``.
        eps: for channels that hardly vary.
    """
    y, mean, variance, _ = _Normalize.apply(x, weight, bias, eps)
    return y, mean, variance


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
        count = x.numel() // x.shape[1]
        wide = _wide(x)
        # Sums about a point near the mean: about 0 a small variance would be lost in the rounding of a large mean's square.
        near = wide[0].mean((1, 2))
        deviation = wide - _spread(near)
        shift = deviation.sum(_EACH_CHANNEL) / count
        # The mean square about any point, less the square of the mean's distance from it.
        variance = ((deviation * deviation).sum(_EACH_CHANNEL) / count - shift * shift).clamp(min=0)
        mean = near + shift
        inverse = torch.rsqrt(variance + eps)
        y = (wide - _spread(mean)) * _spread(weight * inverse) + _spread(bias)
        return y.to(x.dtype), mean, variance, inverse

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, *_ = inputs
        _, mean, variance, inverse = output
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.mark_non_differentiable(mean, variance, inverse)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        wide, deviation = _wide(gradient), _wide(x) - _spread(mean)
        of_bias = wide.sum(_EACH_CHANNEL)
        of_weight = (wide * deviation).sum(_EACH_CHANNEL) * inverse
        scale = weight * inverse
        # Less what moves with the channel's mean, and what moves with its variance.
        of_x = _spread(scale) * wide - _spread(scale * of_bias / count) - _spread(scale * inverse * of_weight / count) * deviation
        return of_x.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(channels: Tensor) -> Tensor:
    """``(C,)`` as it goes with ``(N, C, H, W)``."""
    return channels[:, None, None]
