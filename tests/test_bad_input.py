"""Bad input: one clear line that names what is wrong, exit status 2, no traceback, nothing written."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import run_main

import data
import models
import quantize
from training import arguments, regimes

GOOD = ("--dataset=sample", "--model_config", "{'depth': 8}", "--epochs", "2", "--save", "run")

# arguments, and what the line must hold
CASES = [
    (["--projection_mode", "porx"], ["--projection_mode", "porx", "prox_ternary"]),
    (["--model", "resnext"], ["--model", "resnext", "resnet"]),
    (["--dataset", "cifar11"], ["--dataset", "cifar11", "cifar10"]),
    (["--optimizer", "Adma"], ["--optimizer", "Adma", "Adam"]),
    (["--wombat", "3"], ["--wombat"]),
    (["--epoch", "3"], ["--epoch"]),
    (["--binarize"], ["--binarize", "--projection_mode"]),
    (["--model_config", "{'depth': "], ["--model_config", "dict literal"]),
    (["--model_config", "[20]"], ["--model_config", "dict literal"]),
    (["--model_config", "__import__('os').system('touch hacked')"], ["--model_config", "dict literal"]),
    (["--model_config", "{'depth': 1j}"], ["--model_config", "1j", "dict literal"]),
    (["--model_config", "{'depth': {20}}"], ["--model_config", "{20}", "dict literal"]),
    (["--model_config", "{'dpeth': 20}"], ["--model_config", "dpeth", "depth"]),
    (["--model_config", "{'depth': 21}"], ["--model_config", "21", "6n+2"]),
    (["--model_config", "{'depth': 8, 'num_classes': 5}"], ["--model_config", "10 classes"]),
    (["--lr", "-1"], ["--lr", "-1"]),
    (["--lr", "nan"], ["--lr", "nan"]),
    (["--lr", "inf"], ["--lr", "inf"]),
    (["--reg_rate", "-0.1", "--projection_mode", "prox"], ["--reg_rate", "-0.1"]),
    (["--reg_rate", "nan"], ["--reg_rate", "nan"]),
    (["--projection_mode", "prox"], ["--projection_mode prox", "--reg_rate is needed", "--reg_rate 0"]),
    (["--projection_mode", "prox_ternary", "--binary_reg", "1"], ["--reg_rate is needed"]),
    (["--projection_mode", "prox", "--reg_rate", "1e308", "--adjust_reg", "--epochs", "9"], ["--reg_rate 1e+308", "epoch 9"]),
    (["--epochs", "-3"], ["--epochs", "-3"]),
    (["--epochs", "2.5"], ["--epochs", "2.5"]),
    (["--epochs"], ["--epochs"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--batch-size", "many"], ["--batch-size", "many"]),
    (["--freeze_epoch", "1"], ["--freeze_epoch", "--projection_mode"]),
    (["--start-epoch", "2"], ["--start-epoch", "--epochs"]),
    (["--gpu", "x"], ["--gpu", "x"]),
    (["--save", "../elsewhere"], ["--save", "../elsewhere"]),
    (["--save", ""], ["--save"]),
    (["--regime", "{0: {'lr': -1}}"], ["--regime", "-1"]),
    (["--regime", "{'a': {}}"], ["--regime", "'a'"]),
    (["--regime", "{0: {'plateau': 'a'}}"], ["--regime", "plateau 'a'", "above 1"]),
    (["--regime", "{0: {'lr': '0.1', 'plateau': 1.2}}"], ["--regime", "lr '0.1'", "not a finite number"]),
    (["--regime", "{0: {'lr': 1" + 400 * "0" + ", 'plateau': 1.2}}"], ["--regime", "lr 1", "not a finite number"]),
    (["--regime", "{0: {'lr': 1j}}"], ["--regime", "1j", "dict literal"]),
    (["--regime", "{0: {'dampening': 'x'}}"], ["--regime", "dampening"]),
    (["--regime", "{0: {'optimizer': 'Rprop', 'step_sizes': ('a', 'b')}}"], ["--regime", "Rprop", "step_sizes"]),
    (["--save", os.fsdecode(b"caf\xe9")], ["--save", "caf", "UTF-8"]),
    (["--regime", "{0: 3}"], ["--regime", "3"]),
    (["--regime", "{0: {'speed': 3}}"], ["speed", "momentum"]),
    (["--binary_regime", "--ttq_regime"], ["--binary_regime", "--ttq_regime"]),
    (["--momentum", "0.5", "--optimizer", "Adam"], ["--momentum", "Adam"]),
    (["--input_size", "64"], ["--input_size", "64", "32"]),
    (["--resume", "nowhere"], ["nowhere", "no such"]),
    (["--resume", "empty"], ["empty", "model_best.pth.tar"]),
    (["--resume", "truncated.pth.tar"], ["truncated.pth.tar", "damaged"]),
    (["--resume", "hostile.pth.tar"], ["hostile.pth.tar", "refused"]),
    (["--resume", "hostile_zip.pth.tar"], ["hostile_zip.pth.tar", "refused"]),
    (["--resume", "text.pth.tar"], ["text.pth.tar"]),
    (["--resume", "list.pth.tar"], ["list.pth.tar", "state_dict"]),
    (["--resume", "nan.pth.tar"], ["nan.pth.tar", "finite"]),
    (["--resume", "depth14.pth.tar"], ["depth14.pth.tar", "14", "8"]),
    (["--resume", "classes100.pth.tar"], ["classes100.pth.tar", "a network for 100 classes", "for 10 classes"]),
    (["--evaluate", "nowhere"], ["nowhere", "no such"]),
    (["--evaluate", "hostile.pth.tar"], ["hostile.pth.tar", "refused"]),
    (["--evaluate", "truncated.pth.tar"], ["truncated.pth.tar", "damaged"]),
    (["--evaluate", "unknown_mode.pth.tar"], ["unknown_mode.pth.tar", "projection_mode", "porx"]),
    (["--dataset", "cifar10", "--data_dir", "no_class"], ["no_class", "airplane"]),
    (["--dataset", "imagenet", "--model_config", "{'depth': 18}", "--data_dir", "empty"], ["empty", "train/<class>"]),
    (["--results_dir", "text.pth.tar"], ["--results_dir", "text.pth.tar"]),
    (["--tb_dir", "text.pth.tar"], ["--tb_dir", "text.pth.tar"]),
]


class Hostile:
    """Runs code when it is unpickled without limits."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder with checkpoints of every bad kind."""
    place = tmp_path_factory.mktemp("bad input")
    (place / "empty").mkdir()
    (place / "no_class" / "CIFAR10" / "train").mkdir(parents=True)
    state = models.resnet("cifar10", 8).state_dict()
    torch.save({"state_dict": state}, place / "good.pth.tar")
    (place / "truncated.pth.tar").write_bytes((place / "good.pth.tar").read_bytes()[:5000])
    (place / "hostile.pth.tar").write_bytes(pickle.dumps({"state_dict": Hostile()}))
    torch.save({"state_dict": state, "regime": Hostile()}, place / "hostile_zip.pth.tar")
    (place / "text.pth.tar").write_text("not a checkpoint")
    torch.save({"state_dict": state, "projection_mode": "porx", "dataset": "sample"}, place / "unknown_mode.pth.tar")
    odd = {"config": "{[]: 1}", "holdout": "many", "hard_quantized": torch.ones(2), "dataset": "sample"}
    torch.save({"state_dict": state, "projection_mode": "prox", **odd}, place / "odd.pth.tar")
    torch.save([1, 2], place / "list.pth.tar")
    broken = {name: value * float("nan") if value.is_floating_point() else value for name, value in state.items()}
    torch.save({"state_dict": broken}, place / "nan.pth.tar")
    torch.save({"state_dict": models.resnet("cifar10", 14).state_dict()}, place / "depth14.pth.tar")
    torch.save({"state_dict": models.resnet("cifar100", 8, 100).state_dict()}, place / "classes100.pth.tar")
    return place


def listing(place: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(place.rglob("*"))}


@pytest.mark.parametrize(("arguments", "named"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_one_line_and_status_two(folder, arguments, named):
    before = listing(folder)
    done = run_main(*GOOD, *arguments, cwd=folder, check=2)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("main_binary_reg.py: error: ")
    for words in named:
        assert words in lines[0]
    assert listing(folder) == before


def test_what_a_checkpoint_says_and_cannot_be_is_passed_over_where_the_user_says_it(folder):
    printed = run_main("--evaluate", "odd.pth.tar", "--model_config", "{'depth': 8}", "--holdout", 500, cwd=folder).stdout
    assert "hard-quantized: loss" in printed


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--projection_mode", "prox", "--reg_rate", "1", "--freeze_epoch", "5"], "--freeze_epoch 5 is not below --epochs"),
        (["--projection_mode", "lazy", "--reg_rate", "0.1"], "--reg_rate has no effect"),
        (["--projection_mode", "prox", "--reg_rate", "1", "--binary_reg", "1"], "--binary_reg has no effect"),
        (["--projection_mode", "prox", "--reg_rate", "0"], "--reg_rate is 0"),
        (["--projection_mode", "prox", "--reg_rate", "1", "--freeze_epoch", "1", "--epochs", "2"], "--freeze_epoch 1: nothing"),
        (["--reg_rate", "1"], "--reg_rate has no effect"),
        (["--device", "cpu", "--gpu", "0"], "--gpus has no effect with --device cpu"),
        (["--device", "cpu", "--tf32"], "--tf32 has no effect with --device cpu"),
        (["--workers", "2"], "--workers has no effect with --dataset cifar10"),
    ],
)
def test_warnings(tiny_data, tmp_path, arguments, named):
    options = [
        "--model_config",
        "{'depth': 8}",
        "--epochs",
        "1",
        "--save",
        "run",
        "--results_dir",
        tmp_path,
        "--data_dir",
        tiny_data,
    ]
    done = run_main(*options, *arguments)
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert named in warnings[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--overwrite", "--overwrite has no effect without --save"),
        ("--dataset sample_text --model lstm --compile on", "--compile on has no effect with --dataset sample_text"),
        ("--evaluate run --device cpu --gpus 3", "--gpus has no effect with --device cpu"),
        ("--evaluate run --device cpu --tf32", "--tf32 has no effect with --device cpu"),
    ],
)
def test_what_the_arguments_alone_warn_of(given, said):
    names = {"modes": quantize.MODES, "models": models.MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
    _, (line,) = arguments.parse(given.split(), **names)
    assert line.startswith(said)


def test_a_folder_that_cannot_be_written(tmp_path):
    if os.geteuid() == 0:
        place = Path("/proc/results")  # where not even root can make a folder
    else:
        place = tmp_path / "locked"
        place.mkdir(mode=0o500)
    done = run_main(*GOOD, "--results_dir", place, check=2)
    assert len(done.stderr.splitlines()) == 1
    assert "--results_dir" in done.stderr


@pytest.mark.parametrize("name", ["with space", "ünïcödé 量子", "-dash", "'quotes\""])
def test_odd_names_work(tiny_data, tmp_path, name):
    place = tmp_path / name
    place.mkdir()
    options = ["--model_config", "{'depth': 8}", "--epochs", "1", f"--save={name}", "--results_dir", place, "--data_dir", tiny_data]
    run_main(*options)
    assert (place / name / "model_best.pth.tar").exists()
    run_main("--evaluate", place / name, "--data_dir", tiny_data)


def test_help_names_every_flag_with_its_default():
    done = run_main("--help")
    published = (
        "--results_dir --save --save_all --tb_dir --dataset --model -a --input_size --model_config --gpus --gpu -j --workers "
        "--epochs --start-epoch -b --batch-size --binary_reg --reg_rate --adjust_reg --projection_mode --freeze_epoch --optimizer "
        "--lr --learning_rate --momentum --weight-decay --wd --print-freq -p --resume --binary_regime --ttq_regime --no_adjust "
        "-e --evaluate"
    )
    for flag in published.split():
        assert flag in done.stdout, flag
