"""Networks that come in another order or from elsewhere: finished before they are wrapped, of other parameters, of other signs."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import quantize

LAZY = [quantize.mode(name) for name, mode in quantize.MODES.items() if mode.lazy]
LAZY += [
    quantize.mode("lazy_alt", bits=3, by_row=True),
    quantize.mode("lazy_alt", "greedy_mean", bits=2),
    quantize.mode("lazy_alt", "greedy_median", bits=2),
    quantize.mode("parq", bits=2, by_row=True),
    quantize.mode("binary_relax", "uniform", bits=3),
]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    return nn.Sequential(*layers)


def wrap(model: nn.Module, mode: quantize.ProjectionMode, pairs: int = 99) -> quantize.ProjectedOptimizer:
    adam = torch.optim.Adam(model.named_parameters(), lr=0.01)
    return quantize.ProjectedOptimizer(adam, mode.select(model)[:pairs], mode)


def train(model: nn.Module, optimizer: quantize.ProjectedOptimizer, steps: int) -> None:
    drawn = torch.Generator().manual_seed(7)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=drawn)).square().mean().backward()
        optimizer.step()


def assert_same(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("load", ["load_state_dict", "load_projection"])
@pytest.mark.parametrize("mode", LAZY, ids=lambda mode: f"{mode.name} {mode.quantizer.in_words}")
def test_a_finished_network_is_as_it_was_in_whatever_order_it_is_loaded(mode, load):
    model = network(0)
    optimizer = wrap(model, mode)
    optimizer.set_strength(mode.strength(0.5, 1, share=0.5))
    train(model, optimizer, 20)
    optimizer.freeze()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for order in ("model wrap state", "wrap model state", "wrap state model"):
        again = network(1)
        for step in order.split():
            if step == "model":
                again.load_state_dict(weights)
            elif step == "wrap":
                wrapped = wrap(again, mode)
            else:
                getattr(wrapped, load)(state)
        assert wrapped.frozen
        assert_same(again, weights)
        assert all(torch.equal(levels, wrapped.levels[name]) for name, levels in optimizer.levels.items())
        train(again, wrapped, 2)
        assert all(torch.equal(weight, weights[name]) for name, weight in wrapped.parameters.items())


def test_learned_levels_on_one_side_of_zero_come_back():
    mode = quantize.mode("ttq")
    model = network(0)
    optimizer = wrap(model, mode)
    with torch.no_grad():
        for levels in optimizer.levels.values():
            levels.copy_(torch.tensor([-0.25, -1.5]))
    optimizer.set_strength(0.0)
    optimizer.freeze()
    assert model[2].weight.unique().tolist()[:2] == [-1.5, -0.25]
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = network(1)
    again.load_state_dict(weights)
    wrapped = wrap(again, mode)
    wrapped.load_state_dict(state)
    assert_same(again, weights)
    assert [levels.tolist() for levels in wrapped.levels.values()] == [[-0.25, -1.5]] * 2


class Twins(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(16, 16, bias=False))

    def forward(self, x):
        return self.q(x) - 2 * self.k(x)


@pytest.mark.parametrize("mode", [quantize.mode("lazy"), quantize.mode("ttq"), quantize.mode("lazy_alt", bits=2)])
def test_the_latent_weights_of_other_layers_are_refused(mode):
    model = Twins("aqkz")
    optimizer = wrap(model, mode)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    other_order = "another order: number 1 is 'q.weight' there and 'k.weight' here"
    for names, pairs, said in (("akqz", 9, other_order), ("aqkz", 1, "which is not quantized here")):
        other = Twins(names)
        wrapped = wrap(other, mode, pairs)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=said):
            wrapped.load_state_dict(state)
        assert_same(other, before)
    with pytest.raises(ValueError, match="are missing"):
        optimizer.load_state_dict(wrap(Twins("aqkz"), mode, 1).state_dict())


@pytest.mark.parametrize("mode", [quantize.mode("lazy"), quantize.mode("prox")])
def test_the_same_layers_are_known_under_other_prefixes_and_beside_held_ones(mode):
    model = Twins("aqkz")
    optimizer = wrap(model, mode)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    checkpointed = Twins("aqkz")
    apply_activation_checkpointing(checkpointed, check_fn=lambda layer: isinstance(layer, nn.Linear))
    held = Twins("aqkz")
    held.k.weight.requires_grad_(False)
    for other in (nn.ModuleDict({"_orig_mod": Twins("aqkz")}), nn.ModuleDict({"net": Twins("aqkz")}), checkpointed, held):
        wrapped = wrap(other, mode)
        wrapped.load_state_dict(state)
        if mode.lazy:
            expected = [weight for name, weight in optimizer.latent.items() if other is not held or name != "k.weight"]
            assert all(map(torch.equal, wrapped.latent.values(), expected))


@pytest.mark.parametrize("mode", [quantize.mode("lazy"), quantize.mode("prox"), quantize.mode("ttq")])
def test_a_frozen_state_that_has_all_names_is_taken(mode):
    """As those of earlier versions have."""
    model = network(0)
    optimizer = wrap(model, mode)
    optimizer.freeze()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["param_names"] = [name for name, _ in model.named_parameters()]
    again = network(0)
    again.load_state_dict(weights)
    wrapped = wrap(again, mode)
    wrapped.load_state_dict(state)
    train(again, wrapped, 1)
    assert all(torch.equal(weight, weights[name]) for name, weight in wrapped.parameters.items())


def test_a_copy_of_what_was_just_wrapped_takes_a_finished_networks_state():
    mode = quantize.mode("lazy_alt", "greedy_median", bits=2)
    model = network(0)
    optimizer = wrap(model, mode)
    optimizer.freeze()
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = network(1)
    again.load_state_dict(weights)
    again, wrapped = copy.deepcopy((again, wrap(again, mode)))
    wrapped.load_state_dict(state)
    assert_same(again, weights)


@pytest.mark.parametrize("kind", ["signs", "clipped"])
@pytest.mark.parametrize("mode_name", ["lazy", "parq", "prox_connect"])
def test_another_network_is_taken_whole_in_modes_of_signs(mode_name, kind):
    """Half of its signs, and where it is clipped some of its weights, are what the model shows already."""
    mode = quantize.mode(mode_name)
    model = network(0)
    optimizer = wrap(model, mode)
    optimizer.set_strength(mode.strength(1.0, 1, share=1.0))
    assert model[2].weight.abs().eq(1).all()
    other = {name: value.sign() if kind == "signs" else (value * 8).clamp(-1, 1) for name, value in network(1).state_dict().items()}
    model.load_state_dict(other)
    for name, latent in optimizer.latent.items():
        assert torch.equal(latent, other[name])


def test_a_few_signs_that_are_turned_leave_the_others_their_latent_weights():
    model = network(0)
    optimizer = wrap(model, quantize.mode("lazy"))
    before = optimizer.latent["2.weight"].clone()
    with torch.no_grad():
        model[2].weight[0, :3].neg_()
    after = optimizer.latent["2.weight"]
    assert torch.equal(after[0, :3], model[2].weight[0, :3])
    assert torch.equal(after.flatten()[3:], before.flatten()[3:])


def test_frozen_parameters_leave_with_their_names():
    model = network(0)
    optimizer = wrap(model, quantize.mode("prox"))
    optimizer.freeze()
    named = dict(model.named_parameters())
    (group,) = optimizer.param_groups
    assert [id(named[name]) for name in group["param_names"]] == [id(parameter) for parameter in group["params"]]


def test_a_fraction_of_a_bit_is_refused():
    with pytest.raises(ValueError, match="a whole number from 1"):
        quantize.mode("prox_alt", bits=2.5)


def test_packed_layers_go_into_those_of_another_memory_format():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, bias=False)
    layer.weight.data.sign_()
    by_format = {}
    for memory_format in (torch.channels_last, torch.contiguous_format):
        packed = nn.Sequential(copy.deepcopy(layer).to(memory_format=memory_format))
        assert quantize.pack_layers(packed, ["0.weight"]) == ["0.weight"]
        by_format[memory_format] = packed
    for model in by_format.values():
        for other in by_format.values():
            other.load_state_dict(model.state_dict())
            assert torch.equal(other[0].weight, layer.weight)
    turned = by_format[torch.channels_last]
    assert turned[0].weight.is_contiguous(memory_format=torch.channels_last)
    before = turned.state_dict()
    before._metadata["0"]["version"] = 1
    with pytest.raises(RuntimeError, match="of an earlier version"):
        turned.load_state_dict(before)


@pytest.mark.parametrize("add", ["register_forward_hook", "register_forward_pre_hook", "forward"])
def test_a_layer_with_hooks_stays_as_it_is(add):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        nn.init.ones_(layer.weight)
    if add == "forward":
        model[0].forward = lambda x: 2 * x
    else:
        getattr(model[0], add)(lambda module, x, *result: 2 * (result or x)[0])
    x = torch.randn(3, 4)
    expected = model(x)
    assert quantize.pack_layers(model, ["0.weight", "1.weight"]) == ["1.weight"]
    assert torch.equal(model(x), expected)
