"""Hard quantizers: the values that weights have in the finished network.

Each is a pure function of one weight tensor of any shape. ``within`` is for the optimizer, which passes many tensors side by
side in one buffer and takes the means within each of them (see ``side_by_side``); a caller with one tensor leaves it out.
"""

import torch
from torch import Tensor

from quantize.side_by_side import ONE_TENSOR, Within


def binarize(w: Tensor, within: Within = ONE_TENSOR) -> Tensor:
    """sign(w) with a tie broken to +1, so that the result holds only -1 and +1 (section 3.1 of the paper)."""
    # Adding zero turns -0.0 into +0.0, whose sign bit copysign reads.
    return torch.copysign(torch.ones_like(w), w + 0.0)


def ternarize(w: Tensor, within: Within = ONE_TENSOR) -> Tensor:
    """Ternary quantizer in the manner of TWN: two levels and zero, all from the tensor itself (section 4 of the paper).

    With D = 0.7 * mean|w|, entries >= D become the mean of those entries, entries <= -D the mean of those, the rest 0. The two
    levels differ in general. A side without entries has no level; an all-zero tensor stays zero. Half-precision tensors are
    quantized in float32 and rounded at the end.
    """
    x = w if w.dtype in (torch.float32, torch.float64) else w.float()
    threshold = (0.7 * within.mean(x.abs())).to(x.dtype)
    # Where 0.7 * mean|w| is too small to be represented, every entry but zero lies beyond it.
    threshold = torch.maximum(threshold, torch.nextafter(torch.zeros_like(threshold), torch.ones_like(threshold)))
    high, low = (x >= threshold).to(x.dtype), (x <= -threshold).to(x.dtype)
    levels = high * within.mean(x, high).to(x.dtype) + low * within.mean(x, low).to(x.dtype)
    return levels.to(w.dtype)
