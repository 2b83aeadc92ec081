"""The projection modes: one object each, in one table. A new mode is one more row.

A mode says which parameters are quantized, to what, by which proximal operator, where the gradient is taken and how the strength
of the projection follows from the rate that the user gives.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from quantize.proximal import prox_binary, prox_ternary
from quantize.quantizers import binarize, ternarize
from quantize.selectors import NamedParameters, select_all_layers, select_inner_layers


@dataclass(frozen=True)
class ProjectionMode:
    """One method of training quantized weights.

    Attributes:
        name: the word on the command line.
        title: what it is, in one line, for help texts and tables.
        select: the parameters that it quantizes in a network.
        hard_quantize: ``Q(w)``, see ``quantizers``.
        prox: ``prox(w, strength)``, see ``proximal``.
        latent_apart: True where the model shows ``prox(w)`` while the optimizer keeps and updates the latent ``w`` (the gradient
            is then taken at the projected weights); False where the proximal step follows the optimizer's step on the weights.
        strength_grows: True where the strength in an epoch is rate * epoch; False where it is the rate itself.
        scaled_by_lr: True where each step's proximal operator has the strength lr * strength; False where the strength is used as
            it is.
        default_rate: the rate where the user gives none.
        side_by_side: True where ``hard_quantize`` and ``prox`` take ``within=`` and so can treat many tensors in one call; False
            for functions of one tensor, which are then called tensor by tensor.
    """

    name: str
    title: str
    select: Callable[[nn.Module], NamedParameters]
    hard_quantize: Callable[..., Tensor]
    prox: Callable[..., Tensor]
    latent_apart: bool = False
    strength_grows: bool = True
    scaled_by_lr: bool = True
    default_rate: float = 0.0
    side_by_side: bool = False

    def strength(self, rate: float, epoch: int) -> float:
        """Strength of the projection in an epoch (counted from 0), before the learning rate scales it."""
        return rate * epoch if self.strength_grows else rate


MODES: dict[str, ProjectionMode] = {
    mode.name: mode
    for mode in (
        ProjectionMode(
            name="lazy",
            title="BinaryConnect: gradients at the projected weights",
            select=select_all_layers,
            hard_quantize=binarize,
            prox=prox_binary,
            latent_apart=True,
            strength_grows=False,
            scaled_by_lr=False,
            default_rate=1.0,
            side_by_side=True,
        ),
        ProjectionMode(
            name="prox",
            title="ProxQuant-binary: a binary proximal step after each optimizer step",
            select=select_all_layers,
            hard_quantize=binarize,
            prox=prox_binary,
            side_by_side=True,
        ),
        ProjectionMode(
            name="prox_ternary",
            title="ProxQuant-ternary: a ternary proximal step after each optimizer step",
            select=select_inner_layers,
            hard_quantize=ternarize,
            prox=prox_ternary,
            side_by_side=True,
        ),
    )
}

# No projection at all: what the training loop uses where no mode is chosen.
FULL_PRECISION = ProjectionMode(
    name="none",
    title="full precision",
    select=lambda model: [],
    hard_quantize=lambda w, within=None: w,
    prox=lambda w, strength, within=None: w,
    side_by_side=True,
)
