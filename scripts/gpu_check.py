"""Tries and measures everything that a GPU changes, part by part, and sums it up in a table and one JSON file.

    python scripts/gpu_check.py [--out DIR] [--parts tests,bench] [--limits bench=900] [--dataset cifar10] [--data_dir DIR]

No part stops the next: each has commands of its own and a limit in seconds, and its output is in PART.out. Figures come first, for
machines that are lent for minutes; given again with other --parts, it adds to what DIR has. Without a GPU each part does what the
CPU can, shortly. Exit status 0 if every part passed.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import utils

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, str(ROOT / "main_binary_reg.py")]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rs", "-p", "no:cacheprovider"]
QUANTIZED = ["--projection_mode", "prox", "--reg_rate", "0.5", "--optimizer", "Adam", "--lr", "0.01"]


@dataclass(frozen=True)
class Part:
    """One thing to try.

    Attributes:
        title: what it shows.
        commands: run one after the other; the first that fails ends the part.
        limit: seconds for all of them.
        environment: variables set for them.
        leaves: what they leave in the folder, to be removed before: what is found there later is theirs.
    """

    title: str
    commands: list[list[str]]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()


def parts(out: Path, gpu: bool, dataset: str, data_dir: str) -> dict[str, Part]:
    """All parts by name, as they suit a GPU or a CPU."""
    bench = [sys.executable, str(ROOT / "scripts" / "bench.py"), *([] if gpu else ["--quick"])]
    on_data = ["--dataset", dataset, "--data_dir", data_dir]
    run = [*MAIN, *on_data, "--results_dir", str(out), "--overwrite", "--model_config", f"{{'depth': {20 if gpu else 8}}}"]
    repeat = [*run, *QUANTIZED, "--epochs", "2", "--freeze_epoch", "1", "--deterministic", "--seed", "3"]
    compare = [sys.executable, str(Path(__file__)), "--compare", str(out / "repeat-1"), str(out / "repeat-2")]
    epochs = ["--epochs", "3" if gpu else "1", "--save"]
    study = {"SCHEDULE": "short", "DATASET": dataset, "DATA_DIR": data_dir, "PYTHON": sys.executable, "TB_DIR": str(out / "tb")}
    study |= {"RESULTS_DIR": str(out / "study"), "METHODS": "bc pq_binary", "REGIMES": "published"}
    study |= {"SEEDS": "0 1", "RUNS_PER_GPU": "2"} if gpu else {"SEEDS": "0", "DEPTHS": "8", "SHORTER": "100"}
    captured = ["-m", "gpu", "-k", "captured_steps"] if gpu else ["-k", "captured_steps and not gpu and Adam"]
    return {
        "epoch": Part("seconds of an epoch", [[*run, *QUANTIZED, *epochs, "epoch"]], 300, leaves=("epoch",)),
        "capture": Part(
            "seconds of an epoch with --capture",
            [[*run, *QUANTIZED, *epochs, "capture", "--capture"]],
            300,
            leaves=("capture",),
        ),
        "bench": Part(
            "step against its floor; runs at once",
            [[*bench, "--json", str(out / "bench.json")]],
            600,
            leaves=("bench.json",),
        ),
        "text": Part(
            "the same of the language model",
            [[*bench, "--task", "text", "--json", str(out / "text.json")]],
            300,
            leaves=("text.json",),
        ),
        "repeat": Part(
            "--deterministic, twice the same bits",
            [[*repeat, "--save", "repeat-1"], [*repeat, "--save", "repeat-2"], compare],
            300,
            leaves=("repeat-1", "repeat-2"),
        ),
        "captured": Part("captured step against the plain one", [[*PYTEST, *captured, "tests/test_captured.py"]], 400),
        "tests": Part("tests marked for a GPU", [[*PYTEST, "-m", "gpu", "-k", "not captured_steps", "tests"]], 300),
        "study": Part("a short study", [[str(ROOT / "scripts" / "reproduce.sh")]], 900, study, leaves=("study", "tb")),
    }


def carry_out(part: Part, output: Path) -> tuple[str, float]:
    """Runs a part; returns how it ended and its seconds. Nothing that it started outlives it."""
    began = time.monotonic()
    with open(output, "w") as file:
        for command in part.commands:
            settings = {"stdout": file, "stderr": subprocess.STDOUT, "cwd": ROOT, "start_new_session": True}
            unbuffered = {"PYTHONUNBUFFERED": "1"}  # what was said before a limit is to be read
            process = subprocess.Popen(command, env={**os.environ, **unbuffered, **part.environment}, **settings)
            try:
                status = process.wait(max(0.0, part.limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                return f"over {part.limit:g} s", time.monotonic() - began
            finally:
                end_group(process)
            if status:
                return f"failed ({status})", time.monotonic() - began
    return "passed", time.monotonic() - began


def remove(path: Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def figures(name: str, out: Path) -> Any:
    """What a part has measured, where it left figures, also one that did not come to its end."""
    if (measured := out / f"{name}.json").exists():
        return json.loads(measured.read_text())
    if (table := out / name / "results.csv").exists():
        with open(table, newline="") as file:
            return {"seconds_by_epoch": [float(row["seconds"]) for row in csv.DictReader(file)]}
    return None


def compare(one: Path, other: Path) -> int:
    """Exit status 0 if two runs have the same weights, to the last bit."""
    first, second = (torch.load(run / "checkpoint.pth.tar", weights_only=True)["state_dict"] for run in (one, other))
    differing = [name for name, value in first.items() if not torch.equal(value, second[name])]
    print(f"{len(differing)} of {len(first)} tensors differ {' '.join(differing)}")
    return 1 if differing else 0


def measured_before(out: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The parts of an earlier call on this machine with these versions; none where it was another."""
    try:
        before = json.loads((out / "gpu_check.json").read_text())
        return before["parts"] if before["machine"] == here else {}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    found = {"gpus": gpus, "cuda": torch.version.cuda, "torch": torch.__version__, "python": platform.python_version()}
    return {**found, "cores": os.cpu_count()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of what is written (default: gpu_check)")
    parser.add_argument("--parts", help="only these, such as tests,bench")
    parser.add_argument("--limits", default="", help="other limits in seconds, such as bench=900,study=600")
    parser.add_argument("--dataset", default="sample", help="of the runs (default: sample, which is in the repository)")
    parser.add_argument("--data_dir", default="Datasets")
    parser.add_argument("--compare", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    out, gpu = args.out.resolve(), torch.cuda.is_available()
    known = parts(out, gpu, args.dataset, str(Path(args.data_dir).resolve()))
    chosen = args.parts.split(",") if args.parts else list(known)
    limits = {name: limit for name, _, limit in (word.partition("=") for word in args.limits.split(",") if word)}
    for name in (*chosen, *limits):
        if name not in known:
            parser.error(f"there is no part {name}: {', '.join(known)} are accepted")
    for name, limit in limits.items():
        if not limit.isdecimal():
            parser.error(f"--limits {name}={limit}: whole seconds are needed")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what runs ends with this process
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    here = machine()
    summary: dict[str, Any] = {"machine": here, "parts": measured_before(out, here) if args.parts else {}}
    print(", ".join(summary["machine"]["gpus"]) or "no GPU here: each part does what the CPU can, shortly", flush=True)
    for name in chosen:
        part = replace(known[name], limit=float(limits.get(name, known[name].limit)))
        if name == "capture" and not gpu:
            ended, seconds = "left out: needs a GPU", 0.0
        else:
            print(f"{name}: {part.title}, at most {part.limit:g} s ...", flush=True)
            for left in part.leaves:
                remove(out / left)
            ended, seconds = carry_out(part, out / f"{name}.out")
        measured = figures(name, out)
        row = {"title": part.title, "date": time.strftime("%Y-%m-%d"), "ended": ended, "seconds": round(seconds, 1)}
        summary["parts"][name] = {**row, "figures": measured}
        utils.write_text(out / "gpu_check.json", json.dumps(summary, indent=2) + "\n")  # after each: what was measured stays
    print(f"\n{'part':10}{'':48}{'seconds':>9}  ended")
    for name, row in summary["parts"].items():
        print(f"{name:10}{row['title']:48}{row['seconds']:>9.1f}  {row['ended']}")
    print(f"\nfigures: {out / 'gpu_check.json'}; what each part said: {out}/PART.out")
    return 0 if all(summary["parts"][name]["ended"].startswith(("passed", "left out")) for name in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
