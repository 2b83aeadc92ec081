"""Language models: texts and their windows, the network, perplexity, the regime that follows the validation, and whole runs."""

import csv
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_main, until
from torch import Tensor

import data
import main_binary_reg
import models
import quantize
from models.lstm import REGIME
from sources import text
from training import computing, loops, regimes
from training.tasks import TEXT, TokenMeter
from utils import UsageError

CPU = torch.device("cpu")
SMALL = ("--model_config", "{'hidden': 8}", "--batch-size", "4", "--precision", "fp32")
WORDS = ["a", "be", "see", "dee"]


def write_text(folder: Path, sizes: tuple[int, int, int] = (300, 60, 45), words: list[str] = WORDS) -> Path:
    """A text in three parts of so many lines; what follows a word depends on the word, so that there is something to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for part, lines in zip(("train", "valid", "test"), sizes, strict=True):
        rows = []
        for _ in range(lines):
            start = int(random.integers(len(words)))
            rows.append(" ".join(words[(start + step) % len(words)] for step in range(random.integers(1, 7))))
        (folder / f"{part}.txt").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def load(folder: Path, name: str = "checkpoint.pth.tar") -> dict:
    return torch.load(folder / name, weights_only=True)


# Texts and windows.


def test_words_are_numbered_by_frequency_and_lines_end_in_eos(tmp_path):
    line = "b b a b c a"
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("\n".join([line] * 5) + "\n")
    found = text.read_text("text", tmp_path)
    assert found.words == ("b", "a", "<eos>", "c")  # of one frequency: in the order of the alphabet
    assert found.train.tolist() == [0, 0, 1, 0, 3, 1, 2] * 5


def test_unk_stands_for_what_training_lacks(tmp_path):
    write_text(tmp_path, words=["a", "b", "<unk>"])
    (tmp_path / "test.txt").write_text("a strange b\n" * 12)
    found = text.read_text("text", tmp_path)
    unknown = found.words.index("<unk>")
    assert found.test[1] == unknown
    assert found.test[0] == found.words.index("a")


@pytest.mark.parametrize(("tokens", "streams"), [(31 * 4, 4), (200, 3), (121 * 2, 2), (500, 7)])
def test_training_windows_are_the_plain_ones(tokens, streams):
    numbers = torch.arange(tokens) % 97
    windows = text.training_windows(numbers, streams, CPU)
    length = tokens // streams
    first, samples = 0, 0
    for inputs, targets in windows.epoch(0):
        for stream in range(streams):
            for step in range(len(inputs)):
                assert inputs[step, stream] == numbers[stream * length + first + step]
                assert targets[step, stream] == numbers[stream * length + first + step + 1]
                samples += 1
        first += len(inputs)
    assert first == length - 1  # every word of a stream but its last one is an input
    assert samples == windows.samples
    assert len(list(windows.epoch(3, start=1))) == len(windows) - 1


@pytest.mark.parametrize("tokens", [31, 40, 41, 619, 2000])
def test_validation_predicts_every_word_but_the_first_once(tokens):
    numbers = torch.randperm(tokens)
    windows = text.validation_windows(numbers, CPU)
    pairs = [
        (int(word), int(following))
        for inputs, targets in windows.epoch()
        for word, following in zip(inputs.flatten(), targets.flatten(), strict=True)
        if following != text.NO_TARGET
    ]
    assert sorted(pairs) == sorted(zip(numbers[:-1].tolist(), numbers[1:].tolist(), strict=True))
    assert windows.samples == tokens - 1


def test_the_sample_text():
    found = text.read_text("sample_text", Path("nowhere"))
    assert {len(found.train), len(found.validation), len(found.test)} == {100061, 14961, 12860}
    assert len(found.words) == 3538


# The network and its step.


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_the_network_is_the_recurrence():
    torch.manual_seed(0)
    model = models.lstm(hidden=5, num_classes=11).double().eval()
    w = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    tokens, h, c = torch.randint(0, 11, (7, 3)), np.random.default_rng(0).normal(size=(3, 5)), np.zeros((3, 5))
    states = [torch.tensor(h)[None], torch.tensor(c)[None]]
    logits = []
    for step in tokens.numpy():
        gates = w["embedding.weight"][step] @ w["lstm.weight_ih_l0"].T + h @ w["lstm.weight_hh_l0"].T
        i, f, g, o = np.split(gates + w["lstm.bias_ih_l0"] + w["lstm.bias_hh_l0"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        logits.append(h @ w["decoder.weight"].T + w["decoder.bias"])
    found, (hidden, cell) = model(tokens, *states)
    np.testing.assert_allclose(found.detach().numpy(), np.stack(logits), rtol=1e-10)
    np.testing.assert_allclose(hidden[0].detach().numpy(), h, rtol=1e-10)
    np.testing.assert_allclose(cell[0].detach().numpy(), c, rtol=1e-10)


def test_parameters_and_their_start():
    torch.manual_seed(0)
    model = models.lstm(num_classes=10_000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_732_400
    assert sum(parameter.numel() for _, parameter in model.quantizable()) == 6_720_000
    names = ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "decoder.weight"]
    assert [name for name, _ in model.quantizable()] == names
    assert not model.decoder.bias.any()
    for name, parameter in model.named_parameters():
        if name != "decoder.bias":
            assert parameter.abs().max() <= 0.1
            assert float(parameter.detach().abs().mean()) == pytest.approx(0.05, rel=0.05)


def test_dropout_is_on_the_embedded_words_and_on_the_output():
    torch.manual_seed(0)
    model, tokens = models.lstm(hidden=50, num_classes=9), torch.randint(0, 9, (3, 2))
    seen = []
    model.lstm.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    model.decoder.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    model.train()(tokens, *model.start(2))
    assert [float((part == 0).float().mean()) for part in seen] == pytest.approx([0.5, 0.5], abs=0.1)
    kept = seen[0] != 0
    assert torch.equal(seen[0][kept], 2 * model.embedding(tokens)[kept])


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
def test_impossible_sizes_are_refused(value):
    with pytest.raises(ValueError, match="whole number"):
        models.lstm(hidden=value)


def test_steps_are_those_of_the_plain_loop():
    """Windows in order, states carried and cut from the graph, the gradient's norm clipped, plain SGD."""
    windows = text.training_windows(torch.arange(400) * 7919 % 13, 3, CPU)
    ours, plain = (models.lstm(hidden=6, num_classes=13).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    for model in (ours, plain):
        model.dropout.p = 0.0
    settings = regimes.settings_at({0: {**REGIME[0], "lr": 3.0}}, 0)
    optimizer = quantize.ProjectedOptimizer(regimes.build_optimizer(ours.parameters(), settings), [], quantize.FULL_PRECISION)
    meter, carried = TEXT.meter(CPU), TEXT.carried(ours, windows)
    hidden, losses = plain.start(3), []
    for inputs, targets in windows.epoch(0):
        loops.train_step(TEXT, ours, optimizer, computing.Precision("fp32", "cpu"), meter, carried, inputs, targets)
        logits, hidden = plain(inputs, *(state.detach() for state in hidden))
        loss = F.cross_entropy(logits.reshape(-1, 13), targets.reshape(-1))
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter -= 3.0 * gradient * min(1.0, 0.25 / norm)
        losses += [loss.item()] * inputs.numel()
        for state, expected in zip(carried, hidden, strict=True):
            torch.testing.assert_close(state, expected.detach(), rtol=1e-6, atol=1e-9)
    assert meter.read() == pytest.approx({"loss": np.mean(losses), "ppl": math.exp(np.mean(losses))})


def test_perplexity_of_a_network_is_that_of_its_words_one_after_another():
    torch.manual_seed(0)
    model, tokens = models.lstm(hidden=6, num_classes=13).double().eval(), torch.randint(0, 13, (107,))
    windows = text.validation_windows(tokens, CPU, streams=4)
    found = loops.validate(TEXT, model, windows, TEXT.meter(CPU), computing.Precision("fp32", "cpu"))
    surprise, length = 0.0, 27
    with torch.no_grad():
        for position in range(106):
            if position % length == 0:
                states: list[Tensor] = model.start(1)
            logits, states = model(tokens[position].view(1, 1), *states)
            surprise -= float(torch.log_softmax(logits[0, 0], 0)[tokens[position + 1]])
    assert found == pytest.approx({"loss": surprise / 106, "ppl": math.exp(surprise / 106)})


def test_perplexity_beyond_all_numbers():
    meter = TokenMeter(CPU)
    assert math.isnan(meter.read()["ppl"])
    meter.update(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.int64), torch.tensor(1e4))
    assert meter.read() == {"loss": 1e4, "ppl": math.inf}


# The regime that follows the validation.


def history(*losses: float, column: str = "val_loss") -> list[dict[str, float]]:
    return [{"epoch": epoch, "val_loss": 0.0, column: loss} for epoch, loss in enumerate(losses, 1)]


def test_the_rate_is_divided_after_an_epoch_that_is_not_the_best():
    losses, expected = (5.0, 4.0, 4.5, 4.0, 3.9, 4.1), (20.0, 20.0, 20.0, 20 / 1.2, 20 / 1.44, 20 / 1.44, 20 / 1.728)
    for column in ("val_loss", "val_loss_bin"):
        for epoch, rate in enumerate(expected):
            settings = regimes.settings_at(REGIME, epoch, history(*losses, column=column))
            assert settings["lr"] == pytest.approx(rate), (column, epoch)


def test_the_rate_is_divided_anew_from_where_the_regime_sets_it():
    regime = {0: {"optimizer": "SGD", "lr": 8.0, "plateau": 2.0}, 2: {"lr": 1.0}}
    rates = [regimes.settings_at(regime, epoch, history(1.0, 2.0, 3.0, 0.5))["lr"] for epoch in range(5)]
    assert rates == [8.0, 8.0, 1.0, 0.5, 0.5]


def test_the_run_ends_below_a_rate():
    worse = history(*range(1, 80))
    ended = [epoch for epoch in range(80) if regimes.ended(REGIME, epoch, worse)]
    assert 20 / 1.2**54 > 0.001 > 20 / 1.2**55
    assert ended[0] == 56  # the first epoch is the best one: 55 divisions after 56 epochs
    assert not regimes.ended({0: {"optimizer": "SGD", "lr": 0.0}}, 5, worse)


# Whole runs.


def test_a_run_from_start_to_end(folder, tmp_path):
    command = [
        "--dataset",
        "text",
        "--data_dir",
        folder,
        *SMALL,
        "--optimizer",
        "Adam",
        "--lr",
        0.05,
        "--epochs",
        3,
        "--save",
        "run",
    ]
    done = run_main(*command, "--results_dir", tmp_path)
    found, content = rows(tmp_path / "run"), load(tmp_path / "run")
    assert ",".join(found[0]) == (
        "epoch,train_loss,val_loss,train_ppl,val_ppl,val_loss_bin,val_ppl_bin,test_ppl,lr,strength,seconds,binary,quant_error,"
        "sign_change"
    )
    for row in found:
        for split in ("train", "val"):
            assert float(row[f"{split}_ppl"]) == pytest.approx(math.exp(float(row[f"{split}_loss"])))
    best = min(float(row["val_ppl"]) for row in found)
    assert [row["test_ppl"] != "" for row in found] == [False, False, True]
    assert content["best_ppl"] == best
    assert content["history"][-1]["test_ppl"] == float(found[-1]["test_ppl"])
    assert best < 4  # of five words, which come in one order
    assert f"best validation perplexity {best:.2f}, test perplexity there {float(found[-1]['test_ppl']):.2f}" in done.stdout
    evaluated = run_main("--evaluate", tmp_path / "run", "--data_dir", folder).stdout
    assert re.search(rf"as it is: loss [\d.]+, perplexity {best:.2f}$", evaluated, re.MULTILINE)
    assert re.search(rf"as it is, test: loss [\d.]+, perplexity {float(found[-1]['test_ppl']):.2f}$", evaluated, re.MULTILINE)


def test_a_run_ends_by_its_regime_and_is_then_complete(folder, tmp_path):
    regime = "{0: {'lr': 1e-30, 'plateau': 2, 'end_below': 3e-31}}"
    command = ["--dataset", "text", "--data_dir", folder, *SMALL, "--epochs", 9, "--save", "run", "--results_dir", tmp_path]
    run_main(*command, "--regime", regime)  # learns nothing, so that no epoch after the first is the best
    found = rows(tmp_path / "run")
    assert [float(row["lr"]) for row in found] == [1e-30, 1e-30, 5e-31]
    assert found[-1]["test_ppl"]
    again = run_main(*command, "--regime", regime)
    assert "complete, its regime ends after 3 epochs" in again.stdout
    assert rows(tmp_path / "run") == found


@pytest.mark.parametrize("mode", [(), ("--projection_mode", "prox_alt", "--reg_rate", "1e-3", "--freeze_epoch", "3")])
def test_a_killed_run_continues_inside_an_epoch_to_the_same_end(folder, tmp_path, mode):
    command = ["--dataset", "text", "--data_dir", str(folder), *SMALL, "--epochs", "4", "--lr", "2", *mode]
    command += ["--print-freq", "1", "--checkpoint_minutes", "0.00001"]
    run_main(*command, "--save", "whole", "--results_dir", tmp_path)
    waiting = [sys.executable, ROOT / "tests" / "waiting.py", tmp_path / "waits", "3", "6"]
    process = subprocess.Popen([*waiting, *command, "--save", "killed", "--results_dir", tmp_path], stdout=subprocess.DEVNULL)
    until((tmp_path / "waits").exists, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    content = load(tmp_path / "killed")
    assert (content["epoch"], content["step"]) == (2, 5)
    assert all(state.any() for state in content["carried"])
    done = run_main(*command, "--save", "killed", "--results_dir", tmp_path)
    assert "continuing in epoch" in done.stdout
    whole, killed = (
        [{name: value for name, value in row.items() if name != "seconds"} for row in rows(tmp_path / name)]
        for name in ("whole", "killed")
    )
    assert whole == killed
    ours, theirs = (load(tmp_path / name) for name in ("whole", "killed"))
    for name, weight in ours["state_dict"].items():
        assert torch.equal(weight, theirs["state_dict"][name]), name
    assert torch.equal(ours["random"]["torch"], theirs["random"]["torch"])


@pytest.mark.parametrize("mode", ["lazy", "prox"])
def test_a_quantized_run_from_a_warm_start(folder, tmp_path, mode):
    common = ("--dataset", "text", "--data_dir", folder, *SMALL, "--results_dir", tmp_path)
    run_main(*common, "--epochs", 1, "--save", "fp")
    rate = ("--reg_rate", "0.1") if mode == "prox" else ()
    quantized = ("--projection_mode", mode, *rate, "--lr", "0.1", "--freeze_epoch", 2)
    run_main(*common, *quantized, "--epochs", 3, "--resume", tmp_path / "fp", "--save", "run")
    best, final = load(tmp_path / "run", "model_best.pth.tar"), load(tmp_path / "run")
    for content in (best, final):
        for name, weight in content["state_dict"].items():
            assert (set(weight.flatten().tolist()) <= {-1.0, 1.0}) == (weight.dim() == 2), name
    found = rows(tmp_path / "run")
    assert all(row["val_ppl_bin"] for row in found)
    assert found[-1]["val_ppl_bin"] == found[-1]["val_ppl"]
    out = run_main("--evaluate", tmp_path / "run", "--data_dir", folder).stdout
    assert f"hard-quantized, test: loss {math.log(float(found[-1]['test_ppl'])):.4f}" in out


@pytest.mark.parametrize("lost", ["removed", "damaged"])
def test_a_run_whose_best_network_is_lost_comes_to_its_end(tmp_path, folder, lost):
    """Made longer, with no epoch that is better: the test perplexity is left out, which is said."""
    words = ["--dataset", "text", "--data_dir", folder, *SMALL, "--save", "run", "--results_dir", tmp_path]
    words += ["--regime", "{0: {'lr': 0.1}, 1: {'lr': 0.0}}"]
    run_main(*words, "--epochs", 1)
    best = tmp_path / "run" / "model_best.pth.tar"
    if lost == "removed":
        best.unlink()
    else:
        best.write_bytes(best.read_bytes()[:200])
    out = run_main(*words, "--epochs", 2).stdout
    assert re.search(r"warning: .*model_best.pth.tar: .*: nothing is tested", out)
    assert re.search(r"done, best validation perplexity [0-9.]+$", out.strip())
    assert [row["test_ppl"] for row in rows(tmp_path / "run")][1:] == [""]


# Bad input.


@pytest.fixture
def bad(folder, tmp_path, capfd) -> Callable[..., str]:
    """Calls the script's main function, which must end with status 2 and make nothing; returns the one line of its error."""

    def call(*arguments: object) -> str:
        results = tmp_path / "results"
        words = ["--dataset", "text", "--data_dir", folder, *arguments, "--results_dir", results]
        try:
            status = main_binary_reg.main([str(word) for word in words])
        except SystemExit as end:
            status = end.code
        lines = capfd.readouterr().err.splitlines()
        assert status == 2
        assert len(lines) == 1, lines
        assert not results.exists()
        return lines[0]

    return call


@pytest.mark.parametrize(
    ("part", "content", "named"),
    [
        ("valid", b"a be strange\n" * 20, ["valid.txt", "line 1", "'strange'", "<unk>"]),
        ("train", b"", ["train.txt", "empty"]),
        ("test", b"\n\n", ["test.txt", "empty"]),
        ("test", b"a \xff be\n" * 20, ["test.txt", "UTF-8", "0xff"]),
        ("valid", b"a be see\n", ["valid.txt", "4 words", "30"]),
        ("train", b"a be see dee\n" * 20, ["--batch-size 20", "100 words", "620"]),
        ("valid", None, ["valid.txt", "not there"]),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, part, content, named):
    folder = write_text(tmp_path / "text")
    if content is None:
        (folder / f"{part}.txt").unlink()
    else:
        (folder / f"{part}.txt").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        data.load("text", folder, CPU, 20, 0, print)
    assert "\n" not in str(caught.value)
    for words in named:
        assert words in str(caught.value)


def test_a_missing_penn_treebank(bad, tmp_path):
    line = bad("--dataset", "ptb", "--data_dir", tmp_path)
    assert str(tmp_path / "ptb" / "ptb.train.txt") in line
    assert "licence" in line


def test_another_vocabulary_than_the_checkpoints(bad, tmp_path):
    other = write_text(tmp_path / "other", words=["a", "be", "see", "sea"])
    run_main("--dataset", "text", "--data_dir", other, *SMALL, "--epochs", 1, "--save", "run", "--results_dir", tmp_path / "runs")
    run = tmp_path / "runs" / "run"
    for line in (
        bad(*SMALL, "--resume", run),
        bad("--evaluate", run),
    ):
        assert "vocabulary" in line
        assert "'sea'" in line
    (other / "train.txt").write_text((other / "train.txt").read_text().replace("sea", "see"))
    before = (run / "checkpoint.pth.tar").stat().st_mtime_ns
    command = ["--dataset", "text", "--data_dir", other, *SMALL, "--epochs", 2, "--save", "run", "--results_dir", tmp_path / "runs"]
    done = run_main(*command, check=2)  # the text has changed under the run
    assert "vocabulary" in done.stderr or "not in the training text" in done.stderr
    assert (run / "checkpoint.pth.tar").stat().st_mtime_ns == before
    content = torch.load(run / "model_best.pth.tar", weights_only=True)
    torch.save({**content, "words": [["a"], {}]}, tmp_path / "odd.pth.tar")
    assert "what it has for words are none" in bad("--evaluate", tmp_path / "odd.pth.tar")


def test_a_text_is_for_one_process(bad, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert "torchrun: a text is for one process" in bad("--batch-size", 4)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "resnet"], ["--model resnet", "text", "lstm"]),
        (["--model", "lstm", "--dataset", "cifar10"], ["--model lstm", "images", "ptb, text, sample_text"]),
        (["--gpus", "0,1"], ["--gpus 0,1", "one process"]),
        (["--holdout", "5"], ["--holdout 5", "text"]),
        (["--input_size", "64"], ["--input_size 64", "text"]),
        (["--capture"], ["--capture", "text"]),
        (["--sync_bn"], ["--sync_bn", "text"]),
        (["--lr", "0.0001"], ["--lr 0.0001", "0.001"]),
        (["--momentum", "0.5", "--optimizer", "Adam"], ["--momentum", "Adam"]),
        (["--model_config", "{'depth': 20}"], ["--model_config", "depth"]),
        (["--model_config", "{'hidden': 0}"], ["--model_config", "hidden 0"]),
        (["--regime", "{0: {'plateau': 1}}"], ["plateau 1", "above 1"]),
        (["--regime", "{0: {'clip_norm': -1}}"], ["clip_norm -1", "above 0"]),
        (["--regime", "{0: {'end_below': 'x'}}"], ["end_below 'x'", "from 0 up"]),
    ],
)
def test_flags_that_make_no_sense_for_text(bad, arguments, named):
    line = bad("--batch-size", 4, *arguments)
    for words in named:
        assert words in line
