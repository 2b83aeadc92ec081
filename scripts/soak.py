"""Kills runs again and again, at random moments, inside writes and in evaluations, and compares what they end with to undisturbed
runs.

    python scripts/soak.py [--kills 50] [--each 5] [--kinds lazy,text_prox_alt] [--small] [--seed 0] [--folder DIR] [more]

Trains in full precision and in every projection mode on images, and a language model (text, text_lazy_alt, text_prox_alt), on the
embedded samples. Each disturbed run is killed by SIGKILL and started again with the same command until it ends by itself. Then
weights, the optimizer's state, the best checkpoint, results.csv (but for its seconds) and the points in TensorBoard must be those
of the undisturbed run, to the last bit. Exit status 0 if they all are.
"""

import argparse
import csv
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import quantize
from sources.images import CIFAR10_CLASSES

ROOT = Path(__file__).parent.parent

COMMON = ["--print-freq", "5", "--seed", "1", "--checkpoint_minutes", "0.005"]
IMAGES = ["--model_config", "{'depth': 8}"]
SAMPLE = ["--dataset", "sample", "--batch-size", "100"]
SMALL = ["--dataset", "cifar10", "--batch-size", "20"]
TEXT = ["--model", "lstm", "--dataset", "sample_text", "--model_config", "{'hidden': 8}", "--epochs", "3"]
QUANTIZED = ["--optimizer", "Adam", "--lr", "0.01", "--epochs", "4", "--freeze_epoch", "2"]
QUANTIZED_TEXT = [*TEXT, "--lr", "5", "--freeze_epoch", "2", "--bits", "2", "--by_row"]
WARM = {"image": "full_precision", "text": "text"}  # what the others start from
MOMENTS = ("anywhere", "inside a write", "in an evaluation")


def of_mode(mode: quantize.ProjectionMode) -> list[str]:
    """The arguments of a run on images; every other mode keeps its optimizer's state from epoch to epoch."""
    rate = ["--reg_rate", "0.5"] if mode.schedule.flag == "reg_rate" else []
    kept = ["--keep_optimizer_state"] if list(quantize.MODES).index(mode.name) % 2 == 0 else []
    return [*QUANTIZED, "--projection_mode", mode.name, *rate, *kept]


KINDS = {
    "full_precision": ["--epochs", "3"],
    **{name: of_mode(mode) for name, mode in quantize.MODES.items()},
    "text": TEXT,
    "text_lazy_alt": [*QUANTIZED_TEXT, "--projection_mode", "lazy_alt"],
    "text_prox_alt": [*QUANTIZED_TEXT, "--projection_mode", "prox_alt", "--reg_rate", "1e-3"],
}


def task_of(kind: str) -> str:
    return "text" if kind.startswith("text") else "image"


def make_images(folder: Path) -> None:
    """400 and 100 images of noise in CIFAR-10's class folders."""
    from PIL import Image

    drawn = torch.Generator().manual_seed(0)
    for label, name in enumerate(CIFAR10_CLASSES):
        for split, count in (("train", 40), ("test", 10)):
            place = folder / "CIFAR10" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = torch.randint(20 * label, 20 * label + 56, (32, 32, 3), generator=drawn, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{number}.png")


def command(folder: Path, kind: str, name: str, small: bool, more: list[str]) -> list[str]:
    words = [sys.executable, str(ROOT / "main_binary_reg.py"), *COMMON]
    if task_of(kind) == "image":
        words += [*IMAGES, *(SMALL if small else SAMPLE), *(["--data_dir", str(folder / "data")] if small else [])]
    warm = WARM[task_of(kind)]
    words += KINDS[kind] + ([] if kind == warm else ["--resume", str(folder / f"{warm}_whole")])
    return [*words, "--results_dir", str(folder), "--save", f"{kind}_{name}", *more]


def run_whole(words: list[str]) -> float:
    """Trains undisturbed; returns the seconds it took."""
    began = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


def moment_of(run: Path, process: int) -> str:
    """What a process is doing, or was doing when it was killed."""
    if any(run.glob(f".*.{process}.tmp")):
        return "inside a write"
    log = run / "log.txt"
    steps = re.search(r", step (\d+)/(\d+): [^\n]*\n$", log.read_text()) if log.exists() else None
    return "in an evaluation" if steps and steps[1] == steps[2] else "anywhere"


def run_broken(words: list[str], run: Path, kills: int, longest: float, chance: random.Random) -> Counter[str]:
    """Trains with up to so many kills; returns how many processes were really killed, by what they were doing."""
    killed: Counter[str] = Counter()
    while True:
        with open(run.with_name(f"{run.name}.out"), "a") as output:
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
            if killed.total() < kills:
                kill(process, run, chance.choice(MOMENTS), longest, chance)
            status = process.wait()
        if status == -signal.SIGKILL:
            killed[moment_of(run, process.pid)] += 1
        elif status == 0:
            return killed
        else:
            raise RuntimeError(f"{run.name} ended with status {status}, see {run.with_name(f'{run.name}.out')}")


def kill(process: subprocess.Popen, run: Path, moment: str, longest: float, chance: random.Random) -> None:
    """Kills a process at a random time, or a little after it began what it is to be killed in; not if it ends before."""
    try:
        process.wait(chance.uniform(0.3, 1.0 if moment == "anywhere" else 0.7) * longest)
    except subprocess.TimeoutExpired:
        while moment != "anywhere" and process.poll() is None and moment_of(run, process.pid) != moment:
            time.sleep(0.001)
        if moment == "in an evaluation":
            time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)


def differences(whole: Path, broken: Path) -> list[str]:
    """What differs between a disturbed run and the undisturbed one."""
    found = []
    for file_name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, other = (torch.load(run / file_name, weights_only=True) for run in (whole, broken))
        for key in ("epoch", "best_prec1", "best_ppl", "state_dict", "optimizer"):
            found += [f"{file_name}: {place}" for place in differing(one.get(key), other.get(key), key)]
    if table(whole) != table(broken):
        found.append("results.csv")
    if points(whole) != points(broken):
        found.append("TensorBoard")
    return found


def differing(one: Any, other: Any, place: str) -> list[str]:
    """Where two nested dicts and lists of tensors and plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key, value in one.items() for found in differing(value, other[key], f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for key, pair in enumerate(zip(one, other, strict=True)) for found in differing(*pair, f"{place}.{key}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [place]
    return [] if one == other else [place]


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
    parser.add_argument("--each", type=int, default=5, metavar="N", help="kills of a run at most (default: 5)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of runs (default: all)")
    parser.add_argument("--small", action="store_true", help="on 400 images of noise, so that a run takes seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder, removed at the end)")
    args, more = parser.parse_known_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]}: {', '.join(KINDS)} are accepted")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.small:
            make_images(folder / "data")
        began, chance, killed, failures, rounds = time.monotonic(), random.Random(args.seed), Counter(), 0, 0
        longest: dict[str, float] = {}
        while killed.total() < args.kills:
            kind, name = kinds[rounds % len(kinds)], f"broken_{rounds // len(kinds)}"
            for one in (WARM[task_of(kind)], kind):
                if one not in longest:
                    longest[one] = run_whole(command(folder, one, "whole", args.small, more))
            run = folder / f"{kind}_{name}"
            kills = min(args.each, args.kills - killed.total())
            killed += run_broken(command(folder, kind, name, args.small, more), run, kills, longest[kind], chance)
            found = differences(folder / f"{kind}_whole", run)
            failures += len(found)
            rounds += 1
            words = f"differs: {', '.join(found)}" if found else "identical"
            print(f"{kind}: {killed.total()} of {args.kills} kills, {words}", flush=True)
        inside = ", ".join(f"{killed[moment]} {moment}" for moment in MOMENTS[1:])
        seconds = time.monotonic() - began
        print(f"{killed.total()} kills ({inside}) over {rounds} runs, {failures} differences, {seconds:.0f} s")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
