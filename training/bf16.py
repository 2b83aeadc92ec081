"""Passes in bf16 on any device: torch's autocast, and its products by way of float32 where a CPU has no instructions for bf16.

Such a CPU's own bf16 convolutions are many times slower than float32 ones (docs/speed.md), and it has no bf16 LSTM at all. So a
network that was trained elsewhere could hardly be evaluated there, and a run that was begun elsewhere not be continued.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_PRODUCTS = (torch.conv2d, F.linear, torch.lstm)  # what the networks of models/ are made of


@contextlib.contextmanager
def autocast(device_type: str, by_rounding: bool) -> Iterator[None]:
    """The context of a forward pass in bf16; ``by_rounding`` on a CPU that has no instructions for it."""
    with torch.autocast(device_type, torch.bfloat16), _RoundedProducts() if by_rounding else contextlib.nullcontext():
        yield


class _RoundedProducts(TorchFunctionMode):
    """Has convolutions, linear maps and LSTMs compute in float32, with arguments and results rounded to bf16.

    That is what hardware does, which sums in float32 as well, but inside an LSTM, whose states are rounded only after the last
    step. Gradients are rounded where values are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls in place of each of its functions."""
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.bfloat16().float(), (args, kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return tree_map_only(Tensor, Tensor.bfloat16, func(*args, **kwargs))
