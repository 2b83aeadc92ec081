"""scripts/export.py, and a packed network in the place of a checkpoint, by the real command lines."""

import os
import re
import subprocess
import sys
from pathlib import Path

import export
import numpy as np
import pytest
import torch
from conftest import ROOT, run_main

import data
import main_binary_reg
import models
import quantize
from quantize import packing
from training import batch_norm, checkpoints


def checkpoint(path: Path, mode_name: str | None, frozen: bool = False, change=lambda state: None) -> dict[str, torch.Tensor]:
    """Writes a checkpoint of a small network that has seen a little, and returns its finished, hard-quantized state."""
    torch.manual_seed(0)
    model = models.resnet(depth=8).to(memory_format=torch.channels_last)  # as it is trained, which decides how sums are rounded
    mode = quantize.MODES.get(mode_name, quantize.FULL_PRECISION)
    model(torch.randn(8, 3, 32, 32))  # statistics of some input, not of the hard-quantized network's
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    if frozen:
        optimizer.freeze()
    content = {
        "epoch": 3,
        "model": "resnet",
        "config": {"depth": 8, "num_classes": 10},
        "dataset": "cifar10",
        "precision": "fp32",
        "projection_mode": mode_name,
        "hard_quantized": frozen,
        "frozen": frozen,
        "best_prec1": 50.0,
        "optimizer": optimizer.state_dict(),
        "state_dict": {name: value.clone() for name, value in model.state_dict().items()},
    }
    change(content["state_dict"])
    checkpoints.save(path, content)
    with optimizer.hard_quantized():
        return {name: value.clone() for name, value in model.state_dict().items()}


def run(capsys, *argv: object) -> tuple[int, str, str]:
    """Status, output and errors of export.py."""
    status = export.main([str(word) for word in argv])
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.parametrize("mode_name", quantize.MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_file_is_the_finished_network_in_every_mode(mode_name, frozen, tmp_path, tiny_data, capsys):
    expected = checkpoint(tmp_path / "network.pth.tar", mode_name, frozen)
    out = tmp_path / "network.safetensors"
    status, said, _ = run(capsys, tmp_path / "network.pth.tar", "--out", out, "--verify", "--data_dir", tiny_data)
    assert status == 0
    assert ("not frozen, hard-quantized now" in said) == (not frozen)
    assert "read back: every tensor is the same to the last bit" in said
    assert f"{out.stat().st_size:,} bytes" in said
    parts = [re.search(rf"^{row} .* ([\d,]+)$", said, re.MULTILINE)[1] for row in ("all that is", "the rest,", "names, facts,")]
    assert sum(int(part.replace(",", "")) for part in parts) == out.stat().st_size
    assert int(parts[2].replace(",", "")) == 12 + int.from_bytes(out.read_bytes()[:8], "little")
    found = quantize.load_packed(out)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    quantized, packed = (re.findall(rf"^{words}: (loss .*)$", said, re.MULTILINE) for words in ("hard-quantized", "as it is"))
    assert quantized == [packed[1]] * 2  # of the network, and of the file, which is taken as it is
    content = checkpoints.read(out)
    assert (content["projection_mode"], content["hard_quantized"]) == (mode_name, True)
    assert not {"optimizer", "best_prec1"} & content.keys()  # the best epoch of a run is not the one that it is in


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("asked", [("--bits", 3), ("--quantizer", "uniform"), ("--by_row",)])
def test_another_quantizer_than_the_checkpoints_is_refused(asked, frozen, tmp_path, tiny_data, capsys):
    network, data = tmp_path / "network.pth.tar", ("--data_dir", tiny_data)
    checkpoint(network, "prox_alt", frozen)
    status, _, said = run(capsys, network, "--out", tmp_path / "file", *asked, *data)
    assert (status, said.count("\n")) == (2, 1), said
    assert f"--evaluate {network}: it is of quantizer" in said
    assert not (tmp_path / "file").exists()
    content = checkpoints.read(network)
    del content["optimizer"]  # of weights alone any quantizer can make something
    checkpoints.save(network, content)
    assert run(capsys, network, "--out", tmp_path / "file", *asked, *data)[0] == 0


def test_the_facts_are_of_the_network_in_the_file(tmp_path, capsys):
    """The score is where nothing was changed; the quantizer is the one that made the values."""
    network, out = tmp_path / "network.pth.tar", tmp_path / "file"

    def facts(*asked: object) -> dict:
        assert run(capsys, network, "--out", out, *asked)[0] == 0
        return checkpoints.read(out)

    checkpoint(network, "prox_alt", frozen=True)
    content = checkpoints.read(network)
    del content["optimizer"]
    checkpoints.save(network, content | {"bits": 2})  # as a run's best network is
    assert (facts()["best_prec1"], facts()["bits"]) == (50.0, 2)
    assert "best_prec1" not in facts("--half", "float16")
    other = facts("--bits", 1, "--quantizer", "uniform")
    assert (other["bits"], other["quantizer"]) == (1, "uniform")
    assert "best_prec1" not in other
    assert all(len(quantize.load_packed(out)[name].unique()) == 2 for name in ("conv1.weight", "fc.weight"))


@pytest.mark.parametrize("asked", [("--projection_mode", "prox"), ("--quantizer", "ternary")])
def test_kept_bits_do_not_hold_for_a_mode_that_takes_none(asked, tmp_path, capsys):
    network, out = tmp_path / "network.pth.tar", tmp_path / "file"
    checkpoint(network, "prox_alt")
    content = checkpoints.read(network)
    del content["optimizer"]
    checkpoints.save(network, content | {"bits": 3, "by_row": True})
    status, _, said = run(capsys, network, "--out", out, *asked)
    assert status == 0, said
    found = checkpoints.read(out)
    assert not {"bits", "by_row"} & found.keys()
    status, _, said = run(capsys, network, "--out", out, *asked, "--bits", 3)
    assert (status, said.count("\n")) == (2, 1)
    assert "--bits 3" in said


def test_kept_bits_hold_where_the_kept_quantizer_does_not(tmp_path, capsys):
    """Of what the checkpoint says only that is left out which does not go with the mode, and it is said."""
    network, out = tmp_path / "network.pth.tar", tmp_path / "file"
    checkpoint(network, "prox_alt")
    content = checkpoints.read(network)
    del content["optimizer"]
    checkpoints.save(network, content | {"quantizer": "uniform", "bits": 3, "by_row": True})
    status, printed, said = run(capsys, network, "--out", out, "--projection_mode", "prox_median")
    assert status == 0, said
    assert "warning: --quantizer uniform of the checkpoint: left out" in printed
    assert checkpoints.read(out)["bits"] == 3
    assert max(len(row.unique()) for row in quantize.load_packed(out)["fc.weight"]) == 8
    checkpoints.save(network, content | {"bits": 1})
    status, printed, said = run(capsys, network, "--out", out, "--quantizer", "uniform_with_zero")
    assert status == 0, said
    assert "warning: --bits 1 of the checkpoint: left out" in printed
    assert checkpoints.read(out)["quantizer"] == "uniform_with_zero"


def test_recalibrated_statistics_are_in_the_file(tmp_path, tiny_data, capsys):
    checkpoint(tmp_path / "network.pth.tar", "prox")
    words = ["--recalibrate", 3, "--batch-size", 16, "--data_dir", tiny_data]
    status, said, _ = run(capsys, tmp_path / "network.pth.tar", "--out", tmp_path / "file", "--verify", *words)
    assert status == 0
    figures = dict(re.findall(r"^(.*): (loss .*)$", said.split(f"{tmp_path / 'file'}: resnet")[0], re.MULTILINE))
    of_file = dict(re.findall(r"^(.*): (loss .*)$", said.split(f"{tmp_path / 'file'}: resnet")[1], re.MULTILINE))
    again = figures["hard-quantized, BatchNorm's statistics from 3 training batches"]
    assert again == of_file["as it is"] == of_file["hard-quantized"] != figures["hard-quantized"]
    assert figures["as it is, BatchNorm's statistics from 3 training batches"] not in (again, figures["as it is"])
    assert quantize.load_packed(tmp_path / "file")["bn1.num_batches_tracked"] == 3


def test_running_averages_are_the_mean_over_the_batches():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    network(torch.randn(8, 4, 3, 3) * 7)
    batches = [torch.randn(size, 4, 3, 3) * 2 + 5 for size in (8, 8, 3)]
    assert batch_norm.re_estimate(network, (network(batch) for batch in batches)) == 1
    plain = [batch.double().transpose(0, 1).reshape(4, -1).numpy() for batch in batches]
    np.testing.assert_allclose(network[0].running_mean, np.mean([x.mean(1) for x in plain], axis=0), rtol=1e-5)
    np.testing.assert_allclose(network[0].running_var, np.mean([x.var(1, ddof=1) for x in plain], axis=0), rtol=1e-5)
    assert network[0].momentum == 0.1
    assert not any(layer.training for layer in network.modules())
    assert batch_norm.re_estimate(torch.nn.Linear(2, 2), iter([])) == 0


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_of_the_rest(half, tmp_path, capsys):
    expected = checkpoint(tmp_path / "network.pth.tar", "prox_ternary", frozen=True)
    status, said, _ = run(capsys, tmp_path / "network.pth.tar", "--out", tmp_path / "whole")
    status, said, _ = run(capsys, tmp_path / "network.pth.tar", "--out", tmp_path / "half", "--half", half)
    assert status == 0
    stated = float(re.search(rf"--half {half}: relative error of at most (\S+) in a tensor", said)[1])
    found, errors = quantize.load_packed(tmp_path / "half"), []
    for name, value in expected.items():
        if found[name].dtype == getattr(torch, half):
            errors.append(float((found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-300)))
        else:
            assert torch.equal(found[name], value)
    assert stated == pytest.approx(max(errors), rel=0.05)
    assert 0 < stated < 0.01
    assert (tmp_path / "half").stat().st_size < (tmp_path / "whole").stat().st_size - 2 * 3_000
    model = models.resnet(depth=8)
    checkpoints.load_weights(model, checkpoints.read(tmp_path / "half"), tmp_path / "half")
    assert model.bn1.weight.dtype == torch.float32


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, capsys):
    def third_value(state):
        state["layer1.0.conv1.weight"][0, 0, 0, 0] = 0.5

    checkpoint(tmp_path / "third.pth.tar", "prox", frozen=True, change=third_value)
    checkpoint(tmp_path / "float.pth.tar", None)
    checkpoint(tmp_path / "large.pth.tar", "prox", change=lambda state: state["bn1.running_var"].fill_(1e6))
    checkpoint(tmp_path / "good.pth.tar", "prox")
    before = sorted(tmp_path.iterdir())
    for words, named in (
        (["third.pth.tar", "--out", "out"], ["'layer1.0.conv1.weight'", "at most 2", "prox"]),
        (["float.pth.tar", "--out", "out"], ["float.pth.tar", "full precision", "--projection_mode"]),
        (["large.pth.tar", "--out", "out", "--half", "float16"], ["--half float16", "'bn1.running_var'", "1e+06"]),
        (["nowhere", "--out", "out"], ["nowhere", "no such"]),
        (["good.pth.tar", "--out", "nowhere/out"], ["--out", "nowhere/out"]),
        (["good.pth.tar", "--out", "."], ["--out"]),
    ):
        places = [str(tmp_path / word) if not word.startswith("-") and word != "float16" else word for word in words]
        status, _, error = run(capsys, *places)
        assert (status, error.count("\n")) == (2, 1), error
        assert all(word in error for word in ["export.py: error: ", *named]), error
    assert sorted(tmp_path.iterdir()) == before


def test_the_scripts_file_is_evaluated_and_trained_on(tmp_path, tiny_data, capsys):
    """In the size that the quick start names."""
    checkpoint(tmp_path / "network.pth.tar", "prox", frozen=True)
    file = tmp_path / "binary.safetensors"
    command = [sys.executable, ROOT / "scripts" / "export.py", "network.pth.tar", "--out", file]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    stated = int(re.search(r"(\d+) KB", (ROOT / "scripts" / "quickstart.sh").read_text())[1])
    assert abs(file.stat().st_size - 1000 * stated) < 500
    for path in (tmp_path / "network.pth.tar", file):
        assert main_binary_reg.main(["--evaluate", str(path), "--data_dir", str(tiny_data)]) == 0
    figures = re.findall(r"loss .*", capsys.readouterr().out)
    assert figures == [figures[0]] * 4
    short = ["--model_config", "{'depth': 8}", "--precision", "fp32", "--data_dir", tiny_data, "--epochs", 1]
    assert "done, best error" in run_main(*short, "--resume", file, cwd=tmp_path).stdout


def test_a_language_model_is_evaluated_alike_with_its_vocabulary(tmp_path, capsys):
    sets = data.load("sample_text", tmp_path, torch.device("cpu"), 20, 0, print)
    torch.manual_seed(0)
    model, mode = models.lstm("sample_text", hidden=4, num_classes=sets.classes), quantize.MODES["lazy_alt"]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    content = {"model": "lstm", "config": model.config, "dataset": "sample_text", "words": list(sets.words), "precision": "fp32"}
    content |= {"projection_mode": "lazy_alt", "optimizer": optimizer.state_dict(), "state_dict": model.state_dict()}
    checkpoints.save(tmp_path / "network.pth.tar", content)
    status, said, _ = run(capsys, tmp_path / "network.pth.tar", "--out", tmp_path / "file", "--verify")
    assert status == 0
    assert "BatchNorm" not in said
    of_network, of_file = (re.findall(rf"^{words}: (loss .*)$", said, re.MULTILINE) for words in ("hard-quantized", "as it is"))
    assert of_network == [of_file[1]] * 2
    assert checkpoints.read(tmp_path / "file")["words"] == list(sets.words)


@pytest.mark.parametrize("words", [["run"], ["run", "--out", "file", "--half", "int8"], ["run", "--out", "file", "--wombat"]])
def test_flags_that_are_wrong_are_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        export.main(words)
    error = capsys.readouterr().err
    assert (caught.value.code, error.count("\n")) == (2, 1), error


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
def test_bad_packed_files_end_with_one_line_and_status_2(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = packing.pack(models.resnet(depth=8).state_dict(), [], "prox")
    damaged = good[:3000] + bytes([good[3000] ^ 1]) + good[3001:]
    for content, words in (
        (good[:-1], "truncated"),
        (damaged, "damaged"),
        (b"", "truncated"),
        ((1 << 60).to_bytes(8, "little") + good[8:], "truncated"),
        (packing.pack({"w": torch.ones(2)}, [], "prox"), "depth 0"),
    ):
        Path("bad.safetensors").write_bytes(content)
        status = main_binary_reg.main(["--dataset", "sample", "--model_config", "{'depth': 8}", flag, "bad.safetensors"])
        error = capsys.readouterr().err
        assert (status, error.count("\n")) == (2, 1), error
        assert "bad.safetensors" in error
        assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_recalibrate_is_for_evaluation_of_a_quantized_network(tmp_path, capsys, tiny_data):
    checkpoint(tmp_path / "float.pth.tar", None)
    assert main_binary_reg.main(["--recalibrate", "3"]) == 2
    assert "--recalibrate 3" in capsys.readouterr().err
    words = ["--evaluate", str(tmp_path / "float.pth.tar"), "--data_dir", str(tiny_data), "--recalibrate", "3"]
    assert main_binary_reg.main(words) == 2
    assert "full precision" in capsys.readouterr().err
