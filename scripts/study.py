"""The runs of the study: their arguments, and how long they will take. Used by reproduce.sh.

    python scripts/study.py arguments METHOD REGIME SHORTER [BATCH_SIZE]
    python scripts/study.py plan [--shorter N] [--regimes "published common"] ... -- arguments of every run

A study's schedule is the published one divided by SHORTER (1: as published): epochs, freeze and learning-rate steps in proportion,
and the proximal strength, summed over all steps before the freeze, as published. The regimes:

    published   each method as in the paper: BinaryConnect's learning rate decays, ProxQuant's is constant, ternary runs are longer
    common      all methods alike: 300 epochs at batch size 128, Adam at 0.01, 0.001 from their half on, 0.0001 from three quarters
    tuned       as common, with a 16th of the proximal strength (ProxQuant-binary only): the best share on held-out training images
                at a 25th of the length, and no more than a guess at another
"""

import argparse
import csv
import itertools
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = 50_000  # of CIFAR-10, which the published strength is for


@dataclass(frozen=True)
class Schedule:
    """Learning rates by the epoch that they hold from; ``reg_rate`` where a proximal step is scaled by the learning rate."""

    epochs: int
    freeze_epoch: int | None
    batch_size: int
    rates: dict[int, float]
    mode: tuple[str, ...] = ()
    reg_rate: float | None = None

    def pull(self) -> float:
        """Sum of the proximal strength over all steps before the freeze, for a reg_rate of 1."""
        rate, total = 0.0, 0.0
        for epoch in range(self.freeze_epoch or 0):
            rate = self.rates.get(epoch, rate)
            total += rate * epoch
        return total * math.ceil(IMAGES / self.batch_size)

    def shortened(self, divisor: int, batch_size: int) -> "Schedule":
        """The same shape and summed strength at a fraction of the length; raises ValueError where that has no room for it."""
        freeze = None if self.freeze_epoch is None else round(self.freeze_epoch / divisor)
        rates = {round(epoch / divisor): rate for epoch, rate in self.rates.items()}
        short = Schedule(max(1, round(self.epochs / divisor)), freeze, batch_size, rates, self.mode)
        return short.pulling(self.pull() * self.reg_rate) if self.reg_rate is not None else short

    def pulling(self, total: float) -> "Schedule":
        """With the ``reg_rate`` that makes the summed strength ``total``."""
        if not self.pull():
            raise ValueError(f"no epoch before the freeze at {self.freeze_epoch} has any strength: a longer schedule is needed")
        rate = float(f"{total / self.pull():.4g}")
        return Schedule(self.epochs, self.freeze_epoch, self.batch_size, self.rates, self.mode, rate)


REGIMES = ("published", "common", "tuned")
LAZY, PROX, TERNARY = (("--projection_mode", name) for name in ("lazy", "prox", "prox_ternary"))
PUBLISHED = {
    "fp": Schedule(200, None, 128, {0: 0.1, 100: 0.01, 150: 0.001}),
    "bc": Schedule(300, 200, 128, {0: 0.01, 81: 0.001, 122: 0.0001}, (*LAZY, "--binary_reg", "1.0")),
    "pq_binary": Schedule(300, 200, 128, {0: 0.01}, PROX, 1e-4),
    "pq_ternary": Schedule(600, 400, 256, {0: 0.01}, TERNARY, 1e-4),
}
# Share of the summed strength: the best of 1, 1/4, 1/8, 1/16 and 1/32 at a 25th of the length, on 5000 held-out training images.
TUNED = {"pq_binary": 1 / 16}


def schedule(method: str, regime: str, shorter: int, batch_size: int | None = None) -> Schedule:
    """A method's schedule; raises ValueError for an unknown name, and where ``shorter`` leaves too few epochs.

    ``batch_size`` replaces that of the quantized runs: half of it makes twice the steps, each with half the strength.
    """
    for name, value, known in (("METHODS", method, PUBLISHED), ("REGIMES", regime, REGIMES)):
        if value not in known:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
    if shorter < 1:
        raise ValueError(f"SHORTER: {shorter} is not accepted, a whole number from 1 up is needed")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"BATCH_SIZE: {batch_size} is not accepted, a whole number from 1 up is needed")
    if regime == "tuned" and method not in ("fp", *TUNED):
        raise ValueError(f"REGIMES: {regime!r} is for METHODS={' '.join(TUNED)}, not for {method}")
    chosen = published = PUBLISHED[method]
    if regime != "published" and method != "fp":
        chosen = Schedule(300, 200, 128, {0: 0.01, 150: 0.001, 225: 0.0001}, published.mode)
        if published.reg_rate is not None:
            chosen = chosen.pulling(published.pull() * published.reg_rate * (TUNED[method] if regime == "tuned" else 1.0))
    if batch_size is None or method == "fp":
        batch_size = chosen.batch_size
    return chosen if (shorter, batch_size) == (1, chosen.batch_size) else chosen.shortened(shorter, batch_size)


def arguments(method: str, regime: str, shorter: int, batch_size: int | None = None) -> list[str]:
    """The command line's arguments for a method's schedule."""
    chosen = schedule(method, regime, shorter, batch_size)
    found = ["--batch-size", str(chosen.batch_size), "--epochs", str(chosen.epochs)]
    if method != "fp":
        found += ["--optimizer", "Adam", "--lr", str(chosen.rates[0]), "--freeze_epoch", str(chosen.freeze_epoch), *chosen.mode]
    if len(chosen.rates) > 1:
        found += ["--regime", str({epoch: {"lr": rate} for epoch, rate in chosen.rates.items()})]
    if chosen.reg_rate is not None:
        found += ["--reg_rate", str(chosen.reg_rate)]
    return found


def plan(args: argparse.Namespace, common_arguments: list[str]) -> int:
    """Prints each experiment with the epochs that are left, and the time that they will take."""
    for method in args.methods.split():
        for regime in args.regimes.split():
            schedule(method, regime, args.shorter, args.batch_size)  # what cannot be is said before an epoch is measured
    hours = 0.0
    for depth in args.depths.split():
        seconds, source = epoch_seconds(args, depth, common_arguments)
        print(f"ResNet-{depth}: {seconds:.1f} s an epoch ({source})")
        methods = [method for method in args.methods.split() if method != "fp"]  # the warm start is one experiment, always there
        for regime, method in [("published", "fp"), *itertools.product(args.regimes.split(), methods)]:
            chosen = schedule(method, regime, args.shorter, args.batch_size)
            name = run_name(args.network.replace("DEPTH", depth), method, regime)
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


def run_name(network: str, method: str, regime: str) -> str:
    """The name of an experiment's runs, without their seed."""
    return network + ("" if method == "fp" else f"_{method}") + ("" if regime == "published" else f"_{regime}")


def trained(folder: Path) -> int:
    """Epochs that a run has behind it."""
    return len(measured_seconds(folder))


def measured_seconds(folder: Path) -> list[float]:
    """The seconds of each of a run's epochs."""
    try:
        with open(folder / "results.csv", newline="") as file:
            return [float(row["seconds"]) for row in csv.DictReader(file)]
    except OSError:  # not begun; or not a folder but a run's output
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
        command += [*arguments("pq_binary", "published", 1, args.batch_size), "--epochs", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"an epoch could not be measured: {(done.stderr.strip() or done.stdout).splitlines()[-1]}")
        return measured_seconds(Path(folder) / "measured")[0], "measured now, alone"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("arguments")
    one.add_argument("method")
    one.add_argument("regime")
    one.add_argument("shorter", type=int)
    one.add_argument("batch_size", type=int, nargs="?")
    whole = commands.add_parser("plan")
    whole.add_argument("--shorter", type=int, required=True)
    for name in ("depths", "seeds", "methods", "regimes", "network"):
        whole.add_argument(f"--{name}", required=True)
    whole.add_argument("--results_dir", type=Path, required=True)
    whole.add_argument("--batch_size", type=int)
    whole.add_argument("--slots", type=int, default=1)
    whole.add_argument("more", nargs="*")
    args = parser.parse_args()
    try:
        if args.command == "arguments":
            print("\n".join(arguments(args.method, args.regime, args.shorter, args.batch_size)))
            return 0
        return plan(args, args.more)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
