"""What weights must be before and after they are quantized for good."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantize.quantizers import Quantizer
from quantize.shards import local, over_all, over_group


class NotFinite(ValueError):
    """A weight to be quantized is no finite number."""


class NotQuantized(ValueError):
    """A frozen weight holds other values than its mode gives."""


def check_finite(names: Iterable[str], weights: Sequence[Tensor]) -> None:
    """Raises NotFinite, with the name, if a weight is not a finite number."""
    if not weights:
        return
    strange = [over_all(weight, (~local(weight).isfinite()).any().float(), "max") for weight in weights]
    for name, one in zip(names, torch.stack([one.cpu() for one in strange]).tolist(), strict=True):
        if one:
            raise NotFinite(f"{name} holds values that are not finite numbers: the training has diverged, it cannot be quantized")


def check_quantized(names: Iterable[str], weights: Sequence[Tensor], quantizer: Quantizer, mode: str) -> None:
    """Raises NotQuantized, with the name, if a tensor holds other values than -1 and +1 where those are the quantizer's, or more
    values than it has, in a row where each has its own."""
    for name, weight in zip(names, weights, strict=True):
        found = values_beyond(weight, quantizer)
        if found and quantizer.at_ends:
            raise NotQuantized(f"{name} holds other values than -1 and +1 after its freeze by {mode}: {_CAUSE}")
        if found:
            where = " in a row" if quantizer.by_row else ""
            raise NotQuantized(
                f"{name} holds {found} different values{where} after its freeze, where {mode} with {quantizer.bits} bits has at "
                f"most {quantizer.values}: {_CAUSE}"
            )


_CAUSE = "weights that are not quantized were loaded into the frozen model"


def values_beyond(weight: Tensor, quantizer: Quantizer) -> int:
    """How many different values a tensor holds, or the row with the most where each has its own, if those are more than the
    quantizer gives, or others than -1 and +1 where those are its values; else 0."""
    here = local(weight.detach())
    if quantizer.at_ends and not over_all(weight, here.abs().ne(1).any().float(), "max"):
        return 0
    found = int(over_all(weight, _values_in(here, quantizer.by_row), "max"))
    return found if quantizer.at_ends or found > quantizer.values else 0


def levels_alone(weight: Tensor, quantizer: Quantizer) -> Tensor:
    """Whether a tensor, or each of its rows where each has levels of its own, holds values that may be the quantizer's, no more of
    them than it gives, on either side of zero too, and more weights than that: so it was quantized before.

    Returns:
        a boolean, or one a row, in a shape that broadcasts against this process's part of the tensor.
    """
    here, by_row = local(weight.detach()), quantizer.by_row and weight.dim() > 0
    count = len(here) if by_row else 1
    rows = here.reshape(count, here.numel() // max(1, count))
    most = max(1, quantizer.values // 2)  # on a side
    if weight.numel() <= (2 * most + 1) * (len(weight) if by_row else 1):
        return torch.zeros((), dtype=torch.bool, device=here.device)
    more = _holds_more(rows[:, : 2 * most + 2], most, quantizer.values)  # as nearly all weights in training do
    if not more.all():
        more[~more] = _holds_more(rows[~more], most, quantizer.values)
    others = over_group(weight, by_row, more.float(), "max").bool()
    if not others.all():
        largest = over_group(weight, by_row, rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(count), "max")
        others[~others] = ~quantizer.may_give(rows[~others], largest[~others])
        others = over_group(weight, by_row, others.float(), "max").bool()
    return ~others.view(count, *[1] * (here.dim() - 1)) if by_row else ~others.view(())


def _holds_more(rows: Tensor, most: int, values: int) -> Tensor:
    """Which rows hold more than so many different values, or more than ``most`` on a side of zero."""
    rows = rows.sort(dim=1).values
    new = torch.nn.functional.pad(rows.diff(dim=1).ne(0), (1, 0), value=True) if rows.shape[1] else rows.bool()
    positive, negative = ((new & side).sum(1) for side in (rows > 0, rows < 0))
    return (positive > most) | (negative > most) | (new.sum(1) > values)


def _values_in(w: Tensor, by_row: bool) -> Tensor:
    """How many different values a tensor holds, or of its rows the one with the most."""
    if not w.numel():
        return w.new_zeros((), dtype=torch.float32)
    rows = w.reshape(len(w), -1) if by_row and w.dim() else w.reshape(1, -1)
    return (rows.sort(dim=1).values.diff(dim=1).ne(0).sum(dim=1).max() + 1).float()
