"""Which groups go into one picture, and how their lines look."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import quantize
from reporting.groups import Group
from reporting.tables import Section

# Colours of Okabe and Ito, then of Tol, which colour-blind eyes tell apart; markers and lines do in grey print. Full precision has
# the first, and each method that of its place in the table of modes, so that it looks alike in every report.
_STYLES = (("#000000", "D", "-"), ("#D55E00", "s", "-"), ("#0072B2", "o", "--"), ("#009E73", "^", "-."), ("#CC79A7", "v", ":"),
           ("#E69F00", "P", "-"), ("#56B4E9", "X", "--"), ("#332288", "h", "-."), ("#999933", "<", ":"), ("#882255", "*", "-"),
           ("#44AA99", ">", "--"), ("#AA4499", "p", "-."), ("#88CCEE", "d", ":"), ("#117733", "8", "-"))  # fmt: skip


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
    shared = _comparisons([groups for groups in by_schedule.values() if len({group.method for group in groups}) > 1], quantized)
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


def _comparisons(shared: list[list[Group]], quantized: Sequence[Group]) -> list[list[Group]]:
    """Two methods can have one schedule by chance: they are a comparison only if no method of the section is left without one."""
    covered = {group.method for groups in shared for group in groups}
    every = {group.method for group in quantized}
    return [groups for groups in shared if covered == every or len({group.method for group in groups}) > 2]


def style_of(mode: str | None) -> tuple[str, str, str]:
    """A mode's colour, marker and line."""
    modes = [None, *quantize.MODES]
    return _STYLES[modes.index(mode) % len(_STYLES)] if mode in modes else _STYLES[-1]


def styles_of(modes: Iterable[str | None]) -> Iterator[tuple[str, str, str]]:
    """A colour, marker and line for each: the mode's own, and another one where that is taken."""
    used = set()
    for mode in modes:
        own = style_of(mode)
        style = own if own not in used else next((style for style in reversed(_STYLES) if style not in used), own)
        used.add(style)
        yield style


def _lines(groups: Sequence[Group]) -> Iterator[Line]:
    for group, style in zip(groups, styles_of(group.mode for group in groups), strict=True):
        name = f"{group.method} (#{group.number})" if sum(other.method == group.method for other in groups) > 1 else group.method
        yield Line(group, name, *style)
