"""What a run's folder says about the run, what it may be continued with, and what is said when something fails."""

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_class_folders

import main_binary_reg
from training import checkpoints, computing, tracking
from training import folder as folder_module
from training import log as log_module
from training.processes import Processes

PROX = ("--projection_mode", "prox", "--reg_rate", 1, "--optimizer", "Adam", "--lr", "0.01")


class Done(Namespace):
    """Of a run: status, what it printed (out, err), and its folder."""

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def facts(self) -> dict:
        return json.loads((self.folder / "args.json").read_text())

    def checkpoint(self, name: str = "checkpoint.pth.tar") -> dict:
        return torch.load(self.folder / name, weights_only=True)


@pytest.fixture
def train(tiny_data, tmp_path, capsys, monkeypatch) -> Callable[..., Done]:
    """Runs the command line in this process: ``train(name, arguments...)``; of two values of a flag the later one counts."""
    monkeypatch.chdir(tmp_path)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(name: str, *arguments: object) -> Done:
        base = ("--model_config", "{'depth': 8}", "--batch-size", 40, "--epochs", 1, "--data_dir", tiny_data, "--save", name)
        capsys.readouterr()
        status = main_binary_reg.main(list(map(str, (*base, *arguments))))
        printed = capsys.readouterr()
        return Done(status=status, out=printed.out, err=printed.err, folder=tmp_path / "results" / name)

    yield run
    for number, handler in signals.items():
        signal.signal(number, handler)


# How it is computed.


def test_the_precision_belongs_to_the_run(train, monkeypatch):
    monkeypatch.setattr(computing, "_cpu_flags", lambda: {"avx512_bf16"})
    assert train("run").facts()["precision"] == "bf16"
    monkeypatch.setattr(computing, "_cpu_flags", set)
    again = train("run", "--epochs", 2)
    assert again.status == 0, again.err
    assert again.checkpoint()["precision"] == again.checkpoint("model_best.pth.tar")["precision"] == "bf16"
    assert "continued in bf16, as the run was begun; auto on this machine would be fp32" in again.log()
    assert "bf16, by rounding float32 (as the run was begun)" in again.log()
    assert [facts["precision"] for facts in again.facts()["continued"]] == ["bf16"]
    refused = train("run", "--epochs", 3, "--precision", "fp32")
    assert refused.status == 2
    assert "--precision bf16 there, fp32 here" in refused.err
    assert train("run", "--epochs", 2, "--precision", "bf16").status == 0


def test_overwriting_damaged_checkpoints_clears_the_folder(train):
    first = train("run", "--epochs", 2, "--save_all")
    for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar"):
        assert (first.folder / name).exists()
        (first.folder / name).write_bytes(b"x")
    (first.folder / "left").touch()
    refused = train("run", "--epochs", 2, "--save_all")
    assert refused.status == 2
    assert "--overwrite starts anew, which deletes the 2 epochs that are trained there and everything else" in refused.err
    assert (first.folder / "left").exists()
    anew = train("run", "--epochs", 2, "--save_all", "--overwrite")  # the very same run, or its other arguments would clear it
    assert anew.status == 0
    assert not (first.folder / "left").exists()


class Peers(Processes):
    """Others decide for fp32, and against compiling, which they could."""

    unable = 0

    def largest(self, *numbers: int) -> list[int]:
        return [1, 1, self.unable]


class WithoutCompiler(Peers):
    """Others that could not."""

    unable = 1


def test_all_processes_compute_alike():
    asked = Namespace(precision="auto", compile="auto", capture=False)
    native = computing.Precision("bf16", "cpu", "native")
    precision, computed, _ = computing.decide(native, True, asked, "a CPU", {}, Peers())
    assert (precision.name, computed["precision"], computed["compile"]) == ("fp32", "fp32", "off")
    before = {"precision": "bf16", "compile": "on", "place": "a CPU"}
    precision, computed, _ = computing.decide(native, True, asked, "a CPU", before, Peers())
    assert (precision.name, computed["precision"], computed["compile"]) == ("bf16", "bf16", "on")
    assert computing.decide(native, True, asked, "a CPU", before, WithoutCompiler())[1]["compile"] == "off"


def test_another_machine_is_said(train):
    train("run")
    path = Path("results/run/checkpoint.pth.tar")
    content = torch.load(path, weights_only=True)
    content["computed"] |= {"place": "another CPU, 4 threads", "processes": 2}
    torch.save(content, path)
    warnings = train("run", "--epochs", 2).facts()["continued"][0]["warnings"]
    assert [words.split(" before, ")[0] for words in warnings] == ["on another CPU, 4 threads", "2 processes"]


def test_another_compile_is_said(train):
    """What is typed holds; what is not typed stays as it was."""
    train("run")
    path = Path("results/run/checkpoint.pth.tar")
    content = torch.load(path, weights_only=True)
    content["computed"] |= {"compile": "on"}
    torch.save(content, path)
    for epochs, warned in ((2, ["--compile on before, --compile off now: sums round differently"]), (3, [])):
        facts = train("run", "--epochs", epochs, "--compile", "off").facts()["continued"][-1]
        assert (facts["compiled"], facts["warnings"]) == (False, warned)


def test_a_compiled_run_goes_on_where_there_is_no_compiler(train, monkeypatch):
    train("run")
    path = Path("results/run/checkpoint.pth.tar")
    content = torch.load(path, weights_only=True)
    content["computed"] |= {"compile": "on"}
    torch.save(content, path)
    monkeypatch.setenv("CXX", "no-compiler")
    again = train("run", "--epochs", 2)
    assert again.status == 0, again.err
    facts = again.facts()["continued"][-1]
    assert (facts["compiled"], facts["warnings"]) == (False, ["--compile on before, --compile off now: sums round differently"])


def test_a_compiler_that_cannot_build_is_none(train, tmp_path, monkeypatch):
    """As without Python's headers: every long run used to end at its first step."""
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'trial.cpp:1:10: fatal error: Python.h: No such file' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(computing, "COMPILE_PAYS_OFF", 1)
    assert train("run").facts()["compiled"] is False
    refused = train("on", "--compile", "on")
    assert refused.status == 2
    assert f"--compile on: the C++ compiler {compiler} cannot build an extension of Python (Python.h: No such file)" in refused.err
    assert not refused.folder.exists()


def test_gpus_that_are_not_there_are_said_before_anything_starts(train, monkeypatch):
    monkeypatch.setattr("utils.count_gpus", lambda device: 2)
    monkeypatch.setattr(main_binary_reg, "launch", lambda command, count: pytest.fail("started"))
    done = train("run", "--gpus", "0,5")
    assert (done.status, done.err) == (2, "main_binary_reg.py: error: --gpus 5: this machine has the GPUs 0 to 1\n")
    assert not done.folder.exists()


@pytest.mark.parametrize("older", [False, True])
def test_memory_is_kept_where_glibc_lets_it(monkeypatch, older):
    """Old ones refuse a threshold above 32 MiB; where none is accepted, nothing is set."""
    accepted = {}

    def mallopt(name: int, value: int) -> int:
        if name == -3 and value > (32 << 20 if older else 1 << 40):
            return 0
        accepted[name] = value
        return 1

    monkeypatch.setattr(computing.ctypes, "CDLL", lambda name: Namespace(mallopt=mallopt))
    computing.keep_freed_memory()
    assert accepted == {-3: 32 << 20 if older else 1 << 30, -1: 2**31 - 1}
    accepted.clear()
    monkeypatch.setattr(
        computing.ctypes, "CDLL", lambda name: Namespace(mallopt=lambda name, value: name != -3 and mallopt(name, value))
    )
    computing.keep_freed_memory()
    assert accepted == {}


# What it says.


def test_warnings_are_in_the_log_and_among_the_arguments(train):
    done = train("run", "--projection_mode", "lazy", "--reg_rate", "0.1", "--freeze_epoch", 9)
    assert len(done.facts()["warnings"]) == 2
    for words in done.facts()["warnings"]:
        assert f"warning: {words}" in done.log()
        assert f"warning: {words}" in done.out
    assert "--freeze_epoch 9 is not below --epochs 1" in done.log()
    assert train("run", "--projection_mode", "lazy", "--freeze_epoch", 9, "--epochs", 2, "--reg_rate", "0.1").status == 0
    assert done.log().count("--reg_rate has no effect") == 2  # that of the first process is kept


def test_a_run_records_what_it_started_from(train):
    first = train("fp", "--epochs", 2)
    done = train("from_folder", "--resume", "results/fp", *PROX)
    start = done.facts()["warm_start"]
    best = first.checkpoint("model_best.pth.tar")
    assert start == done.checkpoint()["warm_start"]
    assert (start["path"], start["epoch"], start["score"]) == ("results/fp", best["epoch"], best["best_prec1"])
    assert start["finished"] is True
    assert done.facts()["warnings"] == []
    renamed = {f"module.{name}": value.contiguous() for name, value in reversed(best["state_dict"].items())}
    torch.save({"state_dict": renamed}, "alone.pth.tar")
    alone = train("from_file", "--resume", "alone.pth.tar", *PROX).facts()["warm_start"]
    assert alone == {**start, "path": "alone.pth.tar", "epoch": None, "score": None, "finished": None, "of_epochs": None}
    renamed["module.fc.bias"][0] += 1e-6
    torch.save({"state_dict": renamed}, "alone.pth.tar")
    assert train("from_other", "--resume", "alone.pth.tar", *PROX).facts()["warm_start"]["sha256"] != start["sha256"]
    assert first.facts()["warm_start"] is None
    # Continued, it says the same, though the path is spelled otherwise and the start has changed meanwhile.
    (first.folder / "model_best.pth.tar").write_bytes(b"")
    again = train("from_folder", "--resume", "results/fp/", *PROX, "--epochs", 2)
    assert again.status == 0, again.err
    assert again.facts()["warm_start"] == again.checkpoint()["warm_start"] == start


class Unread(io.StringIO):
    """Standard output whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


def test_a_line_that_the_terminal_does_not_take_is_in_the_file_and_among_the_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Unread())
    monkeypatch.setattr(log_module.log, "handlers", [])
    log_module.log_to_terminal()
    log_module.warn("before the file")
    file = log_module.LogFile(tmp_path / "log.txt")
    log_module.warn("in the file")
    file.end()
    said = (tmp_path / "log.txt").read_text()
    assert [line.split("warning: ")[1] for line in said.splitlines()] == ["before the file", "in the file"]
    assert log_module.warnings_so_far() == ["before the file", "in the file"]


def test_a_run_without_standard_error(train, tmp_path, monkeypatch):
    """Closed by ``2>&-``: Python has none then. The images are decoded first, with a bar of its own."""
    make_class_folders(tmp_path / "CIFAR10")
    monkeypatch.setattr(sys, "stderr", None)
    assert train("run", "--data_dir", tmp_path).status == 0


def test_what_goes_to_a_closed_stream_is_in_no_other_file(tmp_path):
    """A file opened later would have the closed one's number, and get what a library prints there, in child processes too."""
    look = "import os, sys; nowhere = os.stat(os.devnull); "
    look += "open(sys.argv[1], 'w').write(str([os.path.samestat(os.fstat(n), nowhere) for n in range(3)]))"
    code = "import subprocess; from training.log import log_to_terminal; log_to_terminal(); exec(sys.argv[2]); "
    code = f"import sys; {code} subprocess.run([sys.executable, '-c', sys.argv[2], sys.argv[1] + '2'])"
    closed = f'exec "{sys.executable}" -c "$0" "$@" <&- >&- 2>&-'
    subprocess.run(["bash", "-c", closed, code, tmp_path / "file", look], cwd=ROOT, check=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "file2").read_text() == "[True, True, True]"


def test_an_unfinished_warm_start_is_said(train):
    train("fp")
    path = Path("results/fp/args.json")
    path.write_text(path.read_text().replace('"epochs": 1', '"epochs": 7'))
    done = train("run", "--resume", "results/fp", *PROX)
    assert "%), never frozen\n" in done.log()
    assert done.facts()["warm_start"]["finished"] is False
    assert done.facts()["warnings"] == ["--resume results/fp: that run is unfinished, it has trained 1 of 7 epochs"]


# How it fails.


def test_a_file_that_cannot_be_written_is_named(train, monkeypatch):
    save = checkpoints.save

    def full(path: Path, content: dict) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write answers, without the file's name

    monkeypatch.setattr(checkpoints, "save", full)
    done = train("run")
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert f"No space left on device: {Path('results/run/model_best.pth.tar')}" in done.err
    assert "there is no checkpoint yet" in done.err
    assert "Traceback" in done.log()
    monkeypatch.setattr(checkpoints, "save", save)
    train("run")
    monkeypatch.setattr(checkpoints, "save", full)
    assert "the last good checkpoint is kept" in train("run", "--epochs", 2).err


def test_a_fault_of_the_program_is_no_full_disk(train, monkeypatch):
    def faulty(*arguments: object) -> None:
        Path("no such file").read_text()

    monkeypatch.setattr(tracking.Board, "add_epoch", faulty)
    with pytest.raises(FileNotFoundError):
        train("run")
    log = Path("results/run/log.txt").read_text()
    assert "Traceback" in log
    assert "in faulty" in log


# What it may be continued with.


def test_a_process_that_dies_at_the_end_of_an_epoch_leaves_its_copy(train, monkeypatch):
    """Once the run has an epoch behind it, nothing would make the copy that ``--save_all`` keeps of it."""
    train("run", "--save_all")
    replace = os.replace

    def replace_and_die(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == checkpoints.LATEST:
            raise OSError(errno.EIO, "the machine is gone")

    with monkeypatch.context() as dying:
        dying.setattr(os, "replace", replace_and_die)
        assert train("run", "--save_all", "--epochs", 2).status == 1
    done = train("run", "--save_all", "--epochs", 2)
    assert "complete" in done.out
    assert done.checkpoint("checkpoint_epoch_2.pth.tar")["epoch"] == 2


def test_what_changes_no_number_may_change(train, tiny_data):
    train("run", "--tb_dir", "tb")
    shutil.copytree(tiny_data, "moved")
    more = ("--data_dir", "moved", "--tb_dir", "elsewhere", "--save_all", "--print-freq", 3, "--workers", 1, "--device", "cpu")
    done = train("run", "--epochs", 2, *more)
    assert done.status == 0, done.err
    assert "continuing in epoch 2" in done.out
    assert any(Path("elsewhere").iterdir())
    refused = train("run", "--epochs", 3, "--seed", 1)
    assert refused.status == 2
    assert "--overwrite, which deletes the 2 epochs that are trained there" in refused.err


def test_a_warm_start_may_be_named_otherwise(train, tmp_path):
    train("fp")
    assert train("run", "--resume", "results/fp").status == 0
    for place in (tmp_path / "results" / "fp", "results/../results/fp/", "results/fp/model_best.pth.tar"):
        assert "complete" in train("run", "--resume", place).out
    assert train("run", "--resume", "results/fp/checkpoint.pth.tar").status == 2


def test_a_warm_start_that_knows_the_held_out_images_is_said(train):
    train("fp", "--holdout", 10)
    (line,) = train("run", "--resume", "results/fp", "--holdout", 20).facts()["warnings"]
    assert line.startswith("--holdout 20: 10 images were held out of the training of --resume results/fp")
    assert train("same", "--resume", "results/fp", "--holdout", 10).facts()["warnings"] == []


def test_a_warm_start_that_knows_the_held_out_files_of_imagenet_is_said(train, imagenet):
    """What tells its data from others is of another split there, and was taken for other images."""
    data = ("--dataset", "imagenet", "--data_dir", imagenet, "--input_size", 40, "--workers", 0, "--model_config", "{'depth': 18}")
    assert train("fp", *data).facts()["warnings"] == []
    (line,) = train("run", *data, "--resume", "results/fp", "--holdout", 2).facts()["warnings"]
    assert line.startswith("--holdout 2: 0 images were held out of the training of --resume results/fp")
    assert train("held", *data, "--holdout", 2).facts()["warnings"] == []
    assert train("same", *data, "--resume", "results/held", "--holdout", 2).facts()["warnings"] == []
    # Its size of images, which no other data set has, needs no --dataset beside it.
    evaluated = ["--evaluate", "results/fp", "--data_dir", str(imagenet), "--input_size", "48", "--workers", "0"]
    assert main_binary_reg.main(evaluated) == 0


@pytest.mark.parametrize("change", ["order", "one more"])
def test_a_run_is_not_continued_on_other_data(train, tiny_data, change):
    """Held-out images would be among those that it was trained on."""
    train("run", "--holdout", 20)
    before = {path: path.read_bytes() for path in Path("results/run").rglob("*.*")}
    shutil.copytree(tiny_data, "moved", ignore=shutil.ignore_patterns("*.npz"))
    images = sorted(Path("moved/CIFAR10/train").rglob("*.png"))
    if change == "order":
        content = images[0].read_bytes()
        images[0].write_bytes(images[1].read_bytes())
        images[1].write_bytes(content)
    else:
        shutil.copy(images[0], images[0].with_name("another.png"))
    refused = train("run", "--holdout", 20, "--epochs", 2, "--data_dir", "moved")
    assert refused.status == 2
    assert "--data_dir moved: holds other samples than results/run was trained on" in refused.err
    assert {path: path.read_bytes() for path in Path("results/run").rglob("*.*")} == before
    assert main_binary_reg.main(["--evaluate", "results/run", "--data_dir", "moved"]) == 0
    (line,) = log_module.warnings_so_far()
    assert line.startswith("--data_dir moved: other images than this network was trained on")
    assert train("run", "--holdout", 20, "--epochs", 2).status == 0


@pytest.mark.parametrize("kind", [("--save_all",), ("--freeze_epoch", 0, *PROX)])
def test_deleted_files_of_a_finished_run_are_made_again(train, kind):
    done = train("run", "--epochs", 2 if "--save_all" in kind else 1, *kind)
    best, results = done.checkpoint("model_best.pth.tar"), (done.folder / "results.csv").read_bytes()
    for name in ("model_best.pth.tar", "results.csv"):
        (done.folder / name).unlink()
    again = train("run", "--epochs", 2 if "--save_all" in kind else 1, *kind)
    assert "complete" in again.out
    assert (done.folder / "results.csv").read_bytes() == results
    found = again.checkpoint("model_best.pth.tar")
    assert set(found) == set(best)
    assert all(found[name] == best[name] for name in best if name not in ("state_dict", "results"))
    assert {name: found["results"][name] for name in best["results"]} == {**best["results"]}
    assert all(torch.equal(found["state_dict"][name], value) for name, value in best["state_dict"].items())


@pytest.mark.parametrize("removed", ["checkpoint.pth.tar", "args.json"])
def test_a_run_that_cannot_be_continued_is_not_begun_anew_in_silence(train, removed):
    """A finished run without its checkpoints, which somebody needed the place of, used to be trained again over its results."""
    done = train("run")
    (done.folder / "checkpoint.pth.tar").unlink()
    (done.folder / removed).unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in done.folder.rglob("*.*")}
    again = train("run")
    assert again.status == 2
    reason = "its checkpoint is gone" if removed == "checkpoint.pth.tar" else "no args.json, but a checkpoint"
    assert (
        f"holds a run that cannot be continued ({reason}); choose another name, or --overwrite, which deletes the 1 ep" in again.err
    )
    assert {path: path.read_bytes() for path in done.folder.rglob("*.*")} == before
    assert train("run", "--overwrite").status == 0


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(train):
    done = train("run")
    (done.folder / "checkpoint.pth.tar").unlink()
    heading = (done.folder / "results.csv").read_text().splitlines()[0]
    (done.folder / "results.csv").write_text(f"{heading}\n")
    assert train("run").status == 0


def test_overwriting_does_not_delete_the_warm_start(train):
    done = train("run")
    before = {path: path.read_bytes() for path in done.folder.rglob("*.*")}
    for place in (done.folder, done.folder / "checkpoint.pth.tar", "results/../results/run"):
        refused = train("run", "--resume", place, "--overwrite")
        assert refused.status == 2
        assert f"--resume {place}: it lies in results/run, which --overwrite would delete" in refused.err
    assert {path: path.read_bytes() for path in done.folder.rglob("*.*")} == before


def test_damaged_results_of_a_finished_run_are_made_again(train):
    done = train("run")
    results = done.folder / "results.csv"
    before = results.read_bytes()
    results.write_bytes(b"\xff\xfe")
    assert "complete" in train("run").out
    assert results.read_bytes() == before
    results.unlink()
    results.mkdir()
    again = train("run")
    assert (again.status, len(again.err.splitlines())) == (1, 1)
    assert "results.csv" in again.err


@pytest.mark.parametrize("epoch", ["inf", "nan", "1e400"])
def test_a_warm_start_beside_damaged_results_is_of_a_run_that_is_not_known(train, epoch):
    results = train("fp").folder / "results.csv"
    heading, row = results.read_text().splitlines()
    results.write_text(f"{heading}\n{epoch},{row.partition(',')[2]}\n")
    done = train("run", "--resume", "results/fp")
    assert done.status == 0
    assert done.facts()["warm_start"]["finished"] is None


def test_what_can_be_refused_is_so_before_the_data_are_read(train, tmp_path):
    """Class folders are decoded into a file, and other data sets downloaded."""
    make_class_folders(tmp_path / "data" / "CIFAR10")
    before = sorted((tmp_path / "data").rglob("*"))
    for flag, value in (("--resume", "nowhere"), ("--model_config", "{'depth': 21}"), ("--regime", "{0: {'momentum': 'x'}}")):
        refused = train("run", "--data_dir", tmp_path / "data", flag, value)
        assert refused.status == 2
        assert flag in refused.err
        assert sorted((tmp_path / "data").rglob("*")) == before


def test_a_deleted_network_that_is_nowhere_else_is_said(train):
    """Before the freeze the quantized network is scored, and the run's state is the other one."""
    done = train("run", *PROX)
    (done.folder / "model_best.pth.tar").unlink()
    again = train("run", *PROX)
    assert (again.status, (done.folder / "model_best.pth.tar").exists()) == (0, False)
    assert "model_best.pth.tar is gone, and the best network, after epoch 1, is in no other file" in again.out


def test_two_runs_in_one_folder_of_curves_are_said(train):
    assert train("one", "--tb_dir", "tb").facts()["warnings"] == []
    assert train("one", "--tb_dir", "tb", "--epochs", 2).facts()["continued"][0]["warnings"] == []
    (words,) = train("two", "--tb_dir", "tb", "--seed", 1).facts()["warnings"]
    assert words.startswith("--tb_dir tb: events of another run")


def test_images_that_were_trained_on_are_not_called_held_out(train, tiny_data, capsys):
    folder = train("run", "--holdout", 30).folder
    for held, seen in ((20, 0), (40, 10)):
        assert main_binary_reg.main(["-e", str(folder), "--holdout", str(held), "--data_dir", str(tiny_data)]) == 0
        said = capsys.readouterr().out
        assert ("held out training images" in said) == (not seen)
        assert (f"warning: --holdout {held}: 30 images were held out" in said) == bool(seen)


@pytest.mark.parametrize("mode_name", ["ttq", "lazy", "binary_relax", None])
def test_the_strength_is_told_where_there_is_one(train, mode_name):
    mode = ("--projection_mode", mode_name, "--freeze_epoch", 1) if mode_name else ()
    done = train("run", "--epochs", 2, *mode)
    assert done.status == 0, done.err
    with open(done.folder / "results.csv", newline="", encoding="utf-8") as file:
        cells = [row["strength"] for row in csv.DictReader(file)]
    assert len(cells) == 2
    told = ["strength" in line for line in done.log().splitlines() if re.search(r" epoch \d/2: ", line)]
    if mode_name == "ttq":
        assert cells == ["", ""]
        assert told == [False, False]
    else:
        assert [float(cell) > 0 for cell in cells] == [mode_name is not None, False]
        assert told == [True, True]


def test_flags_that_an_evaluation_has_no_use_for_are_said(train, tiny_data, capsys):
    folder = train("run").folder
    capsys.readouterr()
    arguments = ("--evaluate", folder, "--data_dir", tiny_data, "--lr", 3, "-p", 7, "--start-epoch", 1, "--precision", "fp32")
    assert main_binary_reg.main(list(map(str, arguments))) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    flags = ("--lr", "--print-freq", "--start-epoch")
    assert sorted(warnings) == [f"warning: {flag} has no effect with --evaluate" for flag in flags]


def test_what_killed_writes_have_left_is_removed(train):
    folder = train("run").folder
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    left, mine = folder / f".results.csv.{child.pid}.tmp", folder / f".checkpoint.pth.tar.new.{os.getpid()}.tmp"
    kept = [folder / f".log.txt.{os.getppid()}.tmp", folder / f"notes.{child.pid}.tmp", folder / f".{child.pid}.tmp"]
    for path in (left, mine, *kept):
        path.touch()
    assert train("run", "--epochs", 2).status == 0
    assert not left.exists()
    assert not mine.exists()
    assert all(path.exists() for path in kept)


def test_a_folder_that_another_process_clears_after_the_first_look_begins_with_the_warm_start(train, monkeypatch):
    train("fp")
    options = ("--resume", "results/fp", "--projection_mode", "lazy", "--lr", "0.01")
    undisturbed = train("undisturbed", *options, "--epochs", 2)
    train("run", *options)
    take_lock = folder_module.Run._take_lock

    def cleared_first(run: folder_module.Run) -> None:
        run._clear()  # as a process with --overwrite does, that has ended since
        take_lock(run)

    monkeypatch.setattr(folder_module.Run, "_take_lock", cleared_first)
    done = train("run", *options, "--epochs", 2)
    assert done.status == 0, done.err
    assert done.facts()["warm_start"] == undisturbed.facts()["warm_start"] is not None
    one, other = done.checkpoint(), undisturbed.checkpoint()
    assert one["history"][0]["sign_change"] == other["history"][0]["sign_change"]
    for name, value in other["state_dict"].items():
        assert torch.equal(one["state_dict"][name], value), name
