"""Random command lines, checkpoints and caches: a clean run, or one line and status 2. FUZZ_EXAMPLES=20000 for a long night."""

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_class_folders
from hypothesis import given, settings
from hypothesis import strategies as st

import main_binary_reg
import models
from sources.images import CACHE, read_small_images
from training import checkpoints
from training.folder import Run
from utils import UsageError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "600"))

numbers = st.one_of(
    st.integers(-5, 2000).map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "-0", "1e400", "1e-400", "nan", "inf", "-inf", "0x10", "1_000", "٣", "1,2", " 3", "9" * 400, "--lr"]),
)
words = st.one_of(
    st.sampled_from(["prox", "lazy", "prox_ternary", "resnet", "sample", "Adam", "SGD", "cpu", "cuda", "bf16"]), st.text(max_size=8)
)
names = st.sampled_from(["depth", "lr", "optimizer", "Adam", "momentum", "betas"])
leaves = st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.floats(), names)
literals = st.recursive(
    leaves, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(leaves, inner, max_size=3)), max_leaves=6
).map(repr)
settings_names = st.sampled_from(["lr", "optimizer", "momentum", "weight_decay", "betas", "nesterov", "speed", "eps", "foreach"])
settings_values = st.one_of(leaves, st.sampled_from(["Adam", "SGD", "x"]), st.integers(), st.tuples(st.floats(), st.floats()))
regimes_in_shape = st.dictionaries(
    st.integers(0, 9), st.dictionaries(settings_names, settings_values, max_size=3), min_size=1, max_size=3
).map(repr)
texts = st.one_of(numbers, words, literals, st.just("{" * 300), st.just("(" * 5000))
VALUES = {
    **dict.fromkeys(
        [
            "--epochs",
            "--start-epoch",
            "--batch-size",
            "--freeze_epoch",
            "--print-freq",
            "-j",
            "--seed",
            "--input_size",
            "--holdout",
        ],
        numbers,
    ),
    **dict.fromkeys(["--lr", "--learning_rate", "--momentum", "--wd", "--reg_rate", "--binary_reg", "--gpus", "--gpu"], numbers),
    **dict.fromkeys(["--projection_mode", "--model", "-a", "--optimizer", "--device", "--precision"], words),
    **dict.fromkeys(
        ["--model_config"], st.one_of(literals, texts, st.sampled_from(["{'depth': 8}", "{'depth': 14, 'num_classes': 12}"]))
    ),
    **dict.fromkeys(["--regime"], st.one_of(literals, regimes_in_shape, texts)),
    **dict.fromkeys(
        ["--save", "--resume", "--evaluate", "-e", "--tb_dir", "--results_dir"],
        st.one_of(words, st.just("\0"), st.just("/dev/null/x")),
    ),
}
SWITCHES = [
    "--binary_regime",
    "--ttq_regime",
    "--deterministic",
    "--sync_bn",
    "--no_adjust",
    "--adjust_reg",
    "--keep_optimizer_state",
    "--save_all",
    "--overwrite",
    "--tf32",
]
piece = st.one_of(
    st.sampled_from(sorted(VALUES)).flatmap(lambda flag: VALUES[flag].map(lambda value: [flag, value])),
    st.sampled_from(sorted(VALUES)).flatmap(lambda flag: VALUES[flag].map(lambda value: [f"{flag}={value}"])),
    st.sampled_from(SWITCHES).map(lambda flag: [flag]),
    st.sampled_from(sorted(VALUES)).map(lambda flag: [flag]),  # its value is missing, or is the next flag
    texts.map(lambda text: [text]),
)


class Reached(Exception):
    """Everything is checked; training would begin."""


@pytest.fixture(scope="module")
def no_training():
    """Lets a run come up to its folder and no further."""
    with pytest.MonkeyPatch.context() as patch:

        def stop(self):
            raise Reached

        patch.setattr(Run, "open", stop)
        patch.setattr(main_binary_reg.computing, "keep_freed_memory", lambda: None)
        yield


@settings(max_examples=EXAMPLES)
@given(pieces=st.lists(piece, max_size=6))
def test_command_lines(no_training, tmp_path_factory, pieces):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    argv = [
        "--dataset",
        "sample",
        "--model_config",
        "{'depth': 8}",
        "--results_dir",
        str(folder),
        *(word for part in pieces for word in part),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        messages = []
        patch.setattr(
            "sys.stderr", type("Stream", (), {"write": lambda self, text: messages.append(text), "flush": lambda self: None})()
        )
        try:
            status = main_binary_reg.main(argv)
        except Reached:
            status = 0
        except SystemExit as end:
            status = end.code
    assert status in (0, 2), argv
    said = "".join(messages)
    if status == 2:
        assert said.startswith("main_binary_reg.py: error: ")
        assert said.count("\n") == 1, said
    assert sorted(folder.rglob("*")) == before


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoints") / "good.pth.tar"
    checkpoints.save(
        path, {"epoch": 3, "best_prec1": 50.0, "config": {"depth": 8}, "state_dict": models.resnet(depth=8).state_dict()}
    )
    return path


@pytest.mark.parametrize("seed", range(8))
def test_damaged_checkpoints(good, tmp_path, seed):
    """Truncations and flipped bits: refused in one line, or read to exactly the same weights (a bit that holds nothing)."""
    chance = random.Random(seed)
    content, expected = good.read_bytes(), checkpoints.read(good)["state_dict"]
    path = tmp_path / "damaged.pth.tar"
    refused = 0
    for trial in range(40):
        damaged = bytearray(content)
        if trial % 4 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            # Half of the flips hit the directory at the end, where the structure is.
            low = 0 if trial % 2 else len(damaged) - 6000
            for _ in range(chance.choice([1, 1, 8])):
                damaged[chance.randrange(low, len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = checkpoints.read(path)
            checkpoints.load_weights(models.resnet(depth=8), found, path)
        except UsageError as error:
            refused += 1
            if "\n" in str(error):
                pytest.fail(f"more than one line: {error}")
        else:
            assert all(torch.equal(found["state_dict"][name], expected[name]) for name in expected), (seed, trial)
    assert refused > 20


def test_swapped_and_strange_tensors(good, tmp_path):
    """A state_dict that is not this network's is refused and leaves the network as it was."""
    content = checkpoints.read(good)
    state = content["state_dict"]
    strange = {
        "swapped shapes": {**state, "conv1.weight": state["fc.weight"], "fc.weight": state["conv1.weight"]},
        "missing": {name: value for name, value in state.items() if name != "bn1.bias"},
        "too many": {**state, "extra": torch.zeros(1)},
        "infinite": {**state, "bn1.bias": torch.full((16,), float("inf"))},
        "numbers": {**state, "bn1.bias": 3.0},
        "sparse": {**state, "fc.weight": state["fc.weight"].to_sparse()},
        "complex": {**state, "fc.weight": state["fc.weight"].to(torch.complex64)},
        "keys": dict(enumerate(state.values())),
        "empty": {},
    }
    for name, bad in strange.items():
        path = tmp_path / "strange.pth.tar"
        torch.save({"state_dict": bad}, path)
        model = models.resnet(depth=8)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(UsageError) as caught:
            checkpoints.load_weights(model, checkpoints.read(path), path)
        assert "\n" not in str(caught.value), name
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), name


def test_hostile_archives(tmp_path):
    """Archives with a directory that lies."""
    path = tmp_path / "hostile.pth.tar"
    for names in (["../escape"], ["a/data.pkl"], ["a/data.pkl", "a/version", "a/data/0"], [f"a/{index}" for index in range(2000)]):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"\x80\x02c__main__\nnothing\n.")
        with pytest.raises(UsageError) as caught:
            checkpoints.read(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path.parent / "escape").exists()


def test_damaged_caches(tmp_path):
    """Truncations and flipped bits of the decoded images: noticed, and the images are decoded again."""
    make_class_folders(tmp_path / "CIFAR10", train=1, test=1)
    said: list[str] = []
    expected = read_small_images("cifar10", tmp_path, said.append)
    cache = tmp_path / "CIFAR10" / CACHE
    content = cache.read_bytes()
    chance = random.Random(0)
    noticed = 0
    for trial in range(60):
        damaged = bytearray(content)
        if trial % 3 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(0 if trial % 2 else len(damaged) - 700, len(damaged))] ^= 1 << chance.randrange(8)
        cache.write_bytes(damaged)
        said.clear()
        found = read_small_images("cifar10", tmp_path, said.append)
        noticed += bool(said)
        for split in ("train", "test"):
            assert np.array_equal(getattr(found, split).images, getattr(expected, split).images), trial
            assert np.array_equal(getattr(found, split).labels, getattr(expected, split).labels), trial
    assert noticed > 30
