"""Layers with packed weights: what they compute is what the float layers compute, to the last bit."""

import copy

import pytest
import torch
from benchmark import packed
from benchmark.contenders import Setting
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import models
import quantize

HALF_BYTE = torch.tensor([-2.0, -0.75, 0.5, 0.0, 1.25, 3.0, 4.5, 7.0])


def weight_of(shape: tuple[int, ...], values: int, by_row: bool, generator: torch.Generator) -> torch.Tensor:
    if values == 0:
        return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1
    w = HALF_BYTE[torch.randint(0, values, shape, generator=generator)]
    return w * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator) if by_row else w


@given(
    inputs=st.sampled_from([1, 2, 4]),
    outputs=st.sampled_from([1, 4, 6]),
    kernel=st.integers(1, 3),
    settings=st.fixed_dictionaries(
        {
            "stride": st.integers(1, 2),
            "dilation": st.integers(1, 2),
            "padding": st.integers(0, 2),
            "padding_mode": st.sampled_from(["zeros", "circular", "reflect"]),
            "bias": st.booleans(),
        }
    ),
    depthwise=st.booleans(),
    values=st.sampled_from([0, 1, 2, 3, 5, 8]),
    by_row=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_convolution(inputs, outputs, kernel, settings, depthwise, values, by_row, channels_last, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = inputs if depthwise and outputs % inputs == 0 else 1
    layer = nn.Conv2d(inputs, outputs, kernel, groups=groups, **settings)
    with torch.no_grad():
        layer.weight.copy_(weight_of(tuple(layer.weight.shape), values, by_row, generator))
    layer.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x = torch.randn(2, inputs, 9, 9, generator=generator)
    model = nn.Sequential(layer)
    expected = model(x)
    assert quantize.pack_layers(model, ["0.weight"]) == ["0.weight"]
    assert type(model[0]) is quantize.PackedConv2d
    assert model[0].weight.stride() == layer.weight.stride()
    assert torch.equal(model[0].weight, layer.weight)
    assert torch.equal(model(x), expected)


@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), values=st.integers(0, 8), by_row=st.booleans(), bias=st.booleans())
def test_a_linear_layer(shape, values, by_row, bias):
    generator = torch.Generator().manual_seed(values)
    layer = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        layer.weight.copy_(weight_of(shape, values, by_row, generator))
    model, x = nn.Sequential(layer), torch.randn(3, shape[1], generator=generator)
    expected = model(x)
    quantize.pack_layers(model, ["0.weight"])
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mode_name", quantize.MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_in_every_mode(mode_name, dtype, tmp_path):
    """Under autocast too; and its weights take a tenth of the memory or less."""
    torch.manual_seed(0)
    model, mode = models.resnet(depth=8).to(memory_format=torch.channels_last), quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.freeze()
    model.eval()
    quantize.save_packed(tmp_path / "network", model, optimizer)
    fresh = models.resnet(depth=8).to(memory_format=torch.channels_last).eval()
    names = quantize.load_packed_layers(tmp_path / "network", fresh)
    assert set(names) == set(optimizer.quantized())
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        assert torch.equal(fresh(x), model(x))
    held = {name: value for name, value in fresh.state_dict().items() if name.endswith((".codes", ".levels"))}
    assert sum(value.nbytes for value in held.values()) < sum(weight.nbytes for weight in optimizer.quantized().values()) / 10
    assert not set(names) & set(fresh.state_dict())


def test_the_measurement(monkeypatch, capsys):
    """Of bench.py, on a small network: it compares what both compute, and prints each figure of both."""
    monkeypatch.setattr(packed, "NETWORKS", {"small": (lambda: models.resnet(depth=8), (3, 32, 32), 2)})
    table = packed.report_packed(Setting(torch.device("cpu"), "fp32", images=1), 1)
    assert set(table) == {"small, prox", "small, prox_ternary"}
    row, said = table["small, prox"], capsys.readouterr().out
    assert row["memory packed"] < row["memory float"] / 10
    assert row["file packed"] < row["file float"] / 10
    assert f"{row['memory packed']:,}" in said
    assert said.count(" times\n") == 2 * 5


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.fill_(1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    quantize.pack_layers(model, ["0.weight", "2.weight"])
    assert model[0] is model[2]
    assert copy.deepcopy(model)(torch.ones(1, 4)).shape == (1, 4)


def test_what_is_not_quantized_is_refused_by_name_and_other_layers_stay():
    model = nn.ModuleDict({"plain": nn.Linear(300, 2), "lstm": nn.LSTM(2, 2)})
    with pytest.raises(ValueError, match=r"'plain\.weight': it holds more than 256"):
        quantize.pack_layers(model, ["plain.weight"])
    assert quantize.pack_layers(model, ["lstm.weight_hh_l0"]) == []


def test_a_model_with_a_layer_that_is_refused_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 300), nn.ReLU(), nn.Linear(300, 2))
    with torch.no_grad():
        model[0].weight.fill_(1)
    with pytest.raises(ValueError, match=r"'2\.weight'"):
        quantize.pack_layers(model, ["0.weight", "2.weight"])
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
