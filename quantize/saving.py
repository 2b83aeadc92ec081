"""The wrapped optimizer's state in the layout of every torch optimizer, so that whatever saves, moves or reshards optimizers does
so with it: ``state`` by parameter, ``param_groups`` with what holds for all."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from quantize.checks import strength_of
from quantize.finished import NotFinite
from quantize.projection import Projection
from quantize.shards import local, over_all
from quantize.written import Snapshot

_LATENT, _LEVELS = "latent", "levels"
_MODES, _STRENGTHS, _DRAWS, _FROZEN = "projection_modes", "projection_strengths", "projection_draws", "projection_frozen"
_SHOWN = "shown"  # by the model in a lazy mode, where it is not what is made of the latent weights
_NAMES = "projection_names"  # of the parameters with latent weights of their own, with their numbers in the state
_QUANTIZERS = "projection_quantizers"
_BASE = "projection_base"  # the kind of the base optimizer
_FROZEN_LEVELS = "projection_levels"  # learned ones, once the parameters have no entries in the state any more
_OF_GROUPS = (_MODES, _QUANTIZERS, _STRENGTHS, _DRAWS, _FROZEN, _BASE, _NAMES, _FROZEN_LEVELS)
_WRAPPED_NAMES = (
    # put before the names by torch.compile, DDP, FSDP and activation checkpointing
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
)


class Content(NamedTuple):
    """One projection's part of a state; latent weights and levels are empty where there are none. ``shown``: by the model, where
    it is not what is made of the latent weights, by number."""

    strength: float
    draws: int
    latent: list[Tensor]
    levels: list[Tensor]
    shown: dict[int, Tensor]


class Found(NamedTuple):
    """A state taken apart: whether it is frozen, the base optimizer's part, and each projection's."""

    frozen: bool
    base: dict[str, Any]
    projections: list[Content]


def to_torch(
    optimizer: Optimizer,
    projections: Sequence[Projection],
    now: Sequence[Snapshot],
    frozen: bool,
) -> dict[str, Any]:
    """The state of the base optimizer together with that of the projections, each as it is now unless they are frozen."""
    base = optimizer.state_dict()
    state = {index: dict(entry) for index, entry in base["state"].items()}
    index_of, names = _indices(optimizer.param_groups), {}
    for projection, (shown, latent, levels, written) in zip(projections, now, strict=True) if not frozen else ():
        apart = projection.shown_apart(written)
        for number, (name, parameter) in enumerate(zip(projection.names, projection.parameters, strict=True)):
            own = {}
            if projection.mode.lazy:
                own[_LATENT] = latent[number].clone()
            if number in apart:
                own[_SHOWN] = shown[number].clone()
            if levels:
                own[_LEVELS] = levels[number].clone()
            if own:
                names[name] = index_of[id(parameter)]
                state.setdefault(index_of[id(parameter)], {}).update(own)
    if names:  # torch's distributed checkpoints want entries of all parameters or of none
        for index in index_of.values():
            state.setdefault(index, {})
    common = {
        _MODES: ",".join(projection.mode.name for projection in projections),
        _QUANTIZERS: [projection.mode.shown.in_words for projection in projections],
        _STRENGTHS: [projection.strength for projection in projections],
        _DRAWS: [projection.draws for projection in projections],
        _FROZEN: frozen,
        _BASE: _kinds(optimizer),
        _NAMES: names,
    }
    if frozen and any(projection.levels for projection in projections):
        common[_FROZEN_LEVELS] = [[level.tolist() for level in projection.levels] for projection in projections]
    return {**base, "state": state, "param_groups": [{**group, **common} for group in base["param_groups"]]}


def from_torch(
    content: Mapping[str, Any],
    projections: Sequence[Projection],
    optimizer: Optimizer,
    frozen: bool,
    with_base: bool = True,
) -> Found:
    """Takes a state apart and compares it with the optimizer that it is meant for; changes nothing.

    ``with_base``: whether the base optimizer's part is to be loaded, too.

    Raises:
        ValueError: if it does not fit.
    """
    try:
        return _taken_apart(content, projections, optimizer, frozen, with_base)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the state is damaged, or is none of a wrapped optimizer ({type(error).__name__}: {error})") from error


def _taken_apart(
    content: Mapping[str, Any], projections: Sequence[Projection], optimizer: Optimizer, frozen: bool, with_base: bool
) -> Found:
    if isinstance(content, Mapping) and "base_optimizer" in content:
        return _from_before(content, projections, frozen)
    groups = content.get("param_groups") if isinstance(content, Mapping) else None
    if not groups or "state" not in content:
        raise ValueError("this is not the state of an optimizer: it needs the keys state and param_groups")
    common = next((group for group in groups if _MODES in group), {})  # torch's distributed checkpoints lose what empty ones have
    if not common:
        raise ValueError(
            "the state is of an optimizer that was not wrapped (base_optimizer.load_state_dict() takes it over), or was saved with "
            "flatten_optimizer_state_dict, which cannot be put together again: save it without that option"
        )
    for key in (_QUANTIZERS, _STRENGTHS, _DRAWS, _FROZEN):
        if key not in common:
            raise ValueError(f"the state is not whole: its parameter groups lack {key}")
    if with_base:
        _compare_base(groups, common, optimizer)
    _compare_modes(common[_MODES], common[_FROZEN], projections, frozen)
    theirs, ours = common[_QUANTIZERS], [projection.mode.shown.in_words for projection in projections]
    if theirs != ours:
        raise ValueError(f"the state is of the quantizer {', '.join(theirs)}, this optimizer is of {', '.join(ours)}")
    strengths, draws = (_for_each(common[key], projections, key) for key in (_STRENGTHS, _DRAWS))
    strengths = [strength_of(strength, one.mode) for strength, one in zip(strengths, projections, strict=True)]
    if not all(isinstance(count, int) and count >= 0 for count in draws):
        raise ValueError(f"the state's {_DRAWS} are {draws}: whole numbers from 0 up are needed")
    state = {index: dict(entry) for index, entry in content["state"].items()}
    found = []
    key_of = {} if common[_FROZEN] else _keys(groups, optimizer.param_groups)
    _compare_names(common.get(_NAMES) or {}, key_of, projections, optimizer)
    for number, projection in enumerate(projections):
        latent, levels, shown = [], [], {}
        for index, (name, parameter) in enumerate(zip(projection.names, projection.parameters, strict=True)):
            entry = {} if common[_FROZEN] else state.get(key_of[id(parameter)], {})
            if projection.mode.lazy and not common[_FROZEN]:
                if _LATENT not in entry and not parameter.requires_grad:
                    raise ValueError(
                        f"the state has nothing of {name}, which is held still (requires_grad is False): torch's distributed "
                        "checkpoints leave such parameters out; let it go until the state is loaded"
                    )
                latent.append(_fitting(entry.get(_LATENT), parameter, f"latent weights of {name}"))
                if _SHOWN in entry:
                    shown[index] = _fitting(entry[_SHOWN], parameter, f"shown weights of {name}")
            if projection.levels and not common[_FROZEN]:
                levels.append(_fitting(entry.get(_LEVELS), projection.levels[0], f"levels of {name}"))
        if common[_FROZEN] and projection.levels and common.get(_FROZEN_LEVELS):
            levels = [one.new_tensor(common[_FROZEN_LEVELS][number][i]) for i, one in enumerate(projection.levels)]
        found.append(Content(strengths[number], draws[number], latent, levels, shown))
    stripped = {index: _without(entry, (_LATENT, _LEVELS, _SHOWN)) for index, entry in state.items()}
    # An emptied group may come without settings, see above: it keeps those that it has here.
    own = optimizer.param_groups if len(optimizer.param_groups) == len(groups) else [{}] * len(groups)
    base = {
        **content,
        "state": {index: entry for index, entry in stripped.items() if entry},
        "param_groups": [
            (_without(ours, ("params",)) if not group["params"] else {}) | _without(group, _OF_GROUPS)
            for group, ours in zip(groups, own, strict=True)
        ],
    }
    return Found(common[_FROZEN], base, found)


def latent_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The latent weights in a state, by name; empty where they are the model's own."""
    return dict(content["latent"]) if "base_optimizer" in content else _by_name(content, _LATENT)


def levels_in(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The learned levels in a state, by name."""
    return _by_name(content, _LEVELS)


def _by_name(content: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    groups = content.get("param_groups") or [{}]
    numbers = groups[0].get(_NAMES, {})
    return {name: content["state"][index][kind] for name, index in numbers.items() if kind in content["state"][index]}


def _from_before(content: Mapping[str, Any], projections: Sequence[Projection], frozen: bool) -> Found:
    """States as they were written before they had torch's layout: one mode, latent weights by name."""
    _compare_modes(content["mode"], content["frozen"], projections, frozen)
    projection = projections[0]
    latent = []
    if projection.mode.lazy and not content["frozen"]:
        given = {_plain(name): weight for name, weight in content["latent"].items()}
        if set(given) != {_plain(name) for name in projection.names}:
            raise ValueError("the state's latent weights differ in name from this optimizer's parameters")
        named = zip(projection.names, projection.parameters, strict=True)
        latent = [_fitting(given[_plain(name)], parameter, f"latent weights of {name}") for name, parameter in named]
    strength = strength_of(content["strength"], projection.mode)
    return Found(content["frozen"], content["base_optimizer"], [Content(strength, 0, latent, [], {})])


def _compare_modes(theirs: str, theirs_frozen: bool, projections: Sequence[Projection], frozen: bool) -> None:
    ours = ",".join(projection.mode.name for projection in projections)
    if theirs != ours:
        raise ValueError(f"the state is of projection mode {theirs!r}, this optimizer is of {ours!r}")
    if frozen and not theirs_frozen:
        raise ValueError("the state is of a run before its freeze, and this optimizer is frozen")


def _compare_base(groups: Sequence[Mapping[str, Any]], common: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Another kind of optimizer would fail at its next step, for want of what it keeps of each parameter."""
    theirs, ours = common.get(_BASE), _kinds(optimizer)
    if theirs and not set(theirs) & set(ours):
        raise ValueError(
            f"the state is of another kind of base optimizer: of {theirs[0]}, this one is {ours[0]} (load_projection() takes over "
            "the rest)"
        )
    if any("lr" not in group for group in groups if group["params"]):
        raise ValueError("the state is not whole: its parameter groups lack lr")


def _compare_names(
    theirs: Mapping[str, Any], key_of: Mapping[int, Any], projections: Sequence[Projection], optimizer: Optimizer
) -> None:
    """Latent weights replace a model's weights, so those of another layer must not, even where the shape is right.

    ``theirs``: numbers by name; they tell nothing where torch's distributed checkpoints have put names in the numbers' place.
    """
    named = {id(parameter): _plain(name) for one in projections for name, parameter in zip(one.names, one.parameters, strict=True)}
    here = {key_of[id(p)]: p for group in optimizer.param_groups for p in group["params"]} if key_of else {}
    for name, number in theirs.items():
        if number not in here:
            continue
        parameter, given = here[number], _plain(name)
        own = named.get(id(parameter))
        if own is None and parameter.requires_grad:
            raise ValueError(f"the state has latent weights of {name!r}, which is not quantized here")
        if own is not None and not f".{own}".endswith(f".{given}") and not f".{given}".endswith(f".{own}"):
            what = f"number {number} is {name!r} there and {own!r} here"
            raise ValueError(f"the state is of other parameters, or has them in another order: {what}")


def _kinds(optimizer: Optimizer) -> list[str]:
    """The names of an optimizer's class and of those that it is derived from."""
    return [kind.__name__ for kind in type(optimizer).__mro__ if issubclass(kind, Optimizer) and kind is not Optimizer]


def _for_each(values: Any, projections: Sequence[Projection], key: str) -> Sequence[Any]:
    if not isinstance(values, Sequence) or len(values) != len(projections):
        raise ValueError(f"the state's {key} are {values}: one for each of {len(projections)} modes is needed")
    return values


def _fitting(given: Any, wanted: Tensor, what: str) -> Tensor:
    if not isinstance(given, Tensor) or given.shape != wanted.shape:
        raise ValueError(f"the state's {what} are missing or differ in shape from this optimizer's")
    if not given.is_floating_point() or given.layout != torch.strided or given.is_meta:
        raise ValueError(f"the state's {what} are no dense tensor of floating-point numbers")
    if over_all(given, (~local(given).isfinite()).any().float(), "max"):
        raise NotFinite(f"the state's {what} hold values that are not finite numbers: it is of a training that has diverged")
    return given


def _indices(param_groups: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """The number that torch gives each parameter in a state, by the parameter's identity."""
    return {id(parameter): index for index, parameter in enumerate(p for group in param_groups for p in group["params"])}


def _keys(saved: Sequence[Mapping[str, Any]], param_groups: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """What a state calls each parameter, a number or (torch's distributed checkpoints) a name, by the parameter's identity."""
    theirs = [len(group["params"]) for group in saved]
    ours = [len(group["params"]) for group in param_groups]
    if theirs != ours:
        raise ValueError(f"the state is of parameter groups of {theirs} parameters, this optimizer has groups of {ours}")
    pairs = zip((key for group in saved for key in group["params"]), (p for g in param_groups for p in g["params"]), strict=True)
    return {id(parameter): key for key, parameter in pairs}


def _without(entry: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _plain(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED_NAMES)
