"""Damaged and hostile checkpoints, packed files, caches and texts: read, or refused in one line. FUZZ_EXAMPLES as in test_fuzz.py.

Of each kind there are as many as that number allows: 10,000 make 5,200 checkpoints with flipped bits, 5,000 that were made to do
harm (two fifths of them packed), 1,000 caches and 1,000 texts.
"""

import builtins
import contextlib
import io
import os
import pickle
import random
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_class_folders

import main_binary_reg
import models
import quantize
from quantize import packing
from sources.images import CACHE, read_small_images
from sources.text import read_text
from training import checkpoints, evaluation, loops
from utils import UsageError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "600"))
COMMAND = ["--dataset", "sample", "--model_config", "{'depth': 8}", "--precision", "fp32", "--device", "cpu", "--epochs", "2"]
TRAIN = [*COMMAND, "--projection_mode", "lazy", "--optimizer", "Adam", "--lr", "0.01"]


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
    for trial in range(EXAMPLES // 15):
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
    assert refused > EXAMPLES // 30


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
    for trial in range(EXAMPLES // 10):
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
    assert noticed > EXAMPLES // 20


class Reached(Exception):
    """Everything is read and checked; the network would be used."""


class Payload:
    """What a pickle can do to whoever loads it: call anything with anything."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self._call


def payloads(marker: Path) -> list[Payload]:
    return [
        Payload(os.system, f"touch {marker}"),
        Payload(builtins.exec, f"open({str(marker)!r}, 'w')"),
        Payload(builtins.open, str(marker), "w"),
        Payload(Path.touch, marker),
        Payload(torch.save, 1, str(marker)),
        Payload(getattr, "", "join"),
    ]


def strange_values() -> list[Any]:
    """Of every kind that may stand in a checkpoint, among them tensors that are far larger than the file."""
    deep: list = []
    for _ in range(300):
        deep = [deep]
    one = torch.ones(1)
    return [
        None, True, -1, 0, 8, 9, 1 << 31, 1 << 70, -(1 << 62), 0.0, float("nan"), float("inf"), 1e308, "", "prox", "{'depth': 8}",
        "{" * 300, "line\nbreak", "\ud800x", b"bytes", [], {}, (), [1, [2]], {"a": {}}, {1: 2}, {(1, 2): 3}, deep, set(), 3j,
        one, torch.tensor(7), torch.zeros(0), torch.tensor(float("nan")), torch.zeros(16, dtype=torch.int64), torch.ones(3) > 0,
        one.expand(1 << 40), one.expand(1 << 20, 1 << 20), torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64),
        torch.empty(1 << 40, device="meta"), torch.nn.Parameter(one), torch.Size([1 << 40]), torch.float64, torch.device("cuda", 3),
        torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), torch.zeros(2, dtype=torch.float8_e4m3fn),
        {"depth": 1202}, {"depth": 9}, {"depth": 8, "num_classes": 1 << 40}, {"num_classes": 1 << 31}, {"hidden": 1 << 20},
        ["lazy"], "lstm", "sample_text", "cifar10", 1e400, [float("nan")] * 4,
    ]  # fmt: skip


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested dicts, lists and tuples."""
    yield path
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list | tuple) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def changed(content: Any, path: tuple, change: Callable[[Any], Any]) -> Any:
    """A copy in which one place holds something else."""
    if not path:
        return change(content)
    key, *rest = path
    inner = changed(content[key], tuple(rest), change)
    if isinstance(content, dict):
        return {**content, key: inner}
    return type(content)([inner if place == key else value for place, value in enumerate(content)])


def drawn_place(content: Any, chance: random.Random) -> tuple:
    """A place at any depth, the shallow ones as often as the many deep ones."""
    found = list(places(content))
    depth = chance.choice(sorted({len(path) for path in found} - {0}))
    return chance.choice([path for path in found if len(path) == depth])


def without_a_key(value: Any) -> Any:
    return dict(list(value.items())[1:]) if isinstance(value, dict) else None


def hostile(content: dict[str, Any], marker: Path, chance: random.Random) -> bytes:
    """A checkpoint in which something is of another kind, or runs code, or whose pickle's bytes are changed."""
    for _ in range(chance.choice([1, 1, 2])):
        kind = chance.random()
        if kind < 0.15:
            value = chance.choice(payloads(marker))
        elif kind < 0.25:
            value = without_a_key
        else:
            value = chance.choice(strange_values())
        content = changed(content, drawn_place(content, chance), value if callable(value) else lambda old, value=value: value)
        if not isinstance(content, dict):
            break
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=chance.random() < 0.8)
    if chance.random() < 0.7 or not zipfile.is_zipfile(buffer):
        return buffer.getvalue()
    return repacked(buffer.getvalue(), lambda pickled: with_other_bytes(pickled, chance))


def repacked(archive: bytes, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint's archive with other bytes for its pickle, and the checksums of those."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return buffer.getvalue()


def with_other_bytes(pickled: bytes, chance: random.Random) -> bytes:
    found = bytearray(pickled)
    for _ in range(chance.choice([1, 1, 3])):
        place = chance.randrange(len(found))
        new = chance.choice([bytes([chance.randrange(256)]), b"c__builtin__\neval\n", b"\x8a\x09" + b"\xff" * 9, b"R.", b"h\x00"])
        found[place : place + chance.choice([0, 1, len(new)])] = new
    return bytes(found)


def hostile_packed(content: dict[str, Any], chance: random.Random) -> bytes:
    """A packed network whose facts, mode or tensors are others."""
    facts = {name: content[name] for name in ("model", "config", "dataset", "holdout", "input_size", "precision", "epoch")}
    plain = [value for value in strange_values() if isinstance(value, str | int | float | list | dict | None)]
    for _ in range(chance.choice([1, 1, 2])):
        value = chance.choice(plain)
        facts = changed(facts, (chance.choice(sorted(facts)),), lambda old, value=value: value)
    state = dict(content["state_dict"])
    if chance.random() < 0.5:
        name = chance.choice(sorted(state))
        state[name] = chance.choice([torch.ones(1), torch.full_like(state[name], 3), torch.zeros(0), state[name][None]])
    signed = [name for name, value in state.items() if value.dim() == 4 and name != "conv1.weight"]
    state |= {name: quantize.binarize(state[name]) for name in signed}
    try:
        return packing.pack(state, signed, chance.choice(["lazy", "prox", "prox", "", "full", "lazy,prox"]), facts)
    except quantize.PackedError:
        return packing.pack(state, signed, "prox", {"epoch": 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    """A folder with a run that was interrupted before its first step; no network is used in this module from there on."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        args = {"patch": patch, "sets": None}

        def load_once(*given: Any) -> Any:
            args["sets"] = args["sets"] or evaluation_load(*given)
            return args["sets"]

        evaluation_load = evaluation.load_data
        patch.setattr(evaluation, "load_data", load_once)
        patch.setattr(main_binary_reg, "load_data", load_once)
        patch.setattr(main_binary_reg.computing, "keep_freed_memory", lambda: None)
        patch.setattr(main_binary_reg, "train_epoch", stopping(loops.Interrupted(signal.SIGTERM)))
        assert main_binary_reg.main([*TRAIN, "--results_dir", str(folder), "--save", "run"]) == 128 + signal.SIGTERM
        patch.setattr(main_binary_reg, "train_epoch", stopping(Reached()))
        patch.setattr(loops, "validate", stopping(Reached()))
        yield folder / "run"


def stopping(error: Exception) -> Callable:
    def stop(*args: object, **more: object) -> None:
        raise error

    return stop


def status_and_words(argv: list[str]) -> tuple[int, str]:
    """Of a command line up to where the network would be used."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main_binary_reg.main(argv)
        except Reached:
            status = 0
        except SystemExit as end:
            status = end.code
    return status, said.getvalue()


@contextlib.contextmanager
def little_memory(most: int) -> Iterator[None]:
    """A context in which this process takes at most so many bytes more than it had."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    yield
    assert peak() - before < most


def peak() -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("use", ["--resume", "--evaluate", "continued", "packed --resume", "packed --evaluate"])
def test_hostile_files(run, tmp_path, use):
    """Files that anybody may have made, with checksums that are right: used, or refused in one line, and no code in them is run."""
    chance, marker, refused = random.Random(use), tmp_path / "code-was-run", 0
    good = checkpoints.read(run / checkpoints.LATEST)
    results = ["--results_dir", str(tmp_path)]
    rounds = EXAMPLES // 10
    with little_memory(1 << 30):
        for _ in range(rounds):
            packed = use.startswith("packed")
            path = tmp_path / ("hostile.safetensors" if packed else "hostile.pth.tar")
            content = hostile_packed(good, chance) if packed else hostile(good, marker, chance)
            if use == "continued":
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
                shutil.copytree(run, tmp_path / "run")
                path, argv = tmp_path / "run" / checkpoints.LATEST, [*TRAIN, *results, "--save", "run"]
            elif use.endswith("--resume"):
                argv = [*TRAIN, *results, "--save", "new", "--overwrite", "--resume", str(path)]
            else:
                argv = ["--evaluate", str(path), "--device", "cpu"]
            path.write_bytes(content)
            status, said = status_and_words(argv)
            assert status in (0, 2), said
            if status == 2:
                refused += 1
                assert said.startswith("main_binary_reg.py: error: "), said
                assert said.count("\n") == 1, said
                assert len(said) < 2000
            assert not marker.exists()
    assert refused > rounds // 4


def bomb(path: Path, kind: str) -> None:
    """A small file that asks for 4 GiB or more."""
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(1 << 20)}}, buffer)
    if kind == "compressed":
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                if not name.endswith("/data/0"):
                    new.writestr(name, old.read(name).replace((1 << 20).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
                    continue
                with new.open(name, "w") as stream:
                    for _ in range(1 << 8):
                        stream.write(bytes(1 << 22))
    elif kind == "a storage that is not there":
        path.write_bytes(repacked(buffer.getvalue(), lambda pickled: pickled.replace(b"J\x00\x00\x10\x00", b"J\xff\xff\xff\x7f")))
    elif kind == "one entry many times":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", bytes(1 << 20))
            archive.filelist += archive.filelist * 5000
            archive._didModify = True
    else:  # the older form, whose storages are not in an archive
        torch.save({"state_dict": {"w": torch.zeros(1 << 20)}}, buffer, _use_new_zipfile_serialization=False)
        path.write_bytes(pickle.dumps(torch.serialization.MAGIC_NUMBER, 2) + pickle.dumps(1001, 2) + b"\x80\x02X\xff\xff\xff\xff")


@pytest.mark.parametrize("kind", ["compressed", "a storage that is not there", "one entry many times", "an older form"])
def test_what_a_small_file_claims_is_not_made(kind, tmp_path):
    path = tmp_path / "bomb.pth.tar"
    bomb(path, kind)
    with little_memory(256 << 20), pytest.raises(UsageError) as caught:
        checkpoints.read(path)
    assert "\n" not in str(caught.value)


def test_strange_texts(tmp_path):
    """Parts with flipped bits, cuts, bytes of other encodings and words of any length: read, or refused in one line."""
    chance, refused = random.Random(0), []
    good = {part: ("a b c d e f g <unk>\n" * 20).encode() for part in ("train", "valid", "test")}
    pieces = [
        b"\0",
        b"\xff\xfe",
        b"\r",
        b"\xe2\x80\xa8",
        b"\xed\xa0\x80",
        b"<eos>",
        b"\n\n\n",
        b" " * 3000,
        b"w" * 100_000,
        b"\xc2\xa0",
    ]
    for _ in range(EXAMPLES // 10):
        texts = {part: bytearray(content) for part, content in good.items()}
        for _ in range(chance.choice([1, 1, 4])):
            content = texts[chance.choice(sorted(texts))]
            kind, place = chance.randrange(4), chance.randrange(len(content) or 1)
            if kind == 0:
                del content[place:]
            elif kind == 1 and content:
                content[place] ^= 1 << chance.randrange(8)
            elif kind == 2:
                content[place:place] = chance.choice(pieces)
            else:
                content[place:place] = chance.randbytes(chance.choice([1, 30]))
        for part, content in texts.items():
            (tmp_path / f"{part}.txt").write_bytes(content)
        try:
            found = read_text("text", tmp_path)
        except UsageError as error:
            refused.append(str(error))
        else:
            for tokens in (found.train, found.validation, found.test):
                assert int(tokens.min()) >= 0
                assert int(tokens.max()) < len(found.words)
    assert len(refused) > EXAMPLES // 40
    assert all(line.isprintable() and len(line) < 1000 for line in refused), max(refused, key=len)
