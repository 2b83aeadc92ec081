"""Kills runs again and again, at random moments, inside writes and in evaluations, and compares what they end with to undisturbed
runs.

    python scripts/soak.py [--kills 50] [--each 5] [--kinds lazy,text_prox_alt] [--small] [--fork] [--seed 0] [--folder DIR] [more]

Trains in full precision and in every projection mode on images, and a language model (text, text_lazy_alt, text_prox_alt), on the
embedded samples; compiled (compiled) and in two processes (two); exports a network (export) and evaluates one (evaluation). Each
disturbed run is killed by SIGKILL and started again with the same command until it ends by itself. Then weights, the optimizer's
state, the best checkpoint, results.csv (but for its seconds) and the points in TensorBoard must be those of the undisturbed run, to
the last bit; so must the exported file, and what an evaluation prints. Exit status 0 if they all are.

With --fork the processes are forks of this one, which has torch imported, instead of new ones: a start costs next to nothing.
Of two forked processes one is killed, or both; torchrun is not between them.
"""

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from soaking import ends, jobs

import quantize
from sources.images import CIFAR10_CLASSES

ROOT = Path(__file__).parent.parent
MAIN, EXPORT = ROOT / "main_binary_reg.py", ROOT / "scripts" / "export.py"

COMMON = ["--print-freq", "1", "--seed", "1", "--checkpoint_minutes", "0.002"]
IMAGES = ["--model_config", "{'depth': 8}"]
SAMPLE = ["--dataset", "sample", "--batch-size", "100"]
SMALL = ["--dataset", "cifar10", "--batch-size", "20"]
TEXT = ["--model", "lstm", "--dataset", "sample_text", "--model_config", "{'hidden': 8}", "--epochs", "3"]
SMALL_TEXT = ["--dataset", "text", "--batch-size", "4"]
QUANTIZED = ["--optimizer", "Adam", "--lr", "0.01", "--epochs", "4", "--freeze_epoch", "2"]
QUANTIZED_TEXT = [*TEXT, "--lr", "5", "--freeze_epoch", "2", "--bits", "2", "--by_row"]
WARM = {"image": "full_precision", "text": "text"}  # what the others start from
USED = "lazy"  # what is exported and evaluated
MOMENTS = ("anywhere", "inside a write", "in an evaluation")


@dataclass(frozen=True)
class Kind:
    """A kind of run: its arguments, on images or a text, by how many processes; ``uses`` a finished run if it does not train."""

    words: list[str]
    task: str = "image"
    processes: int = 1
    uses: str = ""
    script: Path = MAIN


def of_mode(mode: quantize.ProjectionMode) -> Kind:
    """A run on images; every other mode keeps its optimizer's state from epoch to epoch."""
    rate = ["--reg_rate", "0.5"] if mode.schedule.flag == "reg_rate" else []
    kept = ["--keep_optimizer_state"] if list(quantize.MODES).index(mode.name) % 2 == 0 else []
    return Kind([*QUANTIZED, "--projection_mode", mode.name, *rate, *kept])


KINDS = {
    "full_precision": Kind(["--epochs", "3"]),
    **{name: of_mode(mode) for name, mode in quantize.MODES.items()},
    "text": Kind(TEXT, "text"),
    "text_lazy_alt": Kind([*QUANTIZED_TEXT, "--projection_mode", "lazy_alt"], "text"),
    "text_prox_alt": Kind([*QUANTIZED_TEXT, "--projection_mode", "prox_alt", "--reg_rate", "1e-3"], "text"),
    "compiled": Kind([*QUANTIZED, "--projection_mode", "lazy", "--compile", "on"]),
    "two": Kind([*QUANTIZED, "--projection_mode", "lazy", "--device", "cpu"], processes=2),
    "export": Kind([], uses=USED, script=EXPORT),
    "evaluation": Kind([], uses=USED),
}


def needed(kind: str) -> list[str]:
    """The kinds whose undisturbed runs must be there, in the order in which they are made."""
    found = KINDS[kind]
    if found.uses:
        return [*needed(found.uses), kind]
    return list(dict.fromkeys([WARM[found.task], kind]))


def make_data(folder: Path) -> None:
    """100 and 50 images of noise in CIFAR-10's class folders, and a text of a few hundred words."""
    from PIL import Image

    drawn = torch.Generator().manual_seed(0)
    for label, name in enumerate(CIFAR10_CLASSES):
        for split, count in (("train", 10), ("test", 5)):
            place = folder / "CIFAR10" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = torch.randint(20 * label, 20 * label + 56, (32, 32, 3), generator=drawn, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{number}.png")
    for part, lines in (("train", 150), ("valid", 20), ("test", 20)):
        numbers = torch.randint(1, 9, (lines,), generator=drawn).tolist()
        (folder / f"{part}.txt").write_text("".join(" ".join(map(str, range(number))) + "\n" for number in numbers))


def command(folder: Path, kind: str, name: str, small: bool, more: list[str]) -> list[str]:
    """The arguments of a run of a kind, whose folder is ``folder/KIND_NAME``."""
    found, run = KINDS[kind], folder / f"{kind}_{name}"
    data = ["--data_dir", str(folder / "data")] if small else []
    if found.script == EXPORT:
        return [str(folder / f"{found.uses}_whole"), "--out", str(run / "network.safetensors")]
    if found.uses:
        return ["--evaluate", str(folder / f"{found.uses}_whole"), *data]
    images, text = [*IMAGES, *(SMALL if small else SAMPLE)], SMALL_TEXT if small else []
    words = [*COMMON, *(images if found.task == "image" else []), *found.words, *(text if found.task == "text" else []), *data]
    words += [] if kind in WARM.values() else ["--resume", str(folder / f"{WARM[found.task]}_whole")]
    return [*words, "--results_dir", str(folder), "--save", run.name, *more]


def output_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.out")


def begin(start: type[jobs.Job], kind: str, words: list[str], run: Path) -> jobs.Job:
    if KINDS[kind].uses:
        run.mkdir(exist_ok=True)
    return start(KINDS[kind].script, words, output_of(run), KINDS[kind].processes)


def run_whole(start: type[jobs.Job], kind: str, words: list[str], run: Path) -> float:
    """Runs undisturbed; returns the seconds it took."""
    began = time.monotonic()
    status = begin(start, kind, words, run).wait()
    if status != 0:
        raise RuntimeError(f"{run.name} ended with status {status}, see {output_of(run)}")
    return time.monotonic() - began


def moment_of(kind: str, run: Path, pids: list[int]) -> str:
    """What the processes are doing, or were doing when they were killed."""
    if any(file for pid in pids for file in run.glob(f".*.{pid}.tmp")):
        return "inside a write"
    if KINDS[kind].uses:
        return f"in an {kind}"
    log = run / "log.txt"
    lines = log.read_text() if log.exists() else ""
    if kind == "compiled" and re.search(r" mode: [^\n]*\n[^\n]*(quantized|nothing)[^\n]*\n$|continuing[^\n]*\n$", lines):
        return "in a compilation"
    steps = re.search(r", step (\d+)/(\d+): [^\n]*\n$", lines)
    return "in an evaluation" if steps and steps[1] == steps[2] else "elsewhere"


def run_broken(
    start: type[jobs.Job], kind: str, words: list[str], run: Path, kills: int, longest: float, chance: random.Random
) -> Counter[str]:
    """Runs with up to so many kills; returns how many processes were really killed, by what they were doing."""
    killed: Counter[str] = Counter()
    while True:
        job = begin(start, kind, words, run)
        aimed = killed.total() < kills
        if aimed:
            moments = MOMENTS[:1] if KINDS[kind].uses else MOMENTS
            kill(job, kind, run, chance.choice(moments), longest, 0.0 if start is jobs.Forked else 0.3, chance)
        status = job.wait(60 + 10 * longest)
        if status is None:
            job.kill()
            raise RuntimeError(f"{run.name} hangs: {10 * longest + 60:.0f} s were not enough, see {output_of(run)}")
        if status == -9 and aimed:
            killed[moment_of(kind, run, job.pids)] += 1
        elif status == 0:
            return killed
        else:
            raise RuntimeError(f"{run.name} ended with status {status}, see {output_of(run)}")


def kill(job: jobs.Job, kind: str, run: Path, moment: str, longest: float, first: float, chance: random.Random) -> None:
    """Kills a job at a random time, or a little after it began what it is to be killed in; not if it ends before.

    Args:
        moment: one of ``MOMENTS``.
        longest: seconds that an undisturbed run takes.
        first: share of them at which the earliest kills fall.
    """
    last = 1.0 if moment == "anywhere" and not KINDS[kind].uses else 0.6
    if job.wait(chance.uniform(first, last) * longest) is not None:
        return
    while moment != "anywhere" and job.wait(0) is None and moment_of(kind, run, job.pids) != moment:
        time.sleep(0.0002)
    if moment == "in an evaluation":
        time.sleep(chance.uniform(0, 0.05))
    if job.wait(0) is None:
        job.kill(chance.choice([None, *range(len(job.pids))]))


def differences(kind: str, whole: Path, broken: Path) -> list[str]:
    """What differs between a disturbed run and the undisturbed one."""
    if KINDS[kind].script == EXPORT:
        one, other = (sorted((path.name, path.read_bytes()) for path in run.iterdir() if path.suffix != ".tmp")
                      for run in (whole, broken))  # fmt: skip
        return [] if one == other else ["the exported file"]
    if KINDS[kind].uses:
        return [] if output_of(broken).read_text().endswith(output_of(whole).read_text()) else ["what is printed"]
    return ends.differences(whole, broken)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all (default: 50)")
    parser.add_argument("--each", type=int, default=5, metavar="N", help="kills of a run at most (default: 5)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of runs (default: all)")
    parser.add_argument("--small", action="store_true", help="on 100 images of noise and a short text, so that a run takes seconds")
    parser.add_argument("--fork", action="store_true", help="fork the processes from this one (set OMP_NUM_THREADS=1)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: a temporary folder, removed at the end)")
    args, more = parser.parse_known_args()
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds {unknown[0]}: {', '.join(KINDS)} are accepted")
    if args.each < 1:
        parser.error(f"--each {args.each}: a whole number from 1 up is needed")
    if args.folder and args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(
            f"--folder {args.folder}: a new or an empty folder is needed, so that no run of another soak is taken for one of this"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.small:
            make_data(folder / "data")
        start = jobs.Forked if args.fork else jobs.Started
        if args.fork:
            torch.set_num_threads(1)  # there are no threads in a fork
            for script in (MAIN, EXPORT):
                jobs.module_of(script)
        began, chance, killed, by_kind, failures, rounds = time.monotonic(), random.Random(args.seed), Counter(), Counter(), 0, 0
        longest: dict[str, float] = {}
        while killed.total() < args.kills:
            kind, name = kinds[rounds % len(kinds)], f"broken_{rounds // len(kinds)}"
            for one in needed(kind):
                if one not in longest:
                    words = command(folder, one, "whole", args.small, more)
                    longest[one] = run_whole(start, one, words, folder / f"{one}_whole")
            run = folder / f"{kind}_{name}"
            kills = min(args.each, args.kills - killed.total())
            words = command(folder, kind, name, args.small, more)
            found = run_broken(start, kind, words, run, kills, longest[kind], chance)
            killed, by_kind[kind] = killed + found, by_kind[kind] + found.total()
            differing = differences(kind, folder / f"{kind}_whole", run)
            failures += len(differing)
            rounds += 1
            words = f"differs: {', '.join(differing)}" if differing else "identical"
            print(f"{kind}: {killed.total()} of {args.kills} kills, {words}", flush=True)
            if not differing:
                shutil.rmtree(run)
        moments, kinds_hit = (", ".join(f"{count} {name}" for name, count in counts.most_common()) for counts in (killed, by_kind))
        seconds = time.monotonic() - began
        print(f"by kind: {kinds_hit}")
        print(f"{killed.total()} kills ({moments}) over {rounds} runs, {failures} differences, {seconds:.0f} s")
        return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
