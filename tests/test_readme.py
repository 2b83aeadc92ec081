"""README and docs/: the training commands run (shortened), so does the code for one's own model; what the pages name is there."""

import ast
import contextlib
import copy
import functools
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_main

import data
import quantize
from models import MODELS
from sources.batches import MEAN, STD
from training import arguments, regimes
from training.arguments import table_of_modes
from utils import UsageError

PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, OWN_MODELS, FLAGS = (PAGES[name] for name in ("README.md", "docs/own-models.md", "docs/flags.md"))
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Indented lines are commands, all but those of the citation.
PARTS = [CODE.sub("", page.split("## Citation")[0]) for page in PAGES.values()]
LINES = [line for part in PARTS for line in re.findall(r"^    (.*)$", part, re.MULTILINE)]
ELSEWHERE = {  # what other tests run: test_package.py, test_bad_input.py, test_fuzz.py
    "pip install .",
    "python main_binary_reg.py --help",
    "FUZZ_EXAMPLES=10000 python -m pytest tests/test_fuzz.py tests/test_fuzz_files.py tests/test_packing.py",
}
TRAINING = [line for line in LINES if "main_binary_reg.py" in line and line not in ELSEWHERE]
SCRIPTS = [line for line in LINES if re.search(r"\bscripts/", line)]
EVERY_COMMAND = [line.partition("main_binary_reg.py ")[2] for line in TRAINING]
# test_command_line.py trains on ImageNet, and nobody has the text of Penn Treebank or that of one's own.
COMMANDS = [command for command in EVERY_COMMAND if not re.search("imagenet|lstm|austen", command)]
OF_SAMPLE_TEXT = [command for command in EVERY_COMMAND if "austen" in command]
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
            quantized = ("--projection_mode", "prox", "--reg_rate", 1, "--data_dir", tiny_data)
            run_main(*SHORT, "--save", needed.name, "--epochs", 1, *quantized, cwd=folder)
    if "--save" in words:  # what was made for another command that needs it
        shutil.rmtree(folder / "results" / words[words.index("--save") + 1], ignore_errors=True)
    done = run_main(*words, cwd=folder)
    assert ("hard-quantized: loss" if "--evaluate" in words else "done, best error") in done.stdout


def test_commands_of_the_sample_text(folder):
    """One after another, with a network and an epoch of a size for tests."""
    assert len(OF_SAMPLE_TEXT) == 3
    for command in OF_SAMPLE_TEXT:
        small = () if "--evaluate" in command else ("--model_config", "{'hidden': 4}", "--batch-size", 400, "--epochs", 1)
        done = run_main(*shlex.split(command), *small, cwd=folder)
        assert ("hard-quantized, test: loss" if "--evaluate" in command else "done, best validation perplexity") in done.stdout


@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_every_command_is_accepted(command):
    assert arguments.parse(shlex.split(command), **names())[1] == []


def test_there_are_the_published_commands():
    published = [command for command in COMMANDS if command in README]
    assert len(published) == 5
    assert sum("--freeze_epoch" in command for command in published) == 3


def test_no_command_goes_unchecked():
    assert set(LINES) == {*TRAINING, *SCRIPTS, *ELSEWHERE}


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_know_what_commands_say(command):
    """The script is there and can be run; it, or one that it uses, reads the variables, and it knows the flags."""
    script = ROOT / re.search(r"\bscripts/[\w.-]+", command)[0]
    text = script.read_text()
    if script.suffix == ".py":
        assert all(f'"{flag}"' in text for flag in re.findall(r"--\w+", command))
        return
    assert script.suffix == ".sbatch" or script.stat().st_mode & 0o111
    text = "\n".join(path.read_text() for path in with_those_it_names(script))
    for variable in re.findall(r"\b([A-Z_]+)=", command):
        assert re.search(rf"\$\{{?{variable}\b|\"{variable}\"", text), variable


def with_those_it_names(script: Path) -> set[Path]:
    """A script, those in the same folder that it names, those that they name, and so on."""
    found, looked_at = {script}, set()
    while found - looked_at:
        path = (found - looked_at).pop()
        looked_at.add(path)
        found |= {other for other in script.parent.iterdir() if other.is_file() and other.name in path.read_text()}
    return found


def test_the_readme_is_a_door():
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


def test_every_page_is_in_the_readme():
    assert all(f"({page})" in README for page in PAGES if page != "README.md")


class Quantized:
    """A network, data and a loop's functions for the pages' code; remembers how many values a weight had at each validation."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        self.model = torch.nn.Sequential(*layers)
        self.batches = [(torch.randn(60, 4), torch.randint(0, 3, (60,)))] * 3
        self.validated: list[int] = []

    def train_one_epoch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for images, labels in self.batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    def validate(self, model: torch.nn.Module) -> None:
        self.validated.append(self.values())

    def values(self) -> int:
        return len(self.model[2].weight.unique())


LEVELS = {"prox_ternary": 3, "ttq": 3, "prox_alt": 4, "lazy_alt": 4}  # values of a finished tensor; in all other modes 2


def in_mode(code: str, mode_name: str) -> str:
    """The code with another mode than the one that it shows."""
    assert code.count('quantize.mode("prox")') == 1
    return code.replace('quantize.mode("prox")', f'quantize.mode("{mode_name}")')


def code_with(words: str) -> str:
    """The one block of code for one's own model that has these words."""
    (code,) = (code for code in CODE.findall(OWN_MODELS) if words in code)
    return code


def run_loop(setting: Quantized, mode_name: str, **more) -> dict:
    """Runs the whole loop; returns its variables."""
    given = {name: getattr(setting, name) for name in ("model", "batches", "validate", "train_one_epoch")}
    given |= {"epochs": 12, "freeze_epoch": 11, "loss_fn": torch.nn.functional.cross_entropy, **more}
    exec(in_mode(code_with("validate(model)"), mode_name), given)
    return given


@pytest.mark.parametrize("mode_name", quantize.MODES)
def test_own_model(mode_name, tmp_path, monkeypatch):
    """The whole loop, and the file that is written after it."""
    setting = Quantized()
    given = run_loop(setting, mode_name)
    assert setting.validated == [LEVELS.get(mode_name, 2)] * 12
    assert setting.values() == LEVELS.get(mode_name, 2)
    monkeypatch.chdir(tmp_path)
    before = copy.deepcopy(setting.model.state_dict())
    exec(code_with("save_packed"), given)
    assert all(torch.equal(value, before[name]) for name, value in setting.model.state_dict().items())


@pytest.mark.parametrize("mode_name", quantize.MODES)
def test_own_model_in_the_readme(mode_name):
    (code,) = CODE.findall(README)
    code = code.replace("300", "12").replace("200", "8")  # shortened
    setting = Quantized()
    given = {"torch": torch, "quantize": quantize, "model": setting.model, "train_one_epoch": setting.train_one_epoch}
    exec(in_mode(code, mode_name), given)
    assert setting.values() == LEVELS.get(mode_name, 2)
    assert given["optimizer"].frozen


@pytest.mark.parametrize("mode_name", ["prox", "ttq"])
def test_an_average_is_quantized(mode_name):
    setting = Quantized()
    given = run_loop(setting, mode_name, freeze_epoch=20)
    exec(code_with("AveragedModel"), given)
    weight = given["averaged"].module[2].weight
    assert len(weight.unique()) == LEVELS.get(mode_name, 2)
    levels = given["optimizer"].levels
    assert set(weight.unique().tolist()) == ({*levels["2.weight"].tolist(), 0.0} if levels else {-1.0, 1.0})


def test_statistics_of_the_quantized_weights():
    """Those of the copy are of the batches as they come through quantized layers; the network in training keeps its own."""
    setting, shown = Quantized(), []
    setting.model.insert(1, torch.nn.BatchNorm1d(8))
    given = run_loop(setting, "prox", freeze_epoch=20, validate=lambda model: None)
    before = copy.deepcopy(setting.model.state_dict())
    exec(code_with("import copy"), given | {"validate": shown.append})
    (network,) = shown
    assert not network[0].weight.abs().ne(1).any()
    reached = torch.cat([images @ network[0].weight.T + network[0].bias for images, _ in setting.batches])
    assert torch.allclose(network[1].running_mean, reached.mean(0), atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in setting.model.state_dict().items())


def test_a_packed_network_runs_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, mode = MODELS["resnet"](depth=20), quantize.mode("prox")
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(network.parameters(), lr=0.1), mode.select(network), mode)
    quantize.save_packed("resnet20.safetensors", network, optimizer)
    (code,) = CODE.findall(PAGES["docs/packed-format.md"])
    given: dict = {}
    exec(code, given)
    images = torch.randn(2, 3, 32, 32)
    optimizer.freeze()
    assert torch.equal(given["model"](images), network.eval()(images))
    assert f"mean {', '.join(map(str, MEAN))} and std {', '.join(map(str, STD))}" in code


def test_several_methods_in_one_network():
    setting = Quantized()
    exec(code_with("*body, head"), {**run_loop(setting, "prox", epochs=0), "epochs": 12})
    assert setting.values() == len(setting.model[0].weight.unique()) == 2
    assert [len(row.unique()) for row in setting.model[4].weight] == [4] * 3


def test_a_new_method():
    setting, found = Quantized(), {}
    exec(code_with("import Uniform"), found)
    model, mode = setting.model, found["mode"]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.set_strength(mode.strength(1e-2, 3))
    setting.train_one_epoch(model, optimizer)
    optimizer.freeze()
    steps = model[2].weight.unique().diff()
    assert 2 < len(steps) < 16
    assert torch.allclose(steps / steps.min(), (steps / steps.min()).round(), atol=1e-4)


def test_a_new_quantizer_of_five_values(tmp_path):
    """In under 20 lines; it trains, freezes and is exported like those that are there."""
    code = code_with("class Five")
    (lines,) = re.findall(r"^class Five.*?(?=^\S(?!lass))", code, re.MULTILINE | re.DOTALL)
    assert len(lines.strip().splitlines()) < 20
    setting, found = Quantized(), {}
    exec(code, found)
    model, mode = setting.model, found["mode"]
    assert torch.equal(mode.hard_quantize(torch.zeros(3)), torch.zeros(3))
    w = torch.tensor([-9.0, -1.0, 0.1, 1.2, 2.6])  # its mean size is 2.78
    expected = 2.78 * torch.tensor([-2.0, 0, 0, 0, 1])
    assert torch.allclose(mode.hard_quantize(w), expected)
    assert mode.hard_quantize(w.bfloat16()).dtype == torch.bfloat16
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.set_strength(mode.strength(1e-2, 3))
    before = model[2].weight - mode.hard_quantize(model[2].weight)
    setting.train_one_epoch(model, optimizer)
    after = model[2].weight - mode.hard_quantize(model[2].weight)
    assert after.norm() < before.norm()
    optimizer.freeze()
    assert len(model[2].weight.unique()) == 5
    quantize.save_packed(tmp_path / "network", model, optimizer)
    assert torch.equal(quantize.load_packed(tmp_path / "network")["2.weight"], model[2].weight)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is meant
@pytest.mark.parametrize("mode_name", ["prox", "ttq"])
def test_state_goes_through_a_distributed_checkpoint(mode_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setting = Quantized()
    given = run_loop(setting, mode_name, freeze_epoch=20)
    save, load = code_with("dcp.save").split("# Later")
    exec(save, given)
    again = Quantized()
    given |= run_loop(again, mode_name, epochs=1, freeze_epoch=20)
    exec(load.partition("\n")[2], given)
    assert all(torch.equal(value, setting.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_the_table_of_methods_is_complete():
    stated = re.findall(r'^\| `"(\w+)"` \| .* \| (\w+) \|$', OWN_MODELS, re.MULTILINE)
    assert stated == [(mode.name, "lazy" if mode.lazy else "eager") for mode in quantize.MODES.values()]
    assert {mode.name for mode in list(quantize.MODES.values())[-5:]} == {
        m.name for m in quantize.MODES.values() if m.any_quantizer
    }


def test_the_rate_is_the_published_one_at_the_published_length():
    found = {}
    exec(code_with("rate_for"), found)
    assert found["rate_for"](7.8, 0.01, 391, 200) == pytest.approx(1e-4, rel=0.01)
    assert found["rate_for"](15.6, 0.01, 196, 400) == pytest.approx(1e-4, rel=0.01)


def names() -> dict:
    return {"modes": quantize.MODES, "models": MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}


def flags() -> list:
    return [action for action in arguments.build_parser(**names())._actions if action.dest != "help"]


def test_flags_are_the_parsers():
    expected = [f"| {', '.join(f'`{flag}`' for flag in action.option_strings)} | {action.help} |" for action in flags()]
    assert [line for line in FLAGS.split("\n## ")[0].splitlines() if line.startswith("| `-")] == expected


def test_the_table_of_projection_modes_is_that_of_the_help():
    (part,) = (part for part in FLAGS.split("\n## ") if part.startswith("The projection modes"))
    expected = [f"| `{name}` | {title} | {values} | {rate} |" for name, title, values, rate in table_of_modes(quantize.MODES)]
    assert [line for line in part.splitlines() if line.startswith("| `")] == expected
    text = arguments.build_parser(**names()).format_help()
    assert all(word in text for row in table_of_modes(quantize.MODES) for word in row)
    free = ", ".join(list(quantize.QUANTIZERS)[:-1])
    assert f"any of {free} and uniform_with_zero" in part
    for name, mode in quantize.MODES.items():  # what the table says of a mode is what is accepted
        for quantizer, kind in quantize.modes.ALL_QUANTIZERS.items():
            words = ["--projection_mode", name, "--quantizer", quantizer, f"--{mode.schedule.flag or 'epochs'}", "1"]
            stated = next(values for other, _, values, _ in table_of_modes(quantize.MODES) if other == name)
            allowed = quantizer in stated.split("; ")[0].split(" or ") or (
                ", or another" in stated and quantizer in quantize.QUANTIZERS
            )
            with (
                contextlib.nullcontext() if allowed else pytest.raises(UsageError, match=f"--quantizer {quantizer}: {name} accepts")
            ):
                arguments.parse(words, **names())
            if allowed and not kind.takes_bits:
                with pytest.raises(UsageError, match=f"--bits 3: {name} .* take it$"):
                    arguments.parse([*words, "--bits", "3"], **names())
                with pytest.raises(UsageError, match=f"--by_row: {name} .* take it$"):
                    arguments.parse([*words, "--by_row"], **names())


def test_defaults_are_those_of_the_help():
    for action in flags():
        stated = re.findall(r"\bdefault: (-?[\w./-]+)[),;]", action.help)
        special = action.default in (None, {}) or action.dest == "binary_reg"  # a default that depends on the rest
        if not special and action.nargs != 0:
            default = ",".join(map(str, action.default)) if isinstance(action.default, list) else action.default
            assert stated == [str(default)] or float(stated[0]) == float(default), action.dest


@functools.cache
def parsed(file: str) -> tuple[str, ast.Module]:
    text = (ROOT / file).read_text()
    return text, ast.parse(text)


def source_of(file: str, name: str) -> str:
    """The source of a function, or of a class's method, in a file of this repository."""
    text, node = parsed(file)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [child for child in node.body if isinstance(child, kinds) and child.name == part]
        assert len(found) == 1, f"{file} has no {name}"
        node = found[0]
    return ast.get_source_segment(text, node)


FUNCTION = re.compile(r"`([\w/]+\.py)`: `([\w.]+)`")


def test_the_map_leads_from_each_flag_to_its_line():
    """The function in the middle column asks for the flag by name; the one in the last column is there."""
    rows = [line.split(" | ") for line in PAGES["docs/reading-the-code.md"].splitlines() if line.startswith("| `--")]
    by_flag = {flag: action for action in flags() for flag in action.option_strings}
    assert len(rows) == len(flags())
    assert {by_flag[row[0].strip("| `")].dest for row in rows} == {action.dest for action in flags()}
    for flag, asked, acts in rows:
        dest = by_flag[flag.strip("| `")].dest
        for file, name in FUNCTION.findall(asked):
            assert re.search(rf"\b{dest}\b", source_of(file, name)), (flag, file, name)
        assert FUNCTION.findall(asked), flag
        assert FUNCTION.findall(acts), flag
        for file, name in FUNCTION.findall(acts):
            source_of(file, name)


def test_promises_name_tests_that_are_there():
    named = 0
    for line in PAGES["docs/reliability.md"].splitlines():
        file = None
        for word in re.findall(r"`([^`]+)`", line):
            if word.startswith("tests/") and word.endswith(".py"):
                file = word
            elif word.startswith("test_"):
                assert source_of(file, word), (file, word)
                named += 1
    assert named > 20
