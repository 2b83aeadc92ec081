"""Packed networks: every tensor comes back bit for bit, the page on the format is true, and bad files are refused in one line."""

import copy
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import read_packed
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import models
import quantize
from quantize import codes, packing

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
PAGE = (ROOT / "docs" / "packed-format.md").read_text()
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}
EXAMPLE = {"fc.weight": torch.tensor([[0.5, -0.25, 0.0], [0.5, 0.5, -0.25]]), "fc.bias": torch.tensor([1.0, 2.0])}


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype in INTEGERS:
        left, right = (value.contiguous().flatten().view(INTEGERS[value.dtype]) for value in (left, right))
    return torch.equal(left, right)


@st.composite
def tensors_of_few_values(draw) -> torch.Tensor:
    """Of any shape and floating-point type, with 1 to 256 values in the tensor or in each row, -0.0 among them."""
    shape = draw(st.lists(st.integers(1, 7), max_size=4))
    values = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 65, 129, 256]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = torch.randn(values, generator=generator)
    levels[0] = draw(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40]))
    if draw(st.booleans()):  # symmetric, all but perhaps some zeros
        levels[values // 2 + values % 2 :] = -levels[: values // 2]
    w = levels[torch.randint(0, values, shape, generator=generator)]
    if shape and draw(st.booleans()):
        w = w * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return w.to(draw(st.sampled_from(FLOATS)))


@pytest.mark.parametrize("values", [2, 3, 5, 16, 200])
def test_the_default_device_is_not_asked(values):
    """A user's torch.set_default_device("cuda"); "meta" shows it anywhere."""
    w = torch.arange(4 * values).view(4, -1).remainder(values) * 0.5
    state = {"w": w, "signs": torch.ones(9), "b": torch.randn(3), "none": torch.ones(0), "flag": torch.tensor([True])}
    expected = packing.pack(state, ["w", "signs"], "prox_alt")
    with torch.device("meta"):
        content = packing.pack(state, ["w", "signs"], "prox_alt")
        found = packing.unpack(content).state_dict()
    assert content == expected
    assert all(same_bits(found[name], value) for name, value in state.items())


@given(w=tensors_of_few_values())
def test_a_tensor_of_few_values_comes_back_bit_for_bit(w):
    content = packing.pack({"w": w, "a.w": w}, ["w"], "prox_alt")
    found = packing.unpack(content).state_dict()
    assert all(same_bits(found[name], w) for name in ("w", "a.w"))
    arrays = safetensors.torch.load(content)  # the library finds the container in order
    length = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert [(name, array.shape, array.dtype) for name, array in arrays.items()] == [("tensors", (length,), torch.uint8)]


@given(w=tensors_of_few_values(), other=st.sampled_from([torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64]))
def test_the_numpy_reader_agrees(tmp_path_factory, w, other):
    path = tmp_path_factory.getbasetemp() / "one.safetensors"
    state = {"a.b.w": w, "a.b.rest": torch.arange(5).to(other), "": w[..., :0] if w.dim() else w}
    path.write_bytes(packing.pack(state, ["a.b.w", ""], "prox_alt"))
    found = read_packed.read(str(path))
    assert set(found) == set(state)
    for name, value in state.items():
        expected = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        assert found[name].dtype == expected.dtype
        assert np.array_equal(found[name], expected), name
        assert np.array_equal(np.signbit(found[name]), np.signbit(expected)), name


def test_the_numpy_reader_on_the_command_line(tmp_path):
    path = tmp_path / "network.safetensors"
    state = {f"layers.{number}.a.weight": torch.ones(number + 1) for number in range(2000)}
    path.write_bytes(packing.pack(state, [], "prox"))
    command = f"set -o pipefail; {sys.executable} {read_packed.__file__} {path}"
    listed = subprocess.run(["bash", "-c", f"{command} | head -1"], capture_output=True, text=True)
    assert listed.stdout.split() == ["layers.0.a.weight", "float32", "[1]"]
    assert listed.stderr == ""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, f"error: {path}: damaged, or no packed network\n")


WORDS = st.text(st.sampled_from([*"ab0|% \n/-,~é\u4e2d", "|", " "]), max_size=3)


@given(names=st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), unique=True, max_size=30), seed=st.integers(0, 99))
def test_any_names_come_back_with_their_tensors(tmp_path_factory, names, seed):
    """Of layers that are alike, of scalars that are the same number, and of letters that the table is made of."""
    path, chance = tmp_path_factory.getbasetemp() / "names.safetensors", random.Random(seed)
    state = {name: torch.tensor(chance.choice([[1.0, 2.0], [3.0, 4.0], 5, 5, 6, [7], [-0.0], [0.0]])) for name in names}
    path.write_bytes(
        packing.pack(state, [name for name in names if len(name) == 3 and state[name].is_floating_point()], "prox_alt")
    )
    found, read = quantize.load_packed(path), read_packed.read(str(path))
    assert set(found) == set(read) == set(state)
    assert all(same_bits(found[name], value) for name, value in state.items())
    assert all(
        np.array_equal(read[name], value.numpy()) and read[name].dtype == value.numpy().dtype for name, value in state.items()
    )
    assert len({value.data_ptr() for value in found.values()}) == len(found)  # one that is written to changes no other


def test_numbers_that_are_the_same_are_stored_once():
    state = {f"layer{place}.count": torch.tensor(7) for place in range(1000)}
    one = len(packing.pack({"layer0.count": torch.tensor(7)}, [], "prox"))
    assert len(packing.pack(state, [], "prox")) < one + 10_000


@pytest.mark.parametrize(("levels", "values", "stored"), [
    ([-0.5, 0.5], 2, 1),
    ([-0.5, 0.0, 0.5], 3, 1),
    ([-0.5, -0.0, 0.5], 3, 3),
    ([-0.5, 0.0, 0.25], 3, 3),
    ([-0.5, -0.25, 0.25, 0.5], 4, 2),
    ([-0.5, -0.0, 0.0, 0.5], 4, 2),
    ([-0.5, -0.25, 0.0, 0.25, 0.5], 5, 2),
    ([-3.0, -2.0, -1.0, 0.0, 1.0, 2.0], 7, 3),
    ([-3.0, -1.0, 1.0, 2.0], 4, 4),
])  # fmt: skip
def test_of_symmetric_levels_the_upper_half_is_stored(levels, values, stored):
    for w in (torch.tensor(levels).repeat(40), torch.tensor(levels).repeat(5, 40) * torch.tensor([[1.0], [2], [3], [4], [5]])):
        coded = codes.encode(w)
        assert coded.levels.shape == ((1 if w.dim() == 1 else 5), values)
        assert coded.stored_levels.shape[1] == stored
        assert same_bits(codes.decode(coded), w)


@pytest.mark.parametrize("coding", [coding for coding in codes.CODINGS if coding != "sign"])
def test_bits_a_weight(coding):
    """As many bytes as the page says, and by row only where that is shorter."""
    values = codes.CODINGS[coding]
    w = torch.arange(values).repeat(7)[: 7 * values - 1].float() / 3
    coded = codes.encode(w)
    bits = 8 / 5 if coding == "base3" else int(coding[4:])
    assert coded.coding == coding
    assert not coded.by_row
    assert len(coded.codes) == int(-(-len(w) * bits // 8)) == codes.packed_bytes(coding, len(w))
    rows = torch.stack([w * scale for scale in (1, 2.5, -3, 7)])
    assert codes.encode(rows.repeat(1, 300)).by_row
    assert codes.encode(rows.repeat(1, 300)).coding == coding
    if values < 256:
        with pytest.raises(ValueError, match=rf"{values + 1} .* at most {values}"):
            codes.encode(torch.arange(values + 1).float() / 3, most=values)


@pytest.mark.parametrize("mode_name", quantize.MODES)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_network_comes_back_bit_for_bit_in_every_mode(mode_name, frozen, tmp_path):
    torch.manual_seed(0)
    model, mode = models.resnet(depth=8), quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), mode.select(model), mode)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    if frozen:
        optimizer.freeze()
    with optimizer.hard_quantized():
        expected = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantize.save_packed(tmp_path / "network", model, optimizer)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    found = quantize.load_packed(tmp_path / "network")
    assert set(found) == set(expected)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert list(tmp_path.iterdir()) == [tmp_path / "network"]
    read = packing.unpack((tmp_path / "network").read_bytes())
    assert read.mode == mode_name
    assert {name for name, value in read.tensors.items() if isinstance(value, codes.Coded)} == set(optimizer.quantized())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_language_model_of_k_bits(bits, by_row, tmp_path):
    torch.manual_seed(0)
    model, mode = models.lstm(hidden=20, num_classes=50), quantize.mode("prox_alt", bits=bits, by_row=by_row)
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    quantize.save_packed(tmp_path / "network", model, optimizer)
    optimizer.freeze()
    packed = packing.unpack((tmp_path / "network").read_bytes())
    found, expected = packed.state_dict(), model.state_dict()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    coded = [value for value in packed.tensors.values() if isinstance(value, codes.Coded)]
    assert len(coded) == 4
    assert all(value.coding == f"bits{bits}" and value.by_row == by_row for value in coded)


def test_several_modes_in_one_network(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Linear(8, 40), torch.nn.Linear(40, 3))
    modes = [quantize.mode("prox"), quantize.mode("prox_alt", bits=3), quantize.mode("prox_ternary")]
    groups = [([(f"{place}.weight", model[place].weight)], mode) for place, mode in enumerate(modes)]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), groups)
    optimizer.freeze()
    quantize.save_packed(tmp_path / "network", model, optimizer)
    packed = packing.unpack((tmp_path / "network").read_bytes())
    assert packed.mode == "prox,prox_alt,prox_ternary"
    assert [packed.tensors[f"{place}.weight"].coding for place in range(3)] == ["sign", "bits3", "base3"]
    assert all(same_bits(packed.state_dict()[name], value) for name, value in model.state_dict().items())


FACTS = {
    "epoch": 300,
    "model": "resnet",
    "config": {"depth": 20, "num_classes": 10},
    "dataset": "cifar10",
    "precision": "bf16",
    "best_prec1": 90.65,
}


@pytest.mark.parametrize(("mode_name", "most"), [("prox", 60_000), ("prox_ternary", 81_920)])
def test_the_sizes_of_the_page(mode_name, most, tmp_path):
    torch.manual_seed(0)
    model, mode = models.resnet(depth=20), quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    quantize.save_packed(tmp_path / "network", model, optimizer, FACTS)
    size = (tmp_path / "network").stat().st_size
    assert size <= most
    row = next(line for line in PAGE.splitlines() if line.startswith("| ResNet-20"))
    assert f"| {size:,} |" in row
    assert f"| {sum(value.nbytes for value in model.state_dict().values()):,} |" in row


def test_a_weight_that_layers_share_is_coded_under_both_names(tmp_path):
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(8, 8), "two": torch.nn.Linear(8, 8)})
    model["two"].weight = model["one"].weight
    mode = quantize.MODES["prox"]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    quantize.save_packed(tmp_path / "network", model, optimizer)
    tensors = packing.unpack((tmp_path / "network").read_bytes()).tensors
    assert [tensors[name].coding for name in ("one.weight", "two.weight")] == ["sign", "sign"]


def test_what_cannot_be_packed_is_refused_by_name(tmp_path):
    model, mode = torch.nn.Linear(3, 2), quantize.MODES["prox"]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    live = copy.deepcopy(optimizer)
    optimizer.freeze()
    with torch.no_grad():
        model.weight[0, 0] = 0.5
        model.weight[1] = torch.tensor([1.0, -1.0, 1.0])
    with pytest.raises(quantize.PackedError, match=r"weight holds other values than -1 and \+1 after its freeze"):
        quantize.save_packed(tmp_path / "network", model, optimizer)
    with pytest.raises(quantize.PackedError, match=r"'weight': it holds 3 in the tensor where at most 2 .*\(mode prox\)"):
        packing.pack(model.state_dict(), ["weight"], "prox")
    with pytest.raises(quantize.PackedError, match="'weight' is not the parameter that the optimizer quantizes"):
        quantize.save_packed(tmp_path / "network", torch.nn.Linear(3, 2), live)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias[0] = float("nan")
    with pytest.raises(quantize.PackedError, match="'bias': it holds values that are not finite"):
        quantize.save_packed(tmp_path / "network", model, optimizer)
    model.weight.requires_grad_(True)
    renamed = quantize.ProjectedOptimizer(torch.optim.SGD([model.weight], lr=0.1), [("other", model.weight)], mode)
    with pytest.raises(quantize.PackedError, match="'other'"):
        quantize.save_packed(tmp_path / "network", model, renamed)
    for value, words in (
        (torch.full((3,), float("inf")), "finite"),
        (torch.randn(300), "more than 256"),
        (torch.ones(3).to_sparse(), "dense"),
        (torch.ones(3, dtype=torch.complex64), "complex64"),
        (3.0, "float"),
    ):
        with pytest.raises(quantize.PackedError, match=f"'layer.w': .*{words}"):
            packing.pack({"layer.w": value}, ["layer.w"], "prox_alt")
    with pytest.raises(quantize.PackedError, match="facts"):
        packing.pack({}, [], "prox", {"tensor": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_page():
    content = packing.pack(EXAMPLE, ["fc.weight"], "prox_ternary")
    stated = [bytes.fromhex(line) for line in re.findall(r"^((?:[0-9a-f]{2} +)+[0-9a-f]{2})", PAGE, re.MULTILINE)]
    assert f"has {len(content)} bytes" in PAGE
    assert stated[0] == content[:8]
    assert b"".join(stated[1:]) == content[8 + int.from_bytes(content[:8], "little") :]
    assert json.loads(re.search(r"^(\{.*\})$", PAGE, re.MULTILINE)[1]) == header_of(content)
    with pytest.raises(quantize.PackedError, match="version '1' of the packed format: this program reads version 2"):
        packing.unpack(made({"__metadata__": {"proxquant": '{"version":1}'}, "crc32": {}}, b""))


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def table_of(content: bytes) -> str:
    return header_of(content)["__metadata__"]["tensors"]


def made(header: dict | str, data: bytes) -> bytes:
    """A file of a header and the tensors' bytes, with the right checksum."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    content = len(text).to_bytes(8, "little") + text + data
    return content + zlib.crc32(content).to_bytes(4, "little")


GOOD = packing.pack(EXAMPLE | {"on": torch.tensor([True, False])}, ["fc.weight"], "prox_ternary")
GOOD_DATA = GOOD[8 + int.from_bytes(GOOD[:8], "little") : -4]
GOOD_LINES = ["F32 2 bias fc", "BOOL 2 on", "F32/3 2,3 weight fc"]


def with_header(change) -> bytes:
    """The good file with its header changed in place by ``change(header)``, or replaced by what that returns."""
    header = header_of(GOOD)
    return made(change(header) or header, GOOD_DATA)


def with_metadata(**changed) -> bytes:
    return with_header(lambda header: header["__metadata__"].update(changed))


def with_array(**changed) -> bytes:
    return with_header(lambda header: header["tensors"].update(changed))


def with_data(place: int, value: bytes) -> bytes:
    return made(header_of(GOOD), GOOD_DATA[:place] + value + GOOD_DATA[place + len(value) :])


def line(text: str) -> bytes:
    """The good file with another line for its coded tensor."""
    return with_metadata(tensors="\n".join([*GOOD_LINES[:2], text]))


def float32_at(place: int, value: float) -> bytes:
    return with_data(place, np.float32(value).tobytes())


def more(text: str) -> bytes:
    """The good file with another line."""
    return with_metadata(tensors="\n".join([*GOOD_LINES, text]))


NO_TENSORS = "describes no tensors"
HOSTILE = {
    "a length beyond the file": ((1 << 62).to_bytes(8, "little") + GOOD[8:], "truncated"),
    "a header of 100 MB": ((100 << 20).to_bytes(8, "little") + GOOD[8:], "truncated"),
    "a header of 5 MB that is there": (made(" " * (5 << 20), GOOD_DATA), "a header of 5242880 bytes"),
    "no JSON": (made("}{", GOOD_DATA), "header"),
    "no text": (b"\xff" * 40, "truncated"),
    "deep JSON": (made("[" * 100_000 + "]" * 100_000, b""), "header"),
    "a number of 10,000 digits": (made('{"a":' + "9" * 10_000 + "}", b""), "header"),
    "a list": (made("[]", b"  "), "no JSON object"),
    "another safetensors file": (safetensors.torch.save({"w": torch.ones(3)}), "no packed network"),
    "a key twice": (made('{"tensors":1,"tensors":2}', GOOD_DATA), "twice"),
    "an unknown array": (with_header(lambda h: h.__setitem__("wombat", h["tensors"])), "one array 'tensors'"),
    "no array": (with_header(lambda h: {"__metadata__": h["__metadata__"]}), "one array 'tensors'"),
    "offsets beyond the file": (with_array(data_offsets=[10**9, 10**9 + 30]), "one array 'tensors'"),
    "offsets that descend": (with_array(data_offsets=[22, 20]), "one array 'tensors'"),
    "negative offsets": (with_array(data_offsets=[-2, 28]), "one array 'tensors'"),
    "a shape that overflows": (with_array(shape=[2**64 + 2]), "one array 'tensors'"),
    "another type": (with_array(dtype="I8"), "one array 'tensors'"),
    "a shape of two": (with_array(shape=[1, 30]), "one array 'tensors'"),
    "no room for a checksum": (made(header_of(GOOD), b"")[:-2], "one array 'tensors'"),
    "no table": (with_metadata(tensors=3), "metadata lacks"),
    "another version": (with_metadata(proxquant="3"), "version '3'.*reads version 2"),
    "the version before": (with_metadata(proxquant='{"version":1,"mode":"prox"}'), "version '1'.*reads version 2"),
    "a version that is a number": (with_metadata(proxquant=2), "no packed network"),
    "facts that are no JSON": (with_metadata(facts="{"), "facts"),
    "facts that are a list": (with_metadata(facts="[]"), "facts"),
    "NaN in the facts": (with_metadata(facts='{"a":NaN}'), "NaN"),
    "another order of bits": (with_metadata(bit_order="highest first"), "order of bits"),
    "a tensor twice": (more("F32 0 bias fc"), "twice"),
    "a tensor twice in one line": (more("F32 0 a|a b"), "twice"),
    "a tensor twice by another spelling": (more("F32 0 bi%61s fc"), "twice"),
    "a tensor left out": (with_metadata(tensors="\n".join(GOOD_LINES[:2])), "takes 10 of the 24 bytes"),
    "a million tensors": (more("F32 0 " + "|".join(map(str, range(1_000_000)))), "a header of"),
    "200,000 tensors": (more("F32 0 " + "|".join(map(str, range(200_000)))), "tensors in a file"),
    "a product of layers and names": (more("F32 0 " + "|".join(map(str, range(3000))) + " a" * 3000), "tensors in a file"),
    "a pattern that stands for 2 to the 100": (more("F32 0 w " + ".".join(["0|1"] * 100)), "tensors in a file"),
    "names that multiply": (more("F32 0 " + "|".join(map(str, range(3000))) + " " + "a" * 50_000), "tensors in a file"),
    "a million times one number": (more("F32/once 1 w " + ".".join(["0|1|2|3|4|5|6|7|8|9"] * 6)), "tensors in a file"),
    "a large tensor that is there once": (more("F32/once 2 v|w"), NO_TENSORS),
    "a shape whose product overflows": (line("F32 4294967296,4294967296,6 weight fc"), NO_TENSORS),
    "a shape far beyond the data": (line("F32 1073741824,6 weight fc"), "takes 25769803786 of the 24 bytes"),
    "an empty shape of huge sides": (line("F32 0,1099511627776,1099511627776 weight fc"), NO_TENSORS),
    "a side of 10,000 digits": (line(f"F32 {'9' * 10_000} weight fc"), NO_TENSORS),
    "a thousand dimensions": (line(f"F32 {','.join('1' * 1000)} weight fc"), NO_TENSORS),
    "a negative side": (line("F32/3 -2,-3 weight fc"), NO_TENSORS),
    "a side of other digits": (line("F32/3 \u0662,3 weight fc"), NO_TENSORS),
    "no shape": (line("F32/3 weight"), NO_TENSORS),
    "an unknown type": (line("F8 2,3 weight fc"), NO_TENSORS),
    "a coded integer": (line("I64/3 2,3 weight fc"), NO_TENSORS),
    "an unknown coding": (line("F32/base4 2,3 weight fc"), NO_TENSORS),
    "unknown groups": (line("F32/3/column 2,3 weight fc"), NO_TENSORS),
    "no levels": (line("F32/0 2,3 weight fc"), NO_TENSORS),
    "more levels than a byte has": (line("F32/257 2,3 weight fc"), NO_TENSORS),
    "other levels than there are": (line("F32/4 2,3 weight fc"), "takes 28 of the 24 bytes"),
    "half of one level": (line("F32/1/upper 2,3 weight fc"), NO_TENSORS),
    "half of the signs": (line("F32/sign/upper 2,3 weight fc"), NO_TENSORS),
    "signs by row": (line("F32/sign/row 2,3 weight fc"), NO_TENSORS),
    "rows of a vector": (line("F32/3/row 6 weight fc"), NO_TENSORS),
    "no rows": (line("F32/3/row 0,3 weight fc"), NO_TENSORS),
    "levels by row that are not there": (line("F32/3/row 2,3 weight fc"), "takes 36 of the 24 bytes"),
    "fewer codes than there are": (line("F32/3 1,3 weight fc"), "takes 23 of the 24 bytes"),
    "levels that descend": (float32_at(10, 0.25), "'fc.weight': its levels"),
    "a level that is no number": (float32_at(14, float("nan")), "'fc.weight': its levels"),
    "an infinite level": (float32_at(18, float("inf")), "'fc.weight': its levels"),
    "a negative upper half": (
        made(
            header_of(packing.pack({"w": torch.tensor([0.5, -0.5, 0.25, -0.25])}, ["w"], "prox_alt")),
            np.float32([-0.5, 0.25]).tobytes() + b"\0",
        ),
        "'w': its levels",
    ),
    "a byte beyond five digits": (with_data(22, b"\xf3"), "'fc.weight': its codes"),
    "more codes than weights": (with_data(23, b"\x03"), "'fc.weight': its codes"),
    "a bool of 2": (with_data(8, b"\x02"), "'on': an entry is"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_little_memory(name, tmp_path):
    content, words = HOSTILE[name]
    (tmp_path / "hostile").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(quantize.PackedError, match=words) as caught:
        quantize.load_packed(tmp_path / "hostile")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert peak < 40 * len(content) + (8 << 20)


def test_the_good_file_of_the_hostile_ones_is_read():
    assert table_of(GOOD).split("\n") == GOOD_LINES
    for content in (GOOD, with_metadata(), with_array(), line(GOOD_LINES[2]), with_data(0, b""), more("F32 0 w")):
        assert torch.equal(packing.unpack(content).state_dict()["fc.weight"], EXAMPLE["fc.weight"])


def test_every_truncation_and_every_flipped_bit_of_a_small_file_is_refused():
    """Truncations at each byte; each bit of the header's length and of the data, and every seventh of the header."""
    damaged = [GOOD[:length] for length in range(len(GOOD))] + [GOOD + b"\0"]
    for place in range(len(GOOD)):
        for bit in range(8) if not 8 <= place < len(GOOD) - len(GOOD_DATA) else (place % 7,):
            damaged.append(GOOD[:place] + bytes([GOOD[place] ^ 1 << bit]) + GOOD[place + 1 :])
    for content in damaged:
        with pytest.raises(quantize.PackedError) as caught:
            packing.unpack(content)
        assert "\n" not in str(caught.value)


def test_damaged_files_with_the_right_checksum():
    """Flips, cuts and insertions that an attacker makes, who computes the checksum anew: refused in one line, or read."""
    chance, refused = random.Random(0), []
    texts = [
        "[]",
        "{}",
        "-1",
        "1e99",
        "/sign",
        "/row",
        "/upper",
        "/once",
        "4294967296",
        '"',
        ",",
        "\\ud800",
        "0",
        " ",
        "|",
        ".",
        "%",
        "\\n",
    ]
    for _ in range(EXAMPLES):
        header = json.dumps(header_of(GOOD))
        data = bytearray(GOOD_DATA)
        for _ in range(chance.choice([1, 1, 2, 4])):
            if chance.random() < 0.3:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            else:
                begin = chance.randrange(len(header))
                new = chance.choice(texts) if chance.random() < 0.7 else chr(chance.randrange(32, 127))
                header = header[:begin] + new + header[begin + chance.randrange(6) :]
        try:
            content = made(json.loads(header), bytes(data))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError):
            content = made(header, bytes(data))
        try:
            packing.unpack(content).state_dict()
        except quantize.PackedError as error:
            refused.append(str(error))
    assert len(refused) > EXAMPLES // 2
    assert all(line.isprintable() and len(line) < 500 for line in refused)
