"""The README: every training command runs (shortened), so does the code for one's own model, and its table of flags is true."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_main

import data
import quantize
from models import MODELS
from training import arguments, regimes

README = (ROOT / "README.md").read_text()
EVERY_COMMAND = re.findall(r"^    .*\bmain_binary_reg\.py (.*)$", README, re.MULTILINE)
COMMANDS = [command for command in EVERY_COMMAND if "imagenet" not in command]  # test_command_line.py trains on ImageNet
SHORT = ("--model_config", "{'depth': 8}", "--precision", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands are run, one after another as in the README."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(
    "command", COMMANDS, ids=lambda command: re.search(r"--(?:evaluate|save|projection_mode) (\S+)", command)[0]
)
def test_command(command, folder, tiny_data):
    words = [*shlex.split(command), *SHORT, "--data_dir", tiny_data]
    if "--evaluate" not in words:
        words += ["--epochs", 2]
        if "--freeze_epoch" in words:
            words += ["--freeze_epoch", 1]
    for flag in {"--evaluate", "--resume"} & set(words):
        needed = Path(words[words.index(flag) + 1])
        if not (folder / needed).exists():  # this test runs on its own, without those before it
            run_main(*SHORT, "--save", needed.name, "--epochs", 1, "--data_dir", tiny_data, "--projection_mode", "prox", cwd=folder)
    done = run_main(*words, cwd=folder)
    assert ("hard-quantized: loss" if "--evaluate" in words else "done, best error") in done.stdout


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_is_accepted(command):
    names = {"modes": quantize.MODES, "models": MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
    assert arguments.parse(shlex.split(command), **names)[1] == []


def test_there_are_the_published_commands():
    assert len(COMMANDS) == 5
    assert sum("--freeze_epoch" in command for command in COMMANDS) == 3


def test_own_model():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    images, labels = torch.randn(60, 4), torch.randint(0, 3, (60,))
    validated = []
    names = {
        "torch": torch,
        "model": model,
        "epochs": 4,
        "freeze_epoch": 3,
        "rate": 1.0,
        "batches": [(images, labels)] * 5,
        "loss_fn": torch.nn.functional.cross_entropy,
        "validate": lambda net: validated.append(set(net[0].weight.unique().tolist())),
    }
    exec(code, names)
    assert validated == [{-1.0, 1.0}] * 4
    assert set(model[2].weight.unique().tolist()) == {-1.0, 1.0}


def test_flags_are_the_parsers():
    parser = arguments.build_parser(modes=quantize.MODES, models=MODELS, datasets=data.DATASETS, optimizers=regimes.OPTIMIZERS)
    actions = [action for action in parser._actions if action.dest != "help"]
    expected = [f"| {', '.join(f'`{flag}`' for flag in action.option_strings)} | {action.help} |" for action in actions]
    assert [line for line in README.splitlines() if line.startswith("| `-")] == expected


def test_defaults_are_those_of_the_help():
    parser = arguments.build_parser(modes=quantize.MODES, models=MODELS, datasets=data.DATASETS, optimizers=regimes.OPTIMIZERS)
    for action in parser._actions:
        stated = re.findall(r"\(default: (-?[\w./-]+)[),;]", action.help)
        special = action.default in (None, {}) or action.dest in ("binary_reg", "help")  # a default that depends on the rest
        if not special and action.nargs != 0:
            default = ",".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            assert stated == [str(default)] or float(stated[0]) == float(default), action.dest
