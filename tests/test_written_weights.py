"""Weights that others write into the model of a lazy mode: what of them becomes latent, before and after a state is loaded."""

import copy

import pytest
import torch
from test_step import backward, network, weights
from test_torch_habits import LAZY, MODES, started, steps
from torch import nn
from torch.optim.swa_utils import AveragedModel

import quantize
from quantize.modes import PROXQUANT, ProjectionMode
from quantize.pulls import Hard, Soft
from quantize.quantizers import Binary

FIXED = [name for name in LAZY if quantize.MODES[name].shown.at_ends]  # each weight is quantized by itself
TAKEN = [name for name in LAZY if not quantize.MODES[name].shown.at_ends and quantize.MODES[name].drawn is None]


@pytest.mark.parametrize("mode_name", LAZY)
def test_the_best_weights_restored_after_a_continuation_are_what_is_frozen(mode_name):
    """Almost all of them agree with what the loaded state shows."""
    model, optimizer = started(mode_name)
    best = weights(model)
    steps(model, optimizer, 3, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = started(mode_name, count=0)
    other.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    other.load_state_dict(best)
    differing = [name for name in optimizer.latent if not torch.equal(best[name], saved[0][name])]
    assert differing
    mode = quantize.MODES[mode_name]
    shows_quantized = isinstance(mode.pull, Hard) and mode.drawn is None
    expected = {name: best[name] if shows_quantized else mode.hard_quantize(best[name]) for name in differing}
    for name, value in continued.quantized().items():
        if name in differing:
            assert torch.equal(value, expected[name])
    continued.freeze()
    for name in differing:
        assert torch.equal(other.get_parameter(name).detach(), expected[name])


@pytest.mark.parametrize("mode_name", FIXED)
def test_a_network_of_signs_of_others_is_taken_over_after_a_state(mode_name):
    """By chance about half of its signs are those of the state."""
    model, optimizer = started(mode_name)
    saved = copy.deepcopy(optimizer.state_dict())
    other, continued = started(mode_name, count=0)
    continued.load_state_dict(saved)
    signs = {name: value.sign() if value.dim() > 1 else value for name, value in weights(model).items()}
    for name in continued.latent:
        signs[name] = signs[name].flatten().roll(1).view(signs[name].shape)
    other.load_state_dict(signs)
    for name, value in continued.quantized().items():
        assert torch.equal(value, signs[name]), name


@pytest.mark.parametrize("mode_name", FIXED + TAKEN)
def test_an_entry_that_is_written_leaves_the_others_their_latent_weights(mode_name):
    model, optimizer = started(mode_name)
    for name, before in [(name, weight.clone()) for name, weight in optimizer.latent.items()]:
        parameter = model.get_parameter(name)
        with torch.no_grad():
            parameter.view(-1)[3] = 0.375
        expected = before.clone()
        expected.view(-1)[3] = 0.375
        assert torch.equal(optimizer.latent[name], expected)
        optimizer.set_strength(0.4)
        assert torch.equal(optimizer.latent[name], expected)


def test_training_under_a_mask_is_that_of_the_weights_that_remain():
    """BinaryConnect with pruning: entries that are zeroed after each step stay out, and the rest trains as it would."""
    model, optimizer = started("lazy", count=0)
    optimizer.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer.set_strength(1.0)
    name, latent = next(iter(optimizer.latent.items()))
    parameter, latent = model.get_parameter(name), latent.clone()
    mask = torch.arange(parameter.numel()).remainder(10).eq(0).view(parameter.shape)  # a tenth is kept
    for step in range(6):
        with torch.no_grad():
            parameter.mul_(mask)
        optimizer.zero_grad()
        backward(model, step)
        latent = (torch.where(mask, latent, 0.0) - 0.05 * parameter.grad).clamp(-1, 1)
        optimizer.step()
        torch.testing.assert_close(optimizer.latent[name][mask], latent[mask], rtol=1e-12, atol=1e-12)
        assert torch.equal(parameter.detach(), torch.where(latent >= 0, 1.0, -1.0))


@pytest.mark.parametrize("mode_name", TAKEN)
def test_values_of_other_levels_are_taken_whole(mode_name):
    """Zeros are among both, and are no sign that the rest was left alone."""
    model, optimizer = started(mode_name)
    name = next(iter(optimizer.latent))
    shown = model.get_parameter(name).detach().clone()
    with torch.no_grad():
        model.get_parameter(name).copy_(2 * shown)
    assert torch.equal(optimizer.latent[name], 2 * shown)


@pytest.mark.parametrize("follow", ["freeze", "quantized", "hard_quantized", "state", "copy", "cast", "strength"])
def test_quantized_weights_bring_their_learned_levels(follow):
    """The best network restored at the end of a training: what is frozen is what was loaded, not its codes with later levels."""
    model, optimizer = started("ttq")
    best = weights(model)
    steps(model, optimizer, 3, 8)
    levels = {name: torch.stack([best[name].max(), best[name].min()]) for name in optimizer.levels}
    assert not any(torch.equal(optimizer.levels[name], expected) for name, expected in levels.items())
    model.load_state_dict(best)
    if follow == "state":
        saved = copy.deepcopy(optimizer.state_dict())
        model, optimizer = started("ttq", count=0)
        optimizer.load_state_dict(saved)
    elif follow == "copy":
        model, optimizer = copy.deepcopy((model, optimizer))
    elif follow == "cast":
        model.float()
        best = {name: weight.float() for name, weight in best.items()}
    elif follow == "strength":
        optimizer.set_strength(0.5)
    for name, expected in levels.items():
        torch.testing.assert_close(optimizer.levels[name], expected.to(best[name].dtype), rtol=0, atol=0)
    if follow == "quantized":
        shown = optimizer.quantized()
    elif follow == "hard_quantized":
        with optimizer.hard_quantized():
            shown = weights(model)
    else:
        optimizer.freeze()
        shown = weights(model)
    for name, found in optimizer.levels.items():
        assert torch.equal(shown[name], best[name]), name
        torch.testing.assert_close(found, levels[name].to(found.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("written", ["full precision", "pruned", "one value"])
def test_other_weights_leave_the_learned_levels_alone(written):
    model, optimizer = started("ttq")
    name, before = next(iter(optimizer.levels.items()))
    before, parameter = before.clone(), model.get_parameter(name)
    with torch.no_grad():
        if written == "full precision":
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        elif written == "pruned":
            parameter[0] = 0
        else:
            parameter.fill_(0.25)
    assert torch.equal(optimizer.levels[name], before)
    optimizer.set_strength(0.0)
    assert torch.equal(optimizer.levels[name], before)


def test_a_network_with_learned_levels_that_is_wrapped_again_keeps_them():
    model, optimizer = started("ttq")
    levels = {name: level.clone() for name, level in optimizer.levels.items()}
    optimizer.freeze()
    shown = weights(model)
    other = network()
    other.load_state_dict(shown)
    again = quantize.ProjectedOptimizer(
        torch.optim.Adam(other.parameters()), quantize.mode("ttq").select(other), quantize.mode("ttq")
    )
    torch.testing.assert_close(again.levels, levels, rtol=0, atol=0)
    again.freeze()
    torch.testing.assert_close(weights(other), shown, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, -0.25, 0.0, 0.5], [0.5, -0.25]),
        ([0.5, -0.25, -0.25, 0.5], [0.5, -0.25]),
        ([0.5, -0.25, 0.0], [1.0, -1.0]),  # three weights may be any
        ([0.5, -0.25, 0.25, 0.5], [1.0, -1.0]),
        ([0.5, 0.5, 0.0, 0.5], [1.0, -1.0]),
    ],
)
def test_levels_are_learned_from_those_that_a_tensor_has(values, expected):
    weight = nn.Parameter(torch.tensor(values))
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([weight], lr=0.1), [("w", weight)], quantize.mode("ttq"))
    assert optimizer.levels["w"].tolist() == expected


@pytest.mark.parametrize("write", ["an entry", "a mask", "a row", "all"])
@pytest.mark.parametrize("mode_name", LAZY)
def test_what_is_written_is_frozen_as_it_was_shown_quantized(mode_name, write):
    model, optimizer = started(mode_name)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in optimizer.latent:
            parameter = model.get_parameter(name)
            if write == "an entry":
                parameter.view(-1)[3] = 0.2
            elif write == "a mask":
                parameter.mul_(torch.rand(parameter.shape, generator=random) > 0.3)
            elif write == "a row":
                parameter[0] *= 0.7
            else:
                parameter.mul_(0.9)
    expected = optimizer.quantized()
    with optimizer.hard_quantized():
        assert all(torch.equal(model.get_parameter(name), value) for name, value in expected.items())
    optimizer.freeze()
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(name).detach(), value), name
    a_step(model, optimizer, 0)


K_BITS = [
    ("lazy_alt", None, 3, True), ("lazy_alt", None, 4, False), ("prox_alt", None, 3, True), ("parq", None, 3, True),
    ("lazy_alt", "greedy_mean", 2, False), ("lazy_alt", "uniform", 4, False), ("prox_median", None, 2, False),
    ("binary_relax", "uniform_with_zero", 3, True), ("prox_alt", "greedy_median", 3, False), ("ttq", None, None, None),
]  # fmt: skip


@pytest.mark.parametrize("loaded_a_state", [False, True])
@pytest.mark.parametrize(
    "given", [("ttq",), ("lazy_alt", None, 2, False), ("lazy_alt", None, 2, True), ("lazy_alt", None, 3, True)]
)
def test_another_network_of_which_one_level_is_the_same_is_taken_whole(given, loaded_a_state):
    """As at a small rate, where a level of float32 may not have moved since the best epoch."""
    mode, random = quantize.mode(*given), torch.Generator().manual_seed(0)
    weight = nn.Parameter(0.03 * torch.randn(12, 40, generator=random))
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([weight], lr=0.1), [("w", weight)], mode)
    if loaded_a_state:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    best = weight.detach().clone()
    best[torch.rand(best.shape, generator=random) > 0.97] *= -1
    moved = best < 0 if mode.name == "ttq" else best.abs() == best.abs().amax(1, keepdim=True)
    best = torch.where(moved, 1.25 * best, best)
    with torch.no_grad():
        weight.copy_(best)
    assert torch.equal(optimizer.quantized()["w"], best)
    optimizer.freeze()
    assert torch.equal(weight.detach(), best)


ON_THE_WAY = [("parq", "ternary"), ("parq", "alternating", 2), ("binary_relax", "ternary"), ("prox_connect", "ternary")]


@pytest.mark.parametrize(
    "mode", [quantize.mode(*one) for one in ON_THE_WAY], ids=lambda mode: f"{mode.name}-{mode.quantizer.in_words}"
)
def test_a_quantized_network_is_taken_whole_where_weights_are_on_their_way(mode):
    """Some of what is shown has arrived at its levels, so that it agrees with the same epoch's quantized network."""
    model, optimizer = trained(mode, torch.float64)
    with optimizer.hard_quantized():
        best = weights(model)
    model.load_state_dict(best)
    for name, value in optimizer.quantized().items():
        torch.testing.assert_close(value, best[name], rtol=1e-12, atol=0)
    optimizer.freeze()
    for name in optimizer.latent:
        torch.testing.assert_close(model.get_parameter(name).detach(), best[name], rtol=1e-12, atol=0)


def test_a_row_that_has_not_moved_does_not_have_the_others_quantized_again():
    """As of a word that no text holds."""
    mode = quantize.mode("lazy_alt", bits=3, by_row=True)
    weight = nn.Parameter(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([weight], lr=0.5), [("w", weight)], mode)
    best = weight.detach().clone()
    weight.grad = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    weight.grad[45:] = 0
    optimizer.step()
    assert torch.equal(weight[45:], best[45:])
    assert not torch.equal(weight[:45], best[:45])
    with torch.no_grad():
        weight.copy_(best)
    optimizer.freeze()
    assert torch.equal(weight.detach(), best)


@pytest.mark.parametrize(
    "mode",
    [quantize.mode("prox_median"), quantize.mode("lazy_alt"), quantize.mode("prox_alt", bits=3, by_row=True)],
    ids=lambda mode: f"{mode.name}-{mode.quantizer.in_words}",
)
def test_zeros_beside_the_levels_are_quantized_at_the_freeze(mode):
    """A pruned network of k bits: its zeros are one value too many, and would be refused when it is continued."""
    model, optimizer = trained(mode)
    optimizer.freeze()
    pruned = {
        name: w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(0)) > 0.3) for name, w in weights(model).items()
    }
    model, optimizer = trained(mode)
    model.load_state_dict(pruned)
    optimizer.freeze()
    saved = model.state_dict(), optimizer.state_dict()
    model, optimizer = trained(mode, count=0)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    a_step(model, optimizer, 0)


@pytest.mark.parametrize("how", ["freeze", "quantized", "into a new one"])
@pytest.mark.parametrize("mode", [quantize.mode(*one) for one in K_BITS], ids=lambda mode: f"{mode.name}-{mode.quantizer.in_words}")
def test_quantized_weights_that_are_loaded_again_are_not_quantized_a_second_time(mode, how):
    """Levels that are taken from levels are others, with 3 bits and more."""
    model, optimizer = trained(mode, torch.float64)
    with optimizer.hard_quantized():
        best = weights(model)
    for step in range(2, 6):
        a_step(model, optimizer, step)
    if how == "into a new one":
        model, optimizer = trained(mode, torch.float64, count=0)
    model.load_state_dict(best)
    if how == "quantized":
        with optimizer.hard_quantized():
            shown = weights(model)
        torch.testing.assert_close(optimizer.quantized(), {name: best[name] for name in optimizer.latent}, rtol=0, atol=0)
    else:
        optimizer.freeze()
        shown = weights(model)
    for name in optimizer.latent:
        assert torch.equal(shown[name], best[name]), name


def test_learned_levels_follow_the_gradient_in_any_layout():
    """Tensors of more than 65,536 entries are worked on where they lie."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(256, 64, 3, 3, generator=random, dtype=torch.float64)
    gradient = torch.randn(values.shape, generator=random, dtype=torch.float64)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(values.clone())
        optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([weight], lr=0.001), [("w", weight)], quantize.mode("ttq"))
        weight.grad = gradient.to(memory_format=layout)
        optimizer.step()
        found.append((optimizer.levels["w"], optimizer.latent["w"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_a_strength_set_in_inference_mode_leaves_a_held_layer_writable():
    model, optimizer = started("lazy")
    parameter = model.get_parameter(next(iter(optimizer.latent)))
    parameter.requires_grad_(False)
    with torch.inference_mode():
        optimizer.set_strength(0.5)
    with torch.no_grad():
        parameter.add_(0.25)
    written = parameter.detach().clone()
    steps(model, optimizer, 3, 4)
    assert torch.equal(parameter.detach(), written)


VARIANTS = {name: quantize.MODES[name] for name in LAZY} | {
    "lazy_alt, by row": quantize.mode("lazy_alt", bits=2, by_row=True),
    "lazy_alt, 3 bits": quantize.mode("lazy_alt", bits=3, by_row=True),
    "parq, 2 bits": quantize.mode("parq", bits=2),
    "binary_relax, ternary": quantize.mode("binary_relax", quantizer="ternary"),
}


def trained(mode, dtype=torch.float32, count=2):
    """A network and its optimizer after some steps, in float32, where the order of a sum can be seen."""
    model = network().to(dtype)
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), mode.select(model), mode)
    optimizer.set_strength(0.4)
    for step in range(count):
        a_step(model, optimizer, step)
    return model, optimizer


def a_step(model, optimizer, step):
    random = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter)
    optimizer.step()


def assert_latent(optimizer, latent):
    for name, weight in optimizer.latent.items():
        assert torch.equal(weight, latent[name].to(weight)), name


def latent_of(optimizer):
    return {name: weight.clone() for name, weight in optimizer.latent.items()}


CHANGES = {
    "double": lambda model: model.double(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "double and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", VARIANTS.values(), ids=VARIANTS)
def test_a_cast_model_is_copied_moved_again_and_saved_with_its_latent_weights(mode, change):
    model, optimizer = trained(mode)
    latent = latent_of(optimizer)
    CHANGES[change](model)
    assert_latent(optimizer, latent)
    other, copied = copy.deepcopy((model, optimizer))
    assert_latent(copied, latent)
    other.double().to(memory_format=torch.channels_last)
    assert_latent(copied, latent)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for order in (0, 1):
        again, loaded = trained(mode, next(model.parameters()).dtype, count=0)
        for what in (order, 1 - order):
            (again, loaded)[what].load_state_dict(saved[what])
        assert_latent(loaded, latent)
        for name, value in again.state_dict().items():
            assert torch.equal(value, saved[0][name]), name
    name = next(iter(latent))
    entry = (0,) * latent[name].dim()
    with torch.no_grad():
        model.get_parameter(name)[entry] = 0.0
    if mode.drawn is None:
        latent[name][entry] = 0.0
        assert_latent(optimizer, latent)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", VARIANTS.values(), ids=VARIANTS)
def test_a_state_goes_into_a_model_of_another_layout(mode, seed):
    """Levels are differences of larger amplitudes, whose rounding they have."""
    torch.manual_seed(seed)
    weight = torch.randn(8, 6, 3, 3)
    made = []
    for layout in (torch.channels_last, torch.contiguous_format):
        parameter = nn.Parameter(weight.to(memory_format=layout))
        made.append((parameter, quantize.ProjectedOptimizer(torch.optim.SGD([parameter], lr=0.05), [("w", parameter)], mode)))
    (parameter, optimizer), (other, continued) = made
    optimizer.set_strength(0.4)
    parameter.grad = torch.randn(weight.shape)
    optimizer.step()
    latent = optimizer.latent["w"].clone()
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        other.copy_(parameter)
    assert torch.equal(continued.latent["w"], latent)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("mode", VARIANTS.values(), ids=VARIANTS)
def test_a_state_that_is_saved_after_a_mask_continues_as_the_run_does(mode, order):
    model, optimizer = trained(mode)
    name = next(iter(optimizer.latent))
    mask = torch.arange(model.get_parameter(name).numel()).remainder(10).gt(0).view(model.get_parameter(name).shape)
    with torch.no_grad():
        model.get_parameter(name).mul_(mask)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = trained(mode, count=0)
    for what in order:
        (other, continued)[what].load_state_dict(saved[what])
    for step in (2, 3):
        assert_latent(continued, latent_of(optimizer))
        for key, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key
        a_step(model, optimizer, step)
        a_step(other, continued, step)


@pytest.mark.parametrize("call", ["set_strength", "step"])
@pytest.mark.parametrize("mode", [mode for mode in VARIANTS.values() if mode.drawn is None and not mode.quantizer.spares_ends])
def test_holding_a_layer_takes_nothing_over_a_second_time(mode, call):
    model, optimizer = copy.deepcopy(trained(mode))
    first, *_, name = optimizer.latent
    expected = latent_of(optimizer)
    model.get_parameter(first).requires_grad_(False)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = 0.125
    expected[name].view(-1)[1] = 0.125
    if call == "step":
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    else:
        optimizer.set_strength(0.7)
    limits = (-1.0, 1.0) if mode.quantizer.clips and call == "step" else (-100.0, 100.0)
    assert_latent(optimizer, {one: weight.clamp(*limits) for one, weight in expected.items()})


@pytest.mark.parametrize("mode", VARIANTS.values(), ids=VARIANTS)
def test_a_layer_that_is_held_after_a_state_is_loaded_shows_what_it_did(mode):
    model, optimizer = trained(mode)
    parameter = model.get_parameter(next(iter(optimizer.latent)))
    parameter.requires_grad_(False)
    optimizer.set_strength(0.3)
    a_step(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = trained(mode, count=0)
    other.load_state_dict(saved[0])
    continued.load_state_dict(saved[1])
    other.get_parameter(next(iter(optimizer.latent))).requires_grad_(False)
    for name, value in other.state_dict().items():
        assert torch.equal(value, saved[0][name]), name
    a_step(model, optimizer, 3)
    a_step(other, continued, 3)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("mode", VARIANTS.values(), ids=VARIANTS)
def test_a_model_of_a_state_that_comes_after_another_strength_is_saved_with_its_latent_weights(mode):
    model, optimizer = trained(mode)
    latent = latent_of(optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for _ in range(2):
        other, continued = trained(mode, count=0)
        continued.load_state_dict(saved[1])
        continued.set_strength(0.7)
        other.load_state_dict(saved[0])
        assert_latent(continued, latent)
        saved = copy.deepcopy((other.state_dict(), continued.state_dict()))


def test_a_rate_that_is_a_tensor_is_changed_in_place_by_a_scheduler():
    mode = ProjectionMode(
        "own", "own", "a lazy mode whose pull goes with the rate", Binary(), Soft(), lazy=True, schedule=PROXQUANT
    )
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode)
    optimizer.set_strength(0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    a_step(model, optimizer, 0)
    latent = latent_of(optimizer)
    scheduler.step()
    assert_latent(copy.deepcopy((model, optimizer))[1], latent)


# One tensor, as for an average of the weights.


@pytest.mark.parametrize("mode_name", MODES)
def test_a_parameter_can_be_quantized_by_itself(mode_name):
    parameter = nn.Parameter(torch.randn(4, 6))
    levels = torch.tensor([1.0, -1.0]) if mode_name == "ttq" else None
    found = quantize.MODES[mode_name].hard_quantize(parameter, levels)
    assert torch.equal(found, quantize.MODES[mode_name].hard_quantize(parameter.detach(), levels))
    assert not found.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("mode_name", MODES)
def test_an_average_that_is_not_finite_is_refused(mode_name, value):
    tensor, levels = torch.tensor([[0.5, value], [-0.5, 0.25]]), torch.tensor([1.0, -1.0])
    levels = levels if quantize.MODES[mode_name].quantizer.given == "levels" else None
    with pytest.raises(quantize.NotFinite, match="not finite numbers"):
        quantize.MODES[mode_name].hard_quantize(tensor, levels)
    if levels is not None:
        with pytest.raises(quantize.NotFinite, match="its levels"):
            quantize.MODES[mode_name].hard_quantize(torch.ones(2, 2), torch.tensor([value, -1.0]))


def test_an_average_needs_the_learned_levels():
    model, optimizer = started("ttq")
    averaged = AveragedModel(model)
    for name, weight in optimizer.mode.select(averaged.module):
        assert optimizer.mode.hard_quantize(weight, optimizer.levels[name]).unique().numel() <= 3
        with pytest.raises(ValueError, match="learns its levels"):
            optimizer.mode.hard_quantize(weight, optimizer.levels.get(f"module.{name}"))
