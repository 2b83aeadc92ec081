"""The pictures: curves over epochs with a band over seeds, and strips of histograms. The same runs give the same bytes."""

import io
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from reporting import weights
from reporting.families import Family, Line, families, styles_of
from reporting.groups import method_of
from reporting.measures import ERROR, PERPLEXITY, Measure
from reporting.statistics import Spread
from reporting.tables import Note, Section

plt.rcParams.update({"svg.hashsalt": "proxquant", "text.parse_math": False, "figure.constrained_layout.use": True,
                     "font.size": 11, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True,
                     "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                     "legend.fontsize": 10})  # fmt: skip
_TICKS = (
    0.01,
    0.1,
    0.2,
    0.5,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    10,
    12,
    15,
    20,
    25,
    30,
    40,
    50,
    70,
    100,
    150,
    200,
    300,
    500,
    700,
    1000,
    2000,
    5000,
    10_000,
)  # percent, or perplexity


@dataclass(frozen=True)
class Picture:
    """One picture: ``name`` of its files, ``caption``, and its files' contents by extension."""

    name: str
    caption: str
    files: dict[str, bytes]


def draw(section: Section, note: Note) -> Iterator[Picture]:
    """All pictures of a section."""
    for family in families(section):
        name, title = f"{section.slug}_{family.name}", f"{textwrap.fill(section.title(note), 90)}\n{family.words}"
        measure = section.measure
        yield Picture(
            f"{name}_{measure.plural}",
            f"{_words(measure).capitalize()} over epochs, hard-quantized and as the weights are (the same where a method takes its "
            f"gradient at the quantized weights). {_SEEDS}",
            _files(_draw_measure(section, family, title)),
        )
        if any(len(line.values("binary")[0]) for line in family.lines):
            yield Picture(
                f"{name}_levels", f"How far the latent weights are from their levels. {_SEEDS}", _files(_draw_levels(family, title))
            )
        if any(len(line.values("sign_change")[0]) for line in family.lines):
            yield Picture(
                f"{name}_signs", f"Signs that differ from those of the warm start. {_SEEDS}", _files(_draw_signs(family, title))
            )
        strips = _draw_strips(family, title)
        if strips:
            yield Picture(f"{name}_weights", strips[1], _files(strips[0]))
        learned = _draw_learned_levels(family, title)
        if learned:
            caption = "Learned levels of each quantized parameter, and their mean over the parameters, of each method's first seed."
            yield Picture(f"{name}_learned_levels", caption, _files(learned))
    by_bits = _draw_bits(section, textwrap.fill(section.title(note), 90))
    if by_bits:
        caption = "Quantization error just before the freeze by bits: means over the seeds, bars their full range."
        yield Picture(f"{section.slug}_bits", caption, _files(by_bits))


def _words(measure: Measure) -> str:
    return "top-1 validation error" if measure is ERROR else f"validation {measure.name}"


_SEEDS = "Lines are means over the seeds, bands their full range, dotted verticals the freeze."


def _curve(axes: Axes, line: Line, column: str, factor: float = 1.0, floor: float = 0.0, **look: object) -> None:
    epochs, *curves = line.values(column, factor)
    if not len(epochs):
        return
    mean, least, greatest = (np.maximum(curve, floor) for curve in curves)
    style = {"color": line.colour, "marker": line.marker, "linestyle": line.line, "markersize": 5, "linewidth": 1.8}
    axes.plot(epochs, mean, markevery=max(1, len(epochs) // 12), **{**style, "label": line.label, **look})
    if len(line.group.runs) > 1:
        axes.fill_between(epochs, least, greatest, color=line.colour, alpha=0.15, linewidth=0)


def _mark_freezes(axes: Axes, family: Family) -> None:
    """A dotted line after the last epoch before each freeze."""
    by_epoch: dict[int, list[Line]] = {}
    for line in family.lines:
        if line.group.freeze_epoch:
            by_epoch.setdefault(line.group.freeze_epoch, []).append(line)
    for epoch, lines in sorted(by_epoch.items()):
        alone = len(by_epoch) > 1 and len(lines) == 1
        axes.axvline(epoch, color=lines[0].colour if alone else "#555555", linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate("freeze", (epoch, 1), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
                      va="top", fontsize=9, color=lines[0].colour if alone else "#555555")  # fmt: skip


def _over_epochs(axes: Axes, family: Family, words: str) -> None:
    axes.set_xlabel("epochs trained")
    axes.set_ylabel(words)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_freezes(axes, family)


def _draw_measure(section: Section, family: Family, title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 5.4))
    column = section.measure.column
    for line in family.lines:
        if line.group.mode is None:
            _curve(axes, line, column, floor=_TICKS[0])
            continue
        _curve(axes, line, column, floor=_TICKS[0], label=None, linestyle="--", linewidth=1, marker=None)
        _curve(axes, line, f"{column}_bin", floor=_TICKS[0], linestyle="-")
    starts = {line.group.warm_start for line in family.lines if line.group.warm_start and line.group.warm_start[1] is not None}
    for index, (_, error) in enumerate(sorted(starts)):
        label = f"warm start, full precision ({error:.2f}{section.measure.unit.strip()})"
        axes.axhline(error, color="#000000", linewidth=1, linestyle=(0, (1 + 2 * index, 2)), label=label)
    if any(line.group.mode is not None for line in family.lines):
        axes.plot([], [], color="#555555", linewidth=1.8, label="solid: hard-quantized")
        axes.plot([], [], color="#555555", linewidth=1, linestyle="--", label="dashed: as the weights are")
    # The hard-quantized network begins near chance and ends points apart: only a logarithmic scale shows both.
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if section.measure is PERPLEXITY:  # before the freeze it may be beyond all that a picture can show
        high = min(high, 40 * low)
        axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high] or [low, high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    _over_epochs(axes, family, _words(section.measure) + (" (%)" if section.measure is ERROR else ""))
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_levels(family: Family, title: str) -> Figure:
    figure, both = plt.subplots(1, 2, figsize=(11, 4.9))
    words = {"binary": "mean distance of |w| from 1", "quant_error": "quantization error ‖w - Q(w)‖ / ‖w‖"}
    for axes, column in zip(both, words, strict=True):
        for line in family.lines:
            _curve(axes, line, column)
        axes.set_ylim(bottom=0)
        _over_epochs(axes, family, words[column])
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize=11)
    return figure


def _draw_signs(family: Family, title: str) -> Figure:
    figure, axes = plt.subplots(figsize=(8, 4.9))
    for line in family.lines:
        _curve(axes, line, "sign_change", factor=100)
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])  # room for the word at the freeze
    _over_epochs(axes, family, "signs changed since the start (%, mean over layers)")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_strips(family: Family, title: str) -> tuple[Figure, str] | None:
    """The middle one of the layers that all methods quantize, of each method's first seed; None where no histogram is left."""
    named = [(line, weights.layers(line.group.runs[0])) for line in family.lines if line.group.freeze_epoch]
    named = [(line, names) for line, names in named if names]
    common = [name for name in named[0][1] if all(name in names for _, names in named)] if named else []
    if not common:
        return None
    layer = common[len(common) // 2]
    columns = [(line, weights.shares(line.group.runs[0], layer, line.group.freeze_epoch)) for line, _ in named]
    columns = [(line, shares) for line, shares in columns if shares]
    if not columns:
        return None
    rows = max(len(shares) for _, shares in columns)
    figure, grid = plt.subplots(rows, len(columns), figsize=(3.4 * len(columns) + 0.6, 1.35 * rows + 1), sharex=True, squeeze=False)
    for column, (line, shares) in enumerate(columns):
        for row, (axes, (epoch, share)) in enumerate(zip(grid[:, column], shares.items(), strict=False)):
            axes.stairs(share, weights.EDGES, fill=True, color=line.colour, alpha=0.45)
            axes.stairs(share, weights.EDGES, color=line.colour, linewidth=1)
            axes.set_ylim(0, 1.4 * max(share))  # room for the epoch's number
            axes.yaxis.set_major_locator(MaxNLocator(3))
            words = "start" if epoch == 0 else f"epoch {epoch}" + (", freeze" if epoch == line.group.freeze_epoch else "")
            axes.annotate(words, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=9)
            if row == 0:
                axes.set_title(line.label)
        for axes in grid[len(shares) :, column]:
            axes.set_visible(False)
        grid[len(shares) - 1, column].tick_params(labelbottom=True)
    figure.supylabel("share of the weights in a bin of 0.05 (%)", fontsize=11)
    figure.supxlabel(f"latent weight of {layer}", fontsize=11)
    figure.suptitle(title, fontsize=11)
    seeds = sorted({line.group.seeds[0] for line, _ in columns})
    words = f"seed {', '.join(map(str, seeds))}; the scale of shares is each strip's own"
    return figure, f"The latent weights of {layer} from the start to just before the freeze ({words})."


def _draw_learned_levels(family: Family, title: str) -> Figure | None:
    """None where no method learns its levels."""
    found = [(line, weights.learned_levels(line.group.runs[0])) for line in family.lines]
    found = [(line, levels) for line, levels in found if levels]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(8, 4.9))
    for line, levels in found:
        for side in ("positive", "negative"):
            curves = [sides[side] for sides in levels.values() if sides.get(side)]
            for curve in curves:
                axes.plot(curve.keys(), curve.values(), color=line.colour, alpha=0.3, linewidth=0.8)
            epochs = sorted(set.intersection(*map(set, curves))) if curves else []
            mean = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
            style = "-" if side == "positive" else "--"
            axes.plot(epochs, mean, color=line.colour, linestyle=style, linewidth=2, label=f"{line.label}, {side}, mean")
    _over_epochs(axes, family, "learned level")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_bits(section: Section, title: str) -> Figure | None:
    """A line for each mode and quantizer; None where none of them was run with several numbers of bits."""
    by_method: dict[tuple[str, str], list[tuple[int, Spread, dict[int, float]]]] = {}
    for group in section.groups:
        errors = group.at(group.freeze_epoch, "quant_error")
        if group.bits is not None and errors:
            method = (group.mode, method_of(group.runs[0], with_bits=False))
            by_method.setdefault(method, []).append((group.bits, group.spread(errors), errors))
    if not any(len({bits for bits, *_ in points}) > 1 for points in by_method.values()):
        return None
    figure, axes = plt.subplots(figsize=(8, 4.9))
    styles = styles_of(mode for mode, _ in by_method)
    for ((_, label), points), (colour, marker, line) in zip(by_method.items(), styles, strict=True):
        bits, spreads, errors = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        means = [spread.mean for spread in spreads]
        low = [mean - min(one.values()) for mean, one in zip(means, errors, strict=True)]
        high = [max(one.values()) - mean for mean, one in zip(means, errors, strict=True)]
        axes.errorbar(bits, means, (low, high), color=colour, marker=marker, linestyle=line, capsize=3, label=label)
    axes.set_xlabel("bits of a weight")
    axes.set_ylabel("quantization error before the freeze ‖w - Q(w)‖ / ‖w‖")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _files(figure: Figure) -> dict[str, bytes]:
    """PNG and SVG without the date and versions that would make each one different."""
    found = {}
    for extension, facts in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=extension, dpi=150, metadata=facts)
        found[extension] = buffer.getvalue()
    plt.close(figure)
    return found
