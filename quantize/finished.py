"""What weights must be before and after they are quantized for good."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantize.quantizers import Quantizer
from quantize.shards import local, over_all


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
        here = local(weight.detach())
        if quantizer.at_ends:
            if over_all(weight, here.abs().ne(1).any().float(), "max"):
                raise NotQuantized(f"{name} holds other values than -1 and +1 after its freeze by {mode}: {_CAUSE}")
            continue
        found = int(over_all(weight, _values_in(here, quantizer.by_row), "max"))
        if found > quantizer.values:
            where = " in a row" if quantizer.by_row else ""
            raise NotQuantized(
                f"{name} holds {found} different values{where} after its freeze, where {mode} with {quantizer.bits} bits has at "
                f"most {quantizer.values}: {_CAUSE}"
            )


_CAUSE = "weights that are not quantized were loaded into the frozen model"


def was_quantized(weight: Tensor, quantizer: Quantizer) -> bool:
    """Whether a tensor (each of its rows, where each has levels of its own) looks as if it had been quantized before: it holds no
    more different values on either side of zero than the quantizer gives, and more weights than that."""
    here, most = local(weight.detach()), max(1, quantizer.values // 2)
    rows = here.reshape(len(here), -1) if quantizer.by_row and here.dim() and here.numel() else here.reshape(1, -1)
    sample = rows[:1, :: max(1, rows.shape[1] // _SAMPLE)]  # tells of nearly all weights in training that they are not
    unlike = weight.numel() <= (2 * most + 1) * (len(weight) if quantizer.by_row and weight.dim() else 1)
    unlike = unlike or any(bool((_values_a_side(x) > most).any()) for x in (sample, rows) if x.numel())
    return not over_all(weight, torch.tensor(float(unlike), device=here.device), "max")


_SAMPLE = 1024


def _values_a_side(rows: Tensor) -> Tensor:
    """How many different positive and negative values the rows of a matrix hold, ``(2, rows)``."""
    rows = rows.sort(dim=1).values
    new = torch.nn.functional.pad(rows.diff(dim=1).ne(0), (1, 0), value=True)
    return torch.stack([(new & (rows > 0)).sum(1), (new & (rows < 0)).sum(1)])


def _values_in(w: Tensor, by_row: bool) -> Tensor:
    """How many different values a tensor holds, or of its rows the one with the most."""
    if not w.numel():
        return w.new_zeros((), dtype=torch.float32)
    rows = w.reshape(len(w), -1) if by_row and w.dim() else w.reshape(1, -1)
    return (rows.sort(dim=1).values.diff(dim=1).ne(0).sum(dim=1).max() + 1).float()
