"""The wrapped step of every mode against a plain transcription of it, tensor by tensor, in float64."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plain
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quantize


class Plain(NamedTuple):
    """A mode once more: quantizer, pull(w, quantizer, strength), place, clip, and whether the learning rate scales the strength."""

    quantizer: Callable[[np.ndarray], np.ndarray]
    pull: Callable[[np.ndarray, Callable, float], np.ndarray]
    lazy: bool
    clip: bool
    scaled: bool
    strength: float


def soft(w, quantizer, strength):
    return plain.soft(w, quantizer(w), strength)


def quadratic(w, quantizer, strength):
    return plain.quadratic(w, quantizer(w), strength)


def quadratic_thrice(w, quantizer, strength):
    result = w
    for _ in range(3):
        result = plain.quadratic(w, quantizer(result), strength)
    return result


def hard(w, quantizer, strength):
    return quantizer(w)


def toward_signs(w, quantizer, slope):
    return plain.piecewise_affine(w, [-1.0, 1.0], slope)


def toward_three(w, quantizer, slope):
    return plain.piecewise_affine(w, sorted({*quantizer(w).ravel().tolist(), 0.0}), slope)


def rows(quantizer, *arguments):
    return lambda w: plain.by_row(quantizer, w, *arguments)


PLAIN = {
    "lazy": (quantize.mode("lazy"), Plain(plain.binarize, soft, True, True, False, 0.6)),
    "prox": (quantize.mode("prox"), Plain(plain.binarize, soft, False, True, True, 1.5)),
    "prox_ternary": (quantize.mode("prox_ternary"), Plain(plain.ternarize, quadratic, False, True, True, 1.5)),
    "prox_median": (quantize.mode("prox_median"), Plain(plain.greedy_median, soft, False, True, True, 1.5)),
    "prox_alt": (quantize.mode("prox_alt"), Plain(plain.alternating, quadratic_thrice, False, False, True, 1.5)),
    "prox_alt by row": (
        quantize.mode("prox_alt", bits=2, by_row=True),
        Plain(rows(plain.alternating), quadratic_thrice, False, False, True, 1.5),
    ),
    "lazy_alt": (quantize.mode("lazy_alt"), Plain(plain.alternating, hard, True, False, False, 1.0)),
    "lazy_alt by greedy means": (
        quantize.mode("lazy_alt", "greedy_mean", 2, True),
        Plain(rows(plain.greedy_mean, 2), hard, True, False, False, 1.0),
    ),
    "parq": (quantize.mode("parq"), Plain(plain.binarize, toward_signs, True, True, False, 0.4)),
    "parq, ternary": (quantize.mode("parq", "ternary"), Plain(plain.ternarize, toward_three, True, True, False, 0.4)),
    "binary_relax": (quantize.mode("binary_relax"), Plain(plain.binarize, quadratic, True, True, False, 0.8)),
    "prox_connect": (quantize.mode("prox_connect"), Plain(plain.binarize, soft, True, True, False, 0.3)),
    "prox_connect, uniform": (
        quantize.mode("prox_connect", "uniform", 2),
        Plain(lambda w: plain.uniform(w, 2), quadratic, True, False, False, 0.3),
    ),
}
PROX = {name: of.pull for name, (_, of) in PLAIN.items()}
HARD = {name: of.quantizer for name, (_, of) in PLAIN.items()}
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
@pytest.mark.parametrize("words", PLAIN)
def test_twenty_steps_are_the_transcription(words, optimizer_name):
    mode, of = PLAIN[words]
    model, reference = network(), network()
    optimizer = quantize.ProjectedOptimizer(OPTIMIZERS[optimizer_name](model.parameters()), mode.select(model), mode)
    optimizer.set_strength(of.strength)
    base = OPTIMIZERS[optimizer_name.removeprefix("fused ")](reference.parameters())
    names = {name for name, _ in mode.select(reference)}
    chosen = {name: parameter for name, parameter in reference.named_parameters() if name in names}
    latent = {name: parameter.detach().numpy().copy() for name, parameter in chosen.items()}

    def put(weights):
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter.copy_(torch.tensor(weights[name]))

    def shown():
        return {name: of.pull(w, of.quantizer, of.strength) if of.lazy else w for name, w in latent.items()}

    for step in range(20):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

        base.zero_grad()
        put(shown())
        backward(reference, step)
        put(latent)
        base.step()
        for name, parameter in chosen.items():
            w = parameter.detach().numpy().copy()
            if not of.lazy:
                w = of.pull(w, of.quantizer, of.strength * (base.param_groups[0]["lr"] if of.scaled else 1))
            latent[name] = np.clip(w, -1, 1) if of.clip else w
        put(latent)

    put(shown())
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    for name, weight in optimizer.latent.items():
        np.testing.assert_allclose(weight.numpy(), latent[name], rtol=0, atol=1e-12)
    with optimizer.hard_quantized():
        for name, w in latent.items():
            found = dict(model.named_parameters())[name].detach().numpy()
            np.testing.assert_allclose(found, of.quantizer(w), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_learned_levels_follow_their_gradient(optimizer_name):
    """TTQ against autograd through the ternary weights as a function of the two levels, and its rule for the latent ones."""
    model, reference = network(), network()
    optimizer = wrap(model, "ttq", OPTIMIZERS[optimizer_name](model.parameters()))
    base = OPTIMIZERS[optimizer_name.removeprefix("fused ")](reference.parameters())
    (name, parameter), *others = quantize.MODES["ttq"].select(reference)
    assert not others
    latent, levels = parameter.detach().numpy().copy(), [1.0, -1.0]
    for step in range(20):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()

        base.zero_grad()
        with torch.no_grad():
            parameter.copy_(torch.tensor(plain.learned_ternary(latent, *levels)))
        backward(reference, step)
        gradient = parameter.grad.numpy()
        high, low = plain.learned_sides(latent)
        parameter.grad = torch.tensor(gradient * np.where(high, abs(levels[0]), np.where(low, abs(levels[1]), 1.0)))
        with torch.no_grad():
            parameter.copy_(torch.tensor(latent))
        base.step()
        rate = base.param_groups[0]["lr"]
        levels = [levels[0] - rate * gradient[high].sum(), levels[1] - rate * gradient[low].sum()]
        latent = parameter.detach().numpy().copy()
    np.testing.assert_allclose(optimizer.levels[name].numpy(), levels, atol=1e-12)
    np.testing.assert_allclose(optimizer.latent[name].numpy(), latent, atol=1e-12)
    expected = plain.learned_ternary(latent, *levels)
    np.testing.assert_allclose(dict(model.named_parameters())[name].detach().numpy(), expected, atol=1e-12)
    optimizer.freeze()
    np.testing.assert_allclose(dict(model.named_parameters())[name].detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(optimizer.levels[name].numpy(), levels, atol=1e-12)


def test_drawn_signs_change_at_each_step_and_follow_from_the_seed():
    def shown_over_steps(seed):
        model = network()
        mode = quantize.MODES["stoch_bin"]
        base = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer, found = quantize.ProjectedOptimizer(base, mode.select(model), mode, seed=seed), []
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            latent = {name: weight.clone() for name, weight in optimizer.latent.items()}
            gradients = {name: parameter.grad.clone() for name, parameter in mode.select(model)}
            optimizer.step()
            for name, weight in optimizer.latent.items():  # the step is the base optimizer's, on the latent weights
                torch.testing.assert_close(weight, (latent[name] - 0.01 * gradients[name]).clamp(-1, 1), rtol=0, atol=1e-15)
            found.append(torch.cat([parameter.detach().flatten().clone() for _, parameter in mode.select(model)]))
        with optimizer.hard_quantized():
            for name, parameter in mode.select(model):
                assert torch.equal(parameter, quantize.binarize(optimizer.latent[name]))
        return found

    first, again, other = shown_over_steps(3), shown_over_steps(3), shown_over_steps(4)
    assert all(set(signs.tolist()) == {-1.0, 1.0} for signs in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


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
        expected = PROX[mode_name](before[name], HARD[mode_name], 0.3 * (0.5 if parameter is inner else 0.01))
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
    expected = {name: weight.numpy() for name, weight in optimizer.quantized().items()}
    optimizer.freeze()
    frozen = {name: weight.clone() for name, weight in optimizer.latent.items()}
    for name, weight in frozen.items():
        assert np.array_equal(weight.numpy(), expected[name])
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
    state["state"][state["param_groups"][0]["projection_names"]["3.weight"]].pop("latent")
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


@dataclass(frozen=True)
class ToZero(quantize.Quantizer):
    """Everything becomes 0: with a soft pull that is soft thresholding."""

    name = "to zero"

    def fit(self, x, given=None):
        return ()

    def assign(self, w, fitted):
        return torch.zeros_like(w)


@pytest.mark.parametrize("capturable", [False, True], ids=["numbers", "tensors"])
def test_a_mode_of_ones_own_is_one_object(capturable):
    mode = dataclasses.replace(quantize.MODES["prox"], name="sparse", quantizer=ToZero())
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
