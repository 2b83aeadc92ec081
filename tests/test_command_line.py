"""The real command line in a subprocess: every mode, warm start, continuing, evaluation."""

import contextlib
import csv
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import forks
import pytest
import torch
from conftest import PATIENCE, ROOT, run_main, start_main, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models
import quantize

CSV_COLUMNS = (
    "epoch,train_loss,val_loss,train_error1,val_error1,train_error5,val_error5,"
    "val_loss_bin,val_error1_bin,val_error5_bin,lr,strength,seconds,binary,quant_error,sign_change"
)
NETWORK = ("--model", "resnet", "--model_config", "{'depth': 8}", "--dataset", "cifar10", "--batch-size", 32, "--precision", "fp32")
MODES = {
    "prox": ("--projection_mode", "prox", "--reg_rate", "2.0", "--optimizer", "Adam", "--lr", "0.01"),
    "lazy": ("--projection_mode", "lazy", "--binary_reg", "1.0", "--optimizer", "Adam", "--lr", "0.01", "--binary_regime"),
    "prox_ternary": ("--projection_mode", "prox_ternary", "--reg_rate", "2.0", "--optimizer", "Adam", "--lr", "0.01"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_data) -> dict[str, Path]:
    """A results folder with a trained full-precision network in it."""
    results = tmp_path_factory.mktemp("results")
    run_main(*NETWORK, "--data_dir", tiny_data, "--results_dir", results, "--save", "fp", "--epochs", 3, "--lr", "0.01")
    return {"results": results, "data": tiny_data}


def arguments(place: dict[str, Path], *more: object) -> list[object]:
    return [*NETWORK, "--data_dir", place["data"], "--results_dir", place["results"], *more]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(folder: Path, name: str = "checkpoint.pth.tar") -> dict:
    return torch.load(folder / name, weights_only=True)


def scalars(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "tensors": 0})
    return events.Reload()


def assert_quantized(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same entries at the same levels; a level is a mean, which sums of another order round differently."""
    assert torch.equal(found.sign(), expected.sign())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_full_precision_writes_everything(place):
    folder = place["results"] / "fp"
    found = rows(folder)
    assert ",".join(found[0]) == CSV_COLUMNS
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert all(row["val_error1_bin"] == "" for row in found)
    assert all(0 <= float(row["val_error1"]) <= 100 for row in found)
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["arguments"]["model_config"] == {"depth": 8}
    assert recorded["versions"]["torch"] == torch.__version__
    assert {"device", "precision", "git_revision", "command"} <= set(recorded)
    log = (folder / "log.txt").read_text()
    assert re.search(r"epoch 2/3, step 3/3: loss [0-9.]+, error [0-9.]+%, [0-9]+ images/s", log)
    assert "78,042 parameters" in log
    content = load(folder)
    assert content["epoch"] == 3
    assert content["best_prec1"] == pytest.approx(100 - min(float(row["val_error1"]) for row in found))
    events = scalars(folder / "tb")
    for name in ("train_loss", "val_loss", "train_error1", "val_error1", "train_error5", "val_error5", "lr"):
        assert [point.step for point in events.Scalars(name)] == [1, 2, 3]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert [point.value for point in events.Scalars("val_loss")] == pytest.approx([float(row["val_loss"]) for row in found])


@pytest.mark.parametrize("mode_name", MODES)
def test_a_quantized_run_from_start_to_end(place, mode_name, tmp_path):
    folder = place["results"] / mode_name
    options = ("--save", mode_name, "--resume", place["results"] / "fp", "--epochs", 5, "--freeze_epoch", 3, "--save_all")
    done = run_main(*arguments(place, *options, *MODES[mode_name], "--tb_dir", tmp_path / "tb"))
    assert "warning" not in done.stdout + done.stderr

    found = rows(folder)
    grows = quantize.MODES[mode_name].strength_grows
    assert [float(row["strength"]) for row in found[:3]] == ([0.0, 2.0, 4.0] if grows else [1.0, 1.0, 1.0])
    for row in found[3:]:  # frozen: both validations are of the same network, and nothing is projected
        assert float(row["strength"]) == 0
        assert row["val_error1_bin"] == row["val_error1"]
        assert row["val_loss_bin"] == row["val_loss"]

    # Before the freeze the state is the soft network (lazy: the projected one), afterwards the quantized one, to the last bit.
    model = models.resnet("cifar10", 8)
    names = [name for name, _ in quantize.MODES[mode_name].select(model)]
    before, *after = (load(folder, f"checkpoint_epoch_{epoch}.pth.tar") for epoch in (3, 4, 5))
    weights = quantize.latent_in(before["optimizer"]) or before["state_dict"]
    start = load(place["results"] / "fp", "model_best.pth.tar")["state_dict"]
    for content in after:
        for name, value in content["state_dict"].items():
            if name in names:
                assert_quantized(value, quantize.MODES[mode_name].hard_quantize(weights[name]))
                allowed = 3 if mode_name == "prox_ternary" else 2
                assert len(value.unique()) <= allowed
                if allowed == 2:
                    assert set(value.unique().tolist()) <= {-1.0, 1.0}
            elif name.endswith(".weight"):
                assert len(value.unique()) > 3, name
                assert not torch.equal(value, start[name]), name
    frozen, moving = after[0]["state_dict"], after[1]["state_dict"]
    assert any(not torch.equal(frozen[name], moving[name]) for name in frozen if name not in names)
    assert all(weight.abs().max() <= 1 for name, weight in weights.items() if name in names)

    events = scalars(tmp_path / "tb")
    tags = events.Tags()
    for metric in ("binary", "quant_error", "sign_change"):
        assert {f"{metric}/{name}" for name in names} <= set(tags["scalars"])
        assert len(events.Scalars(f"{metric}_mean")) == 5
    assert events.Scalars("quant_error_mean")[-1].value == 0
    assert {f"weights/{name}" for name in names} <= set(tags["histograms"])
    assert any("arguments" in tag for tag in tags["tensors"])

    # The best network is the one that was scored: evaluating it gives the recorded figure.
    best = min(range(5), key=lambda index: float(found[index]["val_error1_bin"]))
    content = load(folder, "model_best.pth.tar")
    assert content["epoch"] == best + 1
    assert content["best_prec1"] == pytest.approx(100 - float(found[best]["val_error1_bin"]))
    for path in (folder, folder / "model_best.pth.tar"):
        printed = run_main("--evaluate", path, "--data_dir", place["data"], "--precision", "fp32").stdout
        errors = re.findall(r"(as it is|hard-quantized): loss ([0-9.]+), top-1 error ([0-9.]+)%", printed)
        for _, loss, error in errors:
            assert float(error) == pytest.approx(float(found[best]["val_error1_bin"]), abs=0.005)
            assert float(loss) == pytest.approx(float(found[best]["val_loss_bin"]), abs=2e-6)
        assert len(errors) == 2


@pytest.mark.parametrize("mode_name", MODES)
def test_evaluate_shows_the_soft_and_the_quantized_network(place, mode_name):
    folder = place["results"] / f"soft_{mode_name}"
    run_main(*arguments(place, "--save", folder.name, "--resume", place["results"] / "fp", "--epochs", 2, *MODES[mode_name]))
    last = rows(folder)[-1]
    printed = run_main("--evaluate", folder / "checkpoint.pth.tar", "--data_dir", place["data"], "--precision", "fp32").stdout
    for words, suffix in (("as it is", ""), ("hard-quantized", "_bin")):
        loss, error = re.search(rf"{words}: loss ([0-9.]+), top-1 error ([0-9.]+)%", printed).groups()
        assert float(error) == pytest.approx(float(last[f"val_error1{suffix}"]), abs=0.005)
        assert float(loss) == pytest.approx(float(last[f"val_loss{suffix}"]), rel=1e-5)


def test_a_quantized_network_under_another_mode_is_quantized_anew(place):
    """The binary network, seen as ternary: what the mode's quantizer makes of it, and not the binary one under a ternary name."""
    options = ("--save", "binary_frozen", "--resume", place["results"] / "fp", "--epochs", 1, "--freeze_epoch", 0)
    run_main(*arguments(place, *options, *MODES["prox"]))
    path = place["results"] / "binary_frozen" / "model_best.pth.tar"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["layer1.0.conv1.weight"] *= torch.linspace(0.1, 1.0, 2304).view(16, 16, 3, 3)
    torch.save(content, path.with_name("uneven.pth.tar"))
    losses = {}
    for mode in ("prox", "prox_ternary"):
        options = ("--data_dir", place["data"], "--precision", "fp32", "--projection_mode", mode)
        losses[mode] = re.findall(r": loss ([0-9.]+)", run_main("--evaluate", path.with_name("uneven.pth.tar"), *options).stdout)
    assert losses["prox"][0] == losses["prox"][1] == losses["prox_ternary"][0]
    assert losses["prox_ternary"][1] != losses["prox_ternary"][0]


def test_a_quantized_network_with_another_number_of_bits_is_quantized_anew(place):
    options = ("--save", "two_bits", "--epochs", 1, "--projection_mode", "lazy_alt", "--bits", 2, "--by_row")
    run_main(*arguments(place, *options))
    losses = {}
    for bits in (1, 2):
        options = ("--data_dir", place["data"], "--precision", "fp32", "--bits", bits)
        losses[bits] = re.findall(r": loss ([0-9.]+)", run_main("--evaluate", place["results"] / "two_bits", *options).stdout)
    assert losses[2][0] == losses[2][1] == losses[1][0]  # kept as it is: the best network is the quantized one
    assert losses[1][1] != losses[1][0]


def test_the_same_command_finds_a_finished_run_complete(place):
    before = (place["results"] / "fp" / "checkpoint.pth.tar").read_bytes()
    done = run_main(*arguments(place, "--save", "fp", "--epochs", 3, "--lr", "0.01"))
    assert "complete" in done.stdout
    assert (place["results"] / "fp" / "checkpoint.pth.tar").read_bytes() == before


def test_a_run_can_be_made_longer(place):
    for epochs in (1, 3):
        run_main(*arguments(place, "--save", "longer", "--epochs", epochs, "--lr", "0.01"))
    run_main(*arguments(place, "--save", "at_once", "--epochs", 3, "--lr", "0.01"))
    one, other = (load(place["results"] / name)["state_dict"] for name in ("longer", "at_once"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    recorded = json.loads((place["results"] / "longer" / "args.json").read_text())
    assert recorded["arguments"]["epochs"] == 3
    assert len(recorded["continued"]) == 1
    shorter = run_main(*arguments(place, "--save", "longer", "--epochs", 2, "--lr", "0.01"), check=2)
    assert "--epochs 3 there, 2 here" in shorter.stderr


def test_results_lost_after_the_last_checkpoint_are_made_up_for(place):
    options = arguments(place, "--save", "csv", "--epochs", 2, "--lr", "0.01")
    run_main(*options)
    path = place["results"] / "csv" / "results.csv"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert "complete" in run_main(*options).stdout
    assert path.read_text() == whole


def test_other_arguments_into_a_used_folder(place):
    run_main(*arguments(place, "--save", "used", "--epochs", 1, "--lr", "0.01"))
    folder = place["results"] / "used"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = run_main(*arguments(place, "--save", "used", "--epochs", 1, "--lr", "0.02", "--seed", 3), check=2)
    assert "--lr 0.01 there, 0.02 here" in done.stderr
    assert "--rate" not in done.stderr
    assert "--seed 0 there, 3 here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    run_main(*arguments(place, "--save", "used", "--epochs", 1, "--lr", "0.02", "--seed", 3, "--overwrite"))
    assert json.loads((folder / "args.json").read_text())["arguments"]["seed"] == 3


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        (("--binary_regime", "--projection_mode", "lazy"), ("--lr", "0.1"), "--lr 0.1 not given there, given here"),
        (("--projection_mode", "lazy", "--lr", "0.01"), ("--binary_reg", "0"), "--binary_reg 0.0 not given there, given here"),
        (("--projection_mode", "prox", "--reg_rate", "1"), ("--wd", "1e-4"), "--weight_decay 0.0001 not given there, given here"),
    ],
)
def test_a_default_that_is_typed_may_mean_another_run(place, there, here, said):
    """The value is the same, and the regime that comes of it is not: given later, or left away, it is another run's."""
    for name, first, then in (("typed", there, (*there, *here)), ("untyped", (*there, *here), there)):
        options = ("--save", f"{name}_{here[0][2:]}", "--epochs", 1)
        run_main(*arguments(place, *options, *first))
        refused = run_main(*arguments(place, *options, *then), check=2).stderr
        words = said if name == "typed" else said.replace("not given there, given here", "given there, not given here")
        assert words in refused
        assert len(refused.splitlines()) == 1
        assert "complete" in run_main(*arguments(place, *options, *first)).stdout


@pytest.mark.parametrize("freeze", [-1, 2, 5])
def test_a_pull_that_grows_to_the_end_of_the_run_is_not_begun_anew(place, freeze):
    """PARQ is hard by the freeze, or where there is none before, by the last epoch: a longer run is another from its start."""
    options = ("--save", f"grows_{freeze}", "--projection_mode", "parq", "--freeze_epoch", freeze)
    run_main(*arguments(place, *options, "--epochs", 2))
    done = run_main(*arguments(place, *options, "--epochs", 3), check=0 if freeze == 2 else 2)
    assert ("--epochs 2 there, 3 here" in done.stderr) == (freeze != 2)


def test_unnamed_runs_never_share_a_folder(place, tmp_path):
    options = arguments(place, "--epochs", 1)
    options[options.index("--results_dir") + 1] = tmp_path
    all_three = [start_main(*options, stdout=subprocess.DEVNULL) for _ in range(3)]
    assert [process.wait(timeout=PATIENCE) for process in all_three] == [0, 0, 0]
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 3
    assert all(len(rows(folder)) == 1 for folder in folders)


@pytest.mark.parametrize(("number", "epoch"), [(signal.SIGTERM, 2), (signal.SIGINT, 1), (signal.SIGUSR1, 3)])
def test_an_interrupted_run_continues_to_the_same_end(place, number, epoch):
    options = ("--resume", place["results"] / "fp", "--epochs", 4, "--freeze_epoch", 2, *MODES["lazy"], "--print-freq", 1)
    options = (*options, "--batch-size", 4)
    whole, broken = (place["results"] / f"{kind}_{number.name}" for kind in ("whole", "broken"))
    run_main(*arguments(place, *options, "--save", whole.name))

    mark = place["results"] / f"waits_for_{number.name}"
    python = sys.executable if number == signal.SIGTERM else forks.python()
    command = [python, str(ROOT / "tests" / "waiting.py"), str(mark), str(epoch), "3"]
    command += map(str, arguments(place, *options, "--save", broken.name))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until(mark.exists, process)
    process.send_signal(number)
    printed = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}" in printed
    saved = load(broken)
    assert (saved["epoch"], saved["step"]) == (epoch - 1, 3)

    done = run_main(*arguments(place, *options, "--save", broken.name))
    assert f"continuing in epoch {saved['epoch'] + 1}, after step {saved['step']}/20" in done.stdout
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, other = load(whole, name)["state_dict"], load(broken, name)["state_dict"]
        assert all(torch.equal(one[key], other[key]) for key in one)
    without_time = [[{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)] for folder in (whole, broken)]
    assert without_time[0] == without_time[1]
    undisturbed, events = scalars(whole / "tb"), scalars(broken / "tb")
    assert [point.step for point in events.Scalars("train_loss")] == [1, 2, 3, 4]
    assert len(events.Tags()["histograms"]) == 8
    for tag in events.Tags()["histograms"]:
        strips = [[(point.step, point.histogram_value) for point in board.Histograms(tag)] for board in (undisturbed, events)]
        assert [step for step, _ in strips[0]] == [0, 1, 2, 3, 4]
        assert strips[0] == strips[1]
    log = (broken / "log.txt").read_text()
    assert re.findall(r"epoch (\d)/4: train loss", log) == ["1", "2", "3", "4"]
    assert re.findall(r"epoch 3/4, step (\d+)/20", log) == [str(step) for step in range(1, 21)]


def test_two_processes_on_one_folder(place):
    options = arguments(place, "--save", "locked", "--epochs", 500)
    first = start_main(*options, python=sys.executable, stdout=subprocess.DEVNULL)
    try:
        until((place["results"] / "locked" / "checkpoint.pth.tar").exists, first)
        first.send_signal(signal.SIGSTOP)  # it does not come to its end while the second one looks
        second = run_main(*options, check=2)
        assert "another process is working in" in second.stderr
    finally:
        first.kill()
        first.wait()
    third = start_main(*options, stdout=subprocess.PIPE)
    line = third.stdout.readline()
    third.terminate()
    third.communicate(timeout=PATIENCE)
    assert "continuing" in line  # the lock died with its owner


def test_a_diverging_run_stops_and_keeps_its_checkpoint(place):
    options = ("--save", "diverging", "--epochs", 3, "--regime", "{0: {'lr': 0.01}, 1: {'lr': 1e30}}")
    done = run_main(*arguments(place, *options), check=1)
    assert re.search(r"epoch [23]/3, step \d+: the training loss is (nan|inf)", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    content = load(place["results"] / "diverging")
    assert all(value.isfinite().all() for value in content["state_dict"].values())


def test_long_epochs_are_saved_inside(place):
    options = arguments(place, "--save", "minutes", "--epochs", 200, "--batch-size", 1, "--checkpoint_minutes", "0.0001")
    process = start_main(*options, python=sys.executable, stdout=subprocess.DEVNULL)
    folder = place["results"] / "minutes"
    until((folder / "checkpoint.previous.pth.tar").exists, process)
    process.kill()
    process.wait()
    saved = [load(folder, name) for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar") if (folder / name).exists()]
    inside = [content["step"] for content in saved if content["step"]]
    assert inside  # of two checkpoints in a row at most one is that of a whole epoch
    assert all(content["seconds"] > 0 for content in saved if content["step"])
    again = start_main(*options, stdout=subprocess.PIPE)
    line = again.stdout.readline()
    again.terminate()
    again.communicate(timeout=PATIENCE)
    assert f"continuing in epoch {saved[0]['epoch'] + 1}, after step {saved[0]['step']}/80" in line


def test_a_full_disk_stops_the_run_and_spares_the_last_good_checkpoint(place, tmp_path):
    """On a file system that holds a few checkpoints of this network and then no more."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        options = arguments(place, "--epochs", 20, "--lr", "0.01", "--save_all", "--save", "run")
        options[options.index("--results_dir") + 1] = folder
        done = run_main(*options, check=1)
        assert "No space left on device" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        finished = len(re.findall(r"^epoch \d+/20", done.stdout, re.MULTILINE))
        kept = [torch.load(path, weights_only=True)["epoch"] for path in (folder / "run").glob("checkpoint.p*.tar")]
        assert max(kept) >= finished - 1 > 0
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_vanished_folder_stops_the_run(place):
    """Moved away under the run: one line, and what had been saved is whole and can be continued where it comes back."""
    options = arguments(place, "--save", "vanishing", "--epochs", 400, "--lr", "0.01")
    process = start_main(*options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    folder, away = place["results"] / "vanishing", place["results"] / "away"
    until((folder / "checkpoint.previous.pth.tar").exists, process)
    folder.rename(away)
    said = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 1
    assert re.fullmatch(r".*No such file or directory.*vanishing.*\n", said)
    assert not folder.exists()
    latest = [name for name in ("checkpoint.pth.tar", "checkpoint.previous.pth.tar") if (away / name).exists()]
    saved = load(away, latest[0])  # between two renamings there is only the one before
    away.rename(folder)
    again = start_main(*options, stdout=subprocess.PIPE)
    assert f"continuing in epoch {saved['epoch'] + 1}" in again.stdout.readline()
    again.terminate()
    again.communicate(timeout=PATIENCE)


def test_a_run_that_nobody_listens_to_goes_on(place):
    """As under ``| head -1``, or where the terminal is closed."""
    options = arguments(place, "--save", "unheard", "--epochs", 2, "--lr", "0.01")
    process = start_main(*options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith("run: ")
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=PATIENCE)[1] == ""
    assert process.returncode == 0
    said = (place["results"] / "unheard" / "log.txt").read_text()
    assert "epoch 2/2: train loss" in said
    assert said.splitlines()[-1].endswith("%")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_closes(place, nohup):
    """It sends SIGHUP, which saves and ends the run; under ``nohup`` the run goes on, and what it writes there fails."""
    folder = place["results"] / f"terminal_{nohup}"
    options = arguments(place, "--save", folder.name, "--epochs", 3, "--lr", "0.01", "--batch-size", 4, "--print-freq", 1)
    ours, its = pty.openpty()
    os.set_blocking(ours, False)

    def take_the_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal = {"stdin": its, "stdout": its, "stderr": its, "start_new_session": True, "preexec_fn": take_the_terminal}
    process = start_main(*options, python=sys.executable, **terminal)
    os.close(its)
    log = folder / "log.txt"

    def well_on() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 65536)  # or the run waits for its reader
        return log.exists() and "epoch 1/3, step 3/20" in log.read_text()

    until(well_on, process)
    os.close(ours)
    assert process.wait(timeout=PATIENCE) == (0 if nohup else 128 + signal.SIGHUP)
    saved = load(folder)
    assert (saved["epoch"], saved["step"]) >= ((3, 0) if nohup else (0, 3))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(place):
    options = arguments(place, "--save", "damaged", "--epochs", 4, "--lr", "0.01")
    run_main(*options)
    folder = place["results"] / "damaged"
    good = load(folder)["state_dict"]
    latest = folder / "checkpoint.pth.tar"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 16
    latest.write_bytes(content)
    done = run_main(*options)
    assert "damaged" in done.stdout
    assert "continuing in epoch 4" in done.stdout
    again = load(folder)["state_dict"]
    assert all(torch.equal(good[name], again[name]) for name in good)


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(place):
    """The one before, which the run goes on from, stays until there are two good ones."""
    options = arguments(place, "--save", "damaged_then", "--epochs", 3, "--lr", "0.01")
    run_main(*options)
    folder = place["results"] / "damaged_then"
    latest, previous = folder / "checkpoint.pth.tar", folder / "checkpoint.previous.pth.tar"
    whole = previous.read_bytes()
    latest.write_bytes(latest.read_bytes()[:5000])
    assert "continuing in epoch 3" in run_main(*options).stdout
    assert previous.read_bytes() == whole
    assert load(folder)["epoch"] == 3


def test_a_run_without_a_readable_checkpoint_is_not_begun_anew_in_silence(place):
    options = arguments(place, "--save", "lost", "--epochs", 2, "--lr", "0.01")
    run_main(*options)
    for path in (place["results"] / "lost").glob("checkpoint*"):
        path.write_bytes(path.read_bytes()[:1000])
    done = run_main(*options, check=2)
    assert "no checkpoint" in done.stderr
    assert "--overwrite" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "done" in run_main(*options, "--overwrite").stdout


def test_a_published_checkpoint_is_a_warm_start(place, tmp_path):
    """Its form: other keys beside, the configuration as text, names under ``module.``, no counters of batches."""
    torch.manual_seed(5)
    model = models.resnet("cifar10", 8)
    state = {f"module.{name}": value for name, value in model.state_dict().items() if "num_batches" not in name}
    content = {"epoch": 7, "model": "resnet", "config": "{'depth': 8}", "state_dict": state, "best_prec1": 99.9, "regime": {0: {}}}
    torch.save(content, tmp_path / "published.pth.tar", _use_new_zipfile_serialization=False)
    run_main(*arguments(place, "--save", "from_published", "--resume", tmp_path / "published.pth.tar", "--epochs", 1, "--lr", 0))
    found = load(place["results"] / "from_published")["state_dict"]
    assert torch.equal(found["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    assert (place["results"] / "from_published" / "model_best.pth.tar").exists()  # its own best, not the 99.9 of the other run
    done = run_main("--evaluate", tmp_path / "published.pth.tar", "--data_dir", place["data"], "--projection_mode", "prox")
    assert "hard-quantized" in done.stdout


def test_seeds_differ_and_repeat(place):
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_main(*arguments(place, "--save", f"seed_{name}", "--seed", seed, "--epochs", 1))
        states.append(load(place["results"] / f"seed_{name}")["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_no_gpu_is_said_once(place):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_main(*arguments(place, "--save", "gpu", "--epochs", 1, "--gpu", 0))
    assert (done.stdout + done.stderr).count("no CUDA device") == 1
    done = run_main(*arguments(place, "--save", "cuda", "--epochs", 1, "--device", "cuda"), check=2)
    assert "--device cuda" in done.stderr
    assert not (place["results"] / "cuda").exists()


def test_held_out_images_are_validated_on_and_not_trained_on(place):
    options = ("--save", "held", "--epochs", 1, "--lr", "0.01", "--holdout", 30)
    done = run_main(*arguments(place, *options))
    assert "50 training and 30 validation images" in done.stdout
    assert "30 held out training images" in done.stdout
    assert json.loads((place["results"] / "held" / "args.json").read_text())["arguments"]["holdout"] == 30
    assert "--holdout" in run_main(*arguments(place, *options[:-1], 40), check=2).stderr

    # Evaluated on the same images as in training, though the command does not say so again.
    last = rows(place["results"] / "held")[-1]
    done = run_main("--evaluate", place["results"] / "held" / "checkpoint.pth.tar", "--data_dir", place["data"])
    assert f"as it is: loss {float(last['val_loss']):.6f}" in done.stdout


def test_an_unnamed_run_says_how_it_continues(place, tmp_path):
    options = arguments(place, "--epochs", 300, "--lr", "0.01")
    options[options.index("--results_dir") + 1] = tmp_path
    process = start_main(*options, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.terminate()
    (folder,) = tmp_path.iterdir()
    process.wait(timeout=PATIENCE)
    assert f"the same command with --save {folder.name} continues" in (folder / "log.txt").read_text()
    epoch = load(folder)["epoch"]
    again = start_main(*options, "--save", folder.name, stdout=subprocess.PIPE)
    assert f"continuing in epoch {epoch + 1}" in again.stdout.readline()
    again.terminate()
    again.communicate(timeout=PATIENCE)


def test_a_folder_that_was_cleared_in_part_is_not_continued(place):
    """--overwrite can be killed too."""
    options = arguments(place, "--save", "cleared", "--epochs", 2, "--lr", "0.01")
    run_main(*options)
    folder = place["results"] / "cleared"
    for name in ("args.json", "checkpoint.pth.tar"):
        (folder / name).unlink()
    assert "no args.json" in run_main(*options, check=2).stderr
    assert "continuing" not in run_main(*options, "--overwrite").stdout


def test_deterministic_changes_nothing_on_the_cpu(place):
    for name, more in (("loose", ()), ("strict", ("--deterministic",))):
        run_main(*arguments(place, "--save", name, "--epochs", 1, "--device", "cpu", *more))
    loose, strict = (load(place["results"] / name)["state_dict"] for name in ("loose", "strict"))
    assert all(torch.equal(loose[name], strict[name]) for name in loose)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_an_imagenet_run(imagenet, tmp_path, number):
    """As from Ctrl-C, torchrun or a cluster's manager: the processes that decode images get it too, and must not fall over it."""
    options = ("--dataset", "imagenet", "--data_dir", imagenet, "--results_dir", tmp_path, "--input_size", 40, "--workers", 2)
    options = (*options, "--batch-size", 4, "--save", "run", "--epochs", 50, "--precision", "fp32", "--print-freq", 1)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start_main(*options, python=sys.executable, start_new_session=True, **output)
    log = tmp_path / "run" / "log.txt"
    until(lambda: log.exists() and "epoch 1/50, step 3/12" in log.read_text(), process)
    os.killpg(process.pid, number)
    printed, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, said
    assert "saved after step" in printed
    assert said == ""
    saved = load(tmp_path / "run")
    assert (saved["epoch"], saved["step"]) >= (0, 3)


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_from_start_to_end(imagenet, tmp_path, depth):
    """Class folders of images of many sizes, through the main script: frozen, continued and evaluated."""
    network = ("--dataset", "imagenet", "--data_dir", imagenet, "--input_size", 40, "--workers", 2)
    config = ("--model_config", f"{{'depth': {depth}}}", "--batch-size", 12, "--precision", "fp32")
    options = (*network, *config, "--results_dir", tmp_path)
    run_main(*options, "--epochs", 1, "--lr", "0.01", "--save", "fp")
    quantized = ("--save", "prox", "--resume", tmp_path / "fp", "--freeze_epoch", 1, *MODES["prox"])
    run_main(*options, *quantized, "--epochs", 1)
    done = run_main(*options, *quantized, "--epochs", 2)
    assert "48 training and 32 validation images" in done.stdout
    state = load(tmp_path / "prox")["state_dict"]
    assert set(state["layer3.0.conv1.weight"].unique().tolist()) == {-1.0, 1.0}
    assert len(state["layer3.0.downsample.0.weight"].unique()) > 3
    last = rows(tmp_path / "prox")[-1]
    done = run_main("--evaluate", tmp_path / "prox" / "checkpoint.pth.tar", *network, "--precision", "fp32")
    found = [float(loss) for loss in re.findall(r": loss ([0-9.]+)", done.stdout)]
    assert found == pytest.approx([float(last["val_loss_bin"])] * 2, rel=1e-5)


def test_start_epoch_beyond_the_freeze_freezes_at_once(place):
    options = ("--save", "late", "--resume", place["results"] / "fp", "--epochs", 4, "--start-epoch", 3, "--freeze_epoch", 2)
    run_main(*arguments(place, *options, *MODES["prox"]))
    folder = place["results"] / "late"
    assert [row["epoch"] for row in rows(folder)] == ["4"]
    state = load(folder)["state_dict"]
    assert set(state["conv1.weight"].unique().tolist()) == {-1.0, 1.0}


def test_freeze_before_training_is_ternary_in_ternary_mode(place):
    options = ("--save", "frozen_first", "--resume", place["results"] / "fp", "--epochs", 1, "--freeze_epoch", 0)
    run_main(*arguments(place, *options, *MODES["prox_ternary"]))
    state = load(place["results"] / "frozen_first")["state_dict"]
    start = load(place["results"] / "fp", "model_best.pth.tar")["state_dict"]
    name = "layer1.0.conv1.weight"
    assert_quantized(state[name], quantize.ternarize(start[name]))


def test_adjust_reg_makes_up_for_a_smaller_learning_rate(place):
    options = ("--save", "adjusted", "--epochs", 4, "--projection_mode", "prox", "--reg_rate", "0.5", "--adjust_reg")
    regime = "{0: {'optimizer': 'Adam', 'lr': 0.01}, 2: {'lr': 0.001}}"
    run_main(*arguments(place, *options, "--regime", regime))
    strengths = [float(row["strength"]) for row in rows(place["results"] / "adjusted")]
    assert strengths == pytest.approx([0.0, 0.5, 10.0, 15.0])
