"""Which groups go into one picture, and how their lines look."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from reporting.groups import Group
from reporting.tables import Section

# Colours of Okabe and Ito, then of Tol, which colour-blind eyes tell apart; markers and lines do in grey print.
_STYLES = {None: ("#000000", "D", "-"), "lazy": ("#D55E00", "s", "-"), "prox": ("#0072B2", "o", "--"),
           "prox_ternary": ("#009E73", "^", "-.")}  # fmt: skip
_MORE_STYLES = (("#CC79A7", "v", ":"), ("#E69F00", "P", "-"), ("#56B4E9", "X", "--"), ("#332288", "h", "-."), ("#999933", "<", ":"),
                ("#882255", "*", "-"))  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One group in a picture: its label there, colour, marker and line style."""

    group: Group
    label: str
    colour: str
    marker: str
    line: str

    def values(self, column: str, factor: float = 1.0) -> tuple[np.ndarray, ...]:
        """Epochs, and over the seeds the mean, the least and the greatest value; only epochs that all seeds have."""
        runs = self.group.runs
        by_run = [{row["epoch"]: row[column] for row in run.rows if row.get(column) is not None} for run in runs]
        epochs = sorted(set.intersection(*(set(values) for values in by_run)))
        table = factor * np.array([[values[epoch] for epoch in epochs] for values in by_run])
        table = table.reshape(len(runs), len(epochs))
        return np.array(epochs), table.mean(0), table.min(0), table.max(0)


@dataclass(frozen=True)
class Family:
    """The quantized groups of a section that go into one picture: under one schedule, or each under its own of like length."""

    name: str
    words: str
    lines: tuple[Line, ...]


def families(section: Section) -> list[Family]:
    """One family for each schedule that several methods share, and the other groups by length, a factor of 2 in each."""
    quantized = [group for group in section.groups if group.mode is not None]
    by_schedule: dict[str, list[Group]] = {}
    for group in quantized:
        by_schedule.setdefault(group.same_schedule, []).append(group)
    shared = [groups for groups in by_schedule.values() if _is_comparison({group.mode for group in groups}, quantized)]
    found = [("shared", "all under one schedule", groups) for groups in shared]
    rest = sorted((group for group in quantized if not any(group in groups for groups in shared)), key=lambda group: group.epochs)
    while rest:
        near = [group for group in rest if group.epochs <= 2 * rest[0].epochs]
        found.append(("own", "each under its own schedule", near))
        rest = rest[len(near) :]
    if not quantized:
        found.append(("full_precision", "full precision", list(section.groups)))
    result = []
    for kind, words, groups in found:
        epochs = sorted({group.epochs for group in groups})
        length = f"{epochs[0]} to {epochs[-1]} epochs" if len(epochs) > 1 else f"{epochs[0]} epochs"
        ordered = sorted(groups, key=lambda group: group.number)
        number = 1 + sum(family.words == f"{words}, {length}" for family in result)
        name = f"{kind}_{length.replace(' ', '_')}" + (f"_{number}" if number > 1 else "")
        result.append(Family(name, f"{words}, {length}", tuple(_lines(ordered))))
    return result


def _is_comparison(modes: set[str | None], quantized: Sequence[Group]) -> bool:
    """ProxQuant's two modes can have one schedule by chance: where BinaryConnect was run, a comparison has it too."""
    return len(modes) > 1 and ("lazy" in modes or all(group.mode != "lazy" for group in quantized))


def _lines(groups: Sequence[Group]) -> Iterator[Line]:
    used: dict[str | None, int] = {}
    others = iter(_MORE_STYLES * len(groups))
    for group in groups:
        alone = sum(other.mode == group.mode for other in groups) == 1
        again = used.get(group.mode, 0)
        used[group.mode] = again + 1
        colour, marker, line = _STYLES[group.mode] if group.mode in _STYLES and not again else next(others)
        yield Line(group, f"{group.method} (#{group.number})" if not alone else group.method, colour, marker, line)
