"""The wrapped step of every mode against a plain transcription of it, tensor by tensor, in float64."""

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize

PROX = {"lazy": plain.prox_binary, "prox": plain.prox_binary, "prox_ternary": plain.prox_ternary}
HARD = {"lazy": plain.binarize, "prox": plain.binarize, "prox_ternary": plain.ternarize}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
}


def network() -> nn.Module:
    """Three layers with weights, so that every selector has something to select."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 3),
    )
    return nn.Sequential(*layers).double()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, generator=random, dtype=torch.float64), torch.randint(0, 3, (6,), generator=random)


def backward(model: nn.Module, step: int) -> None:
    images, labels = batch(step)
    F.cross_entropy(model(images), labels).backward()


def wrap(model: nn.Module, mode_name: str, base: torch.optim.Optimizer | None = None) -> quantize.ProjectedOptimizer:
    mode = quantize.MODES[mode_name]
    return quantize.ProjectedOptimizer(base or torch.optim.Adam(model.parameters(), lr=0.01), mode.select(model), mode)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("mode_name", quantize.MODES)
def test_twenty_steps_are_the_transcription(mode_name, optimizer_name):
    strength = {"lazy": 0.6, "prox": 1.5, "prox_ternary": 1.5}[mode_name]
    model, reference = network(), network()
    optimizer = wrap(model, mode_name, OPTIMIZERS[optimizer_name](model.parameters()))
    optimizer.set_strength(strength)
    base = OPTIMIZERS[optimizer_name.removeprefix("fused ")](reference.parameters())
    names = {name for name, _ in quantize.MODES[mode_name].select(reference)}
    chosen = {name: parameter for name, parameter in reference.named_parameters() if name in names}
    latent = {name: parameter.detach().numpy().copy() for name, parameter in chosen.items()}

    for step in range(20):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

        base.zero_grad()
        with torch.no_grad():
            for name, parameter in chosen.items():
                shown = PROX[mode_name](latent[name], strength) if mode_name == "lazy" else latent[name]
                parameter.copy_(torch.tensor(shown))
        backward(reference, step)
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(torch.tensor(latent[name]))
        base.step()
        for name, parameter in chosen.items():
            w = parameter.detach().numpy().copy()
            if mode_name != "lazy":
                w = PROX[mode_name](w, base.param_groups[0]["lr"] * strength)
            latent[name] = np.clip(w, -1, 1)
            with torch.no_grad():
                parameter.copy_(torch.tensor(latent[name]))

    for name, parameter in reference.named_parameters():
        expected = PROX[mode_name](latent[name], strength) if mode_name == "lazy" and name in names else parameter.detach().numpy()
        np.testing.assert_allclose(
            dict(model.named_parameters())[name].detach().numpy(), expected, rtol=0, atol=1e-12, err_msg=name
        )
    for name, weight in optimizer.latent.items():
        np.testing.assert_allclose(weight.numpy(), latent[name], rtol=0, atol=1e-12)
    with optimizer.hard_quantized():
        for name, w in latent.items():
            np.testing.assert_allclose(
                dict(model.named_parameters())[name].detach().numpy(), HARD[mode_name](w), rtol=0, atol=1e-12
            )


@pytest.mark.parametrize("capturable", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("mode_name", ["prox", "prox_ternary"])
def test_each_group_is_pulled_at_its_own_learning_rate(mode_name, capturable):
    model = network()
    first, *rest = model.parameters()
    inner = model[3].weight
    groups = [{"params": [first]}, {"params": [inner], "lr": 0.5}, {"params": [p for p in rest if p is not inner]}]
    base = torch.optim.SGD(groups, lr=0.01)
    if capturable:
        for group in base.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    mode = quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode, capturable=capturable)
    optimizer.set_strength(0.3)
    before = {name: parameter.detach().numpy().copy() for name, parameter in quantize.MODES[mode_name].select(model)}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in quantize.MODES[mode_name].select(model):
        expected = PROX[mode_name](before[name], 0.3 * (0.5 if parameter is inner else 0.01))
        np.testing.assert_allclose(parameter.detach().numpy(), expected.clip(-1, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("mode_name", quantize.MODES)
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_frozen_weights_never_move_again(mode_name, optimizer_name):
    model = network()
    optimizer = wrap(model, mode_name, OPTIMIZERS[optimizer_name](model.parameters()))
    optimizer.set_strength(1.0)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    expected = {name: HARD[mode_name](weight.numpy()) for name, weight in optimizer.latent.items()}
    optimizer.freeze()
    frozen = {name: weight.clone() for name, weight in optimizer.latent.items()}
    for name, weight in frozen.items():
        np.testing.assert_allclose(weight.numpy(), expected[name], rtol=0, atol=1e-12)
    moving = weights(model)
    for step in range(5):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        optimizer.freeze()
        if step == 2:  # as the regime does at an epoch
            optimizer.base_optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name])
            assert not parameter.requires_grad
            assert parameter.grad is None
            assert all(parameter is not other for group in optimizer.param_groups for other in group["params"])
        else:
            assert not torch.equal(parameter, moving[name]), name


def test_only_selected_parameters_are_projected():
    model, unwrapped = network(), network()
    optimizer = wrap(model, "prox", torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer.set_strength(100.0)
    with torch.no_grad():
        for net in (model, unwrapped):
            net[6].bias.fill_(3.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    selected = {name for name, _ in quantize.MODES["prox"].select(model)}
    for (name, parameter), other in zip(model.named_parameters(), unwrapped.parameters(), strict=True):
        if name in selected:
            assert set(parameter.unique().tolist()) <= {-1.0, 1.0}
        else:
            assert torch.equal(parameter, other), name


def test_lazy_shows_projected_weights_from_the_first_pass_on():
    model = network()
    latent = model[3].weight.detach().clone()
    optimizer = wrap(model, "lazy")
    assert torch.equal(model[3].weight, quantize.binarize(latent))
    assert torch.equal(optimizer.latent["3.weight"], latent)
    optimizer.set_strength(0.25)
    assert torch.equal(model[3].weight, quantize.prox_binary(latent, 0.25))
    optimizer.set_strength(0.0)
    assert torch.equal(model[3].weight, latent)


@pytest.mark.parametrize("mode_name", quantize.MODES)
def test_hard_quantized_leaves_no_trace(mode_name):
    model = network()
    optimizer = wrap(model, mode_name)
    optimizer.set_strength(0.5)
    backward(model, 0)
    optimizer.step()
    before = weights(model)
    quantized = optimizer.quantized()

    def assert_quantized():
        for name, weight in quantized.items():
            assert torch.equal(dict(model.named_parameters())[name], weight)

    def look_and_fail():
        with optimizer.hard_quantized():
            with optimizer.hard_quantized():
                assert_quantized()
            assert_quantized()
            for call in (optimizer.step, optimizer.freeze, lambda: optimizer.set_strength(1.0)):
                with pytest.raises(RuntimeError, match="hard_quantized"):
                    call()
            raise KeyError

    with pytest.raises(KeyError):
        look_and_fail()
    assert_same(model, before)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("mode_name", quantize.MODES)
def test_state_dict_continues_exactly(mode_name, freeze, tmp_path):
    def steps(model, optimizer, first, last):
        for step in range(first, last):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()

    model = network()
    optimizer = wrap(model, mode_name)
    optimizer.set_strength(0.7)
    steps(model, optimizer, 0, 3)
    if freeze:
        optimizer.freeze()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "file")
    steps(model, optimizer, 3, 6)

    content = torch.load(tmp_path / "file", weights_only=True)
    other = network()
    continued = wrap(other, mode_name)
    other.load_state_dict(content["model"])
    continued.load_state_dict(content["optimizer"])
    assert continued.frozen == freeze
    assert continued.strength == 0.7
    steps(other, continued, 3, 6)
    assert_same(other, weights(model))
    for name, weight in optimizer.latent.items():
        assert torch.equal(weight, continued.latent[name])


def test_state_of_another_mode_or_network_is_refused():
    model = network()
    state = wrap(model, "lazy").state_dict()
    with pytest.raises(ValueError, match="prox"):
        wrap(network(), "prox").load_state_dict(state)
    frozen = wrap(network(), "lazy")
    frozen.freeze()
    with pytest.raises(ValueError, match="frozen"):
        frozen.load_state_dict(state)
    state["latent"].pop("3.weight")
    with pytest.raises(ValueError, match="latent"):
        wrap(network(), "lazy").load_state_dict(state)


def test_bad_arguments_are_refused():
    model, mode = network(), quantize.MODES["prox"]
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameter"):
        quantize.ProjectedOptimizer(base, [], mode)
    with pytest.raises(ValueError, match="twice"):
        quantize.ProjectedOptimizer(base, mode.select(model) * 2, mode)
    with pytest.raises(ValueError, match=r"3\.weight"):
        quantize.ProjectedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), [("3.weight", model[3].weight)], mode)
    optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength"):
            optimizer.set_strength(strength)
    with pytest.raises(ValueError, match="base optimizer"):
        optimizer.base_optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)


def test_torch_habits_work():
    model = network()
    optimizer = wrap(model, "prox", torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad(set_to_none=True)
        images, labels = batch(0)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert len(calls) == 1
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_parameters_of_two_dtypes():
    model = network()
    model[3].float()
    optimizer = wrap(model, "prox", torch.optim.SGD(model.parameters(), lr=1.0))
    optimizer.set_strength(5.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for _, parameter in quantize.MODES["prox"].select(model):
        assert set(parameter.unique().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("capturable", [False, True], ids=["numbers", "tensors"])
def test_a_mode_of_ones_own_is_one_object(capturable):
    def prox_to_zero(w, strength):
        return w.sign() * (w.abs() - strength).clamp(min=0) + 0 * w.median()  # a function of one tensor

    mode = quantize.ProjectionMode(
        "sparse", "soft thresholding", quantize.select_all_layers, lambda w: torch.zeros_like(w), prox_to_zero
    )
    model = network()
    before = weights(model)
    rate = torch.tensor(0.1, dtype=torch.float64) if capturable else 0.1
    base = torch.optim.SGD(model.parameters(), lr=rate)
    optimizer = quantize.ProjectedOptimizer(base, mode.select(model), mode, capturable=capturable)
    optimizer.set_strength(mode.strength(0.1, epoch=2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in mode.select(model):
        expected = before[name].sign() * (before[name].abs() - 0.02).clamp(min=0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-15)


def test_a_prefix_before_the_names_changes_nothing():
    model = network()
    for mode in quantize.MODES.values():
        plainly = [id(parameter) for _, parameter in mode.select(model)]
        assert plainly == [id(parameter) for _, parameter in mode.select(nn.ModuleDict({"module": model}))]
