"""Packed networks: every tensor comes back bit for bit, the page on the format is true, and bad files are refused in one line."""

import json
import os
import random
import re
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import models
import quantize
from quantize import codes, packing

sys.path.insert(0, str(ROOT / "scripts"))
import read_packed

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
    w = levels[torch.randint(0, values, shape, generator=generator)]
    if shape and draw(st.booleans()):
        w = w * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    return w.to(draw(st.sampled_from(FLOATS)))


@given(w=tensors_of_few_values())
def test_a_tensor_of_few_values_comes_back_bit_for_bit(w):
    content = packing.pack({"w": w, "a.w": w}, ["w"], "prox_alt")
    found = packing.unpack(content).state_dict()
    assert all(same_bits(found[name], w) for name in ("w", "a.w"))


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
    "holdout": 0,
    "input_size": None,
    "precision": "auto",
    "projection_mode": "prox",
    "hard_quantized": True,
    "best_prec1": 90.65,
}


@pytest.mark.parametrize(("mode_name", "most"), [("prox", 60_000), ("prox_ternary", 84_000)])
def test_the_sizes_of_the_page(mode_name, most, tmp_path):
    torch.manual_seed(0)
    model, mode = models.resnet(depth=20), quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    quantize.save_packed(tmp_path / "network", model, optimizer, FACTS | {"projection_mode": mode_name})
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
    optimizer.freeze()
    with torch.no_grad():
        model.weight[0, 0] = 0.5
        model.weight[1] = torch.tensor([1.0, -1.0, 1.0])
    with pytest.raises(quantize.PackedError, match=r"'weight': it holds 3 in the tensor where at most 2 .*\(mode prox\)"):
        quantize.save_packed(tmp_path / "network", model, optimizer)
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
    assert re.search(r"^(\{.*\})$", PAGE, re.MULTILINE)[1] == table_of(content)


def header_of(content: bytes) -> dict:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def table_of(content: bytes) -> str:
    return header_of(content)["__metadata__"]["proxquant"]


def made(header: dict | str, data: bytes) -> bytes:
    """A file of a header and data, with a checksum that is right where there is one."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    content = bytearray(len(text).to_bytes(8, "little") + text + data)
    if isinstance(header, dict) and isinstance(header.get("crc32"), dict):
        begin = 8 + len(text) + header["crc32"]["data_offsets"][0]
        content[begin : begin + 4] = bytes(4)
        content[begin : begin + 4] = zlib.crc32(content).to_bytes(4, "little")
    return bytes(content)


GOOD = packing.pack(EXAMPLE | {"on": torch.tensor([True, False])}, ["fc.weight"], "prox_ternary")
GOOD_DATA = GOOD[8 + int.from_bytes(GOOD[:8], "little") :]


def with_table(change) -> bytes:
    """The good file with its table changed in place by ``change(table)``, or replaced by what that returns."""
    header = header_of(GOOD)
    table = json.loads(table_of(GOOD))
    header["__metadata__"]["proxquant"] = json.dumps(change(table) or table)
    return made(header, GOOD_DATA)


def with_header(change) -> bytes:
    header = header_of(GOOD)
    return made(change(header) or header, GOOD_DATA)


def with_data(place: int, value: int) -> bytes:
    data = bytearray(GOOD_DATA)
    data[place] = value
    return made(header_of(GOOD), bytes(data))


def member(*changed) -> bytes:
    return with_table(lambda table: table["layers"][0][1].__setitem__(0, list(changed)))


def float32_at(place: int, value: float) -> bytes:
    data = bytearray(GOOD_DATA)
    data[place : place + 4] = np.float32(value).tobytes()
    return made(header_of(GOOD), bytes(data))


def many(count: int, shape: list[int]) -> bytes:
    names = [str(index) for index in range(count)]
    return with_table(lambda table: table["layers"].append([names, [["w", "float32", shape]]]))


HOSTILE = {
    "a length beyond the file": ((1 << 62).to_bytes(8, "little") + GOOD[8:], "truncated"),
    "a header of 100 MB": ((100 << 20).to_bytes(8, "little") + GOOD[8:], "truncated"),
    "no JSON": (made("}{", GOOD_DATA), "header"),
    "no text": (made("", b"").replace(b"", b"\xff" * 40, 1), "truncated"),
    "deep JSON": (made("[" * 100_000 + "]" * 100_000, b""), "header"),
    "a number of 10,000 digits": (made('{"a":' + "9" * 10_000 + "}", b""), "header"),
    "a list": (made("[]", b"  "), "no JSON object"),
    "another safetensors file": (safetensors.torch.save({"w": torch.ones(3)}), "no packed network"),
    "a key twice": (made('{"codes":1,"codes":2}', GOOD_DATA), "twice"),
    "an unknown array": (with_header(lambda h: h.__setitem__("wombat", h["float32"])), "wombat"),
    "overlapping arrays": (with_header(lambda h: h["codes"].__setitem__("data_offsets", [18, 20])), "overlap"),
    "offsets beyond the file": (with_header(lambda h: h["codes"].__setitem__("data_offsets", [10**9, 10**9 + 2])), "overlap"),
    "offsets that descend": (with_header(lambda h: h["codes"].__setitem__("data_offsets", [22, 20])), "bytes"),
    "negative offsets": (with_header(lambda h: h["codes"].__setitem__("data_offsets", [-2, 0])), "'codes' is described"),
    "a shape that overflows": (with_header(lambda h: h["codes"].__setitem__("shape", [2**64 + 2])), "'codes' is described"),
    "another type": (with_header(lambda h: h["codes"].__setitem__("dtype", "I8")), "'codes' is described"),
    "a shape of two": (with_header(lambda h: h["codes"].__setitem__("shape", [1, 2])), "'codes' is described"),
    "no checksum": (with_header(lambda h: {name: h[name] for name in h if name != "crc32"}), "end with the file"),
    "a table of no JSON": (with_header(lambda h: h["__metadata__"].__setitem__("proxquant", "{")), "table"),
    "a table that is a list": (with_header(lambda h: h["__metadata__"].__setitem__("proxquant", "[]")), "table"),
    "another version": (with_table(lambda t: t.__setitem__("version", 2)), "version '2'.*reads version 1"),
    "version true": (with_table(lambda t: t.__setitem__("version", True)), "version 'True'"),
    "no facts": (with_table(lambda t: t.__setitem__("facts", 3)), "facts"),
    "another order of bits": (with_table(lambda t: t.__setitem__("bit_order", "highest first")), "order of bits"),
    "NaN in the table": (with_table(lambda t: t.__setitem__("facts", {"a": float("nan")})), "NaN"),
    "no layers": (with_table(lambda t: t.__setitem__("layers", {})), "no layers"),
    "layers of one": (with_table(lambda t: t.__setitem__("layers", [[["fc"]]])), "no layers"),
    "a layer without a name": (with_table(lambda t: t["layers"][0].__setitem__(0, [3])), "no text"),
    "a tensor twice": (with_table(lambda t: t["layers"][0].__setitem__(0, ["fc", "fc"])), "twice"),
    "a tensor left out": (with_table(lambda t: t.__setitem__("layers", t["layers"][:-1])), "'bool'"),
    "a million tensors": (many(1_000_000, [0]), "at most|1000002 tensors"),
    "200,000 tensors": (many(200_000, [0]), "200003 tensors"),
    "a product of layers and tensors": (
        with_table(lambda t: t["layers"].append([[str(i) for i in range(3000)], [[str(i), "int8", [0]] for i in range(3000)]])),
        "9000003 tensors",
    ),
    "names that multiply": (
        with_table(lambda t: t["layers"].append([["a" * 50_000], [[str(i), "int8", [0]] for i in range(3000)]])),
        "tensors in a file",
    ),
    "a shape whose product overflows": (member("weight", "float32", [2**32, 2**32, 6]), "no tensor"),
    "a shape far beyond the data": (member("weight", "float32", [2**30, 6]), "takes 6442450946 of the 5"),
    "an empty shape of huge sides": (member("weight", "float32", [0, 2**40, 2**40]), "no tensor"),
    "a thousand dimensions": (member("weight", "float32", [1] * 1000), "no tensor"),
    "a negative side": (member("weight", "float32", [-2, -3], "base3", "tensor", 3), "no tensor"),
    "a side that is true": (member("weight", "float32", [True, 6], "base3", "tensor", 3), "no tensor"),
    "an unknown type": (member("weight", "float8", [2, 3], "base3", "tensor", 3), "no tensor"),
    "a coded integer": (member("weight", "int64", [2, 3], "base3", "tensor", 3), "no tensor"),
    "an unknown coding": (member("weight", "float32", [2, 3], "base4", "tensor", 3), "no tensor"),
    "a coding that is a list": (member("weight", "float32", [2, 3], [], "tensor", 3), "no tensor"),
    "unknown groups": (member("weight", "float32", [2, 3], "base3", "column", 3), "no tensor"),
    "levels that do not fit the coding": (member("weight", "float32", [2, 3], "base3", "tensor", 4), "no tensor"),
    "too few levels for the coding": (member("weight", "float32", [2, 3], "bits2", "tensor", 2), "no tensor"),
    "levels for signs": (member("weight", "float32", [2, 3], "sign", "tensor", 3), "no tensor"),
    "rows of a vector": (member("weight", "float32", [6], "base3", "row", 3), "no tensor"),
    "levels by row that are not there": (member("weight", "float32", [2, 3], "base3", "row", 3), "takes 8 of the 5"),
    "fewer codes than there are": (
        member("weight", "float32", [1, 3], "base3", "tensor", 3),
        "takes 1 of the 2 entries of 'codes'",
    ),
    "levels that descend": (float32_at(0, 0.25), "'fc.weight': its levels"),
    "a level that is no number": (float32_at(4, float("nan")), "'fc.weight': its levels"),
    "an infinite level": (float32_at(8, float("inf")), "'fc.weight': its levels"),
    "a byte beyond five digits": (with_data(20, 243), "'fc.weight': its codes"),
    "more codes than weights": (with_data(21, 3), "'fc.weight': its codes"),
    "a bool of 2": (with_data(26, 2), "an entry of 'bool' is"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line_and_little_memory(name, tmp_path, monkeypatch):
    """Before the library reads them or a tensor is made, unless the fault is in the data, which are as large as the file."""
    content, words = HOSTILE[name]
    load, loaded = safetensors.torch.load, []
    monkeypatch.setattr(safetensors.torch, "load", lambda content: loaded.append(True) or load(content))
    (tmp_path / "hostile").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(quantize.PackedError, match=words) as caught:
        quantize.load_packed(tmp_path / "hostile")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert bool(loaded) == any(fault in words for fault in ("its levels", "its codes", "an entry of"))
    assert peak < 40 * len(content) + (8 << 20)


def test_the_good_file_of_the_hostile_ones_is_read():
    for content in (GOOD, with_table(lambda table: None), with_header(lambda header: None), made(header_of(GOOD), GOOD_DATA)):
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
    texts = ["[]", "{}", "-1", "1e99", "null", '"sign"', '"row"', "4294967296", '"', ",", "\\ud800", "[[", "0"]
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
