"""One mode's work on its parameters: what happens to them around a step of the base optimizer."""

import hashlib
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantize.blocks import Block, blocks_of
from quantize.checks import warn_of_half_precision
from quantize.finished import check_finite, check_quantized, levels_alone, values_beyond
from quantize.groups import Groups
from quantize.modes import ProjectionMode
from quantize.selectors import FROZEN_BY
from quantize.shards import copy, is_sharded, local, over_all, part
from quantize.written import Loaded, Snapshot, among, extremes, levels_in, moved, of_another, total_of_sample

Rates = Mapping[int, float | Tensor]  # learning rates by the identity of the parameter


class Projection:
    """The parameters of one mode, with what belongs to them beside the model: latent weights, learned levels, the strength.

    Attributes:
        names, parameters: to be quantized.
        latent: their latent weights: tensors of its own in a lazy mode, else the parameters themselves.
        levels: learned ones of each parameter, ``(2,)``: positive, negative; empty where none are learned.
        strength: of the pull, before the learning rate scales it.
        draws: how often the shown weights were drawn, in a stochastic mode.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]], mode: ProjectionMode, capturable: bool, seed: int) -> None:
        self.mode = mode
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.latent: list[Tensor] = [p.detach().clone() for p in self.parameters] if mode.lazy else self.parameters
        self.levels: list[Tensor] = []
        if mode.quantizer.given == "levels":
            for p in self.parameters:
                start = torch.tensor(mode.quantizer.start, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
                self.levels.append(levels_in(p.detach(), start))
        self.strength = 0.0
        self.draws = 0
        self._capturable, self._seed = capturable, seed
        self._strength_on: dict[torch.device, Tensor] = {}
        self._shown_at: list[float | Tensor] = []  # the learning rate of each parameter, of what the model shows
        self._loaded: Loaded | None = None  # of a state that was loaded, until the next step
        self._gradients: list[Tensor | None] = []  # during a step, where levels are learned: the user's, at the shown weights
        self._level_steps: dict[int, Tensor] = {}  # during such a step: what each tensor's levels will lose, by its number
        self._held: dict[int, Tensor] = {}  # parameters that the user holds still: what they show, by number
        self._shown_apart: dict[int, Tensor] = {}  # what is shown of a loaded state or a cast model, until the next step, by number
        self._looked_at: list[tuple[Any, ...]] = []  # once frozen: the marks of the parameters when they were last found quantized
        self._arrange()
        self._note_shown()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shown_marks = [None] * len(self._shown_marks)  # a copy's parameters lie elsewhere: their content is looked at

    def hold(self, strength: float) -> None:
        """Takes a new strength."""
        self.strength = strength
        for tensor in self._strength_on.values():
            tensor.fill_(strength)

    # Around a step.

    def before_step(self, rates: Rates, ascending: set[int]) -> None:
        """Puts the latent weights, with their gradients, in the place of those that the model shows.

        ``ascending``: identities of the parameters whose base optimizer maximizes.
        """
        self._follow()
        if not self._capturable or self._holds_others():
            self.take_over()
        self._note_held()
        if not self.mode.lazy:
            return
        if self.levels:
            self._gradients = [p.grad for p in self.parameters]
            self._pull_gradients_back(rates, ascending)
        copy(self.latent, self.parameters)

    def after_step(self, rates: Rates) -> None:
        """Clips and pulls the weights that the step has made; a step at rate 0 has moved none."""
        for index, step in self._level_steps.items():
            self.levels[index].sub_(step)
        self._give_gradients_back()
        if not self._capturable and all(map(_is_zero, rates.values())):  # a recorded step cannot ask: the rate changes later
            self.show(rates)
            return
        self.draws += 1
        self._loaded, self._shown_apart = None, {}
        clips = self.mode.quantizer.clips
        for number, block in enumerate(self._blocks):
            x = block.read(self.parameters)
            if clips and (self.mode.lazy or self.mode.quantizer.at_ends):  # a pull to the ends clips by itself
                for piece in x.pieces:
                    self._show_infinite(piece)
                    if self.mode.lazy:
                        piece.clamp_(-1.0, 1.0)
            if self.mode.lazy:
                block.write(x, self.latent)
            for piece in self._pull(number, block, x, rates, clips):  # each is clipped while it lies in the cache
                if clips and not self.mode.lazy:
                    if not self.mode.quantizer.at_ends:
                        self._show_infinite(piece)
                    piece.clamp_(-1.0, 1.0)
            block.write(x, self.parameters)
        self._put_held(self.parameters)
        self._note_shown(rates)

    def _show_infinite(self, piece: Tensor) -> None:
        """Infinite weights become NaN: the clip would make ordinary ones of them, and hide that the training has diverged."""
        sum_is_free = piece.device.type == "cpu" and not self._capturable  # elsewhere it would be waited for
        if not sum_is_free or not math.isfinite(piece.sum()):
            piece.masked_fill_(piece.isinf(), math.nan)

    def give_up_step(self, rates: Rates) -> None:
        """Shows what the model showed before a step that did not come to its end: latent weights and levels have not moved."""
        self._give_gradients_back()
        self.show(rates)

    def _give_gradients_back(self) -> None:
        for parameter, gradient in zip(self.parameters, self._gradients, strict=bool(self._gradients)):
            parameter.grad = gradient
        self._gradients, self._level_steps = [], {}

    def check_gradients(self) -> None:
        """Raises ValueError where a gradient cannot be told from the latent weights."""
        for name, parameter in zip(self.names, self.parameters, strict=True) if self.levels else ():
            if parameter.grad is not None and parameter.grad.is_sparse:
                raise ValueError(f"{name} has a sparse gradient, from which {self.mode.name} cannot learn levels: make it dense")

    def show(self, rates: Rates) -> None:
        """Puts the pulled weights into the model, in a lazy mode."""
        if self.mode.lazy:
            self._follow()
            self._note_held()
            self._pulled_into(self.parameters, rates)
            self._note_shown(rates)

    def _pulled_into(self, places: Sequence[Tensor], rates: Rates, latent: Sequence[Tensor] | None = None) -> None:
        copy(self.latent if latent is None else latent, places)
        for number, block in enumerate(self._blocks):
            x = block.read(places)
            for _ in self._pull(number, block, x, rates):
                pass
            block.write(x, places)
        self._put_held(places)

    def _held_now(self) -> set[int]:
        return {index for index, parameter in enumerate(self.parameters) if not parameter.requires_grad}

    def _holds_others(self) -> bool:
        return self.mode.lazy and self._held_now() != self._held.keys()

    def _note_held(self) -> None:
        """Which parameters the user holds still, by ``requires_grad``: they show what they do until they are let go."""
        held = self._held_now()
        if self.mode.lazy and held == self._held.keys():
            return
        known = {**self._shown_apart, **self._held} if self.mode.lazy else {}
        with torch.inference_mode(False):  # what is made here may be written to later
            self._held = {i: known[i] if i in known else self.parameters[i].detach().clone() for i in held}

    def _put_held(self, places: Sequence[Tensor]) -> None:
        copy(list(self._held.values()), [places[index] for index in self._held])

    def _pull(self, number: int, block: Block, x: Groups, rates: Rates, clipped: bool = False) -> Iterator[Tensor]:
        strength = self._strength_of(block, x, rates)
        quantizer = self.mode.shown if self.mode.lazy else self.mode.quantizer
        given = self._given(quantizer.given, number, block, x, self.levels)
        return self.mode.pull.pull_(x, quantizer, strength, given, clipped)

    def _strength_of(self, block: Block, x: Groups, rates: Rates) -> float | Tensor:
        like = x.pieces[0]
        strength: float | Tensor = self.strength
        if self._capturable:
            if like.device not in self._strength_on:
                self._strength_on[like.device] = torch.tensor(self.strength, dtype=torch.float64, device=like.device)
            strength = self._strength_on[like.device]
        if not self.mode.schedule.scaled_by_lr:
            return strength
        own = [rates[id(self.parameters[index])] for index in block.indices]
        if all(rate is own[0] or (not isinstance(rate, Tensor) and rate == own[0]) for rate in own):
            return strength * own[0]
        on_device = torch.stack([torch.as_tensor(rate, dtype=torch.float64, device=like.device) for rate in own])
        return x.spread((strength * on_device).to(like.dtype))

    def _given(self, what: str, number: int, block: Block, x: Groups, levels: Sequence[Tensor]) -> Any:
        """What the quantizer of a block must be given beside the weights."""
        if what == "levels":
            return torch.stack([levels[index] for index in block.indices])
        if what == "draw":  # follows from the seed and the number of draws alone, so that it can be repeated
            here = "".join(f"/{place}" for place in part(self.parameters[block.indices[0]]))  # each process its own signs
            digest = hashlib.sha256(f"{self._seed}/{self.draws}/{number}{here}".encode()).digest()
            return torch.Generator(x.pieces[0].device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return None

    def _pull_gradients_back(self, rates: Rates, ascending: set[int]) -> None:
        """Gradients at the shown weights become those at the latent ones, and give the gradient step of learned levels."""
        quantizer = self.mode.quantizer
        gradients = [torch.zeros_like(p) if p.grad is None else torch.empty_like(p).copy_(p.grad) for p in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if parameter.grad is None else gradient
        for number, block in enumerate(self._blocks):
            latent, gradient = block.read(self.latent), block.read(gradients)
            fitted = quantizer.fit(latent, self._given("levels", number, block, latent, self.levels))
            weights = iter(latent.pieces)
            sums = gradient.sums(lambda g, weights=weights, fitted=fitted: quantizer.level_terms(g, next(weights), fitted))
            for g, w in zip(gradient.pieces, latent.pieces, strict=True):
                g.copy_(quantizer.pull_back(g, w, fitted))
            block.write(gradient, gradients)
            for index, step in zip(block.indices, torch.stack([gradient.by_tensor(one) for one in sums], -1), strict=True):
                parameter = id(self.parameters[index])
                self._level_steps[index] = rates[parameter] * (-step if parameter in ascending else step)

    # Hard quantization.

    def hard_quantize(self, places: Sequence[Tensor]) -> None:
        """Puts the finished network's values of the weights in training into ``places``, tensors like the parameters.

        Weights that were quantized before, such as those of the best epoch that are loaded again, stay as they are.

        Raises:
            NotFinite: if a weight, or a learned level, is not a finite number; nothing is written then.
        """
        self._hard_quantize(self.snapshot(), places)

    def quantize_for_good(self) -> None:
        """Puts them into the model, whose they are from now on. Raises as ``hard_quantize``."""
        now = self.snapshot()
        self._hard_quantize(now, self.parameters)
        self.levels = now.levels

    def _hard_quantize(self, now: Snapshot, places: Sequence[Tensor]) -> None:
        self._check_finite(now)
        quantizer = self.mode.quantizer
        before = {}
        for index, weight in enumerate(now.latent) if not quantizer.settled else ():
            quantized = levels_alone(weight, quantizer)
            if quantized.any():
                before[index] = quantized, local(weight).clone()
        copy(now.latent, places)
        for number, block in enumerate(self._blocks):
            x = block.read(places)
            fitted = quantizer.fit(x, self._given(quantizer.given, number, block, x, now.levels))
            for piece in x.pieces:
                piece.copy_(quantizer.assign(piece, fitted))
            block.write(x, places)
        for index, (quantized, weights) in before.items():
            here = local(places[index])
            here.copy_(torch.where(quantized, weights, here))

    def check_finite(self) -> None:
        """Raises NotFinite if a weight in training, or a learned level, is not a finite number."""
        self._check_finite(self.snapshot())

    def _check_finite(self, now: Snapshot) -> None:
        check_finite(self.names, now.latent)
        check_finite([f"{name}'s levels" for name in self.names], now.levels)

    # Weights that somebody else wrote into the model.

    def snapshot(self) -> Snapshot:
        """The parameters as they are now; none is copied."""
        self._follow()
        shown = [parameter.detach() for parameter in self.parameters]
        if not self.mode.lazy:
            return Snapshot(shown, shown, self.levels, set())
        written = self._written()
        latent = [written.get(index, weight).detach() for index, weight in enumerate(self.latent)]
        return Snapshot(shown, latent, self._levels_with(written), set(written))

    def take_over(self) -> None:
        """Weights that were written into the model from outside become the latent ones, and levels in them the learned ones."""
        self._follow()
        if self.mode.lazy:
            written = self._written()
            self.levels = self._levels_with(written)
            for index, weights in written.items():
                self.latent[index].copy_(weights)
                if index in self._held:
                    self._held[index].copy_(self.parameters[index])

    def put_back(self, before: Snapshot) -> None:
        """Puts what the model showed back into it, still as what others have written where they have."""
        copy(before.shown, self.parameters)
        self._note_shown()
        for index in before.written:
            self._shown_marks[index] = None

    def _written(self) -> dict[int, Tensor]:
        """The weights in training of the parameters that no longer hold what they were made to show, by number.

        They are what was written, and where a parameter still shows what it did, the latent ones. Where it shows that nowhere, or
        in zeros alone, all of it was written: a zero may be among the values of other levels, too. So it was where weights are
        drawn, since what is shown does not tell what it is drawn from.
        """
        suspects = [i for i, mark in enumerate(self._marks()) if mark != self._shown_marks[i]]
        if not self._anywhere(bool(suspects)):
            return {}
        parameters = [parameter.detach() for parameter in self.parameters]
        kept = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters]
        now, loaded = self.strength, self._loaded
        # The model that belongs to a loaded state may come after another strength was set: it shows that state's.
        for strength in dict.fromkeys((loaded.strength if loaded else now, now)):
            self.hold(strength)
            shown = [self._shown_again()]
            if loaded and strength == loaded.strength:
                shown += [self._shown_again(moved(self.latent, sign, loaded)) for sign in (1, -1)]
            for index, parameter in enumerate(parameters):
                kept[index] |= among(parameter, [one[index] for one in shown], loaded if len(shown) > 1 else None)
        self.hold(now)
        for index, weights in self._shown_apart.items():
            kept[index] |= parameters[index] == weights
        for index, parameter in enumerate(parameters):
            local(kept[index]).logical_and_(~of_another(parameter, kept[index], shown[0][index], self.mode.quantizer, loaded))
        everywhere = any(map(is_sharded, parameters))  # all processes take sums of all then
        found = {index: self._with_written(index, kept[index]) for index in (range(len(parameters)) if everywhere else suspects)}
        return {index: weights for index, weights in found.items() if index in suspects and not local(kept[index]).all()}

    def _with_written(self, index: int, kept: Tensor) -> Tensor:
        """A parameter's latent weights, but where it does not show (``kept``) what they make: there what was written."""
        parameter = self.parameters[index].detach()
        some = over_all(parameter, local(kept & (parameter != 0)).any().float(), "max")
        return torch.where(kept, self.latent[index], parameter) if some and self.mode.drawn is None else parameter

    def _levels_with(self, written: Container[int]) -> list[Tensor]:
        """The learned levels; of parameters that were ``written`` those that are in them."""
        found = []
        for index, own in enumerate(self.levels):
            parameter = self.parameters[index].detach()
            somewhere = over_all(parameter, torch.tensor(float(index in written), device=own.device), "max")
            found.append(levels_in(parameter, own) if somewhere else own)
        return found

    def _anywhere(self, suspicion: bool) -> bool:
        """Whether one of those who hold parts of the parameters has a suspicion; all must then look, since looking takes sums."""
        for parameter in self.parameters:
            if is_sharded(parameter) and parameter.device.type == "cpu":  # elsewhere the marks are alike in all processes
                return bool(over_all(parameter, torch.tensor(float(suspicion), device=parameter.device), "max"))
        return suspicion

    def _note_shown(self, rates: Rates | None = None) -> None:
        if rates is not None:
            given = [rates[id(parameter)] for parameter in self.parameters]
            if not self._capturable:  # a scheduler changes a rate that is a tensor in place
                copies = {id(rate): rate.clone() for rate in given if isinstance(rate, Tensor)}
                given = [copies.get(id(rate), rate) for rate in given]
            self._shown_at = given
        self._shown_marks = self._marks() if self.mode.lazy else []

    def _shown_into(self, places: Sequence[Tensor], latent: Sequence[Tensor] | None = None) -> None:
        """Once more what the model was last made to show, or would have been by other latent weights."""
        rates = {id(parameter): rate for parameter, rate in zip(self.parameters, self._shown_at, strict=True)}
        self._pulled_into(places, rates, latent)

    def _shown_again(self, latent: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The same in tensors of its own."""
        places = [torch.empty_like(weight) for weight in self.latent]
        self._shown_into(places, latent)
        return places

    def _marks(self) -> list[tuple[Any, ...]]:
        """What changes where a parameter is written: torch counts its writes, but not those to its ``data``; on a CPU the sum of
        a thousand entries, which is there without waiting, tells of these too."""
        return [
            (
                p._version,
                local(p).data_ptr(),
                total_of_sample(p.detach()) if p.device.type == "cpu" and not self._capturable else None,
            )
            for p in self.parameters
        ]

    # A model that was moved or cast.

    def _arrange(self) -> None:
        self._forms = self._forms_of(self.parameters)
        quantizer = self.mode.quantizer
        self._blocks = blocks_of(self.parameters, quantizer.by_row, quantizer.fits)

    def _follow(self) -> None:
        """Moves and casts what belongs to parameters that were moved or cast."""
        if self._forms != self._forms_of(self.parameters):
            with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
                self._follow_now()

    def _follow_now(self) -> None:
        if self.mode.lazy:
            # The model goes on showing what it did before it was moved or cast, which is not to the last bit what is made anew.
            shown = [torch.empty_like(weight) for weight in self.latent]
            self._shown_into(shown)
            kept = [one.to(p) == p.detach() for one, p in zip(shown, self.parameters, strict=True)]
            for index, weights in self._shown_apart.items():
                kept[index] |= weights.to(self.parameters[index]) == self.parameters[index].detach()
            self.latent = [torch.empty_like(p).copy_(w) for p, w in zip(self.parameters, self.latent, strict=True)]
            self._shown_apart = {index: p.detach().clone() for index, p in enumerate(self.parameters)}
            self._held = {index: self._shown_apart[index].clone() for index in self._held}
            for index, mask in enumerate(kept):
                if over_all(mask, (~local(mask)).any().float(), "max"):
                    self.latent[index].copy_(self._with_written(index, mask))
                    if self.levels:
                        self.levels[index] = levels_in(self.parameters[index].detach(), self.levels[index])
        self.levels = [
            level.to(device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
            for p, level in zip(self.parameters, self.levels, strict=bool(self.levels))
        ]
        now_otherwise = [
            (name, p) for name, p, form in zip(self.names, self.parameters, self._forms, strict=True) if p.dtype != form[0]
        ]
        warn_of_half_precision(now_otherwise, self.mode, stacklevel=6)
        self._arrange()
        self._note_shown()

    @staticmethod
    def _forms_of(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
        return [(tensor.dtype, tensor.device, tensor.stride()) for tensor in tensors]

    # The end of the projection, and loading.

    def show_finished(self) -> None:
        """Weights that were finished when they were wrapped are put back: a lazy mode has shown their projection since then, which
        need not be the same."""
        if not self.mode.lazy:
            return
        self._follow()
        written = self._written()
        for index, (parameter, latent) in enumerate(zip(self.parameters, self.latent, strict=True)):
            others = over_all(parameter, torch.tensor(float(index in written), device=parameter.device), "max")
            if not values_beyond(latent, self.mode.quantizer) and not others:
                parameter.copy_(latent)

    def end(self, quantized: bool) -> None:
        """Lets go of what only training needs, and marks the parameters as quantized for good; they may yet have to be loaded."""
        self.latent = self.parameters
        self._blocks, self._held, self._shown_apart = [], {}, {}
        self._shown_marks = []
        self._looked_at = self._marks() if quantized else []
        for parameter in self.parameters:
            setattr(parameter, FROZEN_BY, self.mode.name)

    def check_frozen(self) -> None:
        """Raises NotFinite or NotQuantized if frozen weights were written over with others that are not quantized."""
        marks = self._marks()
        if not self._anywhere(marks != self._looked_at):
            return
        check_finite(self.names, self.parameters)
        check_quantized(self.names, self.parameters, self.mode.quantizer, self.mode.name)
        self._looked_at = marks

    def frozen_levels(self) -> list[Tensor]:
        """Learned levels; the weights' own where a frozen state of before held none."""
        if self.mode.quantizer.given == "levels" and not self.levels:
            return [extremes(parameter.detach()) for parameter in self.parameters]
        return self.levels

    def shown_apart(self, written: set[int]) -> set[int]:
        """The numbers of the parameters of a lazy mode that may show something else than is made of their latent weights: those
        that are held still, drawn, cast, or written by others; all while a model may be that of a loaded state."""
        if not self.mode.lazy:
            return set()
        every = self.mode.drawn is not None or self._loaded is not None
        return set(range(len(self.names))) if every else {*self._held, *self._shown_apart, *written}

    def load(
        self, strength: float, draws: int, latent: Sequence[Tensor], levels: Sequence[Tensor], shown: Mapping[int, Tensor]
    ) -> None:
        """Takes over what a state holds; no latent weights or levels where there are none."""
        self._follow()
        self.hold(strength)
        self._loaded = Loaded(strength, max((torch.finfo(one.dtype).eps for one in latent), default=0.0))
        self.draws = draws
        for mine, given in zip(self.latent if latent else (), latent, strict=True):
            mine.copy_(given)
        self.levels = self.levels if levels else []
        for mine, given in zip(self.levels, levels, strict=True):
            mine.copy_(given)
        if latent:  # what is held still shows what it did, or the loaded weights
            self._shown_apart = {i: torch.empty_like(self.parameters[i]).copy_(w) for i, w in shown.items()}
            self._held = {i: w for i, w in self._shown_apart.items() if not self.parameters[i].requires_grad}
            self._shown_into(self.parameters)

    def show_loaded(self) -> None:
        """Puts what a loaded state says is shown into the model: it is not always what the latent weights make."""
        copy(list(self._shown_apart.values()), [self.parameters[index] for index in self._shown_apart])
        self._note_shown()


def _is_zero(rate: float | Tensor) -> bool:
    """Whether a learning rate is 0, as far as that is known without waiting for a device."""
    return (not isinstance(rate, Tensor) or rate.device.type == "cpu") and float(rate) == 0
