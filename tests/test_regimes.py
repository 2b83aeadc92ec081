"""Which optimizer with which settings holds in which epoch."""

from argparse import Namespace

import pytest
import torch

from models.resnet import CIFAR_REGIME, IMAGENET_REGIME
from training import regimes
from utils import UsageError

SETTINGS = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
FLAGS = {"regime": None, "binary_regime": False, "ttq_regime": False, "no_adjust": False}


def resolve(model_regime=CIFAR_REGIME, projected=False, **typed) -> regimes.Regime:
    return regimes.resolve_regime(Namespace(**{**SETTINGS, **FLAGS, **typed}, typed=set(typed)), model_regime, projected)


def settings(regime: regimes.Regime, epoch: int, **expected) -> None:
    found = regimes.settings_at(regime, epoch)
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)


def test_full_precision_is_the_networks_regime():
    regime = resolve()
    for epoch, lr in ((0, 0.1), (99, 0.1), (100, 0.01), (149, 0.01), (150, 0.001), (500, 0.001)):
        settings(regime, epoch, optimizer="SGD", lr=lr, momentum=0.9, weight_decay=1e-4)


def test_imagenet_regime():
    regime = resolve(IMAGENET_REGIME)
    for epoch, lr, decay in ((0, 0.1, 1e-4), (30, 0.01, 1e-4), (60, 0.001, 0.0), (90, 1e-4, 0.0)):
        settings(regime, epoch, lr=lr, weight_decay=decay)


@pytest.mark.parametrize("projected", [False, True])
def test_adam_is_constant_without_decay(projected):
    assert resolve(projected=projected, optimizer="Adam", lr=0.01) == {0: {"optimizer": "Adam", "lr": 0.01}}


def test_published_binaryconnect_command():
    regime = resolve(projected=True, optimizer="Adam", lr=0.01, binary_regime=True)
    for epoch, lr in ((0, 0.01), (80, 0.01), (81, 0.001), (121, 0.001), (122, 0.0001)):
        settings(regime, epoch, optimizer="Adam", lr=lr, momentum=None, weight_decay=None)


def test_ttq_regime():
    for epoch, lr in ((0, 0.1), (80, 0.01), (120, 0.001), (300, 0.0001)):
        settings(resolve(ttq_regime=True), epoch, lr=lr, momentum=0.9, weight_decay=2e-4)


def test_sgd_with_a_mode_has_no_decay():
    regime = resolve(projected=True)
    settings(regime, 0, lr=0.1, momentum=0.9, weight_decay=0.0)
    settings(regime, 150, lr=0.001, momentum=0.9, weight_decay=0.0)
    settings(resolve(IMAGENET_REGIME, projected=True, momentum=0.5), 70, momentum=0.5, weight_decay=0.0)


def test_typed_values_are_never_ignored():
    settings(resolve(projected=True, weight_decay=3e-4), 120, weight_decay=3e-4)
    settings(resolve(momentum=0.0), 120, momentum=0.0)
    settings(resolve(binary_regime=True, weight_decay=1e-3), 90, optimizer="Adam", weight_decay=1e-3)
    settings(resolve(binary_regime=True, optimizer="SGD"), 90, optimizer="SGD", lr=0.001)
    settings(resolve(ttq_regime=True, optimizer="Adam"), 90, optimizer="Adam", lr=0.01, momentum=None)


def test_a_typed_learning_rate_scales_the_later_ones():
    regime = resolve(lr=0.05)
    for epoch, lr in ((0, 0.05), (100, 0.005), (150, 0.0005)):
        settings(regime, epoch, lr=lr)


def test_a_rate_that_plateaus_divide_beyond_all_floats_is_none():
    history = [{"epoch": epoch, "val_loss": 1.0} for epoch in range(1, 6)]
    regime = {0: {"optimizer": "SGD", "lr": 1.0, "plateau": 1e200}}
    assert regimes.settings_at(regime, 5, history)["lr"] == 0.0
    assert regimes.settings_at(regime, 2, history)["lr"] == 1e-200


def test_no_adjust_keeps_the_first_entry():
    assert resolve(no_adjust=True) == {0: CIFAR_REGIME[0]}
    assert resolve(no_adjust=True, optimizer="Adam", lr=0.01, binary_regime=True) == {0: {"optimizer": "Adam", "lr": 0.01}}


def test_a_regime_of_ones_own():
    regime = resolve(regime={0: {"lr": 0.2}, 3: {"optimizer": "Adam", "lr": 0.01, "betas": (0.8, 0.9)}})
    settings(regime, 2, optimizer="SGD", lr=0.2, momentum=0.9, weight_decay=1e-4)
    settings(resolve(regime={5: {"lr": 0.01}}, projected=True), 6, optimizer="SGD", lr=0.01, weight_decay=0.0)
    settings(resolve(regime={0: {"lr": 0.2}, 3: {"lr": 0.02}}, lr=0.1), 3, lr=0.01)


@pytest.mark.parametrize(
    ("regime", "named"),
    [
        ({0: {"optimizer": "SDG"}}, "SDG"),
        ({0: {"optimizer": 3}}, "3"),
        ({0: {"speed": 1}}, "speed"),
        ({2: {"lr": -1}}, "-1"),
        ({2: {"lr": float("nan")}}, "nan"),
        ({2: {"lr": 10**400}}, "finite"),
        ({2: {"lr": "fast"}}, "fast"),
        ({2: {"lr": None}}, "None"),
        ({0: {"optimizer": "Adam", "betas": (0.9, 2.0)}}, "2.0"),
        ({0: {"optimizer": "Adam", "betas": 1}}, "betas"),
        ({0: {"fused": True}}, "fused"),
        ({0: {"lr": [0.1]}}, "0.1"),
        ({0: {"lr": True}}, "True"),
        ({0: {"dampening": None}}, "dampening"),
        ({0: {"optimizer": "ASGD", "alpha": "x"}}, "alpha"),
        ({0: {"optimizer": "Rprop", "etas": (0.5, 1.2, 3.0)}}, "etas"),
    ],
)
def test_bad_regimes_are_named(regime, named):
    with pytest.raises(UsageError) as caught:
        resolve(regime=regime)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("regime", "named"),
    [({0: {"lr": "fast"}}, "fast"), ({3: {"lr": [1]}}, "1"), ({0: {"lr": 0.1}, 3: {"lr": 1e308}}, "finite")],
)
def test_bad_regimes_are_named_beside_a_typed_learning_rate(regime, named):
    with pytest.raises(UsageError, match=named):
        resolve(regime=regime, lr=100.0)


def test_a_typed_learning_rate_takes_the_place_of_a_zero():
    regime = resolve(regime={0: {"lr": 0}, 3: {"lr": 0.02}}, lr=0.5)
    settings(regime, 0, lr=0.5)
    settings(regime, 3, lr=0.02)


def test_a_typed_setting_that_the_optimizer_lacks():
    with pytest.raises(UsageError, match="momentum"):
        resolve(optimizer="Adam", momentum=0.5)


@pytest.mark.parametrize("name", regimes.OPTIMIZERS)
def test_every_optimizer_takes_a_step(name):
    weight = torch.ones(3, requires_grad=True)
    optimizer = regimes.build_optimizer([weight], regimes.settings_at(resolve(optimizer=name, lr=0.01), 0))
    weight.sum().backward()
    optimizer.step()
    assert not torch.equal(weight, torch.ones(3))
    regimes.update_settings(optimizer, {"optimizer": name, "lr": 0.5})
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_sgd_that_is_asked_for_has_the_flags_momentum_and_decay_wherever_it_begins():
    """One rule for --binary_regime with SGD, a change to SGD later, and what is said before."""
    settings(resolve(binary_regime=True, optimizer="SGD"), 90, optimizer="SGD", lr=0.001, momentum=0.9, weight_decay=1e-4)
    settings(resolve(binary_regime=True, optimizer="SGD", projected=True), 90, momentum=0.9, weight_decay=0.0)
    later = {0: {"optimizer": "Adam", "lr": 0.01}, 5: {"optimizer": "SGD"}}
    settings(resolve(regime=later), 4, optimizer="Adam", momentum=None, weight_decay=None)
    settings(resolve(regime=later), 5, optimizer="SGD", momentum=0.9, weight_decay=1e-4)
    settings(resolve(regime=later, projected=True), 5, momentum=0.9, weight_decay=0.0)
    settings(resolve(regime=later, momentum=0.5), 4, momentum=None)
    settings(resolve(regime=later, momentum=0.5), 5, momentum=0.5)
    settings(resolve(regime=later, projected=True, weight_decay=3e-4), 5, weight_decay=3e-4)
    there = {0: {"weight_decay": 5e-4, "momentum": 0.3}, 3: {"optimizer": "Adam"}, 5: {"optimizer": "SGD"}}
    settings(resolve(regime=there), 5, momentum=0.9, weight_decay=5e-4)


def test_a_networks_own_regime_says_all_that_it_needs():
    plain = {0: {"optimizer": "SGD", "lr": 20.0}}
    settings(resolve(plain), 3, momentum=None, weight_decay=None)
    settings(resolve(plain, projected=True), 3, momentum=None, weight_decay=0.0)
    settings(resolve(plain, momentum=0.5), 3, momentum=0.5)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"regime": {0: {"foo": 3}}}, "--regime: epoch 0: foo 3: SGD has no setting foo"),
        ({"regime": {0: {"optimizer": "Rprop", "weight_decay": 1}}}, "--regime: epoch 0: weight_decay 1: Rprop has no setting"),
        ({"optimizer": "Rprop", "weight_decay": 1.0}, "--weight-decay 1.0: Rprop has no setting weight_decay"),
        ({"optimizer": "Adam", "momentum": 0.5}, "--momentum 0.5: Adam has no setting momentum"),
    ],
)
def test_a_setting_is_told_as_what_the_user_wrote(typed, words):
    with pytest.raises(UsageError, match=words):
        resolve(**typed)
