"""The captured step against the plain one: on a GPU with CUDA graphs, on the CPU with a tape that holds to their rules."""

import contextlib
import functools
import os
import re
import subprocess

import forks
import pytest
import torch
from conftest import PATIENCE, ROOT, run_main
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path

import models
import quantize
import utils
from training import captured, checkpoints, computing, loops, regimes
from training.tasks import IMAGES
from utils import UsageError

CPU = torch.device("cpu")
RATE = 1 / 128  # one that float32 holds exactly
MODES = [*(mode for mode in quantize.MODES.values() if mode.drawn is None), quantize.FULL_PRECISION]
# Their results, or the sizes of their results, are values that Python waits for.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
COPIED = "lift_fresh"  # of values in Python: torch.tensor(0.5), and the indices in x[[0, 1]]


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: the addresses that they read and write, and all else as the value of that moment.

    What the recorded function did to tensors that were there before is undone. A value that is read into Python is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls, self._before, self._own = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if name == "index" else []
        lengths = name == "repeat_interleave" and "output_size" not in kwargs
        waits = name in WAITING or bool(masks) or lengths
        assert not waits, f"a captured step cannot wait for the device: {function}"
        assert name != COPIED, "a captured step cannot copy values of Python to the device"
        given = [tensor.untyped_storage() for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        for storage in given:  # all, not only what a schema calls written: BatchNorm's does not
            if storage.data_ptr() not in self._own | set(self._before):
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = (whole, whole.clone())
        found = function(*args, **kwargs)
        made = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(found) if isinstance(tensor, Tensor)}
        self._own |= made - set(self._before)
        self._calls.append((function, args, kwargs, found))
        return found

    @torch.no_grad()
    def rewind(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, recorded in self._calls:
            again = function(*args, **kwargs)
            for place, value in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
                    place.copy_(value)


class TapeStream:
    """In the place of captured.Stream.

    Attributes:
        recordings: made so far.
    """

    aside = contextlib.nullcontext

    def __init__(self) -> None:
        self.recordings = 0

    def record(self, run):
        self.recordings += 1
        tape = Tape()
        with tape:
            run()
        tape.rewind()
        return tape.replay


class Training:
    """A small network with everything that a step needs; ``step`` is the plain one, or a captured one.

    In float64: rounding, which training amplifies, then stays far below what any mistake makes.
    """

    def __init__(self, mode, kind, device=CPU, stream=None):
        torch.manual_seed(0)
        self.device, self.mode, self.captured = device, mode, stream is not None
        self.settings = {"optimizer": kind, "lr": RATE} | ({"momentum": 0.9} if kind == "SGD" else {})
        self.model = models.resnet("cifar10", 8).to(device, torch.float64, memory_format=torch.channels_last).train()
        base = regimes.build_optimizer(self.model.parameters(), self.settings)
        if self.captured:
            regimes.make_capturable(base, device)
        self.optimizer = quantize.ProjectedOptimizer(base, mode.select(self.model), mode, capturable=self.captured)
        self.meter = utils.Meter(device)
        computed = computing.Precision("fp32", device.type)
        self.step = functools.partial(loops.train_step, IMAGES, self.model, self.optimizer, computed, self.meter, [])
        if self.captured:
            self.step = captured.CapturedStep(self.step, self.optimizer, 4, stream)

    def set_epoch(self, epoch: int, lr: float) -> None:
        self.settings["lr"] = lr
        base = self.optimizer.base_optimizer
        if self.captured:
            regimes.update_settings(base, self.settings)
            regimes.zero_state(base)
        else:
            self.optimizer.base_optimizer = regimes.build_optimizer(self.model.parameters(), self.settings)
        if self.optimizer.projecting:
            self.optimizer.set_strength(self.mode.strength(self.mode.default_rate or 0.5, epoch))

    def run(self) -> dict[str, Tensor]:
        """30 steps in five epochs of five full batches and a smaller one, with new rates and strengths, frozen after the third."""
        random = torch.Generator().manual_seed(1)
        for epoch in range(5):
            if epoch == 3:
                self.optimizer.freeze()
            self.set_epoch(epoch, RATE / 2**epoch)
            for step in range(6):
                images = torch.randn(4 if step < 5 else 3, 3, 32, 32, generator=random, dtype=torch.float64)
                labels = torch.randint(0, 10, (len(images),), generator=random)
                self.step(images.to(self.device, memory_format=torch.channels_last), labels.to(self.device), 1.0)
            with self.optimizer.hard_quantized(), torch.no_grad():
                self.model(images.to(self.device))  # moves BatchNorm's statistics: what happens between two epochs must count
        figures = torch.tensor(list(self.meter.read().values()), dtype=torch.float64)
        return {"meter": figures, **self.model.state_dict(), **{f"latent {n}": w for n, w in self.optimizer.latent.items()}}


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_captured_steps_are_the_plain_ones(mode, kind):
    stream = TapeStream()
    expected = Training(mode, kind).run()
    found = Training(mode, kind, stream=stream).run()
    assert stream.recordings == 2, "one recording, and another after the freeze"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_captured_steps_are_the_plain_ones_on_a_gpu(mode, kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    gpu = torch.device("cuda", 0)
    computing.select_precision("fp32", gpu, tf32=False)
    expected = Training(mode, kind, gpu).run()
    found = Training(mode, kind, gpu, stream=captured.Stream()).run()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-8, msg=lambda words, name=name: f"{name}: {words}")


# The command line with the tape in place of CUDA graphs.
ON_TAPE = """
import sys
import main_binary_reg, test_captured
from training import captured
captured.check_place = lambda *arguments: None
captured.Stream = test_captured.TapeStream
sys.exit(main_binary_reg.main(sys.argv[1:]))
"""


def run_on_tape(tiny_data, results, *arguments):
    common = ["--dataset", "cifar10", "--data_dir", tiny_data, "--model_config", "{'depth': 8}", "--precision", "fp32"]
    command = [forks.python(), "-c", ON_TAPE, *common, "--batch-size", "25", "--results_dir", results, "--capture", *arguments]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHANGING = "{0: {'optimizer': 'SGD', 'lr': 0.0078125}, 1: {'lr': 0.00390625}, 2: {'optimizer': 'Adam'}, 3: {'lr': 0.0009765625}}"


@pytest.mark.parametrize("kept", [(), ("--keep_optimizer_state",)])
def test_a_captured_run_trains_as_a_plain_one_and_continues(tiny_data, tmp_path, kept):
    quantized = ("--projection_mode", "prox", "--reg_rate", "0.5", "--freeze_epoch", "3", "--regime", CHANGING, *kept)
    assert "captured" in run_on_tape(tiny_data, tmp_path, "--save", "captured", "--epochs", "4", *quantized)
    run_on_tape(tiny_data, tmp_path, "--save", "in-two", "--epochs", "2", *quantized)
    run_on_tape(tiny_data, tmp_path, "--save", "in-two", "--epochs", "4", *quantized)
    plain = ["--dataset", "cifar10", "--data_dir", tiny_data, "--model_config", "{'depth': 8}", "--precision", "fp32"]
    run_main(*plain, "--batch-size", 25, "--results_dir", tmp_path, "--save", "plain", "--epochs", 4, *quantized)

    found = {name: checkpoints.read(tmp_path / name / "checkpoint.pth.tar") for name in ("captured", "in-two", "plain")}
    for part in ("state_dict", "optimizer"):
        expected, again = (tree_leaves_with_path(found[name][part]) for name in ("captured", "in-two"))
        assert [path for path, _ in again] == [path for path, _ in expected]
        for (path, value), (_, other) in zip(expected, again, strict=True):
            assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, keystr(path)
    losses = {name: [row["train_loss"] for row in content["history"]] for name, content in found.items()}
    assert losses["captured"][0] == pytest.approx(losses["plain"][0], rel=1e-5)
    assert losses["captured"] == pytest.approx(losses["plain"], rel=0.02)  # training amplifies what rounding begins
    assert [row["strength"] for row in found["captured"]["history"]] == [0.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("kept", [(), ("--keep_optimizer_state",)])
@pytest.mark.parametrize("captured_first", [True, False])
def test_a_run_is_continued_with_and_without_capturing(tiny_data, tmp_path, captured_first, kept):
    plain = ["--dataset", "cifar10", "--data_dir", tiny_data, "--model_config", "{'depth': 8}", "--precision", "fp32"]
    plain += ["--batch-size", 25, "--results_dir", tmp_path]
    # One optimizer for all: what it keeps is what must fit the other kind of step.
    regime = "{0: {'optimizer': 'Adam', 'lr': 0.0078125}, 2: {'lr': 0.00390625}}"
    quantized = ("--projection_mode", "prox", "--reg_rate", "0.5", "--freeze_epoch", "3", "--regime", regime, *kept)
    run_main(*plain, "--save", "whole", "--epochs", 4, *quantized)
    for epochs, is_captured in ((1, captured_first), (4, not captured_first)):
        arguments = ("--save", "both", "--epochs", str(epochs), *quantized)
        if is_captured:
            run_on_tape(tiny_data, tmp_path, *arguments)
        else:
            run_main(*plain, *arguments)
    first, second = ("captured", "plain") if captured_first else ("plain", "captured")
    assert f"warning: {first} steps before, {second} steps now" in (tmp_path / "both" / "log.txt").read_text()
    found, expected = (checkpoints.read(tmp_path / name / "checkpoint.pth.tar") for name in ("both", "whole"))
    group = found["optimizer"]["param_groups"][0]
    assert group["capturable"] is not captured_first
    assert float(group["lr"]) == 0.00390625
    losses, plain_losses = ([row["train_loss"] for row in content["history"]] for content in (found, expected))
    assert losses == pytest.approx(plain_losses, rel=0.02)
    assert [row["strength"] for row in found["history"]] == [0.0, 0.5, 1.0, 0.0]


def test_the_optimizer_of_captured_steps_takes_plain_ones_inside_an_epoch():
    settings = {"optimizer": "Adam", "lr": 0.01}
    optimizers = []
    for was_captured in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        base = regimes.build_optimizer([weight], settings)
        weight.grad = torch.linspace(2, -1, 5)
        base.step()
        if was_captured:
            regimes.make_capturable(base, CPU)
            captured_state = base.state_dict()
            base = regimes.build_optimizer([weight], settings)
            base.load_state_dict(captured_state)
            assert float(base.param_groups[0]["lr"]) != 0.01, "float32 does not hold it: what is tested here"
            regimes.make_plain(base, settings)
        base.step()
        optimizers.append((weight.detach(), base.param_groups[0]["lr"], base.param_groups[0]["capturable"]))
    (expected, *settings_before), (found, *settings_after) = optimizers
    assert torch.equal(found, expected)
    assert settings_before == settings_after == [0.01, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_captured_run_on_a_gpu(tiny_data, tmp_path, compiled):
    common = ["--dataset", "cifar10", "--data_dir", tiny_data, "--model_config", "{'depth': 8}", "--precision", "bf16", "--capture"]
    common += ["--batch-size", 25, "--results_dir", tmp_path, "--compile", compiled]
    quantized = ("--projection_mode", "prox", "--reg_rate", "0.5", "--freeze_epoch", "3", "--regime", CHANGING)
    for epochs in (2, 4):
        run_main(*common, "--save", "captured", "--epochs", epochs, *quantized)
    common.remove("--capture")
    run_main(*common, "--save", "plain", "--epochs", 4, *quantized)
    found, expected = (checkpoints.read(tmp_path / name / "checkpoint.pth.tar")["history"] for name in ("captured", "plain"))
    assert [row["train_loss"] for row in found] == pytest.approx([row["train_loss"] for row in expected], rel=0.05)


def test_a_recording_is_made_again_where_the_learning_rate_lies_elsewhere():
    stream = TapeStream()
    training = Training(quantize.MODES["prox"], "SGD", stream=stream)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    for rounds in (1, 2):
        for _ in range(captured.WARM_UP + 2):
            training.step(images, labels, 1.0)
        assert stream.recordings == rounds
        base = training.optimizer.base_optimizer
        base.load_state_dict(base.state_dict())


def test_what_cannot_be_captured_is_said_in_one_line(tiny_data, tmp_path):
    done = run_main("--data_dir", tiny_data, "--results_dir", tmp_path / "results", "--device", "cpu", "--capture", check=2)
    assert done.stderr.splitlines() == ["main_binary_reg.py: error: --capture: CUDA graphs need a GPU, and this run has none"]
    assert not (tmp_path / "results").exists()
    captured.check_place(gpu=True, several=False)
    with pytest.raises(UsageError, match="several processes"):
        captured.check_place(gpu=True, several=True)
    captured.check_regime({0: {"optimizer": "Adam", "lr": 0.1}, 5: {"optimizer": "SGD", "dampening": 0.0}}, epochs=9)
    for entry, words in (
        ({"optimizer": "RMSprop"}, "RMSprop (epoch 5)"),
        ({"optimizer": "SGD", "dampening": 0.1}, "SGD with dampening (epoch 5)"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            captured.check_regime({0: {"optimizer": "Adam", "lr": 0.1}, 5: entry}, epochs=6)
        captured.check_regime({0: {"optimizer": "Adam", "lr": 0.1}, 5: entry}, epochs=5)  # an epoch that never comes
