"""States, weights and layers in whatever order a user loads, holds, freezes and changes them, in every mode."""

import contextlib
import copy
import dataclasses
import warnings

import pytest
import torch
from test_step import backward, network, weights, wrap
from test_torch_habits import LAZY, MODES, assert_alike, started, steps
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import quantize
from quantize.projection import Projection

# A step at rate 0, other orders of loading, layers held still, what is refused.


def restarted(mode_name, base=None):
    """A network whose weights reach beyond [-1, 1], before its first step."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(9)
    optimizer = wrap(model, mode_name, base(model.parameters()) if base else None)
    optimizer.set_strength(0.4)
    return model, optimizer


@pytest.mark.parametrize("base", [None, lambda parameters: torch.optim.SGD(parameters, lr=0.1)])
@pytest.mark.parametrize("mode_name", MODES)
def test_asking_for_the_state_before_the_first_step_changes_nothing(mode_name, base):
    model, optimizer = restarted(mode_name, base)
    before, latent = weights(model), {name: weight.clone() for name, weight in optimizer.latent.items()}
    for _ in range(2):
        _, state = get_state_dict(model, optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in optimizer.latent.items():
        assert torch.equal(value, latent[name]), name
    assert state["param_groups"][0]["projection_draws"] == [0]


def test_a_flattened_state_is_refused_in_words():
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for mode_name in ("prox", "lazy"):
        model, optimizer = started(mode_name)
        model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer, options=options))
        before = weights(model)
        with pytest.raises(ValueError, match="flatten_optimizer_state_dict"):
            set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=options)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("mode_name", MODES)
def test_a_frozen_state_goes_into_a_new_optimizer_that_is_frozen_first(mode_name):
    model, optimizer = started(mode_name, frozen=True)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other, continued = started(mode_name, count=0)
    continued.freeze()
    set_state_dict(other, continued, model_state_dict=model_state, optim_state_dict=optimizer_state)
    steps(model, optimizer, 3, 5)
    steps(other, continued, 3, 5)
    assert_alike(model, optimizer, other, continued)


@pytest.mark.parametrize("mode_name", MODES)
def test_a_distributed_checkpoint_of_an_optimizer_without_a_state_of_its_own(mode_name):
    """Plain SGD keeps nothing of any parameter, and torch wants entries of all or of none."""
    model, optimizer = restarted(mode_name, base=torch.optim.SGD)
    steps(model, optimizer, 0, 2)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other, continued = restarted(mode_name, base=torch.optim.SGD)
    set_state_dict(other, continued, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert_alike(model, optimizer, other, continued)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("mode_name", MODES)
def test_a_frozen_state_whose_freeze_has_emptied_a_group(mode_name, first):
    """As where the quantized weights have a group of their own, without weight decay."""

    def made():
        model = network()
        mode = quantize.mode(mode_name)
        pairs = mode.select(model)
        taken = {id(parameter) for _, parameter in pairs}
        groups = [
            {"params": [parameter for _, parameter in pairs], "weight_decay": 0.0},
            {"params": [parameter for parameter in model.parameters() if id(parameter) not in taken]},
        ]
        base = torch.optim.AdamW(groups if first else groups[::-1], lr=0.01)
        optimizer = quantize.ProjectedOptimizer(base, pairs, mode)
        steps(model, optimizer, 0, 2)
        optimizer.freeze()
        return model, optimizer

    model, optimizer = made()
    steps(model, optimizer, 2, 4)
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other, continued = made()
    set_state_dict(other, continued, model_state_dict=model_state, optim_state_dict=optimizer_state)
    steps(model, optimizer, 4, 6)
    steps(other, continued, 4, 6)
    assert_alike(model, optimizer, other, continued)


def test_a_distributed_checkpoint_into_a_layer_that_is_held_still_says_what_to_do():
    model, optimizer = started("lazy")
    model_state, optimizer_state = copy.deepcopy(get_state_dict(model, optimizer))
    other, continued = started("lazy", count=0)
    other[3].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing of 3\.weight, which is held still.*let it go until"):
        set_state_dict(other, continued, model_state_dict=model_state, optim_state_dict=optimizer_state)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("mode_name", LAZY)
def test_latent_weights_outlive_any_order_of_loading(mode_name, held):
    model, optimizer = started(mode_name)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = started(mode_name, count=0)
    other[3].weight.requires_grad_(not held)
    continued.load_state_dict(saved[1])
    continued.set_strength(0.6)
    other.load_state_dict(saved[0])
    for name, weight in continued.latent.items():
        assert torch.equal(weight, optimizer.latent[name]), name
    continued.set_strength(0.8)
    for name, weight in continued.latent.items():
        assert torch.equal(weight, optimizer.latent[name]), name
    steps(other, continued, 3, 4)
    written = {name: value * 0.9 if value.is_floating_point() else value for name, value in saved[0].items()}
    other.load_state_dict(written)  # other weights are taken over as ever
    for name, weight in continued.latent.items():
        assert torch.equal(weight, written[name]), name


@pytest.mark.parametrize("mode_name", MODES)
def test_a_layer_that_is_held_still_while_training_is_not_moved(mode_name):
    model, optimizer = restarted(mode_name)
    steps(model, optimizer, 0, 1)
    shown, latent = model[3].weight.detach().clone(), optimizer.latent["3.weight"].clone()
    model[3].weight.requires_grad_(False)
    optimizer.zero_grad()
    for step in range(1, 4):
        optimizer.set_strength(0.4 + step / 10)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        assert torch.equal(model[3].weight, shown)
        assert torch.equal(optimizer.latent["3.weight"], latent)
    again, copied = copy.deepcopy((model, optimizer))
    assert torch.equal(copied.latent["3.weight"], latent)
    with optimizer.hard_quantized():
        expected = quantize.MODES[mode_name].hard_quantize(latent, optimizer.levels.get("3.weight"))
        torch.testing.assert_close(model[3].weight.detach(), expected)
    assert torch.equal(model[3].weight, shown)
    for net, one in ((model, optimizer), (again, copied)):
        net[3].weight.requires_grad_(True)
        steps(net, one, 4, 6)
    assert not torch.equal(optimizer.latent["3.weight"], latent)
    assert_alike(model, optimizer, again, copied)


@pytest.mark.parametrize("mode_name", LAZY)
def test_weights_written_into_a_layer_that_is_held_still_are_taken_over(mode_name):
    model, optimizer = started(mode_name)
    optimizer.set_strength(0.6)
    for held_first in (True, False):
        other = {name: value * 0.7 if value.is_floating_point() else value for name, value in model.state_dict().items()}
        if held_first:
            model[3].weight.requires_grad_(False)
            optimizer.set_strength(0.5)
            model.load_state_dict(other)
        else:
            model.load_state_dict(other)
            model[3].weight.requires_grad_(False)
        optimizer.set_strength(0.7)
        assert torch.equal(optimizer.latent["3.weight"], other["3.weight"])
        model[3].weight.requires_grad_(True)
        optimizer.set_strength(0.6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode_name", LAZY)
def test_latent_weights_that_are_not_finite_are_seen_and_not_loaded(mode_name, value):
    model, optimizer = started(mode_name)
    state = copy.deepcopy(optimizer.state_dict())
    entry = state["state"][state["param_groups"][0]["projection_names"]["3.weight"]]
    entry["latent"].view(-1)[0] = value
    with pytest.raises(quantize.NotFinite, match=r"latent weights of 3\.weight"):
        optimizer.load_state_dict(state)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[3].weight.grad.view(-1)[0] = float("nan")
    for strength in (0.0, 1.0):
        optimizer.set_strength(strength)
        optimizer.step()
        assert model[3].weight.isnan().any()


def test_what_is_no_strength_and_no_state_is_said_in_one_line():
    model, optimizer = started("lazy")
    shown = weights(model)
    for strength in (None, float("nan"), "much", [None], torch.ones(2)):
        with pytest.raises(ValueError, match="is a finite number >= 0") as caught:
            optimizer.set_strength(strength)
        assert "\n" not in str(caught.value)
    for content in (None, 7, []):
        with pytest.raises(ValueError, match="not the state of an optimizer"):
            optimizer.load_state_dict(content)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["projection_strengths"] = [float("nan")]
    with pytest.raises(ValueError, match="finite number >= 0, not nan"):
        optimizer.load_state_dict(state)
    assert optimizer.strength == 0.4
    for name, value in model.state_dict().items():
        assert torch.equal(value, shown[name])


# Learned levels.


def test_learned_levels_stay_as_they_are_at_the_freeze():
    model, optimizer = started("ttq")
    with torch.no_grad():
        model[3].weight.abs_()  # no entry is at the negative level
    optimizer.set_strength(0.4)
    steps(model, optimizer, 3, 4)
    levels = {name: level.clone() for name, level in optimizer.levels.items()}
    optimizer.freeze()
    other, loaded = started("ttq")
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in (optimizer, loaded):
        assert torch.equal(one.levels["3.weight"], levels["3.weight"])
    before = optimizer.state_dict()
    for group in before["param_groups"]:
        del group["projection_levels"]  # as it was written before
    loaded.load_state_dict(before)
    assert loaded.levels["3.weight"][0] == model[3].weight.max()


def test_learned_levels_leave_the_gradients_as_they_were():
    model, optimizer = started("ttq")
    optimizer.zero_grad()
    backward(model, 3)
    given = {name: parameter.grad for name, parameter in model.named_parameters()}
    before = {name: gradient.clone() for name, gradient in given.items()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is given[name]
        assert torch.equal(parameter.grad, before[name]), name


def test_learned_levels_refuse_sparse_gradients():
    model = nn.ModuleList([nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2)])
    optimizer = quantize.ProjectedOptimizer(
        torch.optim.SparseAdam(model[0].parameters()), [("0.weight", model[0].weight)], quantize.MODES["ttq"]
    )
    before = model[0].weight.detach().clone()
    model[1](model[0](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight has a sparse gradient"):
        optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("name", quantize.MODES)
def test_a_step_that_is_interrupted_leaves_what_the_model_showed(name):
    """Ctrl-C inside the base optimizer used to leave a lazy mode's model on its latent weights, and ttq's levels moved."""

    class Interrupted(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    mode = quantize.mode(name)
    optimizer = quantize.ProjectedOptimizer(Interrupted(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.set_strength(0.5)
    model(torch.randn(3, 4)).sum().backward()

    def seen() -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in model.parameters()]
        held = [*model.parameters(), *optimizer.latent.values(), *optimizer.levels.values(), *gradients]
        return [tensor.detach().clone() for tensor in held]

    before = seen()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for one, other in zip(before, seen(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("call", ["hard_quantized", "freeze"])
@pytest.mark.parametrize("name", quantize.MODES)
def test_quantizing_that_is_interrupted_loses_no_weights_in_training(name, call, monkeypatch):
    """Ctrl-C half-way used to leave an eager mode's model quantized, and a checkpoint was then made of that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    mode = quantize.mode(name)
    optimizer = quantize.ProjectedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.set_strength(0.5)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = [tensor.detach().clone() for tensor in (*model.parameters(), *optimizer.latent.values(), *optimizer.levels.values())]
    quantizing = Projection._hard_quantize

    def interrupted(self, now, places):
        quantizing(self, now, places)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Projection, "_hard_quantize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.freeze() if call == "freeze" else optimizer.hard_quantized().__enter__()
    now = [*model.parameters(), *optimizer.latent.values(), *optimizer.levels.values()]
    for one, other in zip(before, now, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=0, atol=0)
    optimizer.step()
    optimizer.freeze()


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("mode_name", MODES)
def test_a_state_is_the_same_inside_hard_quantized(mode_name, written):
    model, optimizer = started(mode_name)
    if written:
        with torch.no_grad():
            model.get_parameter(next(iter(optimizer.latent))).mul_(-1.5)
    outside, latent = copy.deepcopy(optimizer.state_dict()), {name: w.clone() for name, w in optimizer.latent.items()}
    with optimizer.hard_quantized():
        inside = optimizer.state_dict()
        assert inside["param_groups"] == outside["param_groups"]
        torch.testing.assert_close(inside["state"], outside["state"], rtol=0, atol=0)
        torch.testing.assert_close(optimizer.latent, latent, rtol=0, atol=0)


def test_weights_written_inside_hard_quantized_are_undone_with_a_warning():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    mode = quantize.mode("lazy")
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="inside hard_quantized"), optimizer.hard_quantized():
        model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    assert torch.equal(model.weight, before["weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with optimizer.hard_quantized():
            model(torch.ones(1, 3))


@pytest.mark.parametrize("held_first", [False, True])
@pytest.mark.parametrize("mode_name", MODES)
def test_a_layer_that_is_held_still_is_saved_and_continued_as_it_is(mode_name, held_first):
    model, optimizer = restarted(mode_name)
    steps(model, optimizer, 0, 1)
    model[3].weight.requires_grad_(False)
    optimizer.set_strength(0.6)
    steps(model, optimizer, 1, 2)
    shown = model[3].weight.detach().clone()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for model_first in (False, True):
        other, continued = restarted(mode_name)
        other[3].weight.requires_grad_(not held_first)
        if model_first:
            other.load_state_dict(saved[0])
        continued.load_state_dict(copy.deepcopy(saved[1]))  # torch's optimizers go on in the given tensors
        if not model_first:
            other.load_state_dict(saved[0])
        other[3].weight.requires_grad_(False)
        first, second = copy.deepcopy((model, optimizer)), (other, continued)
        for one in (first, second):
            one[1].set_strength(0.8)
            steps(*one, 2, 4)
            assert torch.equal(one[0][3].weight, shown)
        assert_alike(*first, *second)
        for one in (first, second):
            one[0][3].weight.requires_grad_(True)
            steps(*one, 4, 6)
        assert_alike(*first, *second)


@pytest.mark.parametrize("mode_name", MODES)
def test_weights_that_are_not_quantized_are_seen_after_the_freeze(mode_name):
    model, optimizer = started(mode_name)
    before = copy.deepcopy(model.state_dict())
    for name in optimizer.latent:  # some modes show quantized weights in training too
        before[name] = torch.randn_like(before[name])
    optimizer.freeze()
    frozen = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = started(mode_name, count=0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    continued.load_state_dict(frozen[1])  # and not the model

    def show(one):
        with one.hard_quantized():
            pass

    diverged = {name: value * float("nan") if value.is_floating_point() else value for name, value in frozen[0].items()}
    for net, one, written in ((model, optimizer, before), (other, continued, None), (model, optimizer, diverged)):
        if written is not None:
            net.load_state_dict(written)
        kind, words = (quantize.NotFinite, "not finite") if written is diverged else (quantize.NotQuantized, "values")
        for call in (one.step, one.quantized, lambda one=one: show(one)):
            with pytest.raises(kind, match=words):
                call()
        net.load_state_dict(frozen[0])
        steps(net, one, 3, 5)
        show(one)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("mode_name", MODES)
def test_an_infinite_gradient_is_not_clipped_to_an_ordinary_weight(mode_name, value):
    model = network()
    optimizer = wrap(model, mode_name, torch.optim.SGD(model.parameters(), lr=0.1))
    backward(model, 0)
    model[3].weight.grad.view(-1)[1] = value
    optimizer.step()
    assert not optimizer.latent["3.weight"].view(-1)[1].isfinite()
    with pytest.raises(quantize.NotFinite, match=r"3\.weight"):
        optimizer.freeze()


@pytest.mark.parametrize("mode_name", MODES)
def test_a_cast_to_half_precision_is_said_where_pulls_are_lost(mode_name):
    model, optimizer = started(mode_name)
    model.bfloat16()
    for parameter in model.parameters():
        parameter.grad = None if parameter.grad is None else parameter.grad.bfloat16()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.set_strength(0.1)
    lost = [one for one in said if "half precision" in str(one.message)]
    assert len(lost) == (not quantize.MODES[mode_name].lazy)


def test_the_state_of_another_kind_of_optimizer_is_refused():
    model = network()
    kinds = {
        "Adam": lambda: torch.optim.Adam(model.parameters()),
        "AdamW": lambda: torch.optim.AdamW(model.parameters()),
        "Adamax": lambda: torch.optim.Adamax(model.parameters()),
        "RAdam": lambda: torch.optim.RAdam(model.parameters()),
        "SGD": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    }
    states = {}
    for name, base in kinds.items():
        optimizer = wrap(model, "prox", base())
        torch.optim.lr_scheduler.OneCycleLR(optimizer.base_optimizer, 1.0, total_steps=9, cycle_momentum=name != "Adamax")
        steps(model, optimizer, 0, 1)
        states[name] = copy.deepcopy(optimizer.state_dict())
    for name, base in kinds.items():
        for other, state in states.items():
            optimizer = wrap(model, "prox", base())
            torch.optim.swa_utils.SWALR(optimizer.base_optimizer, 0.1)
            if name == other or {name, other} == {"Adam", "AdamW"}:
                optimizer.load_state_dict(copy.deepcopy(state))
                steps(model, optimizer, 1, 2)
                continue
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=f"another kind of base optimizer: of {other}, this one is {name}"):
                optimizer.load_state_dict(state)
            assert str(optimizer.state_dict()) == str(before)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode_name", MODES)
def test_the_projection_goes_on_under_another_kind_of_optimizer(mode_name, frozen):
    model, optimizer = started(mode_name, frozen)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, again = network(), network()
    continued = wrap(other, mode_name, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9))
    expected = wrap(again, mode_name, torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9))
    other.load_state_dict(saved[0])
    continued.load_projection(saved[1])
    assert_alike(model, optimizer, other, continued)
    assert (continued.frozen, continued.strengths, continued.defaults["momentum"]) == (frozen, optimizer.strengths, 0.9)
    if frozen:
        return
    again.load_state_dict({**saved[0], **optimizer.latent})
    for name, levels in expected.levels.items():
        levels.copy_(optimizer.levels[name])
    expected._projections[0].draws = optimizer._projections[0].draws
    expected.set_strength(optimizer.strength)
    steps(again, expected, 3, 6)
    steps(other, continued, 3, 6)
    assert_alike(again, expected, other, continued)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("projection_strengths", [], "one for each of 1 modes"),
        ("projection_strengths", [0.1, 0.2], "one for each of 1 modes"),
        ("projection_strengths", 0.1, "one for each of 1 modes"),
        ("projection_draws", [], "one for each of 1 modes"),
        ("projection_draws", ["x"], "whole numbers"),
        ("projection_draws", [-1], "whole numbers"),
    ],
)
def test_settings_of_a_state_that_are_none_are_refused(key, value, words):
    _, optimizer = started("stoch_bin")
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group[key] = value
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(state)


def test_what_cannot_be_wrapped_is_refused_as_a_replacement_too():
    model, optimizer = started("prox")
    with pytest.raises(ValueError, match="LBFGS cannot be wrapped"):
        optimizer.base_optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(TypeError, match="wrapped already"):
        optimizer.base_optimizer = optimizer
    with pytest.raises(TypeError, match=r"one of torch\.optim is needed"):
        optimizer.base_optimizer = model


@pytest.mark.parametrize("mode_name", MODES)
def test_a_second_wrapper_of_a_frozen_model_is_told_why_nothing_is_left(mode_name):
    model, _ = started(mode_name, frozen=True)
    model[0].weight.requires_grad_(False)
    model[6].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all \d given have requires_grad=False, \d of them since they were quantized for good"):
        wrap(model, "prox")


@pytest.mark.parametrize("change", ["another seed", "channels last", "double", "bfloat16"])
@pytest.mark.parametrize("mode_name", LAZY)
def test_latent_weights_outlive_the_order_of_loading_where_rounding_and_draws_differ(mode_name, change):
    mode = quantize.MODES[mode_name]
    mode = quantize.mode(mode_name, bits=2) if mode.any_quantizer else mode

    def made(seed=0):
        model = network().float()
        return model, quantize.ProjectedOptimizer(torch.optim.Adam(model.parameters()), mode.select(model), mode, seed=seed)

    model, optimizer = made()
    optimizer.set_strength(0.4)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    latent = {name: weight.clone() for name, weight in optimizer.latent.items()}
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, continued = made(seed=5 if change == "another seed" else 0)
    if change == "channels last":
        other.to(memory_format=torch.channels_last)
    dtype = {"double": torch.float64, "bfloat16": torch.bfloat16}.get(change, torch.float32)
    other.to(dtype)
    continued.load_state_dict(saved[1])
    other.load_state_dict(saved[0])
    continued.set_strength(0.5)
    for name, weight in continued.latent.items():
        assert torch.equal(weight, latent[name].to(dtype)), name


@pytest.mark.parametrize("mode_name", MODES)
def test_a_cast_inside_inference_mode_can_be_trained_on(mode_name):
    model, optimizer = started(mode_name)
    model.float()
    optimizer.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.inference_mode(), optimizer.hard_quantized():
        pass
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.set_strength(0.5)


@pytest.mark.parametrize("strength", [4e4, 1e9])
@pytest.mark.parametrize("mode_name", ["prox", "prox_ternary", "binary_relax", "prox_connect"])
def test_strengths_beyond_half_precision_pull_all_the_way(mode_name, strength):
    model = network().half()
    lossy = not quantize.MODES[mode_name].lazy
    with pytest.warns(UserWarning, match="half precision") if lossy else contextlib.nullcontext():
        optimizer = wrap(model, mode_name, torch.optim.SGD(model.parameters(), lr=1.0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.set_strength(strength)
    optimizer.step()
    name = next(iter(optimizer.latent))
    shown = dict(model.named_parameters())[name].detach()
    torch.testing.assert_close(shown, optimizer.quantized()[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_levels_that_are_not_finite_are_refused(value):
    _, optimizer = started("ttq")
    next(iter(optimizer.levels.values()))[0] = value
    for call in (optimizer.quantized, optimizer.freeze):
        with pytest.raises(quantize.NotFinite, match="levels"):
            call()


def test_a_lazy_mode_of_ones_own_whose_strength_goes_with_the_rate_is_copied_and_loaded():
    mode = dataclasses.replace(quantize.MODES["prox"], name="own", lazy=True)
    model = network()
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), mode.select(model), mode)
    optimizer.set_strength(2.0)
    steps(model, optimizer, 0, 2)
    latent = {name: weight.clone() for name, weight in optimizer.latent.items()}
    copied_model, copied = copy.deepcopy((model, optimizer))
    copied.load_state_dict(copy.deepcopy(copied.state_dict()))
    copied_model.double()
    steps(copied_model, copied, 2, 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    for name, weight in optimizer.latent.items():
        assert torch.equal(weight, latent[name]), name


@pytest.mark.parametrize("mode_name", MODES)
def test_writes_to_the_data_of_frozen_weights_are_seen(mode_name):
    model, optimizer = started(mode_name, frozen=True)
    model[3].weight.data.copy_(torch.randn_like(model[3].weight))
    for call in (optimizer.step, optimizer.quantized):
        with pytest.raises(quantize.NotQuantized, match=r"3\.weight"):
            call()


@pytest.mark.parametrize("values", [(0.3, -0.7), (0.0, 0.0), (0.1, -0.1)])
def test_two_values_that_are_not_the_signs_are_not_binary(values):
    model, optimizer = started("prox", frozen=True)
    with torch.no_grad():
        for name in optimizer.latent:
            weight = dict(model.named_parameters())[name]
            weight.copy_(torch.where(weight > 0, *(torch.tensor(value, dtype=weight.dtype) for value in values)))
    with pytest.raises(quantize.NotQuantized, match=r"other values than -1 and \+1"):
        optimizer.quantized()


def test_a_state_that_is_damaged_is_refused_in_words_and_changes_nothing():
    _, optimizer = started("lazy")
    whole = optimizer.state_dict()
    before = str(whole)
    first = whole["param_groups"][0]
    number = first["projection_names"]["3.weight"]
    entry = whole["state"][number]

    def with_groups(**changes):
        return {**whole, "param_groups": [{**group, **changes} for group in whole["param_groups"]]}

    def with_latent(latent):
        return {**whole, "state": {**whole["state"], number: {**entry, "latent": latent}}}

    without = [{key: value for key, value in group.items() if key != "lr"} for group in whole["param_groups"]]
    for broken in (
        {**whole, "param_groups": without},
        {**whole, "state": []},
        {**whole, "state": 3},
        {**whole, "state": {**whole["state"], number: None}},
        with_groups(params=None),
        with_groups(projection_quantizers=None),
        with_latent(entry["latent"].to_sparse()),
        with_latent(entry["latent"].to("meta")),
        with_latent(entry["latent"] > 0),
        with_latent(entry["latent"].to(torch.complex64)),
    ):
        with pytest.raises(ValueError, match="the state"):
            optimizer.load_state_dict(broken)
        assert str(optimizer.state_dict()) == before
