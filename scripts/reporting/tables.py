"""The tables: of errors, beside the paper's, of differences between methods, and the two machine-readable files."""

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reporting.groups import Group
from reporting.measures import ERROR, MEASURES, Measure
from reporting.schedules import DATA, REGIME
from reporting.statistics import ENOUGH, Difference, Spread, paired

# Quoted from the paper: top-1 error in percent on CIFAR-10 and its standard deviation over 4 runs, by depth. Its recipe trains 200
# epochs in full precision, then 300 (binary) or 600 (ternary) from that network.
PAPER_METHODS = ("full precision", "BinaryConnect", "ProxQuant-binary", "TTQ", "ProxQuant-ternary")
PAPER: dict[int, tuple[tuple[float, float | None], ...]] = {
    20: ((8.06, None), (9.54, 0.03), (9.35, 0.13), (8.87, None), (8.40, 0.13)),
    32: ((7.25, None), (8.61, 0.27), (8.53, 0.15), (7.63, None), (7.65, 0.15)),
    44: ((6.96, None), (8.23, 0.23), (7.95, 0.05), (7.02, None), (7.05, 0.08)),
    56: ((6.54, None), (7.97, 0.22), (7.70, 0.06), (6.44, None), (6.71, 0.20)),
}
NONE = "-"
NEVER_FROZE = "never froze"
SIGNS = "sign changes"
NEAR = 0.05  # a weight this near to its level counts as settled
Note = Callable[[str], str | None]  # what is said of a data set beside its name


@dataclass(frozen=True)
class Section:
    """Groups on the same images with the same network; ``number`` tells apart sections of the same names."""

    groups: tuple[Group, ...]
    number: int = 1

    def title(self, note: Note) -> str:
        """Data set and network in words."""
        first = self.groups[0].identity
        dataset = first["dataset"] + (f" ({note(first['dataset'])})" if note(first["dataset"]) else "")
        config = dict(first["model_config"])
        network = {"resnet": "ResNet", "lstm": "LSTM"}.get(first["model"], first["model"])
        network += f"-{config.pop('depth')}" if "depth" in config else ""
        network += "".join(f", {key} {value}" for key, value in sorted(config.items()))
        held_out = f", validated on {first['holdout']} training images held out" if first["holdout"] else ""
        return cell(f"{dataset}, {network}{held_out}")

    @property
    def depth(self) -> int | None:
        return self.groups[0].identity["model_config"].get("depth")

    @property
    def measure(self) -> Measure:
        return self.groups[0].measure

    def head(self, words: str) -> str:
        """Of a column: ``final`` with the measure's name and unit."""
        return f"{words} {self.measure.name}{self.measure.unit}"

    @property
    def slug(self) -> str:
        """For file names."""
        first = self.groups[0].identity
        words = f"{first['dataset']}_{first['model']}{self.depth or ''}" + (
            f"_holdout_{first['holdout']}" if first["holdout"] else ""
        )
        words += f"_{self.number}" if self.number > 1 else ""
        return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "-" for letter in words)

    @property
    def data(self) -> str:
        return self.groups[0].identity[DATA] or "no log says which images were read"

    @property
    def in_paper(self) -> bool:
        """True where the paper has figures of this network on this data set's test images."""
        first = self.groups[0].identity
        return first["dataset"] == "cifar10" and not first["holdout"] and first["model"] == "resnet" and self.depth in PAPER


@dataclass(frozen=True)
class Comparison:
    """Two groups, seed by seed: ``difference`` is the first's figure minus the second's."""

    first: Group
    second: Group
    quantity: str
    difference: Difference

    @property
    def alike(self) -> bool:
        """True where only the method differs."""
        return self.first.same_schedule == self.second.same_schedule

    @property
    def unit(self) -> str:
        """What the difference is counted in: signs in percent, whatever the networks are judged by."""
        return "points" if self.quantity == SIGNS else self.first.measure.points

    @property
    def verdict(self) -> str:
        if self.difference.n < ENOUGH:
            return "too few seeds to say"
        if not self.difference.shown:
            return "no difference shown"
        lower = self.first if self.difference.mean < 0 else self.second
        return f"{lower.method} (#{lower.number}) lower"


def sections(groups: Sequence[Group]) -> list[Section]:
    """The groups, which are in order, by section."""
    found: list[Section] = []
    for _, members in itertools.groupby(groups, key=lambda group: group.section):
        section = Section(tuple(members))
        alike = sum(Section(other.groups).slug == section.slug for other in found)
        found.append(Section(section.groups, 1 + alike))
    return found


def compare(section: Section) -> list[Comparison]:
    """Every pair of groups of quantized networks by their errors, and two methods by their changes of signs.

    Signs are compared between methods that quantize the same layers only: they change in some layers more than in others.
    """
    pairs = list(itertools.combinations([group for group in section.groups if group.mode is not None and not group.unfrozen], 2))
    quantity = f"{section.measure.judged} {section.measure.name}"
    found = [Comparison(b, a, quantity, paired(b.judged(), a.judged())) for a, b in pairs]
    for a, b in pairs:
        if a.method != b.method and _same_layers(a, b) and None not in (a.freeze_epoch, b.freeze_epoch):
            found.append(Comparison(b, a, SIGNS, paired(b.sign_changes(), a.sign_changes())))
    return found


def _same_layers(a: Group, b: Group) -> bool:
    """Of one network: as many weights in as many tensors."""
    return a.runs[0].quantized is not None and a.runs[0].quantized == b.runs[0].quantized


def paper_figure(section: Section, group: Group) -> tuple[float, float | None] | None:
    """The paper's mean and standard deviation for a group's method; None where it has none."""
    if not section.in_paper or group.method not in PAPER_METHODS:
        return None
    return PAPER[section.depth][PAPER_METHODS.index(group.method)]


def cell(value: Any) -> str:
    """A value inside a table of Markdown."""
    return " ".join(str(value).split()).replace("|", "\\|")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def mean_std_n(found: Spread | None, digits: int = 2) -> str:
    """``19.20 (0.10, n=4)``."""
    if found is None:
        return NONE
    std = "" if found.std is None else f"{found.std:.{digits}f}, "
    return f"{found.mean:.{digits}f} ({std}n={found.n})"


def mean_std(figure: tuple[float, float | None] | None) -> str:
    """``9.35 (0.13)``."""
    if figure is None:
        return NONE
    return f"{figure[0]:.2f}" + ("" if figure[1] is None else f" ({figure[1]:.2f})")


def error_table(section: Section) -> str:
    """The main table: one row a group."""
    measure = section.measure
    tested = any(group.tests() for group in section.groups)
    chosen = [] if measure.judged == "best" else [f"best epoch's {measure.name}{measure.unit}"]  # once is enough
    test = [f"{section.head('test')} there"] if tested else []
    heads = ["#", "method", "schedule", section.head(measure.judged), *test, *chosen,
             f"warm start's {measure.name}{measure.unit}", "gap to it", "signs changed at the freeze %"]  # fmt: skip
    rows = []
    for group in section.groups:
        judged, best = group.spread(group.judged()), group.spread(group.bests())
        start = gap = NONE
        if group.warm_start:
            name, error = group.warm_start
            start = f"{'?' if error is None else f'{error:.2f}'} ({name})"
            gap = "?" if error is None or judged is None else f"{judged.mean - error:+.2f}"
        signs = mean_std_n(group.spread(group.sign_changes()), 1)
        shown = NEVER_FROZE if group.unfrozen else mean_std_n(judged)
        tests = [mean_std_n(group.spread(group.tests()))] if tested else []
        rows.append(
            [
                group.number,
                group.method,
                group.schedule,
                shown,
                *tests,
                *([f"{best.mean:.2f}"] if chosen else []),
                start,
                gap,
                signs,
            ]
        )
    return table(heads, rows)


def paper_table(found: Sequence[Section], note: Note) -> str:
    """The paper's figures for CIFAR-10, and ours of the same depth below each line of them."""
    rows = []
    for depth, figures in PAPER.items():
        rows.append([f"ResNet-{depth}", "the paper's", *map(mean_std, figures)])
        for section in (section for section in found if section.in_paper and section.depth == depth):
            cells = []
            for method in PAPER_METHODS:
                groups = [group for group in section.groups if group.method == method and not group.unfrozen]
                figures_of_ours = [f"{mean_std_n(group.spread(group.finals()))} #{group.number}" for group in groups]
                cells.append("; ".join(figures_of_ours) or NONE)
            rows.append([section.title(note), "ours", *cells])
    return table(("network", "whose", *PAPER_METHODS), rows)


def comparison_table(found: Sequence[Comparison]) -> str:
    """Differences with their intervals, as far as there are seeds enough for one."""
    rows = []
    for one in found:
        interval = NONE if one.difference.low is None else f"{one.difference.low:+.2f} to {one.difference.high:+.2f}"
        mean = NONE if one.difference.mean is None else f"{one.difference.mean:+.2f} {one.unit}"
        names = [f"{group.method} (#{group.number})" for group in (one.first, one.second)]
        rows.append([one.quantity, *names, one.difference.n, mean, interval, one.verdict])
    return table(("of", "A", "B", "shared seeds", "A - B", "95% interval", "verdict"), rows)


def level_rows(section: Section) -> list[Sequence[Any]]:
    """Heads and rows: how well each group's final network does, and how much of it is quantized, and how gently."""
    heads = ("#", "method", section.head(section.measure.judged), "quantized", f"within {NEAR} before the freeze",
             "quantization error then", "and at the end")  # fmt: skip
    rows: list[Sequence[Any]] = [heads]
    for group in section.groups:
        judged = NEVER_FROZE if group.unfrozen else mean_std_n(group.spread(group.judged()))
        run = group.runs[0]
        weights, parameters = (run.quantized or (0, 0))[0], run.parameters
        share = f"{weights / parameters:.1%}" if weights and parameters else NONE
        near = group.spread(group.near_their_level(NEAR))
        near_words = f"{near.mean:.1f}%" if near else NONE
        before, end = group.at(group.freeze_epoch, "quant_error"), group.at_the_end("quant_error")
        errors = [mean_std_n(group.spread(values), 3) for values in (before, end)]
        rows.append([group.number, group.method, judged, share, near_words, *errors])
    return rows


def level_table(section: Section) -> str:
    """The same in Markdown; empty where nothing is quantized."""
    heads, *rows = level_rows(section)
    return table(heads, rows) if any(group.mode is not None for group in section.groups) else ""


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """A table for a terminal."""
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(str(value).ljust(width) for value, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def sign_table(section: Section) -> str:
    """Changes of signs, distance from ±1, and the network just before the freeze, as it was trained until then and quantized."""
    rows = []
    for group in (group for group in section.groups if group.mode is not None):
        end = {seed: 100 * value for seed, value in group.at_the_end("sign_change").items()}
        signs = [mean_std_n(group.spread(values), 1) for values in (group.sign_changes(), end)]
        distance = mean_std_n(group.spread(group.at(group.freeze_epoch, "binary")), 3)
        columns = (section.measure.column, f"{section.measure.column}_bin")
        before = [mean_std_n(group.spread(group.at(group.freeze_epoch, column))) for column in columns]
        rows.append([group.number, group.method, *signs, distance, *before])
    heads = ("#", "method", "signs changed at the freeze %", "and at the end %", "distance from ±1 before the freeze",
             f"{section.measure.name}{section.measure.unit} before the freeze, weights as they are",
             "and hard-quantized")  # fmt: skip
    return table(heads, rows) if rows else ""


def groups_csv(found: Sequence[Section], note: Note) -> str:
    """report.csv: one line a group. Lists are separated by spaces, in the order of the seeds."""
    rows = []
    for section in found:
        for group in section.groups:
            one, run, paper = group.identity, group.runs[0], paper_figure(section, group) or (None, None)
            row = {"group": group.number, "data_set": one["dataset"], "data_note": note(one["dataset"]), "data": one[DATA],
                   "holdout": one["holdout"], "model": one["model"], "depth": section.depth, "method": group.method,
                   "mode": group.mode, "bits": group.bits, "parameters": run.parameters,
                   "quantized": run.quantized and run.quantized[0],
                   "schedule": group.schedule}  # fmt: skip
            row |= {name: one[name] for name in ("epochs", "freeze_epoch", "batch_size")} | {"regime": one[REGIME]}
            row |= {name: one[name] for name in ("reg_rate", "binary_reg", "keep_optimizer_state", "adjust_reg")}
            row |= {"precision": run.facts.get("precision"), "n": len(group.runs), "seeds": _list(group.seeds)}
            final = group.spread(group.finals())
            half_width = None if final is None else final.half_width
            start, warm = group.warm_start or (None, None)
            judged = group.spread(group.judged())
            gap = None if warm is None or judged is None else judged.mean - warm
            row |= {"warm_start": start}
            for measure in MEASURES:  # each has columns of its own, filled where it is the group's
                own = measure is section.measure
                row |= _columns(f"final_{measure.name}", final if own else None)
                row |= {f"final_{measure.name}_half_width_95": half_width if own else None}
                row |= {f"final_{measure.plural}": _list(group.finals().values()) if own else None}
                row |= _columns(f"best_{measure.name}", group.spread(group.bests()) if own else None)
                row |= {f"warm_start_{measure.name}": warm if own else None}
                row |= {"gap" if measure is ERROR else f"{measure.name}_gap": gap if own else None}
                before = group.at(group.freeze_epoch, measure.column) if own else {}
                row |= _columns(f"{measure.name}_before_freeze", group.spread(before))
                if measure.test_column:
                    row |= _columns(f"test_{measure.name}", group.spread(group.tests()) if own else None)
            row |= _columns("sign_change_at_freeze_percent", group.spread(group.sign_changes()))
            row |= _columns("near_their_level_percent", group.spread(group.near_their_level(NEAR)))
            for name in ("binary", "quant_error"):
                row |= _columns(f"{name}_before_freeze", group.spread(group.at(group.freeze_epoch, name)))
            row |= {"paper_error": paper[0], "paper_std": paper[1], "runs": _list(run.name for run in group.runs)}
            rows.append(row)
    return _csv(rows)


def comparisons_csv(found: Sequence[Comparison]) -> str:
    """report_comparisons.csv: one line a pair."""
    return _csv([
        {"quantity": one.quantity, "first_group": one.first.number, "second_group": one.second.number,
         "first_method": one.first.method, "second_method": one.second.method, "same_schedule": one.alike,
         "shared_seeds": one.difference.n, "first_minus_second": one.difference.mean, "low_95": one.difference.low,
         "high_95": one.difference.high, "verdict": one.verdict}
        for one in found
    ])  # fmt: skip


def _columns(name: str, found: Spread | None) -> dict[str, float | None]:
    return {f"{name}_mean": found.mean, f"{name}_std": found.std} if found else {f"{name}_mean": None, f"{name}_std": None}


def _list(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if rows:
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return text.getvalue()
