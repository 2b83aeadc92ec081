"""Counting, and the choices of device, precision and compiler."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import utils
from training import computing
from utils import UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [2, 4, 5, 10])
def test_meter_counts_as_one_would_by_hand(classes):
    random = torch.Generator().manual_seed(classes)
    meter, losses, wrong1, wrong5, samples = utils.Meter(CPU), 0.0, 0, 0, 0
    for size in (7, 7, 3):
        logits = torch.randn(size, classes, generator=random)
        labels = torch.randint(0, classes, (size,), generator=random)
        meter.update(logits, labels, F.cross_entropy(logits, labels))
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
            ranking = sorted(range(classes), key=lambda index: -row[index])
            losses += math.log(sum(math.exp(value) for value in row)) - row[label]
            wrong1 += ranking[0] != label
            wrong5 += label not in ranking[:5]
            samples += 1
    expected = {"loss": losses / samples, "error1": 100 * wrong1 / samples, "error5": 100 * wrong5 / samples}
    assert meter.read() == pytest.approx(expected, rel=1e-6)
    other = utils.Meter(CPU)
    other.load_state_dict(meter.state_dict())
    assert other.read() == meter.read()
    assert other.state_dict()["samples"] == 17
    other.reset()
    assert math.isnan(other.read()["loss"])


def test_an_empty_meter_has_no_figures():
    assert all(math.isnan(value) for value in utils.Meter(CPU).read().values())


def test_precision_follows_the_hardware(monkeypatch):
    for flags, expected in (({"avx512f"}, "fp32"), ({"avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), (set(), "fp32")):
        monkeypatch.setattr(computing, "_cpu_flags", lambda flags=flags: flags)
        assert computing.select_precision("auto", CPU, tf32=False).name == expected
    assert computing.select_precision("fp32", CPU, tf32=False).name == "fp32"
    weight = torch.ones(2, 2)
    with computing.select_precision("bf16", CPU, tf32=False).autocast():
        assert (weight @ weight).dtype == torch.bfloat16
    with computing.select_precision("fp32", CPU, tf32=False).autocast():
        assert (weight @ weight).dtype == torch.float32


def test_compiling_is_for_long_runs_on_a_cpu_with_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert computing.select_compile("auto", CPU, computing.COMPILE_PAYS_OFF)
    assert not computing.select_compile("auto", CPU, computing.COMPILE_PAYS_OFF - 1)
    assert not computing.select_compile("auto", torch.device("cuda"), 10**6)
    assert not computing.select_compile("off", CPU, 10**6)
    assert computing.select_compile("on", CPU, 1)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not computing.select_compile("auto", CPU, 10**6)
    with pytest.raises(UsageError, match="--compile on"):
        computing.select_compile("on", CPU, 1)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_step_is_the_eager_one_to_rounding():
    torch.manual_seed(0)
    eager = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    images = torch.randn(5, 3, 8, 8)
    expected = eager(images)
    network = computing.CompiledNetwork(eager, length=5)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert network(images[:3]).shape == (3, 3)


def test_a_run_that_shares_its_cores_is_told_what_to_set():
    shared = computing.shared_cores(threads=8, cores=8, load=19.6, worked=36.0, seconds=10.0)
    assert "19.6 threads want to run on 8" in shared
    assert "its 8 had 3.6 of them" in shared
    assert "OMP_NUM_THREADS=1" in shared
    alone = {"threads": 8, "cores": 8, "load": 8.4, "worked": 36.0, "seconds": 10.0}
    assert computing.shared_cores(**alone) is None  # a network too small to keep its threads at work
    for other in ({"threads": 1}, {"worked": 75.0}, {"worked": 0.1, "seconds": 0.0}, {"seconds": 4.0}):
        assert computing.shared_cores(**{**alone, "load": 19.6, **other}) is None


def test_a_number_beyond_all_floats_is_not_finite():
    assert utils.is_finite(2**1000)
    assert not any(map(utils.is_finite, (10**400, -(10**400), float("inf"), float("nan"))))
