"""Runs sorted into groups that differ in nothing but their seed, and groups into sections that can be compared."""

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import data
import models
import quantize
from reporting import runs, weights
from reporting.facts import processes
from reporting.measures import Measure
from reporting.runs import Run
from reporting.schedules import DATA, PRECISION, PROCESSES, REGIME, STRENGTH, schedule_text, shown
from reporting.statistics import Spread, spread
from training import checkpoints, regimes
from training.arguments import DERIVED, MAY_CHANGE, build_parser

# What may differ inside a group: the seed, where things lie, and what changes no number but by rounding. The device is one of
# these: auto may have found the very one that another seed asked for. The table of hardware says which ones ran.
FREE = {"seed", "device", *MAY_CHANGE, *DERIVED}
_NAMES = {"modes": quantize.MODES, "models": models.MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
DEFAULTS = vars(build_parser(**_NAMES).parse_args([]))


def identity(run: Run) -> dict[str, Any]:
    """All that two runs of one group have in common, by name."""
    # A flag that is newer than the run had its default's effect.
    arguments = {**DEFAULTS, **run.arguments}
    kept = {name: value for name, value in arguments.items() if name not in FREE}
    kept["holdout"] = kept["holdout"] or 0
    if run.arguments["model"] == "resnet":
        kept["model_config"] = {**kept["model_config"], "depth": depth(run)}
    kept["resume"] = checksum(run) or _place(run, kept["resume"])
    if run.facts.get("precision"):
        kept[PRECISION] = run.facts["precision"]
        del kept["precision"]
    kept[PROCESSES] = processes(run.facts)
    kept[DATA] = run.data
    kept[REGIME] = run.regime or sorted({row.get("lr") or 0 for row in run.rows})
    # A rate that was typed and a default can look alike among the arguments and still act differently. Where a mode has no
    # strength, older versions of the program wrote a 1 and newer ones nothing.
    strengths = run.rows if run.mode not in quantize.MODES or quantize.MODES[run.mode].has_strength else ()
    kept[STRENGTH] = next(([row["epoch"], row["strength"]] for row in strengths if row.get("strength")), None)
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def depth(run: Run) -> int:
    """A residual network's depth; where the user gave none, the flag's default."""
    return run.arguments["model_config"].get("depth", 18 if run.arguments["dataset"] == "imagenet" else 20)


def checksum(run: Run) -> str | None:
    """That of the weights that a run started from; None where it is not written."""
    found = run.warm_start.get("sha256")
    return f"weights {found[:16]}" if isinstance(found, str) else None


def label_of(mode: str | None) -> str:
    """A mode's word in reports."""
    found = quantize.FULL_PRECISION if mode is None else quantize.MODES.get(mode)
    return found.label if found else " ".join(mode.split())


def method_of(run: Run, with_bits: bool = True) -> str:
    """A run's method as the tables have it, with the quantizer that was chosen for it."""
    label = label_of(run.mode)
    quantizer, bits, by_row = (run.arguments.get(name) for name in ("quantizer", "bits", "by_row"))
    said = f"{bits} {'bit' if bits == 1 else 'bits'}" if bits and with_bits else None
    chosen = [quantizer, said, "by row" if by_row else None]
    words = ", ".join(str(word) for word in chosen if word)
    return f"{label} ({words})" if words else label


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in nothing but their seed.

    Attributes:
        number: its name in the report.
        runs: by seed, each seed once.
        identity: what they have in common.
        schedule: that in short words, different from those of the other groups of its section.
        warm_start: name and measure of the full-precision network that they start from; None for runs that start from none,
            and no measure where it cannot be known.
    """

    number: int
    runs: tuple[Run, ...]
    identity: dict[str, Any]
    schedule: str
    warm_start: tuple[str, float | None] | None

    @property
    def mode(self) -> str | None:
        return self.runs[0].mode

    @property
    def method(self) -> str:
        return method_of(self.runs[0])

    @property
    def epochs(self) -> int:
        return self.identity["epochs"]

    @property
    def freeze_epoch(self) -> int | None:
        """Epochs before the freeze; None where it never came."""
        return next((run.freeze_epoch for run in self.runs if run.freeze_epoch is not None), None)

    @property
    def unfrozen(self) -> bool:
        """True where no run has a network of the method that could be judged."""
        return all(run.unfrozen for run in self.runs)

    @property
    def bits(self) -> int | None:
        """How many bits a weight has left; None where it is not known, or no whole number."""
        quantizer, bits, by_row = (self.identity.get(name) for name in ("quantizer", "bits", "by_row"))
        try:
            return quantize.mode(self.mode, quantizer, bits, by_row).quantizer.bits
        except (ValueError, TypeError, AttributeError):  # of another version
            return bits if isinstance(bits, int) else None

    @property
    def measure(self) -> Measure:
        return self.runs[0].measure

    @property
    def seeds(self) -> list[int]:
        return [run.arguments["seed"] for run in self.runs]

    @cached_property
    def section(self) -> str:
        return section_key(self.identity)

    @property
    def same_schedule(self) -> str:
        """Equal for groups whose epochs, freeze, batch size, regime and precision are equal."""
        names = (
            "epochs",
            "start_epoch",
            "freeze_epoch",
            "batch_size",
            "keep_optimizer_state",
            "resume",
            REGIME,
            PRECISION,
            "tf32",
            PROCESSES,
            "sync_bn",
        )
        return json.dumps([self.identity.get(name) for name in names])

    def judged(self) -> dict[int, float]:
        """By seed: the measure that the runs are judged by; not of unfrozen runs."""
        return {run.arguments["seed"]: run.judged for run in self.runs if not run.unfrozen}

    def finals(self) -> dict[int, float]:
        """By seed: the measure after the last epoch, of the hard-quantized network where there is one; not of unfrozen runs."""
        return {run.arguments["seed"]: run.final for run in self.runs if not run.unfrozen}

    def bests(self) -> dict[int, float]:
        """By seed: the lowest of any epoch."""
        return {run.arguments["seed"]: run.best for run in self.runs}

    def tests(self) -> dict[int, float]:
        """By seed: the measure of the best network on the test data; nothing where the validation data are those."""
        found = self.at_the_end(self.measure.test_column) if self.measure.test_column else {}
        return {run.arguments["seed"]: found[run.arguments["seed"]] for run in self.runs
                if not run.unfrozen and run.arguments["seed"] in found}  # fmt: skip

    def at_the_end(self, column: str) -> dict[int, float]:
        """By seed: a figure of the last epoch, of the seeds that have it."""
        found = {run.arguments["seed"]: run.rows[-1].get(column) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def at(self, epoch: int | None, column: str) -> dict[int, float]:
        """By seed: a figure after so many epochs, of the seeds that have it."""
        found = {run.arguments["seed"]: run.at(epoch, column) for run in self.runs} if epoch else {}
        return {seed: value for seed, value in found.items() if value is not None}

    def near_their_level(self, near: float) -> dict[int, float]:
        """By seed: weights that are at most so far from their level just before the freeze, in percent, where this is kept."""
        found = {run.arguments["seed"]: weights.near_their_level(run, near) for run in self.runs}
        return {seed: 100 * share for seed, share in found.items() if share is not None}

    def sign_changes(self) -> dict[int, float]:
        """By seed: signs that differ from the start's at the freeze, in percent, mean over the tensors."""
        return {seed: 100 * value for seed, value in self.at(self.freeze_epoch, "sign_change").items()}

    def spread(self, values: dict[int, float]) -> Spread | None:
        return spread(list(values.values()))


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the tables, or that is not with its family there, and why."""

    run: Run
    reason: str


def section_key(identity: dict[str, Any]) -> str:
    """Equal for runs on the same images with the same network, whose errors can be compared."""
    return json.dumps([identity[name] for name in ("dataset", DATA, "holdout", "model", "model_config", "input_size")])


def collect(found: list[Run]) -> tuple[list[Group], list[LeftOut]]:
    """The groups in the order of the tables, and all that is not as it should be."""
    left_out = [LeftOut(run, run.problem) for run in found if run.problem]
    sorted_runs: dict[str, list[Run]] = {}
    identities, known, several = {}, _checksums_of_places(found), _alike_by_words_alone(found)
    for run in (run for run in found if not run.problem):
        one = identity(run)
        one["resume"] = known.get(one["resume"], one["resume"])
        if (one["dataset"], run.data) in several:
            one[DATA] = f"{run.data}, {f'sha256 {run.digest[:16]}' if run.digest else 'whose sha256 is not known'}"
        key = json.dumps(one, sort_keys=True)
        identities[key] = one
        same_seed = [other for other in sorted_runs.get(key, []) if other.arguments["seed"] == run.arguments["seed"]]
        if same_seed:
            left_out.append(
                LeftOut(run, f"the same seed, {run.arguments['seed']}, and the same arguments as {same_seed[0].name}, which counts")
            )
        else:
            sorted_runs.setdefault(key, []).append(run)
    order = sorted(sorted_runs, key=lambda key: _order(identities[key], sorted_runs[key][0]))
    schedules = _schedules([(sorted_runs[key], identities[key]) for key in order])
    groups = [
        Group(number, tuple(sorted(sorted_runs[key], key=lambda run: run.arguments["seed"])), identities[key], text,
              _warm_start(sorted_runs[key][0], found))
        for number, (key, text) in enumerate(zip(order, schedules, strict=True), 1)
    ]  # fmt: skip
    return groups, [*left_out, *_started_from_unfinished(groups), *_never_frozen(groups), *_mismatched(groups)]


def _checksums_of_places(found: list[Run]) -> dict[str, str]:
    """That of the weights at a place, where all runs that began there and know it agree: older ones wrote the place alone."""
    known: dict[str, set[str]] = {}
    for run in (run for run in found if not run.problem):
        if checksum(run) and (place := _place(run, run.arguments.get("resume"))):
            known.setdefault(place, set()).add(checksum(run))
    return {place: next(iter(sums)) for place, sums in known.items() if len(sums) == 1}


def _alike_by_words_alone(found: list[Run]) -> set[tuple[str, str | None]]:
    """Data sets, and what was read of them in words, behind which there are different samples, or an order of its own."""
    digests: dict[tuple[str, str | None], set[str]] = {}
    for run in (run for run in found if not run.problem and run.digest):
        digests.setdefault((run.arguments["dataset"], run.data), set()).add(run.digest)
    return {words for words, different in digests.items() if len(different) > 1}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names in which two identities differ; not those that only follow from another one."""
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    asked = [name for name in names if name not in (REGIME, STRENGTH)]
    return asked or names


def _order(identity: dict[str, Any], run: Run) -> tuple:
    modes = [None, *quantize.MODES]
    place = modes.index(run.mode) if run.mode in modes else len(modes)
    family = [runs.natural_order(run.folder.parent), runs.natural_order(_family(run)[1])]
    # What was tuned on held-out images comes after what is measured on the test set.
    return identity["dataset"], depth(run), bool(identity["holdout"]), section_key(identity), place, identity["epochs"], family


def _schedules(sorted_runs: list[tuple[list[Run], dict[str, Any]]]) -> list[str]:
    """Each group's schedule in short words; what else sets apart those that would read alike is added."""
    texts = [schedule_text(members[0], identity) for members, identity in sorted_runs]
    heads = [(section_key(identity), members[0].mode, text) for (members, identity), text in zip(sorted_runs, texts, strict=True)]
    found = []
    for (_, identity), head in zip(sorted_runs, heads, strict=True):
        alike = [other for (_, other), other_head in zip(sorted_runs, heads, strict=True) if other_head == head]
        names = sorted({name for other in alike for name in differences(identity, other)})
        more = [f"{name.replace('_', ' ')} {shown(identity.get(name))}" for name in names]
        found.append(", ".join([head[2], *more]))
    return found


def _place(run: Run, text: Any) -> str | None:
    """Where a warm start lies, the same for every way to write it; the text itself where it is not there."""
    if not isinstance(text, str):
        return None
    path = next((path for path in runs.candidates(run, text) if os.path.exists(path)), None)  # it raises on no text
    return str(path.resolve()) if path else text


def begins_with_best(run: Run) -> bool:
    """Whether a run began with the best network of another: where its folder, or that file in it, was given."""
    path = Path(_place(run, run.arguments.get("resume")) or "")
    return path.name == checkpoints.BEST or not (os.path.isfile(path) or path.name.endswith(".pth.tar"))


def _warm_start(run: Run, found: list[Run]) -> tuple[str, float | None] | None:
    """Name and error of the network that a run began with."""
    place = _place(run, run.arguments.get("resume"))
    if place is None:
        return None
    path = Path(place)
    folder = path.parent if os.path.isfile(path) else path
    start = next((other for other in found if other.folder.resolve() == folder), None) or runs.read(folder)
    other_images = start.digest and run.digest and start.digest != run.digest
    if start.problem or other_images or section_key(identity(start)) != section_key(identity(run)):
        return runs.short_path(place), None  # of an unfinished run, or on other images: no figure that the run can be held against
    if begins_with_best(run):
        score = run.warm_start.get("score")  # as it was then: the best network is another one where that run has gone on
        return start.name, start.best if score is None else run.measure.of_score(score)
    kept = re.fullmatch(r"checkpoint(?:_epoch_(\d+))?\.pth\.tar", path.name)
    if kept is None or (kept[1] is None and run.warm_start.get("finished") is False):  # then it may lie inside an epoch
        return runs.short_path(place), None
    trained = run.warm_start.get("epoch")  # as it was then: that run may have gone on
    epoch = int(kept[1] or (trained if isinstance(trained, int) else start.arguments["epochs"]))
    return runs.short_path(place), start.at(epoch, start.score)


def _family(run: Run) -> tuple[Path, str]:
    """Runs that were started as the seeds of one experiment have one folder and, less their number, one name."""
    folder = run.folder.resolve()
    return folder.parent, re.sub(r"_run_\d+$", "", folder.name)


def _never_frozen(groups: list[Group]) -> list[LeftOut]:
    found = []
    for group in groups:
        for run in (run for run in group.runs if run.unfrozen):
            flag = f"--freeze_epoch {run.arguments['freeze_epoch']} of {len(run.rows)} epochs"
            reason = f"it never froze ({flag}): its final network is not quantized, so it has no final {group.measure.name}"
            found.append(LeftOut(run, f"{reason}. In the tables it is group {group.number}"))
    return found


def _started_from_unfinished(groups: list[Group]) -> list[LeftOut]:
    found = []
    for group in groups:
        for run in (run for run in group.runs if run.warm_start.get("finished") is False):
            words = f"it started from {shown(run.warm_start.get('path'))}, a run that was not at its end then"
            epochs = run.warm_start.get("of_epochs")
            words += f", of {epochs} epochs" if isinstance(epochs, int) else ""
            found.append(LeftOut(run, f"{words}. In the tables it is group {group.number}"))
    return found


def _mismatched(groups: list[Group]) -> list[LeftOut]:
    """Runs whose arguments are not those of most of their family. They have groups of their own and are in the tables."""
    by_family: dict[tuple, Counter] = {}
    for group in groups:
        for run in group.runs:
            if re.search(r"_run_\d+$", run.folder.resolve().name):
                by_family.setdefault(_family(run), Counter())[group.number] += 1
    found = []
    for family, counts in by_family.items():
        usual = groups[counts.most_common(1)[0][0] - 1]
        for group in (groups[number - 1] for number in counts if number != usual.number):
            names = differences(group.identity, usual.identity)
            words = "; ".join(f"{n} {shown(group.identity.get(n))}, there {shown(usual.identity.get(n))}" for n in names)
            reason = f"not as most of its family, which is group {usual.number}: {words}. In the tables it is group {group.number}"
            found += [LeftOut(run, reason) for run in group.runs if _family(run) == family]
    return found
