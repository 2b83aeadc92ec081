"""Networks by name. A network knows its published regime (``regime``), and nothing of quantization or command lines."""

from collections.abc import Callable

from torch import nn

from models.lstm import lstm
from models.resnet import resnet

MODELS: dict[str, Callable[..., nn.Module]] = {"resnet": resnet, "lstm": lstm}

__all__ = ["MODELS", "lstm", "resnet"]
