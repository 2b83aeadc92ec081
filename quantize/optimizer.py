"""The wrapped optimizer: any torch optimizer, with a projection around each of its steps."""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantize import saving
from quantize.checks import Pairs, check, check_base, groups_of, strength_of
from quantize.modes import ProjectionMode
from quantize.projection import Projection
from quantize.written import Snapshot


class ProjectedOptimizer(torch.optim.Optimizer):
    """Trains the given parameters toward quantized values; the model itself knows nothing of it.

    Between two calls the model always holds the weights that the next forward pass should use: the latent weights, or in a lazy
    mode their projection (the latent ones are then kept in here). Weights that are written into the model from outside
    (``model.load_state_dict``) become the latent ones.

    Args:
        base_optimizer: any ``torch.optim`` optimizer over (at least) the quantized parameters.
        named_parameters: the parameters to quantize, as ``(name, parameter)``, usually ``mode.select(model)``; or for several
            modes in one network a list of ``(pairs, mode)``. Parameters with ``requires_grad=False`` are left alone.
        mode: one of ``quantize.MODES``, or your own; left out where the modes stand beside their pairs.
        capturable: True keeps the strength on the parameters' device, so that a step recorded as a CUDA graph follows
            ``set_strength``. The base optimizer must be capturable too, its learning rates tensors on that device. In a lazy mode
            weights that are written into the model are then taken over by ``set_strength`` only, not by ``step``.
        seed: of what stochastic modes draw.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if there is nothing to quantize, a name or a parameter comes twice, a parameter is not one of the base
            optimizer's, or it does not hold floating-point numbers.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        named_parameters: Pairs | Sequence[tuple[Pairs, ProjectionMode]],
        mode: ProjectionMode | None = None,
        capturable: bool = False,
        seed: int = 0,
    ) -> None:
        # torch.optim.Optimizer.__init__ is left out: param_groups, state and defaults are the base optimizer's own.
        self._make_hooks()
        groups = groups_of(named_parameters, mode)
        check(base_optimizer, groups, capturable)
        self.modes = tuple(mode for _, mode in groups)
        self.frozen = False
        self._projections = [Projection(pairs, mode, capturable, seed + number) for number, (pairs, mode) in enumerate(groups)]
        self._hidden: list[Snapshot] | None = None  # inside hard_quantized(): of before it
        self.base_optimizer = base_optimizer
        self.set_strength([mode.strength() for mode in self.modes])

    # What users of a torch optimizer expect.

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that makes the step. May be replaced between two steps; frozen parameters are taken out of the new one.

        Raises:
            TypeError: if the new one is of another kind, or wrapped already.
            ValueError: if the new one lacks a parameter that is quantized and not frozen.
        """
        return self._base_optimizer

    @base_optimizer.setter
    def base_optimizer(self, base_optimizer: torch.optim.Optimizer) -> None:
        check_base(base_optimizer)
        self._require({id(parameter) for group in base_optimizer.param_groups for parameter in group["params"]})
        self._base_optimizer = base_optimizer
        if self.frozen:
            self._keep_frozen_out()

    @property
    def mode(self) -> ProjectionMode:
        """The mode; of several the first."""
        return self.modes[0]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's parameter groups."""
        return self._base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._base_optimizer.param_groups = groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The base optimizer's state by parameter. Latent weights and learned levels are apart: ``latent``, ``levels``."""
        return self._base_optimizer.state

    @state.setter
    def state(self, state: dict[Tensor, Any]) -> None:
        self._base_optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's default settings."""
        return self._base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._base_optimizer.defaults = defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``."""
        self._base_optimizer.zero_grad(set_to_none=set_to_none)
        if self.frozen:
            self._hold_frozen_still()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. Its parameters are trained, not quantized."""
        self._base_optimizer.add_param_group(param_group)

    def __repr__(self) -> str:
        words = ", ".join(f"{projection.mode.name} on {len(projection.parameters)} tensors" for projection in self._projections)
        return f"ProjectedOptimizer({words}{', frozen' if self.frozen else ''}) around {self._base_optimizer!r}"

    # The method.

    @property
    def strength(self) -> float:
        """Strength of the projection, before the learning rate scales it (where the mode has it scaled); of several the first."""
        return self._projections[0].strength

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strength of each of several modes."""
        return tuple(projection.strength for projection in self._projections)

    @torch.no_grad()
    def set_strength(self, strength: float | Sequence[float]) -> None:
        """Sets the strength of the projection, of several modes each one's; in a lazy mode the model is projected with it at once.

        Raises:
            ValueError: if a strength is negative or not finite.
        """
        self._refuse_while_quantized("set_strength()")
        strengths = list(strength) if isinstance(strength, list | tuple) else [strength] * len(self._projections)
        if len(strengths) != len(self._projections):
            raise ValueError(f"{len(strengths)} strengths for {len(self._projections)} modes")
        strengths = [strength_of(value, mode) for value, mode in zip(strengths, self.modes, strict=True)]
        self._take_over()
        for projection, value in zip(self._projections, strengths, strict=True):
            projection.hold(value)
        self._show()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the base optimizer on the latent weights, with the mode's projection and clip, see the package's table.

        A step at learning rate 0 changes no weights and draws nothing: torch's distributed checkpoints make the state by one.

        Args:
            closure: evaluates the model and returns the loss, as in torch; called once, at the weights that the model shows.

        Raises:
            NotFinite, NotQuantized: if weights were written into the model since it was frozen that are not quantized.
        """
        return self._step_outside_graphs(self, closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        self._refuse_while_quantized("step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.frozen:
            self._check_frozen()
            self._hold_frozen_still()
            self._base_optimizer.step()
            torch.clear_autocast_cache()
            return loss
        rates = self._rates()
        for projection in self._projections:
            projection.check_gradients()
        ascending = {id(p) for group in self.param_groups if group.get("maximize") for p in group["params"]}
        for projection in self._projections:
            projection.before_step(rates, ascending)
        try:
            self._base_optimizer.step()
        except BaseException:  # an interruption too: the model must not go on showing the latent weights
            for projection in self._projections:
                projection.give_up_step(rates)
            torch.clear_autocast_cache()
            raise
        for projection in self._projections:
            projection.after_step(rates)
        torch.clear_autocast_cache()
        return loss

    @property
    def projecting(self) -> bool:
        """True while something is being quantized: parameters are selected and not frozen yet."""
        return not self.frozen and any(projection.parameters for projection in self._projections)

    @property
    def latent(self) -> dict[str, Tensor]:
        """The latent weights by name: this wrapper's own in a lazy mode, else the model's weights (those in training, also inside
        ``hard_quantized()``). No copies: they change with each step."""
        if self.frozen:
            return {name: parameter.detach() for name, parameter in self._named()}
        return self._by_name([now.latent for now in self._now()])

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The quantized parameters by name."""
        return dict(self._named())

    @property
    def levels(self) -> dict[str, Tensor]:
        """Learned levels by name, ``(2,)``: the positive and the negative one; no copies. Empty in modes that learn none."""
        if self.frozen:
            return self._by_name([projection.frozen_levels() for projection in self._projections])
        return self._by_name([now.levels for now in self._now()])

    @torch.no_grad()
    def quantized(self) -> dict[str, Tensor]:
        """The hard quantization of the latent weights, by name; once frozen, the weights themselves.

        Raises:
            NotFinite: if a weight is not a finite number.
            NotQuantized: if others were written into the model since it was frozen.
        """
        self._check_frozen()
        if self.frozen or self._hidden is not None:
            return {name: parameter.detach().clone() for name, parameter in self._named()}
        found = {}
        for projection in self._projections:
            places = [torch.empty_like(parameter, requires_grad=False) for parameter in projection.parameters]
            projection.hard_quantize(places)
            found |= dict(zip(projection.names, places, strict=True))
        return found

    @contextmanager
    def hard_quantized(self) -> Iterator[None]:
        """A context in which the model holds its hard-quantized weights; afterwards it is as before, to the last bit.

        Once frozen, or inside another such context, nothing is left to do. A step in here is refused; weights that are written into
        the model in here are undone at the end, with a warning.

        Raises:
            NotFinite: if a weight is not a finite number.
            NotQuantized: if others were written into the model since it was frozen.
        """
        self._check_frozen()
        if self.frozen or self._hidden is not None:
            yield
            return
        with torch.no_grad():
            self._check_finite()
            self._hidden = [now.kept() for now in self._now()]
        versions = None
        try:
            with torch.no_grad():
                for projection in self._projections:
                    projection.hard_quantize(projection.parameters)
            versions = [parameter._version for _, parameter in self._named()]
            torch.clear_autocast_cache()
            yield
        finally:
            if versions not in (None, [parameter._version for _, parameter in self._named()]):
                warnings.warn("weights written into the model inside hard_quantized() are undone at its end", stacklevel=3)
            with torch.no_grad():
                for projection, before in zip(self._projections, self._hidden, strict=True):
                    projection.put_back(before)
                self._hidden = None
            torch.clear_autocast_cache()

    @torch.no_grad()
    def freeze(self) -> None:
        """Ends the projection: hard-quantizes for good and takes the quantized parameters out of training.

        They lose their gradient and ``requires_grad``, and the base optimizer drops them with their state, so that neither
        momentum nor weight decay can move them. ``step()`` goes on for the rest. Freezing twice is harmless.

        Raises:
            NotFinite: if a weight is not a finite number; nothing is changed then.
        """
        self._refuse_while_quantized("freeze()")
        if self.frozen:
            return
        self._check_finite()
        before = [now.kept() for now in self._now()]
        try:
            for projection in self._projections:
                projection.quantize_for_good()
        except BaseException:  # an interruption too: the weights in training must not be lost half-way
            for projection, one in zip(self._projections, before, strict=True):
                projection.put_back(one)
            raise
        self._end_projection(quantized=True)

    # Saving, loading and copying.

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, but for the model's own weights, in the layout of every torch optimizer.

        Latent weights and learned levels are among each parameter's state (``latent``, ``levels``), what holds for all in each
        parameter group (``projection_modes``, ``_quantizers``, ``_strengths``, ``_draws``, ``_frozen`` and ``_names``).
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        now = self._now() if not self.frozen else []
        content = saving.to_torch(self._base_optimizer, self._projections, now, self.frozen)
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, content)
            content = content if changed is None else changed
        return content

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a ``state_dict``, whole or not at all. The model's weights are the model's to load, before or right after.

        Raises:
            ValueError: if it is of another mode or other parameters, of a run not yet frozen while this one is, or of an optimizer
                that was not wrapped.
        """
        self._refuse_while_quantized("load_state_dict()")
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        found = saving.from_torch(state_dict, self._projections, self._base_optimizer, self.frozen)
        groups = [dict(group) for group in self.param_groups]
        state = dict(self.state)
        try:
            if found.frozen:
                self._keep_frozen_out()
            self._base_optimizer.load_state_dict(found.base)
        except Exception:
            for group, before in zip(self.param_groups, groups, strict=True):
                group.clear()
                group.update(before)
            self.state.clear()
            self.state.update(state)
            raise
        self._load_projections(found)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    @torch.no_grad()
    def load_projection(self, state_dict: dict[str, Any]) -> None:
        """Takes over only the projection's part of a ``state_dict``: latent weights, learned levels, strengths, and whether it is
        frozen. The base optimizer stays as it is, and may be of another kind than the state's; it holds the same parameters.

        Raises:
            ValueError: as ``load_state_dict``.
        """
        self._refuse_while_quantized("load_projection()")
        self._load_projections(saving.from_torch(state_dict, self._projections, self._base_optimizer, self.frozen, with_base=False))

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_while_quantized("a copy")
        # Without hooks, as torch's optimizers, and without a scheduler's patch of step.
        kept = ("modes", "frozen", "_projections", "_hidden", "_base_optimizer")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_hooks()
        for projection in self._projections if self.frozen else ():
            projection.end(quantized=False)  # a copy of a parameter has lost its mark

    # Inside.

    def _make_hooks(self) -> None:
        for name in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post"):
            setattr(self, f"_optimizer_{name}_hooks", OrderedDict())
        self._patch_step_function()  # torch's: step() then calls its hooks
        # In a compiled training step this is where the graph ends: the work is in place, piece by piece. Said here and not above
        # the method, since it imports torch's compiler, which takes as long as torch. The base optimizer has imported it by now.
        self._step_outside_graphs = torch.compiler.disable(type(self)._step)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return [pair for one in self._projections for pair in zip(one.names, one.parameters, strict=True)]

    def _now(self) -> list[Snapshot]:
        """Each projection's parameters; inside ``hard_quantized()`` as they were before it."""
        return self._hidden or [projection.snapshot() for projection in self._projections]

    def _by_name(self, found: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """What was found for each projection's parameters, or nothing for some, by the parameters' names."""
        of_each = zip(self._projections, found, strict=True)
        return {name: one for projection, tensors in of_each for name, one in zip(projection.names, tensors, strict=bool(tensors))}

    def _rates(self) -> dict[int, float | Tensor]:
        """The learning rate of each parameter, by its identity."""
        rates = {id(parameter): group["lr"] for group in self.param_groups for parameter in group["params"]}
        self._require(rates)
        return rates

    def _require(self, held: Container[int]) -> None:
        missing = [name for name, parameter in self._named() if id(parameter) not in held] if not self.frozen else []
        if missing:
            raise ValueError(
                f"the base optimizer does not hold the parameter {missing[0]!r}, which is to be quantized: give it to the "
                "optimizer too, or set its requires_grad to False, or leave it out of the pairs"
            )

    def _take_over(self) -> None:
        """Weights that were written into the model from outside become the latent ones."""
        if not self.frozen and self._hidden is None:
            for projection in self._projections:
                projection.take_over()

    def _show(self) -> None:
        """Puts the projected weights into the model, in lazy modes."""
        if not self.frozen:
            rates = self._rates()
            for projection in self._projections:
                projection.show(rates)
        torch.clear_autocast_cache()

    def _check_finite(self) -> None:
        for projection in self._projections:
            projection.check_finite()

    def _load_projections(self, found: saving.Found) -> None:
        if found.frozen:
            for projection in self._projections if not self.frozen else ():
                projection.show_finished()
            self._end_projection(quantized=False)
        for projection, content in zip(self._projections, found.projections, strict=True):
            projection.load(*content)
        self._show()
        for projection in self._projections if not found.frozen else ():
            projection.show_loaded()

    def _check_frozen(self) -> None:
        for projection in self._projections if self.frozen else ():
            projection.check_frozen()

    def _end_projection(self, quantized: bool) -> None:
        self.frozen = True
        for projection in self._projections:
            projection.end(quantized)
        self._hold_frozen_still()
        self._keep_frozen_out()
        torch.clear_autocast_cache()

    def _hold_frozen_still(self) -> None:
        """Nobody's ``model.requires_grad_(True)`` makes frozen weights gather gradients again."""
        for _, parameter in self._named():
            if parameter.requires_grad:
                parameter.requires_grad_(False)
            parameter.grad = None

    def _keep_frozen_out(self) -> None:
        frozen = {id(parameter) for _, parameter in self._named()}
        for group in self.param_groups:
            stay = [id(parameter) not in frozen for parameter in group["params"]]
            for key in {"params", "param_names"} & group.keys():  # torch's names, where it was given them
                if len(group[key]) == len(stay):  # a frozen state of before has all names
                    group[key] = [one for one, stays in zip(group[key], stay, strict=True) if stays]
        for _, parameter in self._named():
            self.state.pop(parameter, None)

    def _refuse_while_quantized(self, call: str) -> None:
        if self._hidden is not None:
            raise RuntimeError(f"{call} inside hard_quantized(): the model does not show the weights in training there")
