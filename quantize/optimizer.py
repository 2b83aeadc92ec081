"""The wrapped optimizer: any torch optimizer, with a projection around each of its steps."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize.modes import FULL_PRECISION, ProjectionMode
from quantize.side_by_side import SideBySide


class ProjectedOptimizer(torch.optim.Optimizer):
    """Trains the given parameters toward quantized values; the model itself knows nothing of it.

    Between two calls the model always holds the weights that the next forward pass should use: the latent weights, or their
    projection in a mode that takes the gradient there (``lazy``; the latent ones are then kept in here).

    Args:
        base_optimizer: any ``torch.optim`` optimizer over (at least) the quantized parameters. One that evaluates its closure
            several times within a step (LBFGS) is not supported.
        named_parameters: the parameters to quantize, as ``(name, parameter)``; usually ``mode.select(model)``.
        mode: one of ``quantize.MODES``, or your own.
        capturable: True keeps the strength on the parameters' device, so that a step recorded as a CUDA graph follows
            ``set_strength``. The base optimizer must be capturable too, its learning rates tensors on that device.

    Raises:
        ValueError: if there is nothing to quantize, a name or a parameter comes twice, a parameter is not one of the base
            optimizer's, or it does not hold floating-point numbers.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        mode: ProjectionMode,
        capturable: bool = False,
    ) -> None:
        # torch.optim.Optimizer.__init__ is left out: param_groups, state and defaults are the base optimizer's own.
        named = list(named_parameters)
        _check_parameters(named, mode)
        self.mode = mode
        self.frozen = False
        self._parameters = dict(named)
        self._showing_quantized = False
        self.base_optimizer = base_optimizer
        self._buckets = [_Bucket(group, capturable) for group in _by_device_and_dtype(named)]
        self.set_strength(mode.default_rate)

    # What users of a torch optimizer expect.

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the step. May be replaced between two steps; frozen parameters are taken out of the new one.

        Raises:
            ValueError: if the new one lacks a parameter that is quantized and not frozen.
        """
        return self._base_optimizer

    @base_optimizer.setter
    def base_optimizer(self, base_optimizer: torch.optim.Optimizer) -> None:
        group_of = {id(p): index for index, group in enumerate(base_optimizer.param_groups) for p in group["params"]}
        missing = [name for name, parameter in self._parameters.items() if id(parameter) not in group_of]
        if missing and not self.frozen:
            raise ValueError(f"the base optimizer does not hold the parameter {missing[0]!r}, which is to be quantized")
        self._base_optimizer = base_optimizer
        self._group_of = group_of
        if self.frozen:
            self._take_out_frozen()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self._base_optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The base optimizer's state by parameter."""
        return self._base_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's default settings."""
        return self._base_optimizer.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        self._base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. Its parameters are trained, not quantized."""
        self._base_optimizer.add_param_group(param_group)

    # The method.

    @property
    def strength(self) -> float:
        """Strength of the projection, before the learning rate scales it (where the mode has it scaled)."""
        return self._strength

    def set_strength(self, strength: float) -> None:
        """Sets the strength of the projection; in a mode with latent weights apart, the model is projected with it at once.

        Raises:
            ValueError: if the strength is negative or not finite.
        """
        if not (math.isfinite(strength) and strength >= 0):
            raise ValueError(f"the strength of a projection is a finite number >= 0, not {strength}")
        self._refuse_while_quantized("set_strength()")
        self._hold(float(strength))
        self._show()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the base optimizer on the latent weights, with the mode's projection and the clip to [-1, 1].

        Args:
            closure: evaluates the model and returns the loss, as in torch; called once, at the weights that the model shows.
        """
        self._refuse_while_quantized("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.frozen:
            self._base_optimizer.step()
            return loss
        for bucket in self._buckets:
            if self.mode.latent_apart:
                bucket.store(bucket.rows)
        self._base_optimizer.step()
        for bucket in self._buckets:
            bucket.load()
            if self.mode.latent_apart:
                bucket.rows.clamp_(-1.0, 1.0)
                bucket.store(self._project(bucket))
            else:
                bucket.store(self._project(bucket).clamp_(-1.0, 1.0))
        return loss

    @property
    def projecting(self) -> bool:
        """True while something is being quantized: parameters are selected and not frozen yet."""
        return bool(self._parameters) and not self.frozen

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent weights by name: this wrapper's own where they are apart from the model's, else the model's weights."""
        if self.mode.latent_apart and not self.frozen:
            return {name: view for bucket in self._buckets for name, view in bucket.latent_views()}
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def quantized(self) -> dict[str, Tensor]:
        """The hard quantization of the latent weights, by name; once frozen, the weights themselves."""
        if self.frozen or self._showing_quantized:
            return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        found = {}
        for bucket in self._buckets:
            found.update(zip(bucket.names, bucket.layout.views(self._hard_quantize(bucket)), strict=True))
        return {name: found[name] for name in self._parameters}

    @contextmanager
    def hard_quantized(self) -> Iterator[None]:
        """A context in which the model holds its hard-quantized weights; afterwards it is as before, to the last bit.

        Once frozen, or inside another such context, nothing is left to do. A step in here is refused.
        """
        if self.frozen or self._showing_quantized:
            yield
            return
        shown = [[parameter.detach().clone() for parameter in bucket.parameters] for bucket in self._buckets]
        with torch.no_grad():
            for bucket in self._buckets:
                bucket.store(self._hard_quantize(bucket))
        self._showing_quantized = True
        try:
            yield
        finally:
            self._showing_quantized = False
            with torch.no_grad():
                for bucket, weights in zip(self._buckets, shown, strict=True):
                    torch._foreach_copy_(bucket.parameters, weights)

    @torch.no_grad()
    def freeze(self) -> None:
        """Ends the projection: hard-quantizes for good and takes the quantized parameters out of training.

        They lose their gradient and ``requires_grad``, and the base optimizer drops them with their state, so that neither
        momentum nor weight decay can move them. ``step()`` goes on for the rest. Freezing twice is harmless.
        """
        self._refuse_while_quantized("freeze()")
        if self.frozen:
            return
        for bucket in self._buckets:
            bucket.store(self._hard_quantize(bucket))
        self._end_projection()

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the model's own weights: tensors and plain values only."""
        apart = self.mode.latent_apart and not self.frozen
        return {
            "mode": self.mode.name,
            "strength": self._strength,
            "frozen": self.frozen,
            "latent": {name: weight.clone() for name, weight in self.latent.items()} if apart else {},
            "base_optimizer": self._base_optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a ``state_dict``. The model's weights are the model's to load, before or after.

        Raises:
            ValueError: if it is of another mode or other parameters, or of a run not yet frozen while this one is.
        """
        self._refuse_while_quantized("load_state_dict()")
        if state_dict["mode"] != self.mode.name:
            raise ValueError(f"the state is of projection mode {state_dict['mode']!r}, this optimizer is of {self.mode.name!r}")
        if self.frozen and not state_dict["frozen"]:
            raise ValueError("the state is of a run before its freeze, and this optimizer is frozen")
        latent = state_dict["latent"]
        if self.mode.latent_apart and not state_dict["frozen"]:
            shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
            if {name: tuple(weight.shape) for name, weight in latent.items()} != shapes:
                raise ValueError("the state's latent weights differ in name or shape from this optimizer's parameters")
        if state_dict["frozen"]:
            self._end_projection()
        self._base_optimizer.load_state_dict(state_dict["base_optimizer"])
        self._hold(state_dict["strength"])
        if self.mode.latent_apart and not self.frozen:
            for bucket in self._buckets:
                for name, view in bucket.latent_views():
                    view.copy_(latent[name])
        self._show()

    # Inside.

    def _hold(self, strength: float) -> None:
        self._strength = strength
        for bucket in self._buckets:
            bucket.hold(strength)

    @torch.no_grad()
    def _show(self) -> None:
        """Puts the projected weights into the model, in a mode that keeps the latent ones apart."""
        if self.mode.latent_apart and not self.frozen:
            for bucket in self._buckets:
                bucket.store(self._project(bucket))

    def _project(self, bucket: "_Bucket") -> Tensor:
        """The proximal operator at this step's strength."""
        strength = bucket.strength
        if self.mode.scaled_by_lr:
            rates = [self.param_groups[self._group_of[id(parameter)]]["lr"] for parameter in bucket.parameters]
            if all(rate is rates[0] or (not isinstance(rate, Tensor) and rate == rates[0]) for rate in rates):
                strength = strength * rates[0]
            else:
                on_device = [torch.as_tensor(rate, dtype=torch.float64, device=bucket.rows.device) for rate in rates]
                strength = bucket.layout.spread(strength * torch.stack(on_device), bucket.rows)
        if isinstance(strength, float) and strength == 0:
            return bucket.rows
        return bucket.layout.apply(self.mode.prox, bucket.rows, strength, together=self.mode.side_by_side)

    def _hard_quantize(self, bucket: "_Bucket") -> Tensor:
        if not self.mode.latent_apart:
            bucket.load()
        return bucket.layout.apply(self.mode.hard_quantize, bucket.rows, together=self.mode.side_by_side)

    def _end_projection(self) -> None:
        self.frozen = True
        self._buckets = []
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._take_out_frozen()

    def _take_out_frozen(self) -> None:
        frozen = {id(parameter) for parameter in self._parameters.values()}
        for group in self.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in frozen]
        for parameter in self._parameters.values():
            self.state.pop(parameter, None)

    def _refuse_while_quantized(self, call: str) -> None:
        if self._showing_quantized:
            raise RuntimeError(f"{call} inside hard_quantized(): the model does not show the weights in training there")


class _Bucket:
    """Quantized parameters of one device and dtype, with their rows in one matrix: the latent weights, or working space.

    Attributes:
        strength: of the projection, before the learning rate scales it; a tensor on the device where that is asked for.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], strength_on_device: bool) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.layout = SideBySide(self.parameters)
        self.rows = self.layout.empty(self.parameters[0])
        self.strength: float | Tensor = 0.0
        if strength_on_device:
            self.strength = torch.zeros((), dtype=torch.float64, device=self.rows.device)
        self.load()

    def hold(self, strength: float) -> None:
        """Takes a new strength."""
        if isinstance(self.strength, Tensor):
            self.strength.fill_(strength)
        else:
            self.strength = strength

    @torch.no_grad()
    def load(self) -> None:
        """Model to rows."""
        torch._foreach_copy_(self.layout.views(self.rows), self.parameters)

    def store(self, rows: Tensor) -> None:
        """Rows to model."""
        torch._foreach_copy_(self.parameters, self.layout.views(rows))

    def latent_views(self) -> Iterator[tuple[str, Tensor]]:
        return zip(self.names, self.layout.views(self.rows), strict=True)


def _by_device_and_dtype(named: Sequence[tuple[str, nn.Parameter]]) -> list[list[tuple[str, nn.Parameter]]]:
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        groups.setdefault((parameter.device, parameter.dtype), []).append((name, parameter))
    return list(groups.values())


def _check_parameters(named: Sequence[tuple[str, nn.Parameter]], mode: ProjectionMode) -> None:
    if not named and mode is not FULL_PRECISION:
        raise ValueError("there is no parameter to quantize")
    for position, (name, parameter) in enumerate(named):
        if any(name == other or parameter is same for other, same in named[:position]):
            raise ValueError(f"the parameter {name!r} is to be quantized twice")
        if not parameter.is_floating_point():
            raise ValueError(f"the parameter {name!r} is of dtype {parameter.dtype}: only floating-point weights can be quantized")
