"""What a wrapped optimizer may be given: looked at before anything is wrapped, and said in words."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.groups import IN_PARTS, is_dense
from quantize.modes import ProjectionMode
from quantize.selectors import FROZEN_BY
from quantize.shards import has_whole_rows, is_sharded, local

Named = list[tuple[str, nn.Parameter]]
Pairs = Iterable[tuple[str, nn.Parameter]]


def groups_of(named_parameters: Any, mode: ProjectionMode | None) -> list[tuple[Named, ProjectionMode]]:
    """The pairs of each mode, without parameters that the user holds still."""
    given = list(named_parameters)
    if mode is None:
        if not given or not all(isinstance(one, tuple) and len(one) == 2 and isinstance(one[1], ProjectionMode) for one in given):
            raise TypeError("either pairs and a mode are needed, or a list of (pairs, mode)")
        groups = [(list(pairs), mode) for pairs, mode in given]
    else:
        groups = [(given, mode)]
    for pairs, one in groups:
        if not isinstance(one, ProjectionMode):
            raise TypeError(f"the mode is {one!r}: a ProjectionMode is needed, such as quantize.mode({one!r})")
        for pair in pairs:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)):
                raise TypeError(f"(name, parameter) pairs are needed, as mode.select(model) gives them, not {type(pair).__name__}")
        if pairs and not any(parameter.requires_grad for _, parameter in pairs):
            frozen = sum(hasattr(parameter, FROZEN_BY) for _, parameter in pairs)
            reason = f", {frozen} of them since they were quantized for good by another wrapper's freeze()" if frozen else ""
            raise ValueError(f"there is no parameter to quantize: all {len(pairs)} given have requires_grad=False{reason}")
    return [([(name, parameter) for name, parameter in pairs if parameter.requires_grad], one) for pairs, one in groups]


def strength_of(value: Any, mode: ProjectionMode) -> float:
    """A strength as a number; raises ValueError where it is none that the mode could have."""
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = math.nan
    if not (math.isfinite(strength) and 0 <= strength <= mode.schedule.largest):
        most = "" if math.isinf(mode.schedule.largest) else f" and <= {mode.schedule.largest:g}"
        raise ValueError(f"the strength of a projection by {mode.name} is a finite number >= 0{most}, not {value}")
    return strength


def check_base(base_optimizer: Any) -> None:
    if not isinstance(base_optimizer, torch.optim.Optimizer):
        raise TypeError(f"the base optimizer is a {type(base_optimizer).__name__}: one of torch.optim is needed")
    if hasattr(base_optimizer, "base_optimizer"):
        raise TypeError(
            "the base optimizer is wrapped already: several modes are one wrapper, ProjectedOptimizer(base, [(pairs, mode), ...])"
        )
    if isinstance(base_optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS cannot be wrapped: it evaluates its closure several times in a step, and the projection belongs between"
        )
    if any(group.get("lr") is None for group in base_optimizer.param_groups):
        raise ValueError(f"{type(base_optimizer).__name__}'s parameter groups have no learning rate, lr, which pulls are scaled by")


def check(base_optimizer: Any, groups: Sequence[tuple[Named, ProjectionMode]], capturable: bool) -> None:
    check_base(base_optimizer)
    names: set[str] = set()
    seen: set[int] = set()
    for pairs, mode in groups:
        if not pairs and mode.projects:
            rule = "leaves the first and the last layer in full precision, so that" if mode.quantizer.spares_ends else "finds that"
            raise ValueError(f"there is no parameter to quantize: {mode.name} {rule} none is left here (see quantize.explain)")
        if capturable and mode.drawn is not None:
            raise ValueError(f"{mode.name} draws anew at each step, which a captured step would repeat: it cannot be capturable")
        for name, parameter in pairs:
            if name in names or id(parameter) in seen:
                raise ValueError(f"the parameter {name!r} is to be quantized twice")
            names.add(name)
            seen.add(id(parameter))
            if not parameter.is_floating_point():
                raise ValueError(
                    f"the parameter {name!r} is of dtype {parameter.dtype}: only floating-point weights can be quantized"
                )
            if parameter.is_meta:
                raise ValueError(f"the parameter {name!r} is on the meta device: give it memory first (model.to_empty)")
            if is_sharded(parameter):
                _check_sharded(name, parameter, mode)
        warn_of_half_precision(pairs, mode, stacklevel=5)


def warn_of_half_precision(pairs: Iterable[tuple[str, Tensor]], mode: ProjectionMode, stacklevel: int) -> None:
    narrow = [name for name, parameter in pairs if parameter.dtype in (torch.bfloat16, torch.float16)]
    if narrow and not mode.lazy and mode.projects:
        warnings.warn(
            f"{narrow[0]} and {len(narrow) - 1} more are of half precision, where pulls of less than a rounding step are lost: "
            "keep the weights in float32 and compute under torch.autocast",
            stacklevel=stacklevel,
        )


def _check_sharded(name: str, parameter: Tensor, mode: ProjectionMode) -> None:
    if any(placement.is_partial() for placement in parameter.placements) or not is_dense(local(parameter)):
        raise ValueError(f"the parameter {name!r} is sharded in parts that are to be added, or that have gaps in memory")
    if mode.quantizer.gathers and not (mode.quantizer.by_row and has_whole_rows(parameter)):
        raise ValueError(f"{mode.name} on the sharded parameter {name!r}: {IN_PARTS}")
