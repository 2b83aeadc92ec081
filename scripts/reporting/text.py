"""The report's text: first the answer, then what it rests on."""

import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import tables
from reporting.facts import computed, parts
from reporting.families import families
from reporting.groups import Group, LeftOut, begins_with_best, checksum, method_of
from reporting.measures import ERROR, PERPLEXITY
from reporting.runs import Run, short_path
from reporting.statistics import ENOUGH
from reporting.tables import NONE, Comparison, Note, Section

_TEST_SET = (
    "Images: validation is on the test set, as in the published code. The final error is that of the last epoch, so nothing is "
    "chosen by it; the best epoch's error is chosen by the very images that it is measured on, and is too low for that."
)
_HELD_OUT = (
    "Runs with `--holdout` are validated on training images that were held out, not on the test set: their errors cannot be held "
    "against those of runs on the test set. A warm start that was trained without the same `--holdout` has seen those images. What "
    "was chosen by these runs was chosen for the methods among them alone: the others have not been tuned."
)
_WARM_START = (
    "All seeds of a group start from the same full-precision network{which}{how}. The spread over seeds does not contain the "
    "chance in that network."
)
_BEST_EPOCH = ", the epoch of it that was best on the validation data"
_CHECKED = ": the weights that they began with have one checksum"
_NOT_CHECKED = ", as far as can be known: they name one place, and their version of the program wrote no checksum"
_NOT_CHECKED_ALL = (
    ": their weights have one checksum, or (of an older version of the program, without checksums) they name one place"
)
_ASYMMETRY = (
    "The published comparison is not symmetric: BinaryConnect's learning rate decays and ProxQuant's is constant, and ternary runs "
    "are longer, at a larger batch. Groups of different schedules compare recipes, not methods alone."
)
_BATCH_NORM = (
    "BatchNorm statistics are not estimated anew for the hard-quantized validation: before the freeze its errors can be poor. "
    "BatchNorm, biases and shortcut convolutions stay in full precision throughout."
)
_PAPER = (
    "The paper's figures are for the original CIFAR-10 at 200 + 300 (ternary: 600) epochs, 4 runs. Other images, shorter schedules "
    "or another precision make ours differ for reasons that are not the method's."
)
_INTERVALS = (
    "Intervals are Student t-intervals over seeds, each at 95% on its own: among twenty pairs that do not differ, one is expected "
    "to look as if it did."
)
_PAPER_TABLE = (
    "Top-1 error in percent: mean (standard deviation). Lines of the paper's are quoted from the paper: the final hard-quantized "
    "network after 300 epochs (ternary: 600) from a full-precision network of 200 epochs, 4 runs. Lines of ours are this report's "
    "groups, by number, each with its number of seeds."
)
_JUDGED = {
    ERROR: "top-1 validation error of the final network",
    PERPLEXITY: "perplexity of the epoch that is best on the validation text, there and on the test text",
}
_MEANS = "mean (standard deviation, n seeds). `0.01 -> 0.001@3`: the rate changes when 3 epochs are trained."
_LEVEL_TABLE = (
    "The share of the network's weights that is quantized; the share of those that the freeze moved by no more than "
    f"{tables.NEAR} (known of runs with `--save_all`); and the relative distance ‖w - Q(w)‖ / ‖w‖ of the latent weights from their "
    "hard quantization just before the freeze and at the end, mean over the layers."
)
_ALIKE = "Pairs that differ in the method (and its strength) alone."
_SIGN_TABLE = (
    "Signs that differ from the warm start's, and distance of the latent weights from ±1: means over the layers that the method "
    "quantizes (some spare the first and the last), then over seeds."
)
_COMMANDS = (
    "The first seed's command of each group; the others differ in `--seed`, and may in where things lie (`--save`, `--tb_dir` and "
    "the like) and in what changes a number by rounding alone (`--compile`, `--capture` and the like). Of absolute paths the last "
    "two parts are left."
)
_DOUBLE_QUOTABLE = re.compile(r"[^\"$`\\!]*")

Picture = tuple[str, str]  # the name of its files and its caption


def report(
    sections: Sequence[Section],
    comparisons: Sequence[Sequence[Comparison]],
    pictures: Sequence[Sequence[Picture]],
    left_out: Sequence[LeftOut],
    note: Note,
    machine: str = "",
    place: str = "",
) -> str:
    """report.md; comparisons and pictures are those of each section.

    ``machine`` is what is said of the hardware beside what the runs know of it. ``place`` is the folder of the pictures, with its
    slash, as seen from the text's.
    """
    parts = ["# Report of the runs", answer(sections, comparisons, left_out, note), caveats(sections)]
    for section, pairs, drawn in zip(sections, comparisons, pictures, strict=True):
        parts.append(_section(section, pairs, [(place + name, caption) for name, caption in drawn], note))
    if any(section.in_paper for section in sections):
        parts += ["## The paper's table for CIFAR-10, and ours", _PAPER_TABLE, tables.paper_table(sections, note)]
    groups = [group for section in sections for group in section.groups]
    if groups:
        parts += ["## Hardware, versions, seeds", *filter(None, [machine]), _machines(groups), "## Commands", _commands(groups)]
    parts += ["## Left out, or not as it should be", _left_out(left_out)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def answer(
    sections: Sequence[Section], comparisons: Sequence[Sequence[Comparison]], left_out: Sequence[LeftOut], note: Note
) -> str:
    """What the runs show, in one minute."""
    if not sections:
        return "No run is finished yet: there is nothing to report but the list at the end."
    measures = {section.measure for section in sections}
    names = [words for measure, words in _JUDGED.items() if measure in measures]
    parts = [f"{', and '.join(names).capitalize()} (hard-quantized where a method quantizes), mean over seeds."]
    for section, pairs in zip(sections, comparisons, strict=True):
        paper = ["the paper's: CIFAR-10, 200 epochs, then 300 (ternary: 600); (std of 4 runs)"] if section.in_paper else []
        tested = any(group.tests() for group in section.groups)
        test = [f"{section.head('test')} there"] if tested else []
        heads = ("#", "method", f"{section.measure.name}{section.measure.unit}", "how sure", *test, *paper, "schedule")
        rows = []
        for group in section.groups:
            judged = group.spread(group.judged())
            mean = tables.NEVER_FROZE if judged is None else f"{judged.mean:.2f}"
            test = [tables.mean_std_n(group.spread(group.tests()))] if tested else []
            figure = [tables.mean_std(tables.paper_figure(section, group))] if section.in_paper else []
            rows.append([group.number, group.method, mean, doubt(group), *test, *figure, group.schedule])
        parts += [f"**{section.title(note)}**", tables.table(heads, rows), _verdicts(section, pairs)]
    if left_out:
        count = len({one.run.folder for one in left_out})
        parts.append(f"Left out, or not as it should be: {count} of the runs. The last list says which and why.")
    return "\n\n".join(part.rstrip() for part in parts if part)


def doubt(group: Group) -> str:
    """How far the mean of what a group is judged by can be trusted."""
    errors = group.judged()
    found = group.spread(errors)
    if found is None:
        return "its weights were never quantized for good: nothing to compare"
    if found.n == 1:
        return "1 seed: nothing is known of the spread"
    if found.n < ENOUGH:
        return f"{found.n} seeds, {', '.join(f'{error:.2f}' for error in errors.values())}: too few for an interval"
    if found.half_width is None:
        return f"{found.n} seeds, {', '.join(f'{error:.2f}' for error in errors.values())}: no interval, not all are finite"
    return f"± {found.half_width:.2f} (95% interval, {found.n} seeds)"


def _verdicts(section: Section, pairs: Sequence[Comparison]) -> str:
    """Methods against each other inside a picture's family: under one schedule, or each under its own of like length."""
    together = [{line.group.number for line in family.lines} for family in families(section)]
    chosen = [one for one in pairs if one.first.method != one.second.method]
    chosen = [one for one in chosen if any({one.first.number, one.second.number} <= numbers for numbers in together)]
    if chosen and all(one.difference.n < ENOUGH for one in chosen):
        return (
            f"An interval for the difference of two methods needs {ENOUGH} seeds that both have; there are fewer here. "
            "The differences are below, without intervals."
        )
    lines = [f"- {_sentence(one)}" for one in sorted(chosen, key=lambda one: not one.alike)]
    return "\n".join(["One group minus the other, over the seeds that both have:", "", *lines]) if lines else ""


def _sentence(one: Comparison) -> str:
    names = f"{one.first.method} (#{one.first.number}) - {one.second.method} (#{one.second.number})"
    how = "under one schedule" if one.alike else "each under its own schedule"
    found = one.difference
    mean = "" if found.mean is None else f"{found.mean:+.2f} {one.unit}"
    interval = "" if found.low is None else f" (95%: {found.low:+.2f} to {found.high:+.2f})"
    seeds = f"{found.n} shared {'seed' if found.n == 1 else 'seeds'}"
    return f"{one.quantity}, {how}: {names}: {', '.join(filter(None, (mean + interval, seeds)))}: {one.verdict}"


def caveats(sections: Sequence[Section]) -> str:
    """What a reader has to know before he believes the figures; only what holds for these runs."""
    groups = [group for section in sections for group in section.groups]
    of_images = [group for group in groups if group.measure is ERROR]
    quantized = any(group.mode is not None for group in of_images)
    holds = {
        _TEST_SET: any(not group.identity["holdout"] for group in of_images),
        _HELD_OUT: any(group.identity["holdout"] for group in of_images),
        _WARM_START.format(which=_which_epoch(groups), how=_how_sure_of_the_start(groups)): any(g.warm_start for g in groups),
        _ASYMMETRY: quantized,
        _BATCH_NORM: quantized,
        _PAPER: any(section.in_paper for section in sections),
        _INTERVALS: True,
    }
    return "## Before you believe it\n\n" + "\n".join(f"- {words}" for words, holding in holds.items() if holding)


def _which_epoch(groups: Sequence[Group]) -> str:
    started = [run for group in groups if group.warm_start for run in group.runs]
    return _BEST_EPOCH if all(begins_with_best(run) for run in started) else ""


def _how_sure_of_the_start(groups: Sequence[Group]) -> str:
    known = {checksum(run) is not None for group in groups if group.warm_start for run in group.runs}
    return {(True,): _CHECKED, (False,): _NOT_CHECKED}.get(tuple(known), _NOT_CHECKED_ALL)


def _section(section: Section, pairs: Sequence[Comparison], drawn: Sequence[Picture], note: Note) -> str:
    words = {ERROR: f"Images: {{}}. Top-1 errors in percent on the validation images, {_MEANS}",
             PERPLEXITY: f"Text: {{}}. Perplexities a token, lower is better, {_MEANS}"}[section.measure]  # fmt: skip
    parts = [f"## {section.title(note)}", words.format(tables.cell(section.data)), tables.error_table(section)]
    levels = tables.level_table(section)
    if levels:
        parts += ["### What is quantized, and how gently", _LEVEL_TABLE, levels]
    alike, others = [one for one in pairs if one.alike], [one for one in pairs if not one.alike]
    if alike:
        parts += [
            "### Under one schedule",
            _ALIKE,
            tables.comparison_table(alike),
        ]
    if others:
        parts += ["### All other pairs, as run", "Schedules differ in these pairs.", tables.comparison_table(others)]
    signs = tables.sign_table(section)
    if signs:
        parts += ["### Signs and levels", _SIGN_TABLE, signs]
    if drawn:
        parts.append("### Pictures")
    parts += [f"![{Path(name).name.replace('_', ' ')}]({name}.png)\n\n{caption} ([SVG]({name}.svg))" for name, caption in drawn]
    return "\n\n".join(part.rstrip() for part in parts)


def _machines(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        processes = [facts for run in group.runs for facts in parts(run.facts)]
        seconds = [row["seconds"] for run in group.runs for row in run.rows if row.get("seconds") is not None]
        rows.append([
            group.number, group.method, " ".join(map(str, group.seeds)), _distinct(facts.get("device") for facts in processes),
            _distinct(words for run in group.runs for words in _computed(run)), _distinct(_versions(facts) for facts in processes),
            _distinct(facts.get("git_revision") for facts in processes), f"{statistics.median(seconds):.1f}" if seconds else NONE,
        ])  # fmt: skip
    heads = ("#", "method", "seeds", "device", "computed", "versions", "git revision", "seconds an epoch, median")
    return tables.table(heads, rows)


def _computed(run: Run) -> list[str | None]:
    """How each of a run's processes has computed; as the run's last one says where they do not."""
    return [computed(facts) or run.computed for facts in parts(run.facts)]


def _versions(facts: dict[str, Any]) -> str | None:
    found = facts.get("versions")
    return ", ".join(f"{name} {version}" for name, version in found.items() if version) if isinstance(found, dict) else None


def _distinct(values: Any) -> str:
    return "; ".join(dict.fromkeys(str(value) for value in values if value)) or "not known"


def _commands(groups: Sequence[Group]) -> str:
    parts = [_COMMANDS]
    for group in groups:
        names = ", ".join(f"`{tables.cell(run.name)}`" for run in group.runs)
        parts.append(f"Group {group.number}, {group.method}, {names}:\n\n    {command(group.runs[0])}")
    return "\n\n".join(parts)


def command(run: Run) -> str:
    """The command that made a run, without the places of the machine that it ran on."""
    words = run.facts.get("command")
    if not isinstance(words, list) or not words:
        return "not known: args.json has no command"
    script, *rest = map(str, words)
    return " ".join(["python", Path(script).name, *(_quoted(_without_place(word)) for word in rest)])


def _quoted(word: str) -> str:
    """A word for the shell; in double quotes where that is easier to read."""
    plain = shlex.quote(word)
    return f'"{word}"' if plain != word and _DOUBLE_QUOTABLE.fullmatch(word) else plain


def _without_place(word: str) -> str:
    flag, sign, value = word.partition("=")
    return f"{flag}={short_path(value)}" if sign and flag.startswith("--") else short_path(word)


def _left_out(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "Nothing: every run folder that was found is in the tables."
    rows = []
    for one in left_out:
        arguments = one.run.arguments
        known = [method_of(one.run), arguments["seed"]] if arguments else [NONE, NONE]
        rows.append([one.run.name, *known, one.reason])
    return tables.table(("run", "method", "seed", "why"), rows)
