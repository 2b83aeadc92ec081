"""The wrapper among torch's habits: what is done to any optimizer is done to this one, in every mode."""

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_step import backward, batch, network, weights, wrap
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import parametrizations, prune

import quantize

MODES = list(quantize.MODES)
LAZY = [name for name, mode in quantize.MODES.items() if mode.lazy]


def steps(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def started(mode_name, frozen=False, count=3):
    model = network()
    optimizer = wrap(model, mode_name)
    optimizer.set_strength(0.4)
    steps(model, optimizer, 0, count)
    if frozen:
        optimizer.freeze()
    return model, optimizer


def assert_alike(model, optimizer, other_model, other):
    for (name, value), given in zip(model.state_dict().items(), other_model.state_dict().values(), strict=True):
        assert torch.equal(value, given), name
    for found, expected in ((optimizer.latent, other.latent), (optimizer.levels, other.levels)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


# Copies, pickles, hooks, states.


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode_name", MODES)
def test_a_copy_trains_on_to_the_last_bit(mode_name, frozen):
    model, optimizer = started(mode_name, frozen)
    for made in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        steps(*made, 3, 6)
        untouched = {name: value.clone() for name, value in model.state_dict().items()}
        again = copy.deepcopy((model, optimizer))
        steps(*again, 3, 6)
        assert_alike(*made, *again)
        for name, value in model.state_dict().items():
            assert torch.equal(value, untouched[name])
    steps(model, optimizer, 3, 6)  # the one that was copied goes on, and so do others of its class
    assert_alike(model, optimizer, *again)


@pytest.mark.parametrize("mode_name", MODES)
def test_hooks_are_called_once_a_step(mode_name):
    _, optimizer = started(mode_name)
    calls = []
    hooks = {
        "register_step_pre_hook": lambda *_: calls.append("before"),
        "register_step_post_hook": lambda *_: calls.append("after"),
        "register_state_dict_pre_hook": lambda *_: calls.append("before saving"),
        "register_state_dict_post_hook": lambda _, state: {**state, "note": 7},
        "register_load_state_dict_pre_hook": lambda _, state: {key: state[key] for key in state if key != "note"},
        "register_load_state_dict_post_hook": lambda *_: calls.append("loaded"),
    }
    handles = [getattr(optimizer, name)(hook) for name, hook in hooks.items()]
    optimizer.step()
    assert calls == ["before", "after"]
    state = optimizer.state_dict()
    assert state["note"] == 7
    optimizer.load_state_dict(state)
    assert calls == ["before", "after", "before saving", "loaded"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode_name", MODES)
def test_torchs_distributed_checkpoint_knows_its_state(mode_name, frozen):
    model, optimizer = started(mode_name, frozen)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    assert set(optimizer_state) == {"state", "param_groups"}
    if quantize.MODES[mode_name].lazy and not frozen:
        assert torch.equal(optimizer_state["state"]["3.weight"]["latent"], optimizer.latent["3.weight"])
    model_state, optimizer_state = copy.deepcopy((model_state, optimizer_state))
    steps(model, optimizer, 3, 6)
    other, continued = started(mode_name, frozen, count=1)
    set_state_dict(other, continued, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert continued.strength == optimizer.strength
    steps(other, continued, 3, 6)
    assert_alike(model, optimizer, other, continued)


def test_a_state_of_before_still_loads():
    model, optimizer = started("lazy")
    state = optimizer.state_dict()
    before = {
        "mode": "lazy",
        "strength": 0.4,
        "frozen": False,
        "latent": {f"module._orig_mod.{name}": weight.clone() for name, weight in optimizer.latent.items()},
        "base_optimizer": optimizer.base_optimizer.state_dict(),
    }
    for content in (state, before):
        other = network()
        continued = wrap(other, "lazy")
        other.load_state_dict(model.state_dict())
        continued.load_state_dict(content)
        assert_alike(model, optimizer, other, continued)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_under_a_wrapper_load_in_every_mode(prefix):
    for mode_name in MODES:
        model, optimizer = started(mode_name)
        holder = nn.ModuleDict({prefix.rstrip("."): network()})
        mode = quantize.MODES[mode_name]
        base = torch.optim.Adam(holder.parameters(), lr=0.01)
        continued = quantize.ProjectedOptimizer(base, mode.select(holder), mode)
        inner = next(iter(holder.values()))
        inner.load_state_dict(model.state_dict())
        continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(model, optimizer, 3, 5)
        steps(inner, continued, 3, 5)
        for name, value in model.state_dict().items():
            assert torch.equal(inner.state_dict()[name], value), (mode_name, name)


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer = started("lazy")
    good = optimizer.state_dict()
    before = copy.deepcopy((weights(model), good))
    broken = copy.deepcopy(good)
    for group in broken["param_groups"]:
        group["projection_frozen"] = True  # then the base optimizer's part has too many parameters
    plain = torch.optim.Adam(model.parameters()).state_dict()
    for content, words in (
        (broken, "group"),
        (plain, "not wrapped"),
        ({}, "param_groups"),
        ({"state": {}, "param_groups": []}, "needs"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(content)
        assert not optimizer.frozen
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[0][name])
    optimizer.load_state_dict(before[1])
    steps(model, optimizer, 3, 4)
    other, undisturbed = started("lazy", count=4)
    assert_alike(model, optimizer, other, undisturbed)


def test_groups_state_and_defaults_can_be_put_in_the_place_of_the_old_ones():
    _, optimizer = started("prox")
    assert optimizer.defaults["lr"] == 0.01
    optimizer.param_groups = [dict(group, lr=0.5) for group in optimizer.param_groups]
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = {key: value.clone() for key, value in state.items()}
    optimizer.state = optimizer.state
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.1})
    extra.grad = torch.ones_like(extra)
    steps_before = extra.detach().clone()
    optimizer.step()
    assert not torch.equal(extra, steps_before)
    assert "prox on 3 tensors" in repr(optimizer)
    assert "Adam" in repr(optimizer)
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(extra.grad, torch.zeros_like(extra))


@pytest.mark.parametrize("mode_name", ["prox", "lazy", "ttq"])
def test_a_gradient_scaler_steps_it(mode_name):
    model, optimizer = started(mode_name, count=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    images, labels = batch(0)
    scaler.scale(F.cross_entropy(model(images), labels)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)
    scaler.update()
    other, _ = started(mode_name, count=1)
    for (name, value), given in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, given, rtol=1e-12, atol=1e-12, msg=name)


def test_lbfgs_is_refused_in_words():
    model = network()
    with pytest.raises(ValueError, match="LBFGS"):
        wrap(model, "prox", torch.optim.LBFGS(model.parameters()))


def test_an_optimizer_that_chooses_its_own_rate_is_refused_in_words():
    class OwnRate(torch.optim.SGD):
        def __init__(self, parameters):
            super().__init__(parameters)
            self.param_groups[0]["lr"] = None

    model = network()
    with pytest.raises(ValueError, match="OwnRate's parameter groups have no learning rate"):
        wrap(model, "prox", OwnRate(model.parameters()))


# Several modes in one network.


def test_several_modes_are_each_as_if_alone():
    model, binary, ternary = network(), network(), network()
    modes = [quantize.MODES["lazy"], quantize.MODES["prox_ternary"]]
    names = ["0.weight", "3.weight"]
    pairs = [[(name, dict(model.named_parameters())[name])] for name in names]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), list(zip(pairs, modes, strict=True)))
    optimizer.set_strength([0.3, 2.0])
    assert optimizer.strengths == (0.3, 2.0)
    alone = []
    for net, name, mode, strength in ((binary, names[0], modes[0], 0.3), (ternary, names[1], modes[1], 2.0)):
        one = quantize.ProjectedOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.1), [(name, dict(net.named_parameters())[name])], mode
        )
        one.set_strength(strength)
        alone.append(one)
    random = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameters in zip(model.parameters(), binary.parameters(), ternary.parameters(), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=random, dtype=torch.float64)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for one in (optimizer, *alone):
            one.step()
    for name, net in zip(names, (binary, ternary), strict=True):
        assert torch.equal(dict(model.named_parameters())[name], dict(net.named_parameters())[name])
    other = network()
    pairs = [[(name, dict(other.named_parameters())[name])] for name in names]
    loaded = quantize.ProjectedOptimizer(torch.optim.SGD(other.parameters(), lr=0.1), list(zip(pairs, modes, strict=True)))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    assert_alike(model, optimizer, other, loaded)
    optimizer.freeze()
    values = dict(model.named_parameters())
    assert set(values["0.weight"].unique().tolist()) == {-1.0, 1.0}
    assert len(values["3.weight"].unique()) <= 3


# Weights that somebody else writes, and models that are moved, cast, frozen or broken.


def as_load_state_dict(model, state):
    model.load_state_dict(state)


def as_data(model, state):
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])


def as_new_data(model, state):
    for name, parameter in model.named_parameters():
        parameter.data = state[name].clone()


@pytest.mark.parametrize("write", [as_load_state_dict, as_data, as_new_data])
@pytest.mark.parametrize("mode_name", MODES)
def test_weights_that_are_written_into_the_model_are_taken_over(mode_name, write):
    model, optimizer = started(mode_name)
    random = torch.Generator().manual_seed(5)
    other = {name: value + torch.randn(value.shape, generator=random, dtype=torch.float64) * 0.1
             if value.is_floating_point() else value for name, value in network().state_dict().items()}  # fmt: skip
    write(model, other)
    for name, weight in optimizer.latent.items():
        assert torch.equal(weight, other[name])
    expected = {name: quantize.MODES[mode_name].hard_quantize(other[name], optimizer.levels.get(name)) for name in optimizer.latent}
    for name, value in optimizer.quantized().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)
    optimizer.zero_grad()
    rates = {name: weight.clone() for name, weight in optimizer.latent.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    fresh = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.base_optimizer = fresh
    optimizer.set_strength(0.0)
    optimizer.step()
    for name, weight in optimizer.latent.items():
        bound = rates[name].clamp(-1, 1) if quantize.MODES[mode_name].quantizer.clips else rates[name]
        torch.testing.assert_close(weight, bound, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode_name", LAZY)
def test_weights_that_are_put_in_for_a_while_leave_no_trace(mode_name):
    model, optimizer = started(mode_name)
    shown, latent = weights(model), {name: weight.clone() for name, weight in optimizer.latent.items()}
    averaged = {name: value + 0.3 if value.is_floating_point() else value for name, value in shown.items()}
    model.load_state_dict(averaged)
    with optimizer.hard_quantized():
        for name in latent:
            value = dict(model.named_parameters())[name]
            torch.testing.assert_close(value, quantize.MODES[mode_name].hard_quantize(averaged[name], optimizer.levels.get(name)))
    model.load_state_dict(shown)
    for name, weight in optimizer.latent.items():
        assert torch.equal(weight, latent[name])


@pytest.mark.parametrize("mode_name", MODES)
def test_restored_weights_are_what_a_freeze_quantizes(mode_name):
    model, optimizer = started(mode_name)
    best = weights(model)
    levels = {name: level.clone() for name, level in optimizer.levels.items()}
    steps(model, optimizer, 3, 6)
    model.load_state_dict(best)
    mode = quantize.MODES[mode_name]
    levels = optimizer.levels if levels else {}
    expected = {name: mode.hard_quantize(best[name], levels.get(name)) for name in optimizer.latent}
    optimizer.freeze()
    for name, value in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode_name", MODES)
def test_a_cast_model_is_followed(mode_name):
    model, optimizer = started(mode_name, count=0)
    model.float()
    optimizer.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.set_strength(0.4)
    images, labels = batch(0)
    F.cross_entropy(model(images.float()), labels).backward()
    optimizer.step()
    assert all(weight.dtype == torch.float32 for weight in optimizer.latent.values())
    with optimizer.hard_quantized():
        pass
    optimizer.freeze()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_weights_in_half_precision_are_warned_of():
    model = network().to(torch.bfloat16)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="half precision"):
        wrap(model, "prox", base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(network(), "prox")


@pytest.mark.parametrize("mode_name", MODES)
def test_a_layer_that_the_user_holds_still_is_left_alone(mode_name):
    model = network()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.detach().clone()
    mode = quantize.MODES[mode_name]
    if mode.quantizer.spares_ends:
        with pytest.raises(ValueError, match="no parameter to quantize"):
            wrap(model, mode_name)
        return
    optimizer = wrap(model, mode_name)
    optimizer.set_strength(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    optimizer.freeze()
    assert torch.equal(model[3].weight, before)
    assert quantize.reasons(model, mode)["3.weight"] == "left as it is: requires_grad is False"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode_name", MODES)
def test_weights_that_are_not_finite_are_refused_by_name(mode_name, value):
    model, optimizer = started(mode_name)
    name = next(iter(optimizer.latent))
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[0] = value
    before = weights(model)

    def show():
        with optimizer.hard_quantized():
            pass

    for call in (show, optimizer.quantized, optimizer.freeze):
        with pytest.raises(quantize.NotFinite, match=name):
            call()
    assert not optimizer.frozen
    for key, found in model.state_dict().items():
        assert torch.equal(found.nan_to_num(), before[key].nan_to_num())


@pytest.mark.parametrize("mode_name", MODES)
def test_frozen_weights_gather_no_gradients(mode_name):
    model, optimizer = started(mode_name, frozen=True)
    frozen = {name: dict(model.named_parameters())[name] for name in optimizer.latent}
    before = {name: parameter.detach().clone() for name, parameter in frozen.items()}
    model.requires_grad_(True)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        assert all(parameter.grad is None for parameter in frozen.values())
        optimizer.step()
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("mode_name", MODES)
def test_autocast_forgets_the_weights_of_before(mode_name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    mode = quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), mode.select(model), mode)
    optimizer.set_strength(0.1)
    inputs = torch.randn(5, 8)
    parameters = dict(model.named_parameters())

    def shown_by(name):  # through what autocast multiplies with
        layer = model[int(name.split(".")[0])]
        return F.linear(torch.eye(layer.in_features), layer.weight).t().float()

    def fails_after_moving():
        parameters[name].add_(1.0)
        raise ZeroDivisionError

    with torch.autocast("cpu", torch.bfloat16):
        model(inputs)
        name = next(iter(optimizer.latent))
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        with optimizer.hard_quantized():
            assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        optimizer.set_strength(0.9)
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        model(inputs).square().sum().backward()
        optimizer.step()
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.base_optimizer.step = fails_after_moving
        with pytest.raises(ZeroDivisionError):
            optimizer.step()
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())
        del optimizer.base_optimizer.step
        optimizer.freeze()
        assert torch.equal(shown_by(name), parameters[name].bfloat16().float())


@pytest.mark.parametrize("mode_name", MODES)
def test_inside_hard_quantized_the_weights_in_training_are_still_told(mode_name):
    _, optimizer = started(mode_name)
    latent = {name: weight.clone() for name, weight in optimizer.latent.items()}
    state = copy.deepcopy(optimizer.state_dict())
    with optimizer.hard_quantized():
        for name, weight in optimizer.latent.items():
            assert torch.equal(weight, latent[name])
        inside = optimizer.state_dict()
    for index, entry in state["state"].items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(inside["state"][index][key]), torch.as_tensor(value)), key


def test_errors_are_one_clear_line():
    model, mode = network(), quantize.MODES["prox"]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    for arguments, error, words in (
        ((base, model.parameters(), mode), TypeError, "pairs are needed"),
        ((base, mode.select(model), "prox"), TypeError, r"quantize\.mode\('prox'\)"),
        ((base, mode.select(model)), TypeError, "pairs and a mode"),
        ((model, mode.select(model), mode), TypeError, "one of torch.optim"),
        ((base, [("w", nn.Parameter(torch.empty(3, device="meta")))], mode), ValueError, "meta"),
        ((base, [("w", nn.Parameter(torch.ones(3)))], mode), ValueError, "requires_grad to False"),
    ):
        with pytest.raises(error, match=words) as caught:
            quantize.ProjectedOptimizer(*arguments)
        assert "\n" not in str(caught.value)
    two = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="first and the last layer"):
        wrap(two, "prox_ternary", torch.optim.SGD(two.parameters(), lr=0.1))


# What is selected.


def test_every_layer_that_multiplies_is_selected():
    model = nn.ModuleDict(
        {
            "downsample": nn.Conv2d(3, 4, 3),
            "up": nn.ConvTranspose2d(4, 4, 2),
            "rnn": nn.LSTM(4, 5, num_layers=2, bidirectional=True),
            "cell": nn.GRUCell(4, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "cross": nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            "embedding": nn.Embedding(7, 4),
            "norm": nn.LayerNorm(4),
            "bilinear": nn.Bilinear(2, 3, 4),
        }
    )
    names = [name for name, _ in quantize.quantizable_layers(model)]
    expected = {"downsample.weight", "up.weight", "cell.weight_ih", "cell.weight_hh", "bilinear.weight",
                "attention.in_proj_weight", "attention.out_proj.weight", "cross.q_proj_weight", "cross.k_proj_weight",
                "cross.v_proj_weight", "cross.out_proj.weight"}  # fmt: skip
    expected |= {f"rnn.weight_{kind}_l{layer}{way}" for kind in ("ih", "hh") for layer in (0, 1) for way in ("", "_reverse")}
    assert set(names) == expected
    assert "embedding.weight" in dict(quantize.quantizable_layers(model, embeddings=True))
    found = quantize.reasons(model, quantize.MODES["prox"])
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert {name for name, reason in found.items() if reason == "quantized"} == expected
    assert "embedding" in found["embedding.weight"]
    assert "bias" in found["rnn.bias_ih_l0"]
    assert "LayerNorm" in found["norm.weight"]
    spared = quantize.reasons(model, quantize.MODES["prox_ternary"])
    assert "first or last" in spared["downsample.weight"]


@pytest.mark.parametrize("mode_name", MODES)
def test_explain_knows_what_is_quantized_for_good(mode_name):
    model, optimizer = started(mode_name, frozen=True)
    copied, _ = copy.deepcopy((model, optimizer))
    loaded, other = started(mode_name)
    loaded.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for net in (model, copied, loaded):
        reasons = quantize.reasons(net, quantize.MODES[mode_name])
        assert {name for name, reason in reasons.items() if reason == "quantized"} == set(optimizer.latent)


def test_explain_prints_each_parameter(capsys):
    model = network()
    quantize.explain(model, quantize.MODES["prox_ternary"])
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [name for name, _ in model.named_parameters()]
    assert any(line.split() == ["3.weight", "quantized"] for line in said)


def test_a_parametrized_layer_is_its_parameter_or_a_refusal():
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    names = [name for name, _ in quantize.quantizable_layers(spectral)]
    assert names == ["0.parametrizations.weight.original", "1.weight"]
    optimizer = wrap(spectral, "prox", torch.optim.SGD(spectral.parameters(), lr=0.1))
    optimizer.freeze()
    assert set(spectral[0].parametrizations.weight.original.unique().tolist()) <= {-1.0, 1.0}
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"0\.weight is computed by the parametrization WeightNorm.*remove_parametrizations"):
        quantize.quantizable_layers(normed)
    assert quantize.reasons(normed, quantize.MODES["prox"])["0.weight"].startswith("refused")
    assert quantize.reasons(normed, quantize.MODES["prox"])["1.weight"] == "quantized"
    between = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    said = quantize.reasons(between, quantize.MODES["prox_ternary"])
    assert [name for name, reason in said.items() if reason == "quantized"] == ["1.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="remove_weight_norm"):
        quantize.quantizable_layers(old)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm, prune.random_unstructured])
@pytest.mark.parametrize("layer", [nn.LSTM(4, 4, proj_size=2, bidirectional=True), nn.GRUCell(4, 4)])
def test_a_recurrent_weight_that_is_computed_anew_is_refused(layer, change):
    """What it is computed from, gains and masked weights, used to be quantized in its place."""
    layer = copy.deepcopy(layer)
    name = next(name for name in reversed(dict(layer.named_parameters())) if name.startswith("weight"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(layer, name, **({"amount": 0.5} if change is prune.random_unstructured else {}))
    with pytest.raises(ValueError, match=f"{name} is computed anew in each forward pass"):
        quantize.quantizable_layers(layer)


def test_other_parameters_of_a_recurrent_layer_are_left_alone():
    layer = nn.LSTM(4, 4)
    layer.register_parameter("weight_ih_scale", nn.Parameter(torch.ones(())))
    assert [name for name, _ in quantize.quantizable_layers(layer)] == ["weight_ih_l0", "weight_hh_l0"]
    weight = layer._parameters.pop("weight_hh_l0")  # as WeightDrop does
    layer.register_parameter("weight_hh_l0_raw", weight)
    with pytest.raises(ValueError, match="weight_hh_l0 is computed anew"):
        quantize.quantizable_layers(layer)


def test_a_network_that_knows_better_is_asked():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def quantizable(self):
            return [("b.weight", self.b.weight)]

    model = nn.Sequential(nn.Linear(2, 2), Own())
    assert [name for name, _ in quantize.quantizable_layers(model)] == ["0.weight", "1.b.weight"]
    assert "quantizable()" in quantize.reasons(model, quantize.MODES["prox"])["1.a.weight"]
    compiled = torch.compile(model[1])  # it passes the method on, and has names of its own
    assert [name for name, _ in quantize.quantizable_layers(compiled)] == ["_orig_mod.b.weight"]
    assert "quantizable()" in quantize.reasons(compiled, quantize.MODES["prox"])["_orig_mod.a.weight"]

    class ByProperty(Own):
        quantizable = property(lambda self: lambda: [("a.weight", self.a.weight)])

    assert [name for name, _ in quantize.quantizable_layers(ByProperty())] == ["a.weight"]


def test_a_mode_is_a_plain_value():
    for mode in quantize.MODES.values():
        assert pickle.loads(pickle.dumps(mode)) == mode
        assert copy.deepcopy(mode) == mode
    assert dataclasses.replace(quantize.MODES["prox"], name="own").strength_grows


def test_a_state_is_read_back_as_plain_values():
    _, optimizer = started("ttq")
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    content = torch.load(buffer, weights_only=True)
    assert set(quantize.levels_in(content)) == set(optimizer.levels)


@pytest.mark.parametrize("mode_name", ["prox", "lazy", "prox_ternary"])
def test_a_compiled_training_step_is_the_plain_one(mode_name):
    model, optimizer = started(mode_name, count=1)
    other, plain = started(mode_name, count=1)

    def step(number):
        images, labels = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    compiled = torch.compile(step, backend="eager")
    for number in range(1, 4):
        compiled(number)
    steps(other, plain, 1, 4)
    for (name, value), given in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, given, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("mode_name", LAZY)
def test_written_weights_outlive_a_validation_and_a_copy(mode_name):
    for way in ("validated", "copied", "pickled"):
        model, optimizer = started(mode_name)
        other = {name: value * 0.7 if value.is_floating_point() else value for name, value in network().state_dict().items()}
        model.load_state_dict(other)
        if way == "validated":
            with optimizer.hard_quantized():
                pass
        elif way == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        else:
            model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
        for name, weight in optimizer.latent.items():
            assert torch.equal(weight, other[name]), (way, name)


CASTS = {
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("words", CASTS)
@pytest.mark.parametrize("mode_name", LAZY)
def test_a_cast_keeps_the_latent_weights(mode_name, words, monkeypatch):
    for small in (2**16, 0):  # side by side, and where each tensor is large
        monkeypatch.setitem(quantize.blocks.SMALL, "cpu", small)
        model, optimizer = started(mode_name)
        latent = {name: weight.clone() for name, weight in optimizer.latent.items()}
        CASTS[words](model)
        for name, weight in optimizer.latent.items():
            assert torch.equal(weight, latent[name].to(weight.dtype)), name
        optimizer.base_optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for name, weight in optimizer.latent.items():
            assert torch.equal(weight, latent[name].to(weight.dtype)), name


def test_learned_levels_follow_an_optimizer_that_maximizes():
    found = []
    for sign in (1, -1):
        model = network()
        mode = quantize.MODES["ttq"]
        base = torch.optim.SGD(model.parameters(), lr=0.1, maximize=sign < 0)
        optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode)
        for step in range(4):
            optimizer.zero_grad()
            images, labels = batch(step)
            (sign * F.cross_entropy(model(images), labels)).backward()
            optimizer.step()
        found.append((optimizer.levels["3.weight"], optimizer.latent["3.weight"]))
    for least, most in zip(*found, strict=True):
        torch.testing.assert_close(least, most, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_is_said():
    weight = nn.Parameter(torch.ones(3))
    without_rates = torch.optim.Optimizer([weight], {})
    with pytest.raises(ValueError, match="no learning rate, lr"):
        quantize.ProjectedOptimizer(without_rates, [("w", weight)], quantize.mode("lazy"))
    _, optimizer = started("parq")
    with pytest.raises(ValueError, match="<= 1"):
        optimizer.set_strength(7.0)
    with optimizer.hard_quantized(), pytest.raises(RuntimeError, match="hard_quantized"):
        copy.deepcopy(optimizer)
    model, inner = started("prox")
    with pytest.raises(TypeError, match="wrapped already"):
        wrap(model, "lazy", inner)
    inner.param_groups[0]["params"] = inner.param_groups[0]["params"][1:]
    with pytest.raises(ValueError, match=r"does not hold the parameter '0\.weight'"):
        inner.step()
    two = network()
    mode = quantize.mode("lazy_alt", bits=2)
    of_two = quantize.ProjectedOptimizer(torch.optim.SGD(two.parameters(), lr=0.1), mode.select(two), mode)
    three = quantize.mode("lazy_alt", bits=3)
    of_three = quantize.ProjectedOptimizer(torch.optim.SGD(two.parameters(), lr=0.1), three.select(two), three)
    with pytest.raises(ValueError, match="2 bits, this optimizer is of alternating, 3 bits"):
        of_three.load_state_dict(of_two.state_dict())
    broken = of_two.state_dict()
    broken["param_groups"][0].pop("projection_draws")
    with pytest.raises(ValueError, match="projection_draws"):
        of_two.load_state_dict(broken)
