"""The report: made-up run folders whose figures are known, through the real command line."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, run_main
from PIL import Image

import quantize
from training import checkpoints, tracking
from training.tasks import IMAGES

sys.path.insert(0, str(ROOT / "scripts"))

import report
from reporting import families, groups, pictures, runs, statistics, tables, text, weights

ERRORS = {
    "lazy": {0: 19.5, 1: 19.1, 2: 19.4, 3: 19.9},
    "prox": {0: 18.2, 1: 18.0, 2: 18.1, 3: 18.9},
    "prox_ternary": {0: 17.4, 1: 17.9},
}
SIGNS = {"lazy": 0.26, "prox": 0.17, "prox_ternary": 0.29}
HELD_OUT = {"source": "class folders in /a/b", "samples": "images", "training": 45000, "validation": 5000}
START = 17.32  # best error of the warm start
T_3 = 3.182446305284263  # Student's t, 97.5%, 3 degrees of freedom, from a textbook's table
LAYERS = ("conv1.weight", "layer1.0.conv1.weight", "fc.weight")


def make_run(
    folder: Path, mode: str | None, seed: int, error: float, epochs: int = 6, rows: int | None = None, rate: float = 0.01, **more
) -> Path:
    """A run folder as the program writes it; ``more`` are further arguments."""
    arguments = {"dataset": "cifar10", "model": "resnet", "model_config": {"depth": 20}, "epochs": epochs, "batch_size": 128,
                 "freeze_epoch": 4 if mode else -1, "seed": seed, "projection_mode": mode, "resume": None, "optimizer": "Adam",
                 "lr": rate, "regime": None, "reg_rate": 0.07 if mode and mode != "lazy" else 0.0, "binary_reg": 0.0,
                 "precision": "auto", "results_dir": "results", "data_dir": "/somewhere/private/Datasets", "tb_dir": None,
                 **more}  # fmt: skip
    quantized = {None: (0, 0), "prox_ternary": (267264, 18)}.get(mode, (268336, 20))
    facts = {
        "regime": {"0": {"optimizer": "Adam", "lr": rate}, "3": {"lr": rate / 10}},
        "data": {"source": "class folders in /somewhere/private/CIFAR10", "samples": "images", "training": 50000,
                 "validation": 10000},
        "parameters": 272474, "quantized": {"weights": quantized[0], "tensors": quantized[1]},
        "compiled": True, "captured": False,
        "command": ["/home/someone/secret/main_binary_reg.py", "--save", folder.name, "--data_dir", "/home/someone/secret/Datasets",
                    "--resume=/home/someone/results/fp_run_0", "--model_config", "{'depth': 20}", "--seed", str(seed)],
        "versions": {"python": "3.11.7", "torch": "2.14.1"}, "device": "cpu, 1 threads", "git_revision": "abc1234",
        "precision": "bf16",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"arguments": arguments, **facts}))
    (folder / "log.txt").write_text("")
    table = [row_after(epoch, epochs, mode, error, rate) for epoch in range(1, (epochs if rows is None else rows) + 1)]
    write_rows(folder, table)
    return folder


def row_after(epoch: int, epochs: int, mode: str | None, error: float, rate: float) -> dict:
    """A falling error that ends at ``error`` + 0.5 after its best, ``error``, one epoch before."""
    now = error + (0.5 if epoch == epochs else 2.0 * (epochs - 1 - epoch))
    row = {"epoch": epoch, "train_loss": 1.0, "val_loss": 1.1, "train_error1": 20.0, "val_error1": now, "train_error5": 1.0,
           "val_error5": 1.0, "lr": rate if epoch <= 3 else rate / 10, "strength": 0.0, "seconds": 10.0}  # fmt: skip
    if mode:
        row |= {"val_loss_bin": 1.2, "val_error1_bin": now, "val_error1": now - 5, "val_error5_bin": 1.0, "binary": 0.5 / epoch}
        row |= {"quant_error": 0.4, "sign_change": SIGNS[mode] + 0.01 * (epoch - 4)}
        row["strength"] = 1.0 if mode == "lazy" else 0.07 * (epoch - 1)
    return row


def add_facts(folder: Path, **facts) -> Path:
    """Puts more into args.json, beside the arguments."""
    path = folder / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def write_rows(folder: Path, rows: list[dict]) -> None:
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, IMAGES.columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def make_events(folder: Path, continued: bool = False) -> np.ndarray:
    """Histograms as the program writes them: weights that lie evenly at first, some beyond 1, are at the levels at the freeze."""
    start = torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    with tracking.Board(IMAGES, folder, 0) as board:
        board.add_histograms(dict.fromkeys(LAYERS, start), 0)
        if continued:
            board.add_histograms(dict.fromkeys(LAYERS, start * 0 + 0.3), 3)
        board.add_histograms(dict.fromkeys(LAYERS, start.sign()), 4)
    if continued:  # after epoch 2: what was written of epochs 3 and 4 is of a process that was killed
        with tracking.Board(IMAGES, folder / "later", 2) as board:
            board.add_histograms(dict.fromkeys(LAYERS, start.sign()), 4)
        shutil.move(next((folder / "later").iterdir()), folder / "events.out.tfevents.9999999999.later")
    return start.numpy()


def damage(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    """Results as a study leaves them, with everything that can be amiss."""
    root = tmp_path_factory.mktemp("place") / "results"
    make_run(root / "fp_run_0", None, 0, START, epochs=8)
    for mode, errors in ERRORS.items():
        for seed, error in errors.items():
            folder = make_run(root / f"{mode}_run_{seed}", mode, seed, error - 0.5, resume="results/fp_run_0")
            make_events(folder / "tb")
    make_run(root / "prox_run_4", "prox", 4, 30.0, resume="results/fp_run_0", rate=0.1)
    make_run(root / "lazy_run_5", "lazy", 5, 90.0, rows=2, resume="results/fp_run_0")
    make_run(root / "again" / "lazy", "lazy", 1, 91.0, resume="results/fp_run_0", results_dir="results/again")
    add_facts(make_run(root / "held_out", "prox", 0, 40.0, holdout=5000), data=HELD_OUT)
    make_run(root / "deep" / "er" / "sample_8", "prox", 3, 50.0, dataset="sample", model_config={"depth": 8})
    broken = row_after(2, 3, "prox", 18, 0.01) | {"val_loss": "nan"}
    lost = make_run(root / "not_a_number", "prox", 6, 92.0, epochs=3, rows=1)
    write_rows(lost, [row_after(1, 3, "prox", 18, 0.01), broken, row_after(3, 3, "prox", 18, 0.01)])
    (make_run(root / "no_results", "prox", 7, 93.0) / "results.csv").unlink()
    damage(make_run(root / "bad_args", "prox", 8, 94.0), "args.json", '{"arguments": {"dataset"')
    damage(make_run(root / "bad_csv", "prox", 9, 95.0), "results.csv", "epoch,train_loss,val_loss,val_error1\n1,2,oops,3\n")
    (root / "prox_run_10.out").write_text("Killed\n")
    return root


def run_report(*arguments: object, cwd: Path = ROOT, under: Sequence[str] = ()) -> subprocess.CompletedProcess:
    python = sys.executable if under else forks.python()  # a fork has the rights of what it was forked from
    command = [*under, python, str(ROOT / "scripts" / "report.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def out(study, tmp_path_factory) -> Path:
    """The study's report."""
    folder = tmp_path_factory.mktemp("out") / "new" / "folder"
    done = run_report(study, "--out", folder, "--data_note", "cifar10=JPEG copy")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "14 of 21 runs in 7 groups" in done.stdout
    return folder


@pytest.fixture(scope="module")
def lines(out) -> list[dict[str, str]]:
    with open(out / "report.csv", newline="") as file:
        return list(csv.DictReader(file))


def line_of(lines: list[dict[str, str]], method: str, seeds: str) -> dict[str, str]:
    (found,) = (line for line in lines if (line["method"], line["seeds"]) == (method, seeds))
    return found


@pytest.mark.parametrize(
    ("mode", "method"), [("lazy", "BinaryConnect"), ("prox", "ProxQuant-binary"), ("prox_ternary", "ProxQuant-ternary")]
)
def test_figures_of_a_group(lines, out, mode, method):
    errors = np.array(list(ERRORS[mode].values()))
    line = line_of(lines, method, " ".join(map(str, ERRORS[mode])))
    assert float(line["final_error_mean"]) == pytest.approx(errors.mean())
    assert float(line["final_error_std"]) == pytest.approx(errors.std(ddof=1))
    assert [float(word) for word in line["final_errors"].split()] == pytest.approx(errors)
    assert float(line["best_error_mean"]) == pytest.approx(errors.mean() - 0.5)
    assert line["warm_start"] == "results/fp_run_0"
    assert float(line["warm_start_error"]) == pytest.approx(START)
    assert float(line["gap"]) == pytest.approx(errors.mean() - START)
    assert float(line["sign_change_at_freeze_percent_mean"]) == pytest.approx(100 * SIGNS[mode])
    assert float(line["binary_before_freeze_mean"]) == pytest.approx(0.125)
    assert float(line["error_before_freeze_mean"]) == pytest.approx(errors.mean() - 0.5 + 2 - 5)  # an epoch before the best
    assert float(line["paper_error"]) == {"lazy": 9.54, "prox": 9.35, "prox_ternary": 8.40}[mode]
    assert line["data_note"] == "JPEG copy"
    assert line["n"] == str(len(errors))
    if len(errors) == 4:
        assert float(line["final_error_half_width_95"]) == pytest.approx(T_3 * errors.std(ddof=1) / 2)
    else:
        assert line["final_error_half_width_95"] == ""
    words = (out / "report.md").read_text()
    assert f"{errors.mean():.2f} ({errors.std(ddof=1):.2f}, n={len(errors)})" in words


def test_one_seed_has_no_spread(lines, out):
    line = line_of(lines, "ProxQuant-binary", "4")
    assert float(line["final_error_mean"]) == pytest.approx(30.5)
    assert line["final_error_std"] == ""
    assert "| 30.50 (n=1) |" in (out / "report.md").read_text()


def test_groups_are_those_of_equal_arguments(lines):
    found = {(line["data_set"], line["depth"], line["method"], line["holdout"], line["seeds"]) for line in lines}
    assert found == {
        ("cifar10", "20", "full precision", "0", "0"),
        ("cifar10", "20", "BinaryConnect", "0", "0 1 2 3"),
        ("cifar10", "20", "ProxQuant-binary", "0", "0 1 2 3"),
        ("cifar10", "20", "ProxQuant-binary", "0", "4"),
        ("cifar10", "20", "ProxQuant-ternary", "0", "0 1"),
        ("cifar10", "20", "ProxQuant-binary", "5000", "0"),
        ("sample", "8", "ProxQuant-binary", "0", "3"),
    }
    assert len(lines) == len(found)
    assert [line["holdout"] for line in lines if line["data_set"] == "cifar10"][-1] == "5000"  # after the test set's figures
    schedule = line_of(lines, "ProxQuant-binary", "0 1 2 3")["schedule"]
    assert schedule == "6 epochs, freeze 4, batch 128, Adam 0.01 -> 0.001@3, reg_rate 0.07, bf16"
    assert "Adam 0.1 -> 0.01@3" in line_of(lines, "ProxQuant-binary", "4")["schedule"]
    assert {line["paper_error"] == "" for line in lines if line["holdout"] == "5000"} == {True}
    noted = {line["data_set"]: line["data_note"] for line in lines}
    assert noted == {"cifar10": "JPEG copy", "sample": ""}


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("results/lazy_run_5", "unfinished: 2 of 6 epochs"),
        ("again/lazy", "the same seed, 1, and the same arguments as results/lazy_run_1"),
        ("results/not_a_number", "val_loss is not a number in epoch 2"),
        ("results/no_results", "no results.csv"),
        ("results/bad_args", "its args.json cannot be read"),
        ("results/bad_csv", "its results.csv cannot be read: line 2 has no number in val_loss"),
        ("results/prox_run_10", "it never began"),
        ("results/prox_run_4", "not as most of its family"),
    ],
)
def test_what_is_amiss_is_listed(out, run, reason):
    listed = (out / "report.md").read_text().split("## Left out")[1].splitlines()
    (line,) = (line for line in listed if line.startswith(f"| {run} |"))
    assert reason in line
    if "family" in reason:
        assert "lr 0.1, there 0.01" in line


def test_what_is_amiss_is_in_no_mean(out, lines):
    assert not any(float(error) > 60 for line in lines for error in line["final_errors"].split())
    assert (out / "report.md").read_text().split("## Left out")[1].count("\n| ") == 2 + 8


def test_paired_differences(out):
    with open(out / "report_comparisons.csv", newline="") as file:
        found = list(csv.DictReader(file))
    by_pair = {(one["quantity"], one["first_method"], one["second_method"], one["shared_seeds"]): one for one in found}
    one = by_pair["final error", "ProxQuant-binary", "BinaryConnect", "4"]
    differences = np.array([ERRORS["prox"][seed] - ERRORS["lazy"][seed] for seed in range(4)])
    half = T_3 * differences.std(ddof=1) / math.sqrt(4)
    assert float(one["first_minus_second"]) == pytest.approx(differences.mean())
    assert float(one["low_95"]) == pytest.approx(differences.mean() - half)
    assert float(one["high_95"]) == pytest.approx(differences.mean() + half)
    assert one["same_schedule"] == "True"
    assert one["verdict"].startswith("ProxQuant-binary")
    few = by_pair["final error", "ProxQuant-ternary", "BinaryConnect", "2"]
    assert (few["verdict"], few["low_95"]) == ("too few seeds to say", "")
    assert float(few["first_minus_second"]) == pytest.approx((17.4 - 19.5 + 17.9 - 19.1) / 2)
    signs = by_pair["sign changes", "ProxQuant-binary", "BinaryConnect", "4"]
    assert float(signs["first_minus_second"]) == pytest.approx(-9)
    other = by_pair["final error", "ProxQuant-binary", "BinaryConnect", "0"]  # seed 4 of the other schedule has no partner
    assert (other["same_schedule"], other["first_minus_second"]) == ("False", "")
    # Held-out images and another data set are never set against the test set of CIFAR-10.
    # Signs are compared where the same layers are quantized: BinaryConnect with each of two groups of ProxQuant-binary.
    assert len(found) == 4 * 3 // 2 + 2


def test_verdicts():
    assert statistics.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 3.0, 2: 2.9}).shown is False
    assert statistics.paired({0: 1.0, 1: 2.0, 2: 3.0}, {0: 0.0, 1: 1.1, 2: 2.05}).shown is True
    assert statistics.paired({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.0}).shown is False
    assert statistics.paired({0: 1.0}, {1: 1.0}) == statistics.Difference(0)
    assert statistics.spread([]) is None
    assert statistics.spread([3.0]) == statistics.Spread(3.0, None, 1)
    assert statistics.spread([math.inf, 3.0, math.inf]) == statistics.Spread(math.inf, None, 3)
    assert statistics.spread([math.inf, 3.0, math.inf]).half_width is None
    beyond = statistics.paired({0: math.inf, 1: math.inf, 2: 1.0}, {0: 1.0, 1: math.inf, 2: math.inf})
    assert (beyond.n, beyond.low, beyond.shown) == (3, None, False)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_t_quantiles_are_those_of_the_books(degrees, expected):
    assert statistics.t_quantile(degrees) == pytest.approx(expected, abs=5e-4)


def test_t_distribution():
    assert statistics.t_quantile(3, 0.99) == pytest.approx(5.841, abs=5e-4)
    assert statistics.t_quantile(1, 0.5) == pytest.approx(1)  # Cauchy


def test_the_text(out, study):
    words = (out / "report.md").read_text()
    order = ["# Report", "how sure", "## Before you believe it", "on the test set", "start from the same full-precision",
             "not symmetric", "final error %", "The paper's table", "Hardware", "abc1234", "## Commands",
             "## Left out"]  # fmt: skip
    places = [words.index(word) for word in order]
    assert places == sorted(places)
    assert "cifar10 (JPEG copy), ResNet-20" in words
    assert "| 17.65 | 2 seeds, 17.40, 17.90: too few for an interval | 8.40 (0.13) |" in words
    assert "| 40.50 | 1 seed: nothing is known of the spread | 6 epochs" in words  # held out: the paper's is not beside it
    assert "| ResNet-56 | the paper's | 6.54 | 7.97 (0.22) | 7.70 (0.06) | 6.44 | 6.71 (0.20) |" in words
    assert "--data_dir secret/Datasets --resume=results/fp_run_0 --model_config \"{'depth': 20}\" --seed 0" in words
    assert "    python main_binary_reg.py --save" in words
    for path in out.iterdir():
        content = path.read_bytes()
        assert b"/somewhere" not in content
        assert b"/home" not in content
        assert str(study.parent).encode() not in content


def test_without_seeds_enough_one_sentence_is_the_verdict(study, tmp_path):
    done = run_report(study / "lazy_run_0", study / "prox_run_0", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "report.md").read_text().split("## Before you believe it")[0]
    assert "An interval for the difference of two methods needs 3 seeds that both have; there are fewer here." in words
    assert "too few seeds to say" not in words


@pytest.mark.parametrize(
    ("given", "of_cifar10", "of_others"),
    [
        (["cifar10=lossy", "clean"], "lossy", "clean"),
        (["quality=75"], "quality=75", "quality=75"),
        (["cifar10=quality=75"], "quality=75", None),
        ([], None, None),
    ],
)
def test_notes_on_data(given, of_cifar10, of_others):
    note = report.notes(given)
    assert (note("cifar10"), note("sample")) == (of_cifar10, of_others)


def test_the_papers_table_is_the_contracts():
    """As METHOD.md, part 8, and the README have them."""
    assert tables.PAPER[20] == ((8.06, None), (9.54, 0.03), (9.35, 0.13), (8.87, None), (8.40, 0.13))
    readme = (ROOT / "README.md").read_text()
    for method, figure in zip(tables.PAPER_METHODS, tables.PAPER[20], strict=True):
        if method != "TTQ":
            assert any(line.startswith(f"| {method}") and tables.mean_std(figure) in line for line in readme.splitlines()), method


def test_pictures(out):
    words = (out / "report.md").read_text()
    files = {path.name for path in out.iterdir()}
    for kind in ("errors", "levels", "signs", "weights"):
        name = f"cifar10_resnet20_shared_6_epochs_{kind}"
        assert f"]({name}.png)" in words
        assert f"]({name}.svg)" in words
        assert {f"{name}.png", f"{name}.svg"} <= files
    assert "sample_resnet8_own_6_epochs_errors.png" in files
    assert "cifar10_resnet20_holdout_5000_own_6_epochs_errors.png" in files
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(2**24)) > 20, "an empty picture"
    for path in out.glob("*.svg"):
        assert path.read_text().startswith("<?xml")
        assert path.read_text().rstrip().endswith("</svg>")


def test_the_same_runs_give_the_same_bytes(study, out, tmp_path):
    done = run_report(study / "lazy_run_0", study, "--out", tmp_path, "--data_note", "cifar10=JPEG copy")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in out.iterdir()}
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_readme_is_the_report_with_links_that_lead_there(study, tmp_path):
    done = run_report(study, "--out", tmp_path / "a" / "measured", "--readme", tmp_path / "README.md", "--machine", "two cores")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "README.md").read_text()
    assert text.replace("a/measured/", "") == (tmp_path / "a" / "measured" / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 3
    assert all((tmp_path / link).is_file() for link in links)
    assert "two cores" in text


def test_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "good" / "run", "prox", 0, 20.0)
    for bad in ("nowhere", "empty"):
        done = run_report(tmp_path / "good", tmp_path / bad, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert str(tmp_path / bad) in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_run_that_died_before_it_wrote_anything_is_told(tmp_path):
    """By its output, by its folder with a log, and by both; given as they are, or by the folder that they lie in."""
    results = tmp_path / "results"
    make_run(results / "prox_run_0", "prox", 0, 20.0)
    for name, log, output in (("prox_run_1", True, True), ("prox_run_2", False, True), ("prox_run_3", True, False)):
        (results / name).mkdir()
        if log:
            (results / name / "log.txt").write_text("2026-01-01 00:00:00 run: x\n")
        if output:
            (results / f"{name}.out").write_text("Killed\n")
    (results / "prox_run_0.out").write_text("done\n")
    (results / "tb" / "prox_run_1").mkdir(parents=True)  # of another kind: nobody's run
    for number, given in enumerate([[results], sorted(results.glob("*_run_*"))]):
        done = run_report(*given, "--out", tmp_path / str(number))
        assert (done.returncode, done.stderr) == (0, "")
        assert "1 of 4 runs in 1 groups" in done.stdout
        listed = (tmp_path / str(number) / "report.md").read_text().split("## Left out")[1]
        for name in ("prox_run_1", "prox_run_2", "prox_run_3"):
            assert listed.count(f"| results/{name} | - | - | it ended before it began to train: none of args.json") == 1


@pytest.fixture
def ordinary_user() -> list[str]:
    """The words before a command that make it one of a user who can be refused something, which root cannot."""
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.geteuid() != 0:
        return []
    if not shutil.which("setpriv") or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("root, and no setpriv that could give its rights away")
    return words


@pytest.fixture
def locked(tmp_path) -> Iterator[Path]:
    """A folder with a run that is counted, and with runs in folders that may not be read, or not be entered."""
    results = tmp_path / "results"
    for number, (name, mode) in enumerate({"prox_run_0": 0o755, "prox_run_1": 0, "others": 0, "listed": 0o444}.items()):
        make_run(results / name, "prox", number, 20.0)
        (results / name).chmod(mode)
    yield results
    for folder in (results, *results.iterdir()):
        folder.chmod(0o755)


def test_folders_that_may_not_be_read_are_named(locked, tmp_path, ordinary_user):
    done = run_report(locked, "--out", tmp_path / "out", under=ordinary_user)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 4 runs in 1 groups" in done.stdout
    listed = (tmp_path / "out" / "report.md").read_text().split("## Left out")[1]
    for name in ("prox_run_1", "others"):
        assert listed.count(f"| results/{name} | - | - | its folder cannot be read (Permission denied)") == 1
    assert listed.count("| results/listed | - | - | its args.json cannot be read |") == 1


@pytest.mark.parametrize(("mode", "below"), [(0, ""), (0o444, ""), (0, "prox_run_0"), (0, "prox_run_0.out")])
def test_a_place_that_may_not_be_read_is_said_in_one_line(locked, tmp_path, ordinary_user, mode, below):
    """One that was given, and one that lies in such a one."""
    locked.chmod(mode)
    done = run_report(locked / below, "--out", tmp_path / "out", under=ordinary_user)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"report.py: error: {locked / below}: Permission denied\n"


def test_out_that_cannot_be_written(tmp_path, capsys):
    make_run(tmp_path / "run", "prox", 0, 20.0)
    (tmp_path / "file").write_text("kept")
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    for readme, reason in (("nowhere/README.md", "No such file or directory"), ("folder", "Is a directory")):
        path = tmp_path / readme
        assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--readme", str(path)]) == 1
        assert capsys.readouterr().err == f"report.py: error: --readme {path}: {reason}\n"


def test_runs_of_the_program(tmp_path, tiny_data):
    """What the program writes is what the report reads."""
    common = ("--data_dir", tiny_data, "--model_config", "{'depth': 8}", "--precision", "fp32", "--batch-size", 40)
    run_main(*common, "--save", "fp_run_0", "--epochs", 1, cwd=tmp_path)
    more = ("--projection_mode", "prox", "--reg_rate", 0.5, "--optimizer", "Adam", "--lr", 0.01, "--epochs", 3, "--freeze_epoch", 2)
    run_main(*common, *more, "--save", "prox_run_0", "--resume", "results/fp_run_0", "--tb_dir", "tb/prox_run_0", cwd=tmp_path)
    done = run_report(cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    out = tmp_path / "results" / "report"
    with open(out / "report.csv", newline="") as file:
        start, line = csv.DictReader(file)
    with open(tmp_path / "results" / "prox_run_0" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(line["final_error_mean"]) == float(rows[2]["val_error1_bin"])
    assert float(line["sign_change_at_freeze_percent_mean"]) == pytest.approx(100 * float(rows[1]["sign_change"]))
    assert line["warm_start_error"] == start["best_error_mean"]
    assert line["schedule"] == "3 epochs, freeze 2, batch 40, Adam 0.01, reg_rate 0.5, fp32"
    assert start["schedule"].startswith(
        "1 epochs, batch 40, SGD 0.1 -> 0.01@100 -> 0.001@150, momentum 0.9, weight decay 0.0001, fp32"
    )
    assert line["data"] == "class folders; 80 training and 30 validation images"
    assert (out / "cifar10_resnet8_own_3_epochs_weights.png").exists()
    assert "Nothing: every run folder" in (out / "report.md").read_text()


def collected(*folders: Path) -> tuple[list[groups.Group], list[groups.LeftOut]]:
    return groups.collect([runs.read(folder) for folder in folders])


@pytest.mark.parametrize(
    ("difference", "apart"),
    [
        ({"data_dir": "elsewhere", "workers": 3, "print_freq": 7, "checkpoint_minutes": 1.0, "save_all": True, "gpus": [3]}, False),
        ({"holdout": 0}, False),
        ({"holdout": None}, False),
        ({"compile": "auto"}, False),
        ({"device": "cpu"}, False),
        ({"device": "cuda"}, False),
        ({"compile": "on", "capture": True}, False),
        ({"holdout": 500}, True),
        ({"a_flag_to_come": 3}, True),
        ({"keep_optimizer_state": True}, True),
        ({"batch_size": 64}, True),
        ({"freeze_epoch": 3}, True),
        ({"reg_rate": 0.08}, True),
        ({"resume": "another"}, True),
        ({"model_config": {"depth": 32}}, True),
        ({"model_config": {}}, False),
    ],
)
def test_which_arguments_set_groups_apart(tmp_path, difference, apart):
    first = make_run(tmp_path / "a", "prox", 0, 20.0)
    second = make_run(tmp_path / "b", "prox", 1, 21.0, **difference)
    found, left_out = collected(first, second)
    assert len(found) == 1 + apart
    assert not left_out
    schedules = [group.schedule for group in found if group.section == found[0].section]
    assert len(set(schedules)) == len(schedules), "two groups cannot be told apart"


@pytest.mark.parametrize(
    "facts",
    [
        # typed or not, the arguments can be the same
        {"regime": {"0": {"optimizer": "Adam", "lr": 0.01, "weight_decay": 0.1}, "3": {"lr": 0.001}}},
        {"data": HELD_OUT},
    ],
)
def test_what_ran_sets_groups_apart(tmp_path, facts):
    first, second = (make_run(tmp_path / name, "prox", seed, 20.0) for seed, name in enumerate("ab"))
    assert len(collected(first, second)[0]) == 1
    add_facts(second, **facts)
    assert len(collected(first, second)[0]) == 2


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ("MNIST in Datasets", "MNIST"),
        ("MNIST in /data/Datasets", "MNIST"),
        ("CIFAR10 in Datasets, just downloaded", "CIFAR10"),
        ("class folders in my data in there/CIFAR10", "class folders"),
        ("class folders in a; b", "class folders"),
        ("class folders in Datasets, validated on 5000 held out training images", "class folders"),
        ("text in my_text", "text"),
        ("the sample in the repository (a part of Fashion-MNIST)", "the sample in the repository (a part of Fashion-MNIST)"),
    ],
)
def test_where_a_data_set_lies_sets_no_groups_apart(tmp_path, source, left):
    """As args.json has it, and as the log has it of older runs."""
    facts = {"source": source, "samples": "images", "training": 50000, "validation": 10000}
    new = add_facts(make_run(tmp_path / "new", "prox", 0, 20.0), data=facts)
    old = add_facts(make_run(tmp_path / "old", "prox", 1, 20.0), data=None)
    (old / "log.txt").write_text(f"2026-01-01 00:00:00 data: {source}; 50000 training and 10000 validation images\n")
    for folder in (new, old):
        assert runs.read(folder).data == f"{left}; 50000 training and 10000 validation images"


def test_a_mode_without_strength_has_one_group_whatever_was_written(tmp_path):
    """Older versions of the program wrote a strength of 1 for it."""
    for mode, count in (("ttq", 1), ("stoch_bin", 1), ("lazy_alt", 1), ("parq", 2), ("prox", 2)):
        for seed, strength in enumerate((1.0, "")):
            folder = make_run(tmp_path / mode / str(seed), "prox", seed, 20.0, projection_mode=mode)
            rows = csv.DictReader((folder / "results.csv").read_text().splitlines())
            write_rows(folder, [{**row, "strength": strength} for row in rows])
        assert len(collected(tmp_path / mode / "0", tmp_path / mode / "1")[0]) == count, mode


def test_old_runs_say_the_same_in_their_log(tmp_path):
    """Those whose args.json has no such values: one group with the new ones, whose log says nothing here."""
    new, old = (make_run(tmp_path / name, "prox", seed, 20.0) for seed, name in enumerate("ab"))
    content = json.loads((old / "args.json").read_text())
    for name in ("regime", "data", "parameters", "quantized", "compiled", "captured"):
        del content[name]
    (old / "args.json").write_text(json.dumps(content))
    (old / "log.txt").write_text(
        "2026-01-01 00:00:00 run: x on cpu, fp32, seed 1\n"
        "2026-01-01 00:00:00 run: x on cpu, bf16, compiled, seed 1\n"  # continued, elsewhere
        "2026-01-01 00:00:00 data: class folders in /somewhere/private/CIFAR10; 50000 training and 10000 validation images\n"
        "2026-01-01 00:00:00 network: resnet of depth 20, 272,474 parameters, from results/fp\n"
        "2026-01-01 00:00:00 regime: {0: {'optimizer': 'Adam', 'lr': 0.01}, 3: {'lr': 0.001}}\n"
        "2026-01-01 00:00:00 mode: prox (ProxQuant-binary: as ever), 268,336 weights in 20 tensors (98.5%)\n"
    )
    first, second = runs.read(new), runs.read(old)
    for name in ("regime", "data", "parameters", "quantized"):
        assert getattr(first, name) == getattr(second, name) is not None, name
    assert (first.computed, second.computed) == ("bf16, compiled", "cpu, bf16, compiled")
    assert len(collected(new, old)[0]) == 1


def test_a_run_that_went_on_elsewhere_says_how_it_ended(tmp_path):
    folder = add_facts(make_run(tmp_path / "a", "prox", 0, 20.0), continued=[{"compiled": True}, {"compiled": False}])
    assert runs.read(folder).computed == "bf16"


@pytest.mark.parametrize(
    ("fact", "values", "words"), [("precision", ("bf16", "fp32"), "fp32"), ("processes", (1, 4), "4 processes")]
)
def test_facts_set_groups_apart(tmp_path, fact, values, words):
    for name, value in zip("ab", values, strict=True):
        add_facts(make_run(tmp_path / name, "prox", ord(name), 20.0), **{fact: value})
    found = collected(tmp_path / "a", tmp_path / "b")[0]
    assert [words in group.schedule for group in found] == [False, True]


def test_numbers_of_processes_are_those_of_all_parts_of_a_run(tmp_path):
    """A run that went on with others is neither one of the first number nor one of the last; in which order, is not told."""
    parts = {"a": (1,), "b": (1, 1), "c": (4,), "d": (1, 4), "e": (4, 1, 4), "f": (2, 16, 1)}
    for seed, (name, (first, *others)) in enumerate(parts.items()):
        continued = [{"processes": count} for count in others]
        add_facts(make_run(tmp_path / name, "prox", seed, 20.0), processes=first, continued=continued)
    found = collected(*sorted(tmp_path.iterdir()))[0]
    told = {"".join(run.folder.name for run in group.runs): group.schedule.split(", ", 5)[-1] for group in found}
    assert told == {
        "ab": "bf16",
        "c": "4 processes, bf16",
        "de": "1 and 4 processes, bf16",
        "f": "1, 2 and 16 processes, bf16",
    }


@pytest.mark.parametrize("difference", [{}, {"tf32": True}, {"batch_size": 64}])
def test_pairs_are_alike_that_differ_in_the_method_alone(tmp_path, difference):
    folders = [make_run(tmp_path / "a", "lazy", 0, 20.0), make_run(tmp_path / "b", "prox", 0, 20.0, **difference)]
    (section,) = tables.sections(collected(*folders)[0])
    assert {pair.alike for pair in tables.compare(section)} == {not difference}
    assert len({re.sub(", reg_rate 0.07", "", group.schedule) for group in section.groups}) == 1 + bool(difference)


@pytest.mark.parametrize(
    ("flag", "rate", "words"),
    [("reg_rate", 1.0, "reg_rate 1"), ("reg_rate", 0.0, None), ("binary_reg", 1.0, None), ("binary_reg", 0.5, "binary_reg 0.5")],
)
def test_a_schedule_says_the_rate_that_was_chosen(tmp_path, flag, rate, words):
    (group,) = collected(make_run(tmp_path / "a", "prox", 0, 20.0, **{"reg_rate": 0.0, flag: rate}))[0]
    assert group.schedule == "6 epochs, freeze 4, batch 128, Adam 0.01 -> 0.001@3" + (f", {words}" if words else "") + ", bf16"


def test_a_warm_start_that_cannot_be_known(tmp_path, out):
    gone = make_run(tmp_path / "gone", "prox", 0, 20.0, resume="/nowhere/fp_run_0")
    unfinished = make_run(tmp_path / "fp", None, 0, 20.0, rows=2)
    began = make_run(tmp_path / "began", "prox", 0, 20.0, resume=str(unfinished))
    other = make_run(tmp_path / "held_out", None, 0, 20.0, holdout=5)
    held = make_run(tmp_path / "held", "prox", 0, 20.0, resume=str(other))
    for folder in (gone, began, held):
        (group,) = collected(folder)[0]
        assert group.warm_start[1] is None
        assert "| ? (" in tables.error_table(tables.Section((group,)))


def test_runs_that_were_moved_keep_their_warm_start(tmp_path, monkeypatch):
    """Where the report is made there is another run of the same name."""
    make_run(tmp_path / "here" / "results" / "fp", None, 0, 30.0, epochs=3)
    make_run(tmp_path / "kept" / "runs" / "fp", None, 0, 17.0, epochs=3)
    monkeypatch.chdir(tmp_path / "here")
    for place, expected in (("kept/runs", 17.0), ("here/results", 30.0)):
        (group,) = collected(make_run(tmp_path / place / "prox", "prox", 0, 20.0, resume="results/fp"))[0]
        assert group.warm_start[1] == pytest.approx(expected)


def test_runs_that_were_moved_keep_their_events(tmp_path, monkeypatch):
    """And take none of another run that has their name where the report is made."""
    make_events(tmp_path / "here" / "tb" / "prox")
    monkeypatch.chdir(tmp_path / "here")
    moved = make_run(tmp_path / "kept" / "runs" / "prox", "prox", 0, 20.0, tb_dir="tb/prox")
    assert runs.read(moved).board is None
    make_events(tmp_path / "kept" / "tb" / "prox")
    assert weights.layers(runs.read(moved)) == list(LAYERS)
    for name, results_dir in (("absolute", str(tmp_path / "elsewhere")), ("relative", "../elsewhere")):  # from here
        folder = make_run(tmp_path / "elsewhere" / name, "prox", 0, 20.0, tb_dir="tb/prox", results_dir=results_dir)
        assert weights.layers(runs.read(folder)) == list(LAYERS)


def test_a_checkpoint_as_warm_start(tmp_path):
    start = make_run(tmp_path / "fp", None, 0, 17.0, epochs=3)
    for name, expected in (("model_best.pth.tar", 17.0), ("checkpoint.pth.tar", 17.5), ("checkpoint_epoch_1.pth.tar", 19.0)):
        (start / name).write_bytes(b"")
        (group,) = collected(make_run(tmp_path / f"from_{name}", "prox", 0, 20.0, resume=str(start / name)))[0]
        assert group.warm_start[1] == pytest.approx(expected)


def test_pictures_families(tmp_path):
    """Methods under one schedule are drawn together; what each ran under its own schedule, by like length."""

    def make(name, mode, **more):
        return make_run(tmp_path / name, mode, 0, 20.0, **more)

    shared = [make("a", "lazy"), make("b", "prox"), make("c", "prox_ternary")]
    own = [
        make("d", "lazy", rate=0.1),
        make("e", "prox", rate=0.2),
        make("f", "prox_ternary", epochs=12),
        make("g", "prox", epochs=40),
    ]
    (section,) = tables.sections(collected(*shared, *own)[0])
    drawn = families.families(section)
    found = {family.name: sorted(line.group.runs[0].folder.name for line in family.lines) for family in drawn}
    assert found == {"shared_6_epochs": ["a", "b", "c"], "own_6_to_12_epochs": ["d", "e", "f"], "own_40_epochs": ["g"]}


def test_sections_do_not_share_files(tmp_path):
    first, second = (make_run(tmp_path / name, "prox", 0, 20.0) for name in "ab")
    add_facts(second, data=HELD_OUT)
    found = tables.sections(collected(first, second)[0])
    assert len({section.slug for section in found}) == 2


def test_bands_are_the_range_over_the_seeds(tmp_path):
    folders = [make_run(tmp_path / str(seed), "prox", seed, error) for seed, error in enumerate((20.0, 21.0, 26.0))]
    (section,) = tables.sections(collected(*folders)[0])
    ((line,),) = (family.lines for family in families.families(section))
    epochs, mean, least, greatest = line.values("val_error1_bin")
    assert list(epochs) == [1, 2, 3, 4, 5, 6]
    for curve, value in ((mean, 67 / 3), (least, 20.0), (greatest, 26.0)):
        assert curve == pytest.approx(value + np.array([8, 6, 4, 2, 0, 0.5]))
    assert line.values("sign_change", factor=100)[1][3] == pytest.approx(17)


@pytest.mark.parametrize("continued", [False, True])
def test_histograms_of_tensorboard(tmp_path, continued):
    folder = make_run(tmp_path / "results" / "short" / "run", "prox", 0, 20.0, results_dir="./results/short", tb_dir="tb/short/run")
    start = make_events(tmp_path / "tb" / "short" / "run", continued)
    run = runs.read(folder)
    assert weights.layers(run) == list(LAYERS)
    found = weights.shares(run, LAYERS[1], 4)
    assert list(found) == [0, 4]
    expected = 100 * np.histogram(start.clip(-1, 1), weights.EDGES)[0] / len(start)
    assert np.abs(found[0] - expected).max() < 0.5
    assert found[4][0] == pytest.approx(100 * np.mean(start < 0))
    assert found[4][-1] == pytest.approx(100 * np.mean(start > 0))
    assert weights.shares(run, LAYERS[1], 3).keys() == {0}


def test_histograms_of_checkpoints(tmp_path):
    folder = make_run(tmp_path / "run", "lazy", 0, 20.0)
    random = torch.Generator().manual_seed(1)
    latent = {epoch: torch.randn(500, generator=random) * epoch / 4 for epoch in range(1, 5)}
    for epoch, weight in latent.items():
        kept = {"fc.weight": weight} if epoch > 1 else {}  # where the latent weights are the model's own
        shown = weight.sign() if epoch > 1 else weight
        content = {"state_dict": {"fc.weight": shown}, "optimizer": {"latent": kept, "base_optimizer": {}}}
        checkpoints.save(folder / f"checkpoint_epoch_{epoch}.pth.tar", content)
    damage(folder, "checkpoint_epoch_3.pth.tar", b"damaged")
    checkpoints.save(folder / checkpoints.LATEST, {"state_dict": {}, "start_signs": {"fc.weight": torch.ones(1)}})
    run = runs.read(folder)
    assert weights.layers(run) == ["fc.weight"]
    found = weights.shares(run, "fc.weight", 4)
    assert list(found) == [1, 2, 4]
    for epoch, share in found.items():
        expected = np.histogram(latent[epoch].clamp(-1, 1).numpy(), weights.EDGES)[0] / 5
        assert share == pytest.approx(expected)


ODD = (
    b"", b"\0\xff\xfe", b"[]", b"{}", b"null", b'{"arguments": []}', b'{"arguments": {}}', b'{"arguments": {"epochs": "six"}}',
    b"[" * 5000,
    b"epoch\n1\n", b"epoch,train_loss,val_loss,val_error1,val_error1_bin\n1,,,,\n2,1,1,1,1\n", b"1,2,3\n,,,,,,,,\n", b'"\n' * 9,
    b"2026-01-01 00:00:00 regime: {0: 3}\n2026-01-01 00:00:00 data: x\n2026-01-01 00:00:00 run: y\n",
    b"2026-01-01 00:00:00 regime: {0: {1: 2, 'lr': {3}}}\n", b"2026-01-01 00:00:00 regime: {0: {'lr': None}, 1: {'lr': 'x|y'}}\n",
    b"\x07" * 40, b"\x10\0\0\0\0\0\0\0" * 9,
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["args.json", "results.csv", "log.txt", "tb/events.out.tfevents.0.x", "checkpoint_epoch_2.pth.tar"]
)
def test_no_content_of_a_folder_ends_in_a_traceback(tmp_path, name):
    """Each damaged run is told in the list or counted; the sound one beside it is counted always."""
    made = []
    for number, content in enumerate(ODD):
        folder = make_run(tmp_path / f"run_{number}", "prox", number, 20.0)
        (folder / "tb").mkdir()
        made.append(damage(folder, name, content))
    sound = make_run(tmp_path / "sound", "prox", 1000, 20.0)
    found, left_out = collected(*made, sound)
    counted = {run.folder for group in found for run in group.runs}
    assert counted | {one.run.folder for one in left_out} == {*made, sound}
    assert sound in counted
    if name in ("args.json", "results.csv"):
        assert counted == {sound}
    else:
        assert not left_out
    for section in tables.sections(found):
        tables.error_table(section)
        for group in section.groups:
            for run in group.runs:
                weights.layers(run)
                weights.shares(run, "fc.weight", 4)


@pytest.mark.parametrize("value", [None, True, -3, 1e400, "../..", "a\0b", "x" * 5000, [1], {"a": [None]}, "| x |\n# y"])
def test_no_argument_ends_in_a_traceback(tmp_path, value, monkeypatch):
    """An argument of another kind than the flag's: nobody's run, but its folder may lie among the others."""
    monkeypatch.setattr(pictures, "draw", lambda section, note: [])  # they show none of it
    names = ("resume", "results_dir", "tb_dir", "lr", "reg_rate", "regime", "start_epoch", "model", "dataset", "projection_mode",
             "freeze_epoch", "epochs", "seed", "model_config", "batch_size", "holdout", "a_flag_to_come")  # fmt: skip
    for number, name in enumerate(names):
        make_run(tmp_path / f"run_{number}", "prox", number, 20.0)
        path = tmp_path / f"run_{number}" / "args.json"
        content = json.loads(path.read_text())
        content["arguments"][name] = value
        facts = (
            "command",
            "versions",
            "device",
            "continued",
            "regime",
            "data",
            "parameters",
            "quantized",
            "compiled",
            "warm_start",
        )
        path.write_text(json.dumps(content | dict.fromkeys(facts, value)))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    for number in range(len(names)):
        weights.shares(runs.read(tmp_path / f"run_{number}"), "fc.weight", 4)
    words = (tmp_path / "out" / "report.md").read_text()
    for number in range(len(names)):
        assert f"/run_{number}" in words
    assert "\n# y" not in words


def test_strange_figures_are_drawn(tmp_path):
    """No error at all, one epoch alone, a freeze at the end, a loss beyond all numbers before the freeze."""
    perfect = make_run(tmp_path / "perfect", "prox", 0, 0.0, epochs=2, freeze_epoch=2)
    row = row_after(1, 1, "lazy", 0.0, 0.01) | {"val_error1": 0.0, "val_error1_bin": 0.0, "val_loss_bin": "inf"}
    one = make_run(tmp_path / "one", "lazy", 0, 0.0, epochs=1, freeze_epoch=0)
    write_rows(one, [row])
    write_rows(perfect, [{**row_after(epoch, 2, "prox", 0, 0.01), "val_error1": 0.0, "val_error1_bin": 0.0} for epoch in (1, 2)])
    done = run_report(tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 runs" in done.stdout


def test_words_are_not_read_as_formulas(tmp_path):
    make_run(tmp_path / "run", "prox", 0, 20.0)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--data_note", "for $5, | 3% of \\frac$ \n# it"]) == 0
    assert r"(for $5, \| 3% of \frac$ # it)" in (tmp_path / "out" / "report.md").read_text()


def test_only_unfinished_runs(tmp_path, capsys):
    make_run(tmp_path / "run", "prox", 0, 20.0, rows=1)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "No run is finished yet" in (tmp_path / "out" / "report.md").read_text()
    assert "unfinished: 1 of 6 epochs" in (tmp_path / "out" / "report.md").read_text()
    assert "0 of 1 runs" in capsys.readouterr().out


def test_what_is_committed_is_not_mixed_with_ones_own_runs(tmp_path):
    """In a fresh clone: every committed run lies below a marked folder, and is found by a path of its own."""
    committed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if not committed:
        pytest.skip("not a clone")
    for name in committed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert any(name.endswith("args.json") for name in committed)
    assert runs.find(tmp_path / "results") == []
    own = make_run(tmp_path / "results" / "own_run_0", "prox", 0, 20.0)
    assert runs.find(tmp_path / "results") == [own]
    kept = {(tmp_path / name).parent for name in committed if name.endswith("args.json")}
    assert {run for run in kept if runs.find(run) == [run]} == kept
    assert {run for folder in (tmp_path / "results").iterdir() if folder != own for run in runs.find(folder)} == kept


def test_a_run_that_never_froze_has_no_final_error(tmp_path):
    """Its seeds are in the tables and pictures, marked, and in no mean, comparison or figure beside the paper's."""
    never = {"prox_run_0": {"freeze_epoch": 200}, "prox_run_1": {"freeze_epoch": -1}, "prox_run_2": {"freeze_epoch": 6}}
    folders = [make_run(tmp_path / name, "prox", seed, 11.0, **more) for seed, (name, more) in enumerate(never.items())]
    folders += [make_run(tmp_path / f"lazy_run_{seed}", "lazy", seed, 20.0 + seed) for seed in range(3)]
    full_precision = make_run(tmp_path / "fp_run_0", None, 0, 15.0)
    found, left_out = collected(*folders, full_precision)
    assert {one.run.folder.name for one in left_out if "it never froze" in one.reason} == set(never)
    assert [group.finals() != {} for group in found] == [True, True, False, False, False]
    (section,) = tables.sections(found)
    assert tables.compare(section) == []  # of those that froze there is one group alone
    words = tables.error_table(section)
    assert words.count(f"| {tables.NEVER_FROZE} |") == 3
    (line,) = (line for line in csv.DictReader(tables.groups_csv([section], lambda name: None).splitlines()) if line["n"] == "3")
    assert float(line["final_error_mean"]) == pytest.approx(21.5)
    assert "11.5" not in text.report([section], [[]], [[]], left_out, lambda name: None).split("best epoch")[0]
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0


def test_the_error_of_a_warm_start_is_that_of_the_weights_that_the_run_began_with(tmp_path):
    """The full-precision run went on afterwards, to a better network."""
    start = make_run(tmp_path / "fp_run_0", None, 0, 17.0)
    folder = make_run(tmp_path / "prox_run_0", "prox", 0, 20.0, resume=str(start))
    add_facts(folder, warm_start={"path": str(start), "epoch": 2, "score": 81.5, "sha256": "ab" * 32, "finished": False})
    (group,) = collected(folder)[0]
    assert group.warm_start[1] == pytest.approx(18.5)


def test_one_warm_start_is_claimed_only_of_equal_weights(tmp_path):
    """The same place may have held other weights: checksums decide, and where there are none the report says so."""
    start = make_run(tmp_path / "fp_run_0", None, 0, 17.0)

    def make(name, seed, sha256=None, **more):
        folder = make_run(tmp_path / f"{name}_run_{seed}", "prox", seed, 20.0, resume=str(start))
        facts = {"path": str(start), "epoch": 6, "score": 83.0, "sha256": sha256, "finished": True, "of_epochs": 6, **more}
        return add_facts(folder, warm_start=facts) if sha256 else folder

    def words(*folders):
        found = tables.sections(collected(*folders)[0])
        return [len(section.groups) for section in found], text.caveats(found)

    same = [make("same", 0, "ab" * 32), make("same", 1, "ab" * 32)]
    assert words(*same)[0] == [1]
    assert "have one checksum. The spread" in words(*same)[1]
    assert "network, the epoch of it that was best on the validation data: " in words(*same)[1]
    last = make_run(tmp_path / "last_run_0", "prox", 0, 20.0, resume=str(start / "checkpoint.pth.tar"))
    (start / "checkpoint.pth.tar").write_bytes(b"")
    assert "from the same full-precision network, as far as" in words(last)[1]
    other = make("same", 2, "cd" * 32, finished=False)
    assert words(*same, other)[0] == [2]
    old = [make("old", 0), make("old", 1)]
    assert words(*old)[0] == [1]
    assert "as far as can be known" in words(*old)[1]
    older_and_newer = [make("old", 7), *same]
    assert words(*older_and_newer)[0] == [1]
    assert "checksum, or (" in words(*older_and_newer)[1]
    assert words(*older_and_newer, other)[0] == [3], "which of the two the older one began with is not known"
    (one,) = (one for one in collected(*same, other)[1] if "not at its end" in one.reason)
    assert one.run.folder == other
    assert one.reason.startswith(f"it started from {start.parent.name}/fp_run_0, a run that was not at its end then, of 6 epochs")


def test_a_method_is_named_with_its_quantizer_and_bits(tmp_path):
    """Of a mode that this program does not know, too."""
    for bits, error in ((1, 0.5), (2, 0.2), (3, 0.1)):
        folder = make_run(tmp_path / f"alt_{bits}_run_0", "prox", 0, 20.0, projection_mode="of_later", bits=bits, by_row=True)
        rows = [{**row, "quant_error": error} for row in csv.DictReader((folder / "results.csv").read_text().splitlines())]
        write_rows(folder, rows)
    make_run(tmp_path / "uniform_run_0", "prox", 0, 20.0, quantizer="uniform", bits=4)
    found = collected(*runs.find(tmp_path))[0]
    methods = ["ProxQuant-binary (uniform, 4 bits)", *(f"of_later ({bits}, by row)" for bits in ("1 bit", "2 bits", "3 bits"))]
    assert [group.method for group in found] == methods
    (section,) = tables.sections(found)
    (family,) = families.families(section)
    assert family.words.startswith("all under one schedule")
    assert len({(line.colour, line.marker) for line in family.lines}) == 4
    names = {picture.name for picture in pictures.draw(section, lambda name: None)}
    assert "cifar10_resnet20_bits" in names
    lines = list(csv.DictReader(tables.groups_csv([section], lambda name: None).splitlines()))
    assert [line["bits"] for line in lines] == ["4", "1", "2", "3"]
    one_of_each = tables.Section(section.groups[:1])
    assert "cifar10_resnet20_bits" not in {picture.name for picture in pictures.draw(one_of_each, lambda name: None)}


def test_each_quantizer_has_its_own_line_of_errors_by_bits(tmp_path):
    """Points of another quantizer, or by row, are not joined with those of the mode alone, and do not look like them."""
    for number, (mode, more) in enumerate(
        [("prox_alt", {}), ("prox_alt", {"quantizer": "uniform"}), ("prox_alt", {"by_row": True}), ("lazy_alt", {})]
    ):
        for bits in (2, 3):
            make_run(tmp_path / f"{number}_{bits}_run_0", "prox", 0, 20.0, **{"projection_mode": mode, "bits": bits, **more})
    (section,) = tables.sections(collected(*runs.find(tmp_path))[0])
    (axes,) = pictures._draw_bits(section, "title").axes
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    pq = "ProxQuant-alternating"
    assert set(lines) == {pq, f"{pq} (uniform)", f"{pq} (by row)", "alternating"}
    assert [list(line.get_xdata()) for line in lines.values()] == [[2, 3]] * 4
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 4


def test_differences_of_signs_are_in_points_whatever_networks_are_judged_by(tmp_path):
    for mode in ("prox", "lazy"):
        make_text_run(tmp_path / f"{mode}_run_0", mode, 0, 100.0)
    (section,) = tables.sections(collected(*runs.find(tmp_path))[0])
    rows = [line.split(" | ") for line in tables.comparison_table(tables.compare(section)).splitlines()]
    assert [cells[4] for cells in rows] == ["A - B", "---", "+0.00 of perplexity", "+0.00 points"]


def test_the_error_before_the_freeze_is_told_of_both_networks(tmp_path):
    """As it was trained, which in an eager mode is in float, and hard-quantized, as it is judged afterwards."""
    (section,) = tables.sections(collected(make_run(tmp_path / "run", "prox", 0, 20.0))[0])
    heads, _, row = (line.strip("| ").split(" | ") for line in tables.sign_table(section).splitlines())
    assert heads[-2:] == ["error % before the freeze, weights as they are", "and hard-quantized"]
    assert row[-2:] == ["17.00 (n=1)", "22.00 (n=1)"]


def test_no_mode_is_known_by_name():
    """What the report needs of a mode it asks the mode for: a new one is one row in quantize/."""
    modes = "|".join(quantize.MODES)
    for path in (ROOT / "scripts" / "reporting").glob("*.py"):
        assert not re.findall(rf"[\"'](?:{modes})[\"']", path.read_text()), path


def test_learned_levels_are_drawn(tmp_path):
    folder = make_run(tmp_path / "run", "prox", 0, 20.0)
    with tracking.Board(IMAGES, folder / "tb", 0) as board:
        for epoch in range(1, 5):
            sides = {"positive": 1 + epoch / 10, "negative": 1 - epoch / 10}
            tags = {f"ternary_value/{layer}/{side}": value for layer in LAYERS for side, value in sides.items()}
            board._add_scalars(tags, epoch)
    found = weights.learned_levels(runs.read(folder))
    assert set(found) == set(LAYERS)
    for levels in found.values():
        assert levels["positive"] == pytest.approx({epoch: 1 + epoch / 10 for epoch in range(1, 5)})
        assert levels["negative"] == pytest.approx({epoch: 1 - epoch / 10 for epoch in range(1, 5)})
    (section,) = tables.sections(collected(folder)[0])
    names = {picture.name for picture in pictures.draw(section, lambda name: None)}
    assert "cifar10_resnet20_own_6_epochs_learned_levels" in names


def test_weights_near_their_level_before_the_freeze(tmp_path, capsys):
    """Counted by hand: the share that the freeze moves by 0.05 at most, in a mode with one level for each sign."""
    folder = make_run(tmp_path / "run", "lazy", 0, 20.0)
    latent = {"fc.weight": torch.tensor([0.96, -0.97, 0.9, -0.3]), "conv1.weight": torch.tensor([[1.0, -0.951]])}
    final = {name: weight.sign() for name, weight in latent.items()}
    kept = {"state_dict": final | {"fc.bias": torch.ones(9)}, "optimizer": {"latent": latent, "base_optimizer": {}}}
    checkpoints.save(folder / "checkpoint_epoch_4.pth.tar", kept)
    checkpoints.save(folder / checkpoints.LATEST, {"state_dict": final, "start_signs": final})
    assert weights.near_their_level(runs.read(folder), 0.05) == pytest.approx(4 / 6)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0
    heads, row = capsys.readouterr().out.splitlines()[2:4]
    assert re.split(r"  +", heads)[:5] == ["#", "method", "final error %", "quantized", "within 0.05 before the freeze"]
    assert re.split(r"  +", row) == ["1", "BinaryConnect", "20.50 (n=1)", "98.5%", "66.7%", "0.400 (n=1)", "0.400 (n=1)"]
    assert "| 98.5% | 66.7% | 0.400 (n=1) | 0.400 (n=1) |" in (tmp_path / "out" / "report.md").read_text()


def make_text_run(folder: Path, mode: str | None, seed: int, perplexity: float, **more) -> Path:
    """A run of a language model, whose validation perplexity falls to ``perplexity``; on the test data it is 5 lower."""
    make_run(folder, mode, seed, 0.0, dataset="ptb", model="lstm", model_config={}, **more)
    rows = []
    for epoch in range(1, 7):
        now = perplexity * (7 - epoch)
        row = {"epoch": epoch, "train_loss": 5.0, "val_loss": math.log(now), "train_ppl": now, "val_ppl": now, "lr": 20.0}
        if mode:
            row |= {"val_ppl_bin": "inf" if epoch < 4 else now + 1, "quant_error": 0.3, "sign_change": 0.1, "binary": 0.2}
        rows.append(row | {"strength": 0.0, "seconds": 1.0, "test_ppl": perplexity - 5 if epoch == 6 else ""})
    with open(folder / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return add_facts(folder, data={"source": "ptb in /x/y", "samples": "tokens", "training": 929589, "validation": 73760})


def test_a_perplexity_beyond_all_numbers_is_reported(tmp_path):
    """Of each number of seeds that is treated in its own way: it has a mean, and no spread."""
    for count in (2, 3):
        for seed in range(count):
            make_text_run(tmp_path / str(count) / f"lazy_run_{seed}", "lazy", seed, 100.0 + seed)
            folder = make_text_run(tmp_path / str(count) / f"prox_run_{seed}", "prox", seed, 100.0, freeze_epoch=-1)
            first, *rows = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
            for row in rows if seed else ():
                row[first.index("val_ppl_bin")] = "inf"
            (folder / "results.csv").write_text("\n".join(",".join(cells) for cells in (first, *rows)) + "\n")
        assert report.main([str(tmp_path / str(count)), "--out", str(tmp_path / f"out{count}"), "--show"]) == 0
        words = (tmp_path / f"out{count}" / "report.md").read_text()
        assert f"| inf (n={count}) |" in words
    assert "| inf | 3 seeds, 101.00, inf, inf: no interval, not all are finite |" in words


def test_perplexity_has_tables_and_pictures_of_its_own(tmp_path):
    start = make_text_run(tmp_path / "fp_run_0", None, 0, 90.0)
    for seed in range(3):
        make_text_run(tmp_path / f"prox_run_{seed}", "prox", seed, 100.0 + seed, resume=str(start))
        make_text_run(tmp_path / f"lazy_run_{seed}", "lazy", seed, 120.0 - seed**2, resume=str(start))
    make_run(tmp_path / "images_run_0", "prox", 0, 20.0)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    words = (tmp_path / "out" / "report.md").read_text()
    (of_text,) = (part for part in words.split("\n## ") if part.startswith("ptb, LSTM"))
    assert "Text: ptb; 929589 training and 73760 validation tokens." in of_text
    assert "| best perplexity | test perplexity there | warm start's perplexity |" in of_text
    assert "| 102.00 (1.00, n=3) | 96.00 (1.00, n=3) |" in of_text
    assert "90.00 (" in of_text
    assert "+12.00" in of_text  # the gap to the warm start
    assert "error" not in of_text.replace("quantization error", "")
    assert "- Images: validation is on the test set" in words
    assert {"ptb_lstm_shared_6_epochs_perplexities.png", "cifar10_resnet20_own_6_epochs_errors.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        lines = {(line["data_set"], line["method"]): line for line in csv.DictReader(file)}
    line = lines["ptb", "ProxQuant-binary"]
    assert float(line["final_perplexity_mean"]) == pytest.approx(102)
    assert float(line["test_perplexity_mean"]) == pytest.approx(96)
    assert line["final_error_mean"] == ""
    assert lines["cifar10", "ProxQuant-binary"]["final_perplexity_mean"] == ""
    with open(tmp_path / "out" / "report_comparisons.csv", newline="") as file:
        (one,) = (one for one in csv.DictReader(file) if one["quantity"] == "best perplexity")
    assert float(one["first_minus_second"]) == pytest.approx((100 + 101 + 102 - 120 - 119 - 116) / 3)
    assert one["verdict"].startswith("ProxQuant-binary")


@pytest.mark.parametrize("folder", ["steps", "held_out", "precision", "family"])
def test_committed_reports_are_those_of_their_runs(tmp_path, folder, monkeypatch):
    """The command beside them makes them again; pictures apart, whose bytes are matplotlib's."""
    kept = ROOT / "results" / folder
    command = shlex.split((kept / runs.KEPT).read_text().split("python scripts/report.py ")[1])
    monkeypatch.setattr(pictures, "draw", lambda section, note: [])
    monkeypatch.chdir(ROOT)
    command[command.index("--out") + 1] = str(tmp_path)
    assert report.main(command) == 0
    for name in ("report.csv", "report_comparisons.csv"):
        assert (tmp_path / name).read_text() == (kept / name).read_text(), f"{name}: give the command in {runs.KEPT} again"


def test_a_run_that_its_regime_ended_is_finished(tmp_path):
    """Seeds that end after different numbers of epochs are one group; one that ended before its freeze is judged like them."""
    ends = {"0": {"optimizer": "SGD", "lr": 20.0, "plateau": 1.2, "end_below": 30.0}}
    folders = [make_text_run(tmp_path / f"prox_run_{seed}", "prox", seed, 100.0 + seed, epochs=80) for seed in range(2)]
    folders.append(make_text_run(tmp_path / "lazy_run_0", "lazy", 0, 100.0, epochs=80, freeze_epoch=50))
    for folder in folders:
        add_facts(folder, regime=ends)
    longer = folders[1] / "results.csv"
    *rows, last = longer.read_text().splitlines()
    longer.write_text("\n".join([*rows, last.removesuffix(",96.0") + ",", "7" + last.removeprefix("6")]) + "\n")
    found, left_out = collected(*folders)
    assert [group.method for group in found] == ["BinaryConnect", "ProxQuant-binary"]
    assert [group.judged() for group in found] == [{0: 101.0}, {0: 101.0, 1: 102.0}]
    assert found[1].tests() == {0: 95.0, 1: 96.0}
    assert found[1].at_the_end("epoch") == {0: 6, 1: 7}
    assert left_out == []


def test_networks_of_text_are_judged_by_their_best_epoch_whether_they_froze_or_not(tmp_path):
    """As the paper does: the hard-quantized network that is best on the validation text, and its perplexity on the test text."""
    for seed in range(3):
        for mode, freeze_epoch, perplexity in (("lazy", 3, 130.0), ("prox", -1, 100.0)):
            folder = make_text_run(tmp_path / f"{mode}_run_{seed}", mode, seed, perplexity + seed, freeze_epoch=freeze_epoch)
            text = (folder / "results.csv").read_text()
            first, *rows = [line.split(",") for line in text.splitlines()]
            place = first.index("val_ppl_bin")
            rows[-1][place], rows[-2][place] = rows[-2][place], rows[-1][place]  # the best epoch is the last but one
            (folder / "results.csv").write_text("\n".join(",".join(cells) for cells in (first, *rows)) + "\n")
    found, left_out = collected(*sorted(tmp_path.iterdir()))
    assert left_out == []
    assert [(group.mode, group.freeze_epoch) for group in found] == [("lazy", 3), ("prox", None)]
    assert [group.judged() for group in found] == [{0: 131.0, 1: 132.0, 2: 133.0}, {0: 101.0, 1: 102.0, 2: 103.0}]
    assert [group.tests() for group in found] == [{0: 125.0, 1: 126.0, 2: 127.0}, {0: 95.0, 1: 96.0, 2: 97.0}]
    (section,) = tables.sections(found)
    (one,) = tables.compare(section)  # their changes of signs are taken at the freeze, which one of them has not
    assert (one.quantity, one.difference.mean, one.verdict) == ("best perplexity", -30.0, "ProxQuant-binary (#2) lower")
    assert "| 102.00 (1.00, n=3) | 96.00 (1.00, n=3) |" in tables.error_table(section)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0
    words = (tmp_path / "out" / "report.md").read_text()
    assert tables.NEVER_FROZE not in words
    assert "never quantized for good" not in words
