"""Weights in blocks and pieces: whatever the arrangement, each tensor is treated as if it were alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantize
from quantize import blocks, groups

ALL = [quantize.mode(name) for name in quantize.MODES if name != "stoch_bin"]
ALL += [
    quantize.mode("prox_alt", bits=2, by_row=True),
    quantize.mode("lazy_alt", "uniform", by_row=True),
    quantize.mode("parq", "ternary"),
]


def alone(mode: quantize.ProjectionMode, w: torch.Tensor, strength: float) -> torch.Tensor:
    """The pulled weights of one tensor by the functions of one tensor."""
    quantizer = mode.quantizer
    by_row = quantizer.by_row
    x = groups.Rows(w.reshape(len(w), -1)) if by_row else groups.OneTensor([w])
    given = torch.tensor([[1.0, -1.0]], dtype=w.dtype) if quantizer.given else None
    (found,) = mode.pull.pull_(x, quantizer, strength, given)
    return found.view(w.shape)


@pytest.fixture(params=["side by side", "in pieces"])
def arrangement(request, monkeypatch):
    if request.param == "in pieces":  # every tensor is large, and a piece holds few weights
        monkeypatch.setitem(blocks.SMALL, "cpu", 0)
        monkeypatch.setitem(blocks.PIECE, "cpu", 7)
    else:
        monkeypatch.setitem(blocks.SIDE_BY_SIDE, "cpu", 300)


@pytest.mark.parametrize("mode", ALL, ids=[f"{m.name} {m.quantizer.name} {m.quantizer.bits}{m.quantizer.by_row}" for m in ALL])
def test_each_tensor_as_if_it_were_alone(arrangement, mode):
    random = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (40,), (2, 3, 3, 3), (1, 1), (30, 9), (256,), (257,), (4, 128)]
    parameters = [nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64) * 0.5) for shape in shapes]
    parameters.append(nn.Parameter(torch.randn(4, 3, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last) * 0.5))
    parameters.append(nn.Parameter(torch.randn(6, 10, dtype=torch.float64)[:, ::2] * 0.5))  # with gaps in memory
    parameters.append(nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t() * 0.5))  # rows that are columns in memory
    parameters.append(nn.Parameter(torch.randn(6, 4, dtype=torch.float32) * 0.5))
    named = [(str(number), parameter) for number, parameter in enumerate(parameters)]
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(parameters, lr=0.5), named, mode)
    optimizer.set_strength(0.6)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    strength = 0.6 * (0.5 if mode.schedule.scaled_by_lr else 1)
    for w, parameter in zip(before, parameters, strict=True):
        tolerance = 1e-6 if w.dtype == torch.float32 else 1e-12
        clipped = w.clamp(-1, 1) if mode.quantizer.clips else w
        expected = alone(mode, clipped if mode.lazy else w, strength)
        if mode.quantizer.clips and not mode.lazy:
            expected = expected.clamp(-1, 1)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=tolerance)
    for parameter, (name, quantized) in zip(parameters, optimizer.quantized().items(), strict=True):
        tolerance = 1e-6 if parameter.dtype == torch.float32 else 1e-12
        expected = mode.hard_quantize(optimizer.latent[name], optimizer.levels.get(name))
        torch.testing.assert_close(quantized, expected, rtol=0, atol=tolerance)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_side_by_side_is_one_by_one(sizes, seed):
    random = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    layout = groups.Layout(tensors)
    together = layout.read(tensors)
    for function in (torch.abs, lambda w: (w - 0.3).abs()):  # the second is not zero between the tensors
        for how in ("mean", "median", "max"):
            column = getattr(together, how)(function)
            alone = torch.stack([getattr(groups.OneTensor([w]), how)(function) for w in tensors]).double()
            torch.testing.assert_close(together.by_tensor(column).double(), alone, rtol=1e-13, atol=1e-15)
            assert column.shape == (together.pieces[0].shape[0], 1)


SIZES = st.sampled_from([0.0, 0.5, 1.0, 2.0, math.inf, math.nan])


@given(st.lists(st.lists(SIZES, min_size=5, max_size=5), min_size=1, max_size=4), st.integers(1, 5))
def test_the_median_by_sorting_is_the_lower_median(rows, length):
    """As it is taken on a GPU, where torch's would be refused with --deterministic."""
    matrix = torch.tensor(rows)[:, :length]
    assert torch.equal(groups._median_by_sorting(matrix).nan_to_num(-1), matrix.median(1, keepdim=True).values.nan_to_num(-1))


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40), st.integers(0, 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_median_of_many_pieces_is_that_of_all(dtype, values, repeated):
    w = torch.tensor(values * (repeated + 1), dtype=dtype)
    for function in (torch.abs, lambda v: v.abs() * 1e-40, lambda v: v.abs() * 1e30):
        found = groups.OneTensor(w.split(3)).median(function)
        assert torch.equal(found, function(w).median())


def test_side_by_side_keeps_the_memory_format():
    weight = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last).weight.detach()
    tensors = [weight, weight.transpose(0, 1)]
    layout = groups.Layout(tensors)
    views = layout.views(layout.read(tensors).pieces[0])
    assert views[0].stride() == weight.stride()
    assert torch.equal(views[1], weight.transpose(0, 1))


def test_the_median_of_many_pieces_is_where_they_are_whatever_the_default_device():
    w = torch.randn(10)
    with torch.device("meta"):
        found = groups.OneTensor(w.split(3)).median(torch.abs)
    assert torch.equal(found, w.abs().median())


@pytest.mark.parametrize(("mode_name", "copies"), [("prox", 0), ("lazy", 1), ("prox_ternary", 0), ("lazy_alt", 1)])
def test_no_copies_of_the_weights_but_the_latent_ones(mode_name, copies):
    """Counts what the wrapper keeps of a large tensor: tensors of at least half its size, among everything that it holds."""
    parameter = nn.Parameter(torch.randn(300, 1000))
    mode = quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([parameter], lr=0.1), [("w", parameter)], mode)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.set_strength(0.5)
    optimizer.step()
    seen, held, queue = set(), {}, [vars(optimizer)]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, torch.optim.SGD):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            if thing.numel() >= parameter.numel() // 2:
                held[thing.data_ptr()] = thing
        elif isinstance(thing, dict):
            queue += list(thing.values())
        elif isinstance(thing, (list, tuple)):
            queue += list(thing)
        elif hasattr(thing, "__dict__"):
            queue.append(vars(thing))
    assert len(set(held) - {parameter.data_ptr()}) == copies


def test_the_measurement_of_the_projection(capsys):
    from benchmark import projection

    table = projection.report_projection(torch.device("cpu"), 1, largest=1.0)
    (rows,) = table.values()
    assert set(rows) == set(projection.MODES)
    assert all(0 < row["least"] <= row["passes"] <= row["most"] for row in rows.values())
    assert "prox_ternary" in capsys.readouterr().out
