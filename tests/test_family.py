"""Every projection mode through the whole program: trained, frozen, evaluated, interrupted inside an epoch and continued."""

import csv
import json
import os
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_binary_reg
import models
import quantize
from training import checkpoints, epoch

# Beside the three published ones, which test_command_line.py runs.
RUNS = {
    "prox_median": ["--projection_mode", "prox_median", "--reg_rate", "2"],
    "ttq": ["--projection_mode", "ttq", "--ttq_regime", "--lr", "0.01"],
    "stoch_bin": ["--projection_mode", "stoch_bin"],
    "exponential": ["--projection_mode", "stoch_bin", "--quantizer", "exponential"],
    "prox_alt": ["--projection_mode", "prox_alt", "--reg_rate", "2", "--bits", "2", "--by_row"],
    "lazy_alt": ["--projection_mode", "lazy_alt", "--bits", "3"],
    "parq": ["--projection_mode", "parq", "--quantizer", "ternary"],
    "binary_relax": ["--projection_mode", "binary_relax", "--quantizer", "uniform", "--bits", "2"],
    "prox_connect": ["--projection_mode", "prox_connect", "--reg_rate", "0.2"],
}


def arguments(tiny_data, folder, *more):
    fixed = ("--data_dir", tiny_data, "--results_dir", folder, "--model_config", "{'depth': 8}", "--batch-size", 32, "--epochs", 3)
    return [str(word) for word in (*fixed, "--freeze_epoch", 2, "--precision", "fp32", "--print-freq", 1, *more)]


@pytest.mark.parametrize("words", RUNS)
def test_a_run_from_start_to_end_and_one_in_two_parts(words, tiny_data, tmp_path, monkeypatch, capsys):
    options = RUNS[words] if "--ttq_regime" in RUNS[words] else [*RUNS[words], "--optimizer", "Adam", "--lr", "0.01"]
    assert main_binary_reg.main(arguments(tiny_data, tmp_path, "--save", "whole", *options)) == 0
    between, steps = epoch.between_steps, 0

    def interrupt_once(job, state, progress):
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        between(job, state, progress)

    monkeypatch.setattr(epoch, "between_steps", interrupt_once)
    parts = arguments(tiny_data, tmp_path, "--save", "parts", *options)
    assert main_binary_reg.main(parts) == 128 + signal.SIGTERM
    assert main_binary_reg.main(parts) == 0
    whole, parts = (checkpoints.read(tmp_path / name / checkpoints.LATEST) for name in ("whole", "parts"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    rows = [list(csv.DictReader((tmp_path / name / "results.csv").open())) for name in ("whole", "parts")]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    assert rows[0] == rows[1]
    assert rows[0][2]["val_error1_bin"] == rows[0][2]["val_error1"]

    chosen = json.loads((tmp_path / "whole" / "args.json").read_text())["arguments"]
    mode = quantize.mode(chosen["projection_mode"], chosen["quantizer"], chosen["bits"], chosen["by_row"])
    selected = [name for name, _ in mode.select(models.resnet("cifar10", 8))]
    most = 2**mode.quantizer.bits if not mode.quantizer.spares_ends else 3
    for name in selected:
        value = whole["state_dict"][name]
        groups = value.flatten(1) if mode.quantizer.by_row else value.flatten()[None]
        assert all(len(group.unique()) <= most for group in groups), name

    capsys.readouterr()
    best = checkpoints.read(tmp_path / "whole" / checkpoints.BEST)
    evaluation = ["--data_dir", str(tiny_data), "--precision", "fp32", "--evaluate", str(tmp_path / "whole")]
    assert main_binary_reg.main(evaluation) == 0
    said = capsys.readouterr().out
    assert f"hard-quantized: loss {best['results']['val_loss_bin']:.6f}" in said


def test_an_unfrozen_checkpoint_is_evaluated_at_its_latent_weights_and_levels(tiny_data, tmp_path, capsys):
    for words in ("ttq", "stoch_bin", "lazy_alt"):
        options = [*RUNS[words], "--save", words, "--save_all"]
        assert main_binary_reg.main(arguments(tiny_data, tmp_path, *options)) == 0
        row = checkpoints.read(tmp_path / words / "checkpoint_epoch_2.pth.tar")["history"][-1]
        capsys.readouterr()
        path = tmp_path / words / "checkpoint_epoch_2.pth.tar"
        assert main_binary_reg.main(["--data_dir", str(tiny_data), "--precision", "fp32", "--evaluate", str(path)]) == 0
        said = capsys.readouterr().out
        assert f"as it is: loss {row['val_loss']:.6f}" in said
        assert f"hard-quantized: loss {row['val_loss_bin']:.6f}" in said


def test_learned_levels_are_watched(tiny_data, tmp_path):
    assert main_binary_reg.main(arguments(tiny_data, tmp_path, "--save", "ttq", *RUNS["ttq"])) == 0
    events = EventAccumulator(str(tmp_path / "ttq" / "tb"))
    events.Reload()
    final = checkpoints.read(tmp_path / "ttq" / checkpoints.LATEST)["state_dict"]["layer1.0.conv1.weight"]
    for side, level in (("positive", final.max()), ("negative", final.min())):
        points = events.Scalars(f"ternary_value/layer1.0.conv1.weight/{side}")
        assert [point.step for point in points] == [1, 2, 3]
        assert points[-1].value == pytest.approx(level.item())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", 2), "--bits 2: nothing is quantized without --projection_mode"),
        (("--projection_mode", "ttq", "--bits", 3), "--bits 3: ttq with the quantizer learned"),
        (("--projection_mode", "prox", "--reg_rate", 1, "--quantizer", "uniform"), "--quantizer uniform: prox accepts binary"),
        (("--projection_mode", "parq", "--quantizer", "ternary", "--by_row"), "--by_row: parq with the quantizer ternary"),
        (("--projection_mode", "stoch_bin", "--quantizer", "binary"), "stochastic, exponential"),
        (("--projection_mode", "prox_alt", "--reg_rate", 1, "--bits", 9), "--bits"),
        (("--projection_mode", "prox_alt"), "--reg_rate is needed"),
        (("--projection_mode", "lazy_alt", "--quantizer", "uniform_with_zero", "--bits", 1), "--bits 1"),
    ],
)
def test_what_makes_no_sense_together_is_one_line(options, words, tiny_data, tmp_path, capsys):
    try:
        status = main_binary_reg.main(arguments(tiny_data, tmp_path, "--save", "x", *options))
    except SystemExit as end:
        status = end.code
    assert status == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_rates_that_a_mode_does_not_take_are_said(tiny_data, tmp_path, capsys):
    options = ("--save", "x", *RUNS["parq"], "--reg_rate", 1, "--adjust_reg")
    assert main_binary_reg.main(arguments(tiny_data, tmp_path, *options)) == 0
    log = (tmp_path / "x" / "log.txt").read_text()
    for name in ("reg_rate", "adjust_reg"):
        assert f"--{name} has no effect with --projection_mode parq, which has no strength to choose" in log


def test_a_mode_by_name_with_a_quantizer_of_ones_choice():
    assert quantize.mode("prox") is quantize.MODES["prox"]
    assert quantize.mode("parq", bits=2).quantizer.name == "alternating"
    assert quantize.mode("parq", by_row=True).quantizer.by_row
    assert quantize.mode("prox_connect", "uniform").pull.name == "quadratic"
    assert quantize.mode("prox_median", bits=2).quantizer.bits == 2
    for bad in (
        {"name": "proximal"},
        {"name": "prox", "bits": 2},
        {"name": "prox_alt", "quantizer": "none"},
        {"name": "parq", "bits": 0},
    ):
        with pytest.raises(ValueError, match=r"accepted|accepts|with the quantizer"):
            quantize.mode(**bad)


def test_each_mode_says_what_it_is():
    for name, mode in quantize.MODES.items():
        assert mode.name == name
        assert mode.label
        assert mode.title
        assert 0 <= mode.strength(1.0, 3, 0.5) < float("inf")
    assert quantize.MODES["parq"].strength(share=0) == pytest.approx(1)
    assert quantize.MODES["parq"].strength(share=1) == 0
    assert quantize.MODES["parq"].strength(share=0.5) == pytest.approx(0.5)
    assert quantize.MODES["binary_relax"].strength(share=0.75) == pytest.approx(3)  # t / (1 + t) is the share
    assert quantize.MODES["binary_relax"].strength(share=1) > 1e8
