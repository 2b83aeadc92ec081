"""Proximal operators: the pull toward quantized values, at a given strength.

prox_t(w) = argmin_v 1/2 ||v - w||^2 + t R(v) for a regularizer R that is zero exactly at quantized vectors (equation 3 of the
paper). Each is a pure function of one weight tensor of any shape. ``strength`` is t >= 0: a number, or a tensor that broadcasts
against ``w``. ``within`` is as in ``quantizers``.
"""

import torch
from torch import Tensor

from quantize.quantizers import ternarize
from quantize.side_by_side import ONE_TENSOR, Within


def prox_binary(w: Tensor, strength: float | Tensor, within: Within = ONE_TENSOR) -> Tensor:
    """Proximal operator of the W-shaped regularizer R(w) = ||w - sign(w)||_1 (section 3.1 of the paper).

    sign(w) * (1 + soft(|w| - 1, t)) with soft(x, t) = sign(x) max(|x| - t, 0), that is: |w| moves toward 1 by at most t. Zero
    counts as positive. With t >= 1 and w in [-1, 1] this is exactly ``binarize``; with t = 0 it is exactly w.
    """
    # The number 1 clipped to [|w| - t, |w| + t] is |w| moved toward 1 by at most t, without the rounding of |w| - 1.
    magnitude = w.abs()
    moved = torch.maximum((magnitude + strength).clamp(max=1.0), magnitude - strength)
    return torch.copysign(moved, w + 0.0)  # + 0.0: see binarize


def prox_ternary(w: Tensor, strength: float | Tensor, within: Within = ONE_TENSOR) -> Tensor:
    """Pull toward the ternary quantization T of w: (w + t T) / (1 + t) (section 4 of the paper).

    The minimizer of 1/2 ||v - w||^2 + t/2 ||v - T||^2 over v, with T held at its value for the incoming w.
    """
    return (w + strength * ternarize(w, within)) / (1 + strength)
