"""The report on a whole study of made-up runs, through the real command line, and on what the program itself writes."""

import csv
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import report
from conftest import ROOT, run_main
from made_runs import (
    ERRORS,
    HELD_OUT,
    SIGNS,
    START,
    T_3,
    add_facts,
    damage,
    make_events,
    make_run,
    row_after,
    run_report,
    write_rows,
)
from PIL import Image
from reporting import pictures, runs, tables


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


def test_runs_behind_links_are_found_once(tmp_path):
    """Results that lie on another disk; a link that leads back ends nowhere."""
    kept = make_run(tmp_path / "disk" / "prox_run_0", "prox", 0, 20.0)
    here = make_run(tmp_path / "results" / "prox_run_1", "prox", 1, 20.0)
    (tmp_path / "results" / "prox_run_0").symlink_to(kept)
    (tmp_path / "results" / "back").symlink_to(tmp_path / "results")
    (tmp_path / "results" / "again").symlink_to(tmp_path / "disk")
    found = report.read_runs([tmp_path / "results"])
    assert {run.folder.resolve() for run in found} == {kept, here}
    assert len(found) == 2


@pytest.mark.parametrize("folder", ["published", "steps", "held_out", "precision", "family"])
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
