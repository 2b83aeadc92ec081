"""Kills runs at random moments, again and again, and compares what they end with to undisturbed runs.

    python scripts/soak.py [--kills 50] [--kinds lazy,prox] [--seed 0] [--folder DIR] [further arguments of all runs]

Trains on the embedded sample in all four kinds (full precision and the three modes). Each disturbed run is killed by SIGKILL after
a random time and started again with the same command until it ends by itself. Then weights, best checkpoint, results.csv (but for
its seconds) and the points in TensorBoard must be those of the undisturbed run, to the last bit. Exit status 0 if they all are.
"""

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
COMMON = ["--dataset", "sample", "--model_config", "{'depth': 8}", "--batch-size", "100", "--print-freq", "5", "--seed", "1"]
QUANTIZED = ["--optimizer", "Adam", "--lr", "0.01", "--epochs", "4", "--freeze_epoch", "2"]
KINDS = {
    "full_precision": ["--epochs", "3"],
    "prox": [*QUANTIZED, "--projection_mode", "prox", "--reg_rate", "0.5"],
    "lazy": [*QUANTIZED, "--projection_mode", "lazy", "--keep_optimizer_state"],
    "prox_ternary": [*QUANTIZED, "--projection_mode", "prox_ternary", "--reg_rate", "0.5"],
}


def command(folder: Path, kind: str, name: str, more: list[str]) -> list[str]:
    warm = [] if kind == "full_precision" else ["--resume", str(folder / "full_precision_whole")]
    place = ["--results_dir", str(folder), "--save", f"{kind}_{name}"]
    return [sys.executable, str(ROOT / "main_binary_reg.py"), *COMMON, *KINDS[kind], *warm, *place, *more]


def run_whole(folder: Path, kind: str, more: list[str]) -> float:
    """Trains undisturbed; returns the seconds it took."""
    began = time.monotonic()
    subprocess.run(command(folder, kind, "whole", more), check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def run_broken(folder: Path, kind: str, name: str, more: list[str], kills: int, longest: float, chance: random.Random) -> int:
    """Trains with up to so many kills; returns how many processes were really killed."""
    killed = 0
    while True:
        with open(folder / f"{kind}_{name}.out", "a") as output:
            process = subprocess.Popen(command(folder, kind, name, more), stdout=output, stderr=subprocess.STDOUT)
            if killed < kills:
                try:
                    process.wait(chance.uniform(0.3 * longest, longest))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
            status = process.wait()
        if status == -signal.SIGKILL:
            killed += 1
        elif status == 0:
            return killed
        else:
            raise RuntimeError(f"{kind}_{name} ended with status {status}, see {folder / f'{kind}_{name}.out'}")


def differences(folder: Path, kind: str, name: str) -> list[str]:
    """What differs between a disturbed run and the undisturbed one."""
    whole, broken = folder / f"{kind}_whole", folder / f"{kind}_{name}"
    found = []
    for file_name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, other = (torch.load(run / file_name, weights_only=True) for run in (whole, broken))
        if one["epoch"] != other["epoch"] or one["best_prec1"] != other["best_prec1"]:
            found.append(f"{file_name}: epoch or best score")
        found += [
            f"{file_name}: {key}" for key, value in one["state_dict"].items() if not torch.equal(value, other["state_dict"][key])
        ]
    if table(whole) != table(broken):
        found.append("results.csv")
    if points(whole) != points(broken):
        found.append("TensorBoard")
    return found


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tb"), {"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of runs (default: {','.join(KINDS)})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder, removed at the end)")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        began, chance, killed, failures, rounds = time.monotonic(), random.Random(args.seed), 0, [], 0
        kinds = args.kinds.split(",")
        longest = {kind: run_whole(folder, kind, more) for kind in dict.fromkeys(["full_precision", *kinds])}
        while killed < args.kills:
            kind, name = kinds[rounds % len(kinds)], f"broken_{rounds // len(kinds)}"
            killed += run_broken(folder, kind, name, more, min(5, args.kills - killed), longest[kind], chance)
            differing = differences(folder, kind, name)
            failures += [f"{kind}_{name}: {words}" for words in differing]
            rounds += 1
            print(
                f"{kind}: {killed} of {args.kills} kills, {'differs: ' + ', '.join(differing) if differing else 'identical'}",
                flush=True,
            )
        print(f"{killed} kills over {rounds} runs, {len(failures)} differences, {time.monotonic() - began:.0f} s")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
