"""The projection modes: quantizer x pull x place, one object each, in one table. A new mode is one more row.

A mode says to what (``quantizers``, ``multibit``), how (``pulls``) and which parameters (``selectors``) are quantized, where the
gradient is taken, and how strong the pull is at each moment.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from quantize.finished import check_finite
from quantize.multibit import Alternating, GreedyMean, GreedyMedian, Uniform, UniformWithZero
from quantize.pulls import Hard, PiecewiseAffine, Pull, Quadratic, Soft
from quantize.quantizers import Binary, ExponentialBinary, LearnedTernary, Quantizer, StochasticBinary, Ternary
from quantize.selectors import NamedParameters, select_all_layers, select_inner_layers


@dataclass(frozen=True)
class Schedule:
    """How the strength of a pull follows from the user's rate and from how far the training is.

    Attributes:
        at: (rate, epoch counted from 0, share of the way from the first step to the freeze that is over) -> strength.
        flag: the command line's name of the rate; None where there is no rate to choose.
        default_rate: where the user gives none; None where there is no sensible one.
        scaled_by_lr: True where each step's pull has the strength lr * strength.
        every_step: True where the share matters, so that the strength changes at each step.
        largest: strength that makes sense.
    """

    at: Callable[[float, int, float], float]
    flag: str | None = None
    default_rate: float | None = 1.0
    scaled_by_lr: bool = False
    every_step: bool = False
    largest: float = math.inf


def _rate(rate: float, epoch: int, share: float) -> float:
    return rate


def _growing(rate: float, epoch: int, share: float) -> float:
    return rate * epoch


def _parq_slope(rate: float, epoch: int, share: float) -> float:
    """1 at the start, 0 at the end: (sigma(p) - sigma(1)) / (sigma(0) - sigma(1)), sigma(p) = 1 / (1 + e^(10 (p - 1/2)))."""

    def sigma(p: float) -> float:
        return 1 / (1 + math.exp(10 * (p - 0.5)))

    return max(0.0, (sigma(min(share, 1.0)) - sigma(1)) / (sigma(0) - sigma(1)))


def _relaxing(rate: float, epoch: int, share: float) -> float:
    """t with t / (1 + t) equal to the share; at the end, where that is infinite, so large that float32 sees no difference."""
    return share / max(1 - share, 1e-9)


# METHOD 5: a step's strength is lr * r * e.
PROXQUANT = Schedule(_growing, "reg_rate", default_rate=None, scaled_by_lr=True)
CONSTANT = Schedule(_rate, "binary_reg")
GROWING = Schedule(_growing, "reg_rate", default_rate=None)
SLOPE = Schedule(_parq_slope, every_step=True, largest=1.0)
RELAXING = Schedule(_relaxing, every_step=True)
NONE = Schedule(_rate)


@dataclass(frozen=True)
class ProjectionMode:
    """One method of training quantized weights.

    Attributes:
        name: the word on the command line.
        label: the word in reports.
        title: what it is, in one line, for help texts.
        quantizer: gives the finished network's values.
        pull: how weights are moved toward them.
        lazy: the place of the gradient. True: at the pulled weights, which the model shows, while the optimizer keeps and updates
            latent ones. False (eager): at the weights themselves, which are pulled after each step of the optimizer.
        schedule: of the strength.
        drawn: a quantizer whose values the model shows in training in place of the finished network's; None: the same.
        any_quantizer: whether another quantizer may be chosen.
    """

    name: str
    label: str
    title: str
    quantizer: Quantizer
    pull: Pull
    lazy: bool
    schedule: Schedule
    drawn: Quantizer | None = None
    any_quantizer: bool = False

    def select(self, model: nn.Module) -> NamedParameters:
        """The parameters that it quantizes in a network, see ``selectors``."""
        return select_inner_layers(model) if self.quantizer.spares_ends else select_all_layers(model)

    def strength(self, rate: float | None = None, epoch: int = 0, share: float = 0.0) -> float:
        """Strength of the pull, before the learning rate scales it.

        Args:
            rate: the user's; ``default_rate`` where None.
            epoch: counted from 0.
            share: of the way from the first step to the freeze that is over, 0 to 1; for modes that are scheduled over it.
        """
        rate = self.default_rate if rate is None else rate
        return self.schedule.at(rate, epoch, share)

    @property
    def default_rate(self) -> float:
        """The rate where the user gives none; 0 where there is no sensible one."""
        return self.schedule.default_rate or 0.0

    @property
    def strength_grows(self) -> bool:
        """True where the strength in an epoch is rate * epoch."""
        return self.schedule.at is _growing

    @property
    def has_strength(self) -> bool:
        """False where the pull goes all the way, so that there is no strength to set."""
        return self.schedule != NONE

    @property
    def shown(self) -> Quantizer:
        """The quantizer of the weights that the model shows in training."""
        return self.drawn or self.quantizer

    @property
    def choices(self) -> dict[str, type[Quantizer]]:
        """The quantizers that may be chosen, by name."""
        if self.any_quantizer:
            return QUANTIZERS
        return _STOCHASTIC if self.drawn is not None else {self.quantizer.name: type(self.quantizer)}

    @property
    def projects(self) -> bool:
        """False in full precision alone."""
        return self.name != "none"

    def hard_quantize(self, w: Tensor, levels: Tensor | None = None) -> Tensor:
        """The finished network's values of one tensor; ``levels`` (positive, negative) where they are learned.

        Raises:
            NotFinite: if a weight or a level is not a finite number.
            ValueError: if levels are learned and none are given.
        """
        if self.quantizer.given == "levels" and levels is None:
            raise ValueError(f"{self.name} learns its levels: those of this tensor are needed (optimizer.levels, by name)")
        check_finite(["the tensor"], [w])
        check_finite(["its levels"] if levels is not None else [], [levels] if levels is not None else [])
        return self.quantizer(w, None if levels is None else levels.unsqueeze(0))


QUANTIZERS: dict[str, type[Quantizer]] = {
    kind.name: kind for kind in (Binary, Ternary, GreedyMedian, GreedyMean, Alternating, Uniform, UniformWithZero)
}
ALL_QUANTIZERS: dict[str, type[Quantizer]] = {
    **QUANTIZERS, **{kind.name: kind for kind in (LearnedTernary, StochasticBinary, ExponentialBinary)}
}  # fmt: skip
_STOCHASTIC: dict[str, type[Quantizer]] = {kind.name: kind for kind in (StochasticBinary, ExponentialBinary)}

MODES: dict[str, ProjectionMode] = {
    mode.name: mode
    for mode in (
        ProjectionMode(
            "lazy", "BinaryConnect", "BinaryConnect: gradients at the projected weights",
            Binary(), Soft(), True, CONSTANT,
        ),
        ProjectionMode(
            "prox", "ProxQuant-binary", "ProxQuant-binary: a binary proximal step after each optimizer step",
            Binary(), Soft(), False, PROXQUANT,
        ),
        ProjectionMode(
            "prox_ternary", "ProxQuant-ternary", "ProxQuant-ternary: a ternary proximal step after each optimizer step",
            Ternary(), Quadratic(), False, PROXQUANT,
        ),
        ProjectionMode(
            "prox_median", "ProxQuant-median", "ProxQuant toward plus and minus the median size of a weight",
            GreedyMedian(), Soft(), False, PROXQUANT,
        ),
        ProjectionMode(
            "ttq", "TTQ", "trained ternary quantization: levels learned by gradient",
            LearnedTernary(), Hard(), True, NONE,
        ),
        ProjectionMode(
            "stoch_bin", "stochastic BinaryConnect", "BinaryConnect with signs drawn at each step",
            Binary(), Hard(), True, NONE, drawn=StochasticBinary(),
        ),
        ProjectionMode(
            "prox_alt", "ProxQuant-alternating", "ProxQuant of k bits: toward alternating quantization",
            Alternating(), Quadratic(repeats=3), False, PROXQUANT, any_quantizer=True,
        ),
        ProjectionMode(
            "lazy_alt", "alternating", "gradients at weights of k bits (the paper's ALT)",
            Alternating(), Hard(), True, NONE, any_quantizer=True,
        ),
        ProjectionMode(
            "parq", "PARQ", "piecewise-affine pull, ever steeper up to the freeze",
            Binary(), PiecewiseAffine(), True, SLOPE, any_quantizer=True,
        ),
        ProjectionMode(
            "binary_relax", "BinaryRelax", "average of latent and quantized weights, moving over to the quantized up to the freeze",
            Binary(), Quadratic(), True, RELAXING, any_quantizer=True,
        ),
        ProjectionMode(
            "prox_connect", "ProxConnect", "gradients at weights under a pull that grows by the epoch",
            Binary(), Soft(), True, GROWING, any_quantizer=True,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class _FullPrecision(ProjectionMode):
    def select(self, model: nn.Module) -> NamedParameters:
        """Nothing."""
        return []


# No projection at all: what the training loop uses where no mode is chosen.
FULL_PRECISION = _FullPrecision("none", "full precision", "full precision", Binary(), Hard(), False, NONE)


def mode(name: str, quantizer: str | None = None, bits: int | None = None, by_row: bool | None = None) -> ProjectionMode:
    """A mode by its name, with another quantizer where that makes sense.

    Args:
        name: a key of ``MODES``.
        quantizer: a name among the mode's ``choices``. None: the mode's own; alternating in a mode that takes any quantizer where
            ``bits`` of 2 or more, or ``by_row``, are given and its own does not take them.
        bits: log2 of the number of values.
        by_row: levels for each row of a tensor.

    Raises:
        ValueError: with one line, where the combination makes no sense.
    """
    if name not in MODES:
        raise ValueError(f"projection_mode {name!r} is not known: {', '.join(MODES)} is accepted")
    found = MODES[name]
    if quantizer is not None and quantizer not in found.choices:
        others = [one for one, other in MODES.items() if quantizer in other.choices]
        advice = f"; {quantizer} goes with {', '.join(others)}" if others else ""
        raise ValueError(f"quantizer {quantizer}: {name} accepts {', '.join(found.choices)}{advice}")
    if bits is not None and not (isinstance(bits, numbers.Integral) and 1 <= bits <= 8):
        raise ValueError(f"bits {bits}: a whole number from 1 to 8 is accepted")
    own = found.shown
    kind = type(own) if quantizer in (None, own.name) else found.choices[quantizer]
    if quantizer is None and found.any_quantizer and not kind.takes_bits and ((bits or 1) > 1 or by_row):
        kind = Alternating
    chosen = own if kind is type(own) else kind()
    changes = {"bits": bits} if bits not in (None, chosen.bits) else {}
    changes |= {"by_row": True} if by_row else {}
    if changes and not kind.takes_bits:
        which, value = next(iter(changes.items()))
        said = which if value is True else f"{which} {value}"
        takers = _taking_bits(found)
        modes = [one for one, other in MODES.items() if _taking_bits(other)]
        advice = f"the quantizers {', '.join(takers)}" if takers else f"the modes {', '.join(modes)}"
        raise ValueError(f"{said}: {name} with the quantizer {kind.name} has values of its own; {advice} take it")
    if kind is UniformWithZero and changes.get("bits") == 1:
        raise ValueError("bits 1: uniform_with_zero needs 2 or more")
    if chosen is own and not changes:
        return found
    chosen = replace(chosen, **changes)
    if found.drawn is not None:
        return replace(found, drawn=chosen)
    # ProxConnect's soft pull is for the two signs; toward levels that are themselves taken from the weights it is quadratic.
    pull = Quadratic() if found.any_quantizer and isinstance(found.pull, Soft) and kind is not Binary else found.pull
    return replace(found, quantizer=chosen, pull=pull)


def _taking_bits(mode: ProjectionMode) -> list[str]:
    """The quantizers among a mode's choices whose bits and rows can be chosen."""
    return [name for name, kind in mode.choices.items() if kind.takes_bits]
