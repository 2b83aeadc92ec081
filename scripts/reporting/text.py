"""The report's text: first the answer, then what it rests on."""

import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting import tables
from reporting.families import families
from reporting.groups import Group, LeftOut, method_of
from reporting.runs import Run, short_path
from reporting.statistics import ENOUGH
from reporting.tables import NONE, Comparison, Note, Section

_TEST_SET = (
    "Validation is on the test set, as in the published code. The final error is that of the last epoch, so nothing is chosen by "
    "it; the best epoch's error is chosen by the very images that it is measured on, and is too low for that."
)
_HELD_OUT = (
    "Runs with `--holdout` are validated on training images that were held out, not on the test set: their errors cannot be held "
    "against those of runs on the test set. A warm start that was trained without the same `--holdout` has seen those images. What "
    "was chosen by these runs was chosen for the methods among them alone: the others have not been tuned."
)
_WARM_START = (
    "All seeds of a group start from the same full-precision network, the epoch of it that was best on the validation images. The "
    "spread over seeds does not contain the chance in that network."
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
_ERROR_TABLE = (
    "Top-1 errors in percent on the validation images, mean (standard deviation, n seeds). `0.01 -> 0.001@3`: the rate changes "
    "when 3 epochs are trained."
)
_ALIKE = "Pairs that differ in the method (and its strength) alone."
_SIGN_TABLE = (
    "Signs that differ from the warm start's, distance of the latent weights from ±1, and their relative distance from their hard "
    "quantization: means over the layers that the method quantizes (ProxQuant-ternary: all but the first and the last), then over "
    "seeds."
)
_COMMANDS = (
    "The first seed's command of each group; the others differ in `--seed`, `--save` and `--tb_dir`. Of absolute paths the last "
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
    parts = ["Top-1 validation error of the final network (hard-quantized where a method quantizes), mean over seeds."]
    for section, pairs in zip(sections, comparisons, strict=True):
        paper = ["the paper's: CIFAR-10, 200 epochs, then 300 (ternary: 600); (std of 4 runs)"] if section.in_paper else []
        heads = ("#", "method", "error %", "how sure", *paper, "schedule")
        rows = []
        for group in section.groups:
            final = group.spread(group.final_errors())
            figure = [tables.mean_std(tables.paper_figure(section, group))] if section.in_paper else []
            rows.append([group.number, group.method, f"{final.mean:.2f}", doubt(group), *figure, group.schedule])
        parts += [f"**{section.title(note)}**", tables.table(heads, rows), _verdicts(section, pairs)]
    if left_out:
        parts.append(f"Left out, or not as it should be: {len(left_out)} of the runs. The last list says which and why.")
    return "\n\n".join(part.rstrip() for part in parts if part)


def doubt(group: Group) -> str:
    """How far the mean of a group's final errors can be trusted."""
    errors = group.final_errors()
    found = group.spread(errors)
    if found.n == 1:
        return "1 seed: nothing is known of the spread"
    if found.n < ENOUGH:
        return f"{found.n} seeds, {', '.join(f'{error:.2f}' for error in errors.values())}: too few for an interval"
    return f"± {found.half_width:.2f} (95% interval, {found.n} seeds)"


def _verdicts(section: Section, pairs: Sequence[Comparison]) -> str:
    """Methods against each other inside a picture's family: under one schedule, or each under its own of like length."""
    together = [{line.group.number for line in family.lines} for family in families(section)]
    chosen = [one for one in pairs if one.first.mode != one.second.mode]
    chosen = [one for one in chosen if any({one.first.number, one.second.number} <= numbers for numbers in together)]
    if chosen and all(one.difference.n < ENOUGH for one in chosen):
        return f"No two methods share the {ENOUGH} seeds that an interval takes: the differences are in the tables below."
    lines = [f"- {_sentence(one)}" for one in sorted(chosen, key=lambda one: not one.alike)]
    return "\n".join(["One group minus the other, over the seeds that both have:", "", *lines]) if lines else ""


def _sentence(one: Comparison) -> str:
    names = f"{one.first.method} (#{one.first.number}) - {one.second.method} (#{one.second.number})"
    how = "under one schedule" if one.alike else "each under its own schedule"
    found = one.difference
    mean = "" if found.mean is None else f"{found.mean:+.2f} points"
    interval = "" if found.low is None else f" (95%: {found.low:+.2f} to {found.high:+.2f})"
    seeds = f"{found.n} shared {'seed' if found.n == 1 else 'seeds'}"
    return f"{one.quantity}, {how}: {names}: {', '.join(filter(None, (mean + interval, seeds)))}: {one.verdict}"


def caveats(sections: Sequence[Section]) -> str:
    """What a reader has to know before he believes the figures; only what holds for these runs."""
    groups = [group for section in sections for group in section.groups]
    holds = {
        _TEST_SET: any(not group.identity["holdout"] for group in groups),
        _HELD_OUT: any(group.identity["holdout"] for group in groups),
        _WARM_START: any(group.warm_start for group in groups),
        _ASYMMETRY: any(group.mode is not None for group in groups),
        _BATCH_NORM: any(group.mode is not None for group in groups),
        _PAPER: any(section.in_paper for section in sections),
        _INTERVALS: True,
    }
    return "## Before you believe it\n\n" + "\n".join(f"- {words}" for words, holding in holds.items() if holding)


def _section(section: Section, pairs: Sequence[Comparison], drawn: Sequence[Picture], note: Note) -> str:
    images = f"Images: {tables.cell(section.data)}."
    parts = [f"## {section.title(note)}", f"{images} {_ERROR_TABLE}", tables.error_table(section)]
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
        processes = [facts for run in group.runs for facts in (run.facts, *_continued(run))]
        seconds = [row["seconds"] for run in group.runs for row in run.rows if row.get("seconds") is not None]
        rows.append([
            group.number, group.method, " ".join(map(str, group.seeds)), _distinct(facts.get("device") for facts in processes),
            _distinct(run.computed for run in group.runs), _distinct(_versions(facts) for facts in processes),
            _distinct(facts.get("git_revision") for facts in processes), f"{statistics.median(seconds):.1f}" if seconds else NONE,
        ])  # fmt: skip
    heads = ("#", "method", "seeds", "device", "computed", "versions", "git revision", "seconds an epoch, median")
    return tables.table(heads, rows)


def _continued(run: Run) -> list[dict[str, Any]]:
    """The facts of the processes that continued a run."""
    found = run.facts.get("continued")
    return [facts for facts in found if isinstance(facts, dict)] if isinstance(found, list) else []


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
        known = [method_of(one.run.mode), arguments["seed"]] if arguments else [NONE, NONE]
        rows.append([one.run.name, *known, one.reason])
    return tables.table(("run", "method", "seed", "why"), rows)
