"""The runs of the study: their names, their arguments, and how long they will take. Used by the scripts beside it.

    python scripts/study.py name METHOD REGIME NETWORK
    python scripts/study.py arguments METHOD REGIME
    python scripts/study.py plan --depths "20 32" ... -- arguments of every run
    python scripts/study.py takes MODE

Each METHOD, with its published schedule, is a row of PUBLISHED below. The regimes:

    published   each method as in the paper: BinaryConnect's learning rate decays, ProxQuant's is constant, ternary runs are longer
    common      all methods alike: 300 epochs at batch size 128, Adam at 0.01, 0.001 from their half on, 0.0001 from three quarters
    tuned       as common, with a 16th of the proximal strength (ProxQuant-binary only): the best share on held-out training images
                at a 25th of the length, and no more than a guess at another

What the environment may say of all methods: SHORTER=N divides the schedule by N: epochs, freeze and learning-rate steps in
proportion, and the proximal strength, summed over all steps before the freeze, as it was. EPOCHS=N does the same by the number of
epochs that are left. FREEZE_EPOCH, LR and REG_RATE then have the last word. BATCH_SIZE is that of the quantized runs, with the
summed strength as it was: half of it makes twice the steps, each with half the strength. A pull that begins anew at each step
(prox_connect) has no sum: what it has reached at the freeze stays as it was. QUANTIZER, BITS and BY_ROW=1 are for methods that
take any quantizer, and are in their runs' names.
"""

import argparse
import contextlib
import csv
import itertools
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = 50_000  # of CIFAR-10, which the published strength is for


@dataclass(frozen=True)
class Schedule:
    """What a method's runs are trained with.

    Attributes:
        epochs, freeze_epoch, batch_size: as the flags.
        rates: learning rates by the epoch that they hold from.
        mode: the flags of the method itself.
        reg_rate: where the strength grows by the epoch.
        adds_up: True where each step pulls the weights further, by the learning rate times the strength; False where it pulls the
            latent weights anew, so that only the strength of the moment counts.
        optimizer: its name.
        settings: more of its settings.
        flags: those that say ``rates`` and ``settings`` at the published length, as the README's commands have them; None where
            they take a ``--regime``.
        any_quantizer: True where ``--quantizer``, ``--bits`` and ``--by_row`` make sense.
    """

    epochs: int
    freeze_epoch: int | None
    batch_size: int
    rates: Mapping[int, float]
    mode: tuple[str, ...] = ()
    reg_rate: float | None = None
    adds_up: bool = True
    optimizer: str = "Adam"
    settings: Mapping[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] | None = None
    any_quantizer: bool = False

    def pull(self) -> float:
        """For a reg_rate of 1, what stays as it was: the strength summed over all steps before the freeze, or that at the freeze.

        0 where no epoch before the freeze has any strength.
        """
        freeze = self.freeze_epoch or 0
        if not self.adds_up:
            return float(freeze) if freeze > 1 else 0.0
        rate, total = 0.0, 0.0
        for epoch in range(freeze):
            rate = self.rates.get(epoch, rate)
            total += rate * epoch
        return total * math.ceil(IMAGES / self.batch_size)

    def shortened(self, divisor: float, batch_size: int) -> "Schedule":
        """The same shape at a fraction of the length; frozen before the end in any case."""
        epochs = max(1, round(self.epochs / divisor))
        freeze = None if self.freeze_epoch is None else min(round(self.freeze_epoch / divisor), epochs - 1)
        rates = {round(epoch / divisor): rate for epoch, rate in self.rates.items() if epoch == 0 or round(epoch / divisor) > 0}
        return replace(self, epochs=epochs, freeze_epoch=freeze, batch_size=batch_size, rates=rates, flags=None)

    def pulling(self, total: float) -> "Schedule":
        """With the ``reg_rate`` that makes ``pull`` the given ``total``; raises ValueError where no epoch has any."""
        if not self.pull():
            raise ValueError(f"no epoch before the freeze at {self.freeze_epoch} has any strength: a longer schedule is needed")
        return replace(self, reg_rate=float(f"{total / self.pull():.4g}"))


@dataclass(frozen=True)
class Wishes:
    """What the environment says of the runs; None and nothing where it is silent."""

    shorter: int = 1
    epochs: int | None = None
    freeze_epoch: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    reg_rate: float | None = None
    quantizer: tuple[tuple[str, str], ...] = ()  # flags and values, as ("--bits", "2"); the value of a switch is empty

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Wishes":
        """Raises ValueError with the name of a variable that is not understood."""
        count, number = (int, 1, "a whole number from 1 up"), (float, 0.0, "a number from 0 up")
        kinds = {"SHORTER": count, "EPOCHS": count, "FREEZE_EPOCH": (int, -1, "a whole number from 0 up, or -1"),
                 "BATCH_SIZE": count, "LR": number, "REG_RATE": number}  # fmt: skip
        given = {name: _parsed(name, environment[name], *kind) for name, kind in kinds.items() if environment.get(name)}
        flags = {"QUANTIZER": "--quantizer", "BITS": "--bits", "BY_ROW": "--by_row"}
        if environment.get("BY_ROW", "") not in ("", "0", "1"):
            raise ValueError(f"BY_ROW: {environment['BY_ROW']} is not accepted, 1 or 0 is needed")
        named = [(flag, environment[name]) for name, flag in flags.items() if environment.get(name)]
        named = [pair for pair in named if pair != ("--by_row", "0")]
        quantizer = tuple((flag, "" if flag == "--by_row" else value) for flag, value in named)
        return cls(quantizer=quantizer, **{name.lower(): value for name, value in given.items()})


def _parsed(name: str, text: str, kind: type, least: float, words: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"{name}: {text} is not accepted, {words} is needed")
    return value


REGIMES = ("published", "common", "tuned")
_CONSTANT = {0: 0.01}
_BINARY = {0: 0.01, 81: 0.001, 122: 0.0001}
_TTQ = {0: 0.1, 80: 0.01, 120: 0.001, 300: 0.0001}
_ALL_LAZY = {"flags": ("--binary_regime",)}


def _mode(name: str, *flags: str) -> tuple[str, ...]:
    return ("--projection_mode", name, *flags)


# The first four are the paper's. The schedules of the others are those of the paper's method that is their nearest relative.
PUBLISHED = {
    "fp": Schedule(200, None, 128, {0: 0.1, 100: 0.01, 150: 0.001}, optimizer="SGD", flags=()),
    "bc": Schedule(300, 200, 128, _BINARY, _mode("lazy", "--binary_reg", "1.0"), **_ALL_LAZY),
    "pq_binary": Schedule(300, 200, 128, _CONSTANT, _mode("prox"), 1e-4),
    "pq_ternary": Schedule(600, 400, 256, _CONSTANT, _mode("prox_ternary"), 1e-4),
    "ttq": Schedule(300, 200, 128, _TTQ, _mode("ttq"), optimizer="SGD", settings={"weight_decay": 2e-4}, flags=("--ttq_regime",)),
    "prox_median": Schedule(300, 200, 128, _CONSTANT, _mode("prox_median"), 1e-4),
    "stoch_bin": Schedule(300, 200, 128, _BINARY, _mode("stoch_bin"), **_ALL_LAZY),
    "prox_alt": Schedule(300, 200, 128, _CONSTANT, _mode("prox_alt"), 1e-4, any_quantizer=True),
    "lazy_alt": Schedule(300, 200, 128, _BINARY, _mode("lazy_alt"), any_quantizer=True, **_ALL_LAZY),
    "parq": Schedule(300, 200, 128, _BINARY, _mode("parq"), any_quantizer=True, **_ALL_LAZY),
    "binary_relax": Schedule(300, 200, 128, _BINARY, _mode("binary_relax"), any_quantizer=True, **_ALL_LAZY),
    # Its strength is reg_rate * epoch, without the learning rate: it reaches 1, where a weight is its sign, at the freeze.
    "prox_connect": Schedule(300, 200, 128, _CONSTANT, _mode("prox_connect"), 5e-3, adds_up=False, any_quantizer=True),
}
# Share of the summed strength: the best of 1, 1/4, 1/8, 1/16 and 1/32 at a 25th of the length, on 5000 held-out training images.
TUNED = {"pq_binary": 1 / 16}


def schedule(method: str, regime: str, wishes: Wishes) -> Schedule:
    """A method's schedule; raises ValueError for an unknown name, and where ``SHORTER`` leaves too few epochs."""
    for name, value, known in (("METHODS", method, PUBLISHED), ("REGIMES", regime, REGIMES)):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
    if regime == "tuned" and method not in ("fp", *TUNED):
        raise ValueError(f"REGIMES: {regime!r} is for METHODS={' '.join(TUNED)}, not for {method}")
    published = PUBLISHED[method]
    if wishes.quantizer and method != "fp" and not published.any_quantizer:
        takers = " ".join(name for name, one in PUBLISHED.items() if one.any_quantizer)
        given = " ".join(" ".join(pair).strip() for pair in wishes.quantizer)
        raise ValueError(f"QUANTIZER, BITS, BY_ROW: {method} takes no {given}; METHODS that do are {takers}")
    chosen, total = published, published.pull() * (published.reg_rate or 0.0)
    if regime != "published" and method != "fp":
        rates = {0: 0.01, 150: 0.001, 225: 0.0001}
        chosen = replace(
            published, epochs=300, freeze_epoch=200, batch_size=128, rates=rates, optimizer="Adam", settings={}, flags=None
        )
        total *= TUNED[method] if regime == "tuned" else 1.0
    batch_size = chosen.batch_size if wishes.batch_size is None or method == "fp" else wishes.batch_size
    divisor = wishes.shorter if wishes.epochs is None else chosen.epochs / wishes.epochs
    if (divisor, batch_size) != (1, chosen.batch_size):
        chosen = chosen.shortened(divisor, batch_size)
    too_short = wishes.epochs is not None and not chosen.pull()  # to pull: such a run is a trial, at the published strength
    if chosen is not published and chosen.reg_rate is not None and not too_short:
        chosen = chosen.pulling(total)
    if method == "fp":
        return chosen
    given = {"freeze_epoch": wishes.freeze_epoch, "reg_rate": chosen.reg_rate and wishes.reg_rate}
    return replace(chosen, **{name: value for name, value in given.items() if value is not None})


def arguments(method: str, regime: str, wishes: Wishes) -> list[str]:
    """The command line's arguments for a method's schedule."""
    chosen = schedule(method, regime, wishes)
    found = ["--batch-size", str(chosen.batch_size), "--epochs", str(chosen.epochs)]
    if method != "fp":
        rate = chosen.rates[0] if wishes.lr is None else wishes.lr
        found += ["--optimizer", chosen.optimizer, "--lr", str(rate), "--freeze_epoch", str(chosen.freeze_epoch), *chosen.mode]
        found += [word for pair in wishes.quantizer for word in pair if word]
    elif wishes.lr is not None:
        found += ["--lr", str(wishes.lr)]
    if chosen.flags is not None:
        found += chosen.flags
    elif len(chosen.rates) > 1:
        entries = {epoch: {"lr": rate} for epoch, rate in chosen.rates.items()}
        found += ["--regime", str({**entries, 0: {**entries[0], **chosen.settings}})]
    if chosen.reg_rate is not None:
        found += ["--reg_rate", str(chosen.reg_rate)]
    return found


def run_name(network: str, method: str, regime: str, wishes: Wishes) -> str:
    """The name of an experiment's runs, without their seed; raises ValueError as ``schedule`` does."""
    optimizer = schedule(method, regime, wishes).optimizer
    if method == "fp":  # the one that all others start from: no regime changes it
        return network
    quantizer = [{"--bits": f"{value}bit", "--by_row": "row"}.get(flag, value) for flag, value in wishes.quantizer]
    return "_".join([network, method, *quantizer, optimizer, *([] if regime == "published" else [regime])])


def takes(mode: str, wishes: Wishes) -> list[str]:
    """What a projection mode with ``QUANTIZER`` takes, "bits" (and rows), "reg_rate"; and "scaled_by_lr" where its pull is.

    Raises ValueError for a mode that is not known, and for a quantizer that it does not take.
    """
    sys.path.insert(0, str(ROOT))
    import quantize  # here: it takes seconds, which no other command needs

    quantizer = dict(wishes.quantizer).get("--quantizer")
    try:
        found = quantize.mode(mode, quantizer).schedule
    except ValueError as error:
        raise ValueError(f"MODE={mode}{f', QUANTIZER={quantizer}' if quantizer else ''}: {error}") from None
    words = []
    with contextlib.suppress(ValueError):
        quantize.mode(mode, quantizer, bits=2, by_row=True)
        words.append("bits")
    words += [found.flag] if found.flag == "reg_rate" else []
    return [*words, "scaled_by_lr"] if found.scaled_by_lr else words


def plan(args: argparse.Namespace, wishes: Wishes, common_arguments: list[str]) -> int:
    """Prints each experiment with the epochs that are left, and the time that they will take."""
    for method in args.methods.split():
        for regime in args.regimes.split():
            schedule(method, regime, wishes)  # what cannot be is said before an epoch is measured
    hours = 0.0
    for depth in args.depths.split():
        seconds, source = epoch_seconds(args, depth, common_arguments)
        print(f"ResNet-{depth}: {seconds:.1f} s an epoch ({source})")
        methods = [method for method in args.methods.split() if method != "fp"]  # the warm start is one experiment, always there
        for regime, method in [("published", "fp"), *itertools.product(args.regimes.split(), methods)]:
            chosen = schedule(method, regime, wishes)
            name = run_name(args.network.replace("DEPTH", depth), method, regime, wishes)
            left = [max(0, chosen.epochs - trained(args.results_dir / f"{name}_run_{seed}")) for seed in args.seeds.split()]
            hours += one_after_another(left, args.slots) * seconds / 3600
            print(f"  {name}: {chosen.epochs} epochs, {len(left)} seeds, {sum(left)} epochs left")
    print(f"about {hours:.1f} hours with {args.slots} {'runs' if args.slots > 1 else 'run'} at a time")
    return 0


def one_after_another(lengths: list[int], slots: int) -> int:
    """How long runs take that are started in order, each as soon as one of the slots is free."""
    busy = [0] * slots
    for length in lengths:
        busy[busy.index(min(busy))] += length
    return max(busy)


def trained(folder: Path) -> int:
    """Epochs that a run has behind it."""
    return len(_whole_rows(folder))


def measured_seconds(folder: Path) -> list[float]:
    """The seconds of each of a run's epochs that say them."""
    found = []
    for row in _whole_rows(folder):
        with contextlib.suppress(KeyError, ValueError):  # of another version of the program, or damaged
            found.append(float(row["seconds"]))
    return found


def _whole_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's results; not one that is cut off."""
    try:
        with open(folder / "results.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if None not in row.values()]
    except (OSError, ValueError, csv.Error):  # not begun; or not a folder but a run's output; or no text
        return []


def epoch_seconds(args: argparse.Namespace, depth: str, common_arguments: list[str]) -> tuple[float, str]:
    """Seconds of an epoch: from the runs that are there, else from one that is trained now and thrown away."""
    network = args.network.replace("DEPTH", depth)
    known = [seconds for folder in args.results_dir.glob(f"{network}_*run_*") for seconds in measured_seconds(folder)]
    if known:
        return statistics.median(known), f"median of {len(known)} trained ones"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "main_binary_reg.py"), "--results_dir", folder, "--save", "measured"]
        command += ["--model_config", str({"depth": int(depth)}), *common_arguments]
        command += [*arguments("pq_binary", "published", Wishes()), "--epochs", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"an epoch could not be measured: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
        return measured_seconds(Path(folder) / "measured")[0], "measured now, alone"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("name", "arguments"):
        one = commands.add_parser(command)
        one.add_argument("method")
        one.add_argument("regime")
        if command == "name":
            one.add_argument("network")
    commands.add_parser("takes").add_argument("mode")
    whole = commands.add_parser("plan")
    for name in ("depths", "seeds", "methods", "regimes", "network"):
        whole.add_argument(f"--{name}", required=True)
    whole.add_argument("--results_dir", type=Path, required=True)
    whole.add_argument("--slots", type=int, default=1)
    whole.add_argument("more", nargs="*")
    args = parser.parse_args()
    try:
        wishes = Wishes.of(os.environ)
        if args.command == "plan":
            return plan(args, wishes, args.more)
        if args.command == "name":
            print(run_name(args.network, args.method, args.regime, wishes))
        elif args.command == "takes":
            print(*takes(args.mode, wishes))
        else:
            print("\n".join(arguments(args.method, args.regime, wishes)))
        return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
