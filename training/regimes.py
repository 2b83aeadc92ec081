"""Regimes: which optimizer with which settings from which epoch on, and the optimizer that they ask for.

A regime maps an epoch (counted from 0) to settings that hold from there on; a later entry changes what it names and keeps the
rest. Settings are ``optimizer`` (a name in ``OPTIMIZERS``), that optimizer's own arguments (``lr``, ``momentum``, ...), and with
every optimizer those in ``OWN``, by which a regime can follow the validation: it then needs the rows of results so far, and no
memory of its own.
"""

import functools
import inspect
import sys
from argparse import Namespace
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from utils import UsageError, is_finite

Regime = dict[int, dict[str, Any]]
History = Sequence[Mapping[str, Any]]  # rows of results.csv, one an epoch

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    kind.__name__: kind
    for kind in (
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.ASGD,
        torch.optim.Rprop,
    )
}
# Settings of every optimizer, and what they accept.
OWN = {
    "clip_norm": "a number above 0",  # the gradient is shortened to this norm
    "plateau": "a number above 1",  # the rate is divided by it after an epoch whose validation loss is not the best so far
    "end_below": "a number from 0 up",  # the run ends when the rate falls below it
}
# Those that torch has in a fused form: a few kernels for all parameters, which also read the learning rate from the device.
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
# Arguments that choose an implementation or an objective, not a schedule.
_NOT_SETTINGS = {"self", "params", "foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"}

# The published BinaryConnect and TTQ runs.
BINARY_REGIME: Regime = {0: {"optimizer": "Adam", "lr": 0.01}, 81: {"lr": 0.001}, 122: {"lr": 0.0001}}
TTQ_REGIME: Regime = {
    0: {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4},
    80: {"lr": 0.01},
    120: {"lr": 0.001},
    300: {"lr": 0.0001},
}


def resolve_regime(args: Namespace, model_regime: Regime, projected: bool) -> Regime:
    """The regime of a run. The first line of this table that applies chooses it:

    ======================================= ============================================
    given                                   regime
    ======================================= ============================================
    ``--regime``                            that one, begun with ``--optimizer`` and ``--lr`` where it does not say otherwise
    ``--binary_regime``, ``--ttq_regime``   the published one of that name
    ``--optimizer`` other than SGD          that one at ``--lr``, constant
    a projection mode                       the network's own, without its weight decay
    nothing                                 the network's own
    ======================================= ============================================

    Then what the user typed takes the place of what the regime has at epoch 0: optimizer, momentum and weight decay as they are,
    the learning rate with the later ones, which keep their ratio to it. The network's own regime says all that it needs. In every
    other, wherever SGD begins and nothing before says its momentum or its weight decay, they are ``--momentum`` and
    ``--weight-decay``, or with a projection mode no decay; every other optimizer has torch's defaults.

    Args:
        args: ``optimizer``, ``lr``, ``momentum``, ``weight_decay``, ``regime``, ``binary_regime``, ``ttq_regime``, ``no_adjust``
            and ``typed``, the names of those that the user gave.
        model_regime: the network's own.
        projected: True where a projection mode is on.

    Raises:
        UsageError: on settings that the optimizer does not take.
    """
    own = args.regime or {}
    table = (  # applies, regime, whether it is the network's
        (args.regime is not None, {**own, 0: {"optimizer": args.optimizer, "lr": args.lr, **own.get(0, {})}}, False),
        (args.binary_regime, BINARY_REGIME, False),
        (args.ttq_regime, TTQ_REGIME, False),
        (args.optimizer != "SGD", {0: {"optimizer": args.optimizer, "lr": args.lr}}, False),
        (projected, _without_decay(model_regime), True),
        (True, model_regime, True),
    )
    chosen, of_network = next((regime, of_network) for applies, regime, of_network in table if applies)
    regime = {epoch: dict(chosen[epoch]) for epoch in sorted(chosen)}
    regime[0] |= {name: getattr(args, name) for name in ("optimizer", "momentum", "weight_decay") if name in args.typed}
    _check_entries(regime)
    _drop_foreign(regime, own.get(0, {}), args.typed)
    if not of_network:
        decay = 0.0 if projected and "weight_decay" not in args.typed else args.weight_decay
        _complete(regime, {"momentum": args.momentum, "weight_decay": decay})
    _check_values(regime, args.typed)
    if "lr" in args.typed:
        ratio = args.lr / regime[0]["lr"] if regime[0]["lr"] else 1.0
        for entry in regime.values():
            if "lr" in entry:
                entry["lr"] *= ratio
        regime[0]["lr"] = args.lr
        _check_values(regime, args.typed)  # again: a rate may have grown beyond all numbers
    if args.no_adjust:
        regime = {0: {name: value for name, value in regime[0].items() if name != "plateau"}}
    lowest = regime[0].get("end_below", 0.0)
    if regime[0]["lr"] < lowest:
        raise UsageError(f"--lr {regime[0]['lr']}: the regime ends below {lowest}; a higher rate is needed")
    return regime


def _without_decay(regime: Regime) -> Regime:
    rest = {epoch: {name: value for name, value in entry.items() if name != "weight_decay"} for epoch, entry in regime.items()}
    return {**rest, 0: {**rest[0], "weight_decay": 0.0}}


def _drop_foreign(regime: Regime, own: Collection[str], typed: Collection[str]) -> None:
    """A regime made for SGD keeps its momentum and decay out of an Adam that was asked for; what the user typed waits for SGD."""
    waits = any(entry.get("optimizer") == "SGD" for epoch, entry in regime.items() if epoch)
    accepted = {"optimizer", *OWN, *own, *(() if waits else typed), *_accepted(regime[0]["optimizer"])}
    regime[0] = {name: value for name, value in regime[0].items() if name in accepted}


def _complete(regime: Regime, of_sgd: dict[str, Any]) -> None:
    """Gives SGD, wherever it begins, the settings that nothing before it has said."""
    before: str | None = None
    for epoch, entry in regime.items():
        optimizer = entry.get("optimizer", before)
        if optimizer == "SGD" != before:
            said = settings_at(regime, epoch)
            entry |= {name: value for name, value in of_sgd.items() if name not in said}
        before = optimizer


def settings_at(regime: Regime, epoch: int, history: History = ()) -> dict[str, Any]:
    """The settings that hold in an epoch. A change of optimizer drops what the new one does not take.

    Args:
        regime: of the run.
        epoch: counted from 0.
        history: the rows of results, of the epochs before this one at least.
    """
    settings: dict[str, Any] = {}
    rate_set_at = 0
    for start in sorted(start for start in regime if start <= epoch):
        entry = regime[start]
        if entry.get("optimizer", settings.get("optimizer")) != settings.get("optimizer"):
            settings = {name: value for name, value in settings.items() if name in (*OWN, *_accepted(entry["optimizer"]))}
        settings.update(entry)
        rate_set_at = start if "lr" in entry else rate_set_at
    if "plateau" in settings:
        try:
            settings["lr"] /= settings["plateau"] ** _plateaus(history, rate_set_at, epoch)
        except OverflowError:  # of a number beyond all floats
            settings["lr"] = 0.0
    return settings


def ended(regime: Regime, epoch: int, history: History) -> bool:
    """Whether the regime lets no more epoch be trained after so many."""
    settings = settings_at(regime, epoch, history)
    return settings["lr"] < settings.get("end_below", 0.0)


def from_json(regime: Mapping[str, Any]) -> Regime:
    """A regime as ``args.json`` has it: JSON makes its epochs text."""
    return {int(epoch): entry for epoch, entry in regime.items()}


def _plateaus(history: History, since: int, epoch: int) -> int:
    """How many of the epochs from ``since`` to before ``epoch`` have a validation loss that is not the best so far.

    It is that of the hard-quantized network where there is one, as in the choice of the best epoch.
    """
    count, best = 0, float("inf")
    for row in history:
        loss = row["val_loss"] if row.get("val_loss_bin") is None else row["val_loss_bin"]
        if since < row["epoch"] <= epoch and not loss < best:
            count += 1
        best = min(best, loss)
    return count


def build_optimizer(parameters: Iterable[torch.Tensor], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """A new optimizer over the parameters, in torch's fused form where it has one. It clips the gradients at its steps."""
    kind = OPTIMIZERS[settings["optimizer"]]
    arguments = {name: value for name, value in settings.items() if name not in ("optimizer", *OWN)}
    if kind in FUSED:
        arguments["fused"] = True
    optimizer = kind(list(parameters), **arguments)
    _set_clip_norm(optimizer, settings)
    return optimizer


def _set_clip_norm(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
    """Has each step of the optimizer shorten the gradient to ``clip_norm`` first, where the settings have one."""
    if hasattr(optimizer, "clipping"):
        optimizer.clipping.remove()
    if "clip_norm" in settings:
        optimizer.clipping = optimizer.register_step_pre_hook(functools.partial(_clip_gradients, settings["clip_norm"]))


def _clip_gradients(norm: float, optimizer: torch.optim.Optimizer, arguments: tuple, named_arguments: dict) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm, foreach=True)


def capturable(settings: dict[str, Any]) -> bool:
    """Whether the steps of an optimizer with these settings can be captured, and its state be made new by zeros."""
    return OPTIMIZERS[settings["optimizer"]] in FUSED and not settings.get("dampening") and "clip_norm" not in settings


def make_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Puts the learning rates on the device, where a captured step reads them; to be done again after ``load_state_dict``.

    One tensor for all groups of one rate, which is then known to be one without a look at its value.
    """
    rates: dict[float, torch.Tensor] = {}
    for group in optimizer.param_groups:
        rate = float(group["lr"])
        group["lr"] = rates.setdefault(rate, torch.tensor(rate, dtype=torch.float32, device=device))
        if "capturable" in group:
            group["capturable"] = True


def make_plain(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
    """Undoes ``make_capturable`` in an optimizer with these settings: a checkpoint of captured steps may be continued without."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"] = settings["lr"]
        if "capturable" in group:
            group["capturable"] = False


def update_settings(optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
    """New settings for an optimizer that keeps its state. A tensor keeps its place in memory."""
    for group in optimizer.param_groups:
        for name, value in settings.items():
            if isinstance(group.get(name), torch.Tensor):
                group[name].fill_(value)
            elif name not in ("optimizer", *OWN):
                group[name] = value
    _set_clip_norm(optimizer, settings)


@torch.no_grad()
def zero_state(optimizer: torch.optim.Optimizer) -> None:
    """The state of a new optimizer, in the memory of the old one; for those that are ``capturable``."""
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _accepted(optimizer: str) -> dict[str, Any]:
    """The settings that an optimizer takes, with their defaults."""
    parameters = inspect.signature(OPTIMIZERS[optimizer]).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _NOT_SETTINGS}


def _check_entries(regime: Regime) -> None:
    """Raises UsageError on the first of what is computed with here, before an optimizer sees it, that cannot be."""
    for epoch, entry in regime.items():
        optimizer = entry.get("optimizer", "SGD")
        if not isinstance(optimizer, str) or optimizer not in OPTIMIZERS:
            raise UsageError(f"--regime: epoch {epoch}: optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        rate = entry.get("lr", 0.0)
        if not (_is_number(rate) and is_finite(rate)):
            raise UsageError(f"--regime: epoch {epoch}: lr {rate!r} is not a finite number")
        for name in (name for name in OWN if name in entry):
            _check_own(epoch, name, entry[name])


def _check_values(regime: Regime, typed: Collection[str]) -> None:
    """Raises UsageError on the first setting that the optimizer of its epoch does not take."""
    for epoch in regime:
        settings = settings_at(regime, epoch)
        optimizer = settings["optimizer"]
        accepted = _accepted(optimizer)
        for name, value in settings.items():
            if name == "optimizer" or name in OWN:
                continue
            if name not in accepted:
                where = f"--{name.replace('_', '-')} {value}" if name in typed else f"--regime: epoch {epoch}: {name} {value}"
                raise UsageError(f"{where}: {optimizer} has no setting {name}; it has {', '.join((*accepted, *OWN))}")
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            if not all(abs(number) <= sys.float_info.max for number in numbers if isinstance(number, (int, float))):
                raise UsageError(f"--regime: epoch {epoch}: {name} {value} is not a finite number")
            if isinstance(value, bool) != isinstance(accepted[name], bool):
                raise UsageError(f"--regime: epoch {epoch}: {name} {value} is not of the kind of its default, {accepted[name]}")
        try:
            _try_out(settings)
        except (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]  # torch adds all that its functions would take
            raise UsageError(f"--regime: epoch {epoch}: {optimizer} does not take {settings} ({reason})") from None


def _try_out(settings: dict[str, Any]) -> None:
    """Two steps of the optimizer: not all settings are looked at where it is made, and some not before there is a state."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = build_optimizer([weight], settings)
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()


def _check_own(epoch: int, name: str, value: Any) -> None:
    if (
        not _is_number(value)
        or not is_finite(value)
        or value < 0
        or (value == 0 and name == "clip_norm")
        or (value <= 1 and name == "plateau")
    ):
        raise UsageError(f"--regime: epoch {epoch}: {name} {value!r} is not accepted: {OWN[name]} is needed")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
