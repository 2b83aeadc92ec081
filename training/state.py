"""How far a run is, with everything that its next step depends on: in memory, and in a checkpoint."""

import random
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import quantize
from training import checkpoints, regimes
from training.tasks import Task
from utils import Meter, UsageError


class Diverged(Exception):
    """The training loss or the weights are no longer finite numbers."""


@dataclass
class State:
    """Attributes:
    task: what the network learns to do.
    model: the network, holding the weights of the next forward pass.
    optimizer: the wrapped optimizer over all its parameters.
    start_signs: signs of the quantized parameters at the start of the run, by name: -1 or +1.
    meter: counts of the current epoch's training.
    carried: what the task carries from batch to batch, overwritten in place.
    epoch: epochs trained, which is the number of the current one (counted from 0).
    words: the vocabulary of a text, by number.
    data: what tells the data set from another, see ``data.Data.digest``.
    step: steps trained in the current epoch.
    seconds: spent in the current epoch by processes that were interrupted.
    best: best score so far, see ``Task.score``; None before the first.
    history: the rows of results.csv.
    ended: whether the regime lets no more epoch be trained.
    computed: how the network is computed, see ``computing.decide``.
    warm_start: what the run started from, see ``warm_start.load``; None where it began with random weights.
    """

    task: Task
    model: nn.Module
    optimizer: quantize.ProjectedOptimizer
    start_signs: dict[str, Tensor]
    meter: Meter
    carried: list[Tensor]
    epoch: int
    words: tuple[str, ...] = ()
    data: str = ""
    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    computed: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, Any] | None = None

    def checkpoint(self, args: Namespace) -> dict[str, Any]:
        """Everything, as tensors and plain values; the keys of the published checkpoints keep their names.

        Raises:
            Diverged: if the run could not train on from here.
        """
        content = {
            **self.network(args),
            "step": self.step,
            "seconds": self.seconds,
            "meter": self.meter.state_dict(),
            "carried": self.carried,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "start_signs": {name: sign.to(torch.int8) for name, sign in self.start_signs.items()},
            "random": _random_state(),
            "hard_quantized": self.optimizer.frozen,
            "computed": self.computed,
            "ended": self.ended,
        }
        self._require_finite(content)
        return content

    def require_finite(self) -> None:
        """Raises Diverged on weights or an optimizer's state that are not finite."""
        self._require_finite({"state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def _require_finite(self, content: dict[str, Any]) -> None:
        broken = checkpoints.not_finite(content)
        if broken:
            raise Diverged(f"epoch {self.epoch + 1}, after step {self.step}: {broken} is no longer finite")

    def network(self, args: Namespace) -> dict[str, Any]:
        """The network as it is now (inside ``hard_quantized()``: the quantized one), and what is needed to build it."""
        return {
            **({"words": list(self.words)} if self.words else {}),
            "epoch": self.epoch,
            "model": args.model,
            "config": self.model.config,
            "dataset": args.dataset,
            "data": self.data,
            "holdout": args.holdout,
            "input_size": args.input_size,
            "precision": self.computed.get("precision", args.precision),
            "warm_start": self.warm_start,
            "projection_mode": args.projection_mode,
            "quantizer": args.quantizer,
            "bits": args.bits,
            "by_row": args.by_row,
            "hard_quantized": args.projection_mode is not None,
            "frozen": self.optimizer.frozen,
            self.task.best_key: self.best,
            "state_dict": self.model.state_dict(),
        }

    def restore(self, content: dict[str, Any], regime: regimes.Regime) -> None:
        """Takes over a ``checkpoint``.

        Raises:
            UsageError: if it does not fit this run's network or optimizer.
        """
        try:
            self.model.load_state_dict(content["state_dict"])
            self.epoch, self.step, self.seconds = content["epoch"], content["step"], content["seconds"]
            self.best, self.history = content[self.task.best_key], content["history"]
            self.warm_start = content.get("warm_start")
            self.meter.load_state_dict(content["meter"])
            for tensor, saved in zip(self.carried, content.get("carried", []), strict=True):
                tensor.copy_(saved)
            # At step 0 the optimizer is still that of the epoch before.
            settings = regimes.settings_at(regime, self.epoch if self.step else max(self.epoch - 1, 0), self.history)
            self.optimizer.base_optimizer = regimes.build_optimizer(self.model.parameters(), settings)
            self.optimizer.load_state_dict(content["optimizer"])
            regimes.make_plain(self.optimizer.base_optimizer, settings)
            if self.optimizer.frozen:
                self.optimizer.quantized()  # raises where the checkpoint's weights are not
            self.start_signs = {name: content["start_signs"][name].to(sign) for name, sign in self.start_signs.items()}
            _set_random_state(content["random"])
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the checkpoint does not fit this run ({type(error).__name__}: {reason[:200]})") from None


# What of a checkpoint is the network and what is needed to build it, as ``State.network`` has it beside the best score.
NETWORK_KEYS = frozenset(
    {
        "epoch",
        "model",
        "config",
        "dataset",
        "holdout",
        "data",
        "input_size",
        "precision",
        "warm_start",
        "projection_mode",
        "quantizer",
        "bits",
        "by_row",
        "hard_quantized",
        "frozen",
        "state_dict",
        "words",
    }
)


def computed_before(content: dict[str, Any]) -> dict[str, Any]:
    """How the run of a checkpoint was computed, see ``computing.decide``; older checkpoints say less."""
    if isinstance(content.get("computed"), dict):
        return content["computed"]
    older = {"compile": "on" if content.get("compiled") else "off", "processes": content.get("processes", 1)}
    return older | ({"precision": content["precision"]} if content.get("precision") in ("fp32", "bf16") else {})


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
