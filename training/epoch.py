"""One epoch of a run: training, both validations, and what is written down at its end."""

import copy
import functools
import math
import os
import time
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import data
import quantize
from sources.batches import Batches
from training import captured, checkpoints, loops, regimes, tracking
from training.computing import Precision, shared_cores
from training.folder import Run
from training.log import log, warn
from training.processes import Processes
from training.state import State
from utils import UsageError


@dataclass(frozen=True)
class Job:
    """What stays the same from a run's first epoch to its last."""

    args: Namespace
    run: Run
    sets: data.Data
    regime: regimes.Regime
    device: torch.device
    precision: Precision
    processes: Processes
    network: nn.Module
    captured_step: captured.CapturedStep | None
    stop: loops.StopSignals


def describe(job: Job, state: State) -> None:
    """What is about to run, in the log."""
    args, sets = job.args, job.sets
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    computed = f"{job.precision.in_words} ({job.precision.reason}){', compiled' if state.computed['compile'] == 'on' else ''}"
    computed += ", captured" if job.captured_step else ""
    place = f"{job.processes.share.count} processes, the first on {job.device}" if job.processes.several else str(job.device)
    log.info(f"run: {job.run.folder} on {place}, {computed}, seed {args.seed}")
    log.info(f"data: {sets.source}; {sets.train.samples} training and {sets.validation.samples} validation {state.task.samples}")
    log.info(
        f"network: {args.model} of {state.model.size}, {parameters:,} parameters" + (f", from {args.resume}" if args.resume else "")
    )
    log.info(f"regime: {job.regime}")
    latent = state.optimizer.latent
    if latent:
        count = sum(weight.numel() for weight in latent.values())
        mode = args.mode
        freeze = f"frozen after epoch {args.freeze_epoch}" if 0 <= args.freeze_epoch < args.epochs else "never frozen"
        log.info(
            f"mode: {mode.name} ({mode.title}), quantizer {mode.shown.in_words}, "
            f"{count:,} weights in {len(latent)} tensors ({count / parameters:.1%}), {freeze}"
        )
        for name, reason in quantize.reasons(state.model, mode).items():
            log.debug(f"{name}: {'quantized' if name in latent else reason}")


def facts_of_training(args: Namespace, sets: data.Data, regime: regimes.Regime, state: State) -> dict[str, Any]:
    """The same as values, for ``args.json``: what a report says of a run, so that it need not understand the log."""
    latent = state.optimizer.latent.values()
    return {
        "regime": regime,
        "data": {"source": sets.source, "samples": state.task.samples, "training": sets.train.samples,
                 "validation": sets.validation.samples, "sha256": sets.digest},
        "parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "quantized": {"weights": sum(weight.numel() for weight in latent), "tensors": len(latent)},
        "precision": state.computed["precision"],
        "processes": state.computed["processes"],
        "compiled": state.computed["compile"] == "on",
        "captured": args.capture,
        "warm_start": state.warm_start,
    }  # fmt: skip


def train_epoch(job: Job, state: State) -> dict[str, Any]:
    """An epoch's training and validations; returns its row of results."""
    began = time.perf_counter() - state.seconds  # when it would have begun, had it never been interrupted
    args, optimizer = job.args, state.optimizer
    settings = regimes.settings_at(job.regime, state.epoch, state.history)
    if args.freeze_epoch != -1 and state.epoch >= args.freeze_epoch and optimizer.projecting:
        optimizer.freeze()
        log.info(f"frozen after {state.epoch} epochs: the quantized weights stay as they are, the rest trains on")
    align(job, state)
    if state.step == 0:
        set_optimizer(job, state, settings)

    def after_step() -> None:
        state.seconds = time.perf_counter() - began
        between_steps(job, state, progress)

    try:
        words = f"epoch {state.epoch + 1}/{args.epochs}"
        progress = loops.Progress(words, job.sets.train, state, args.print_freq, shown=job.processes.first)
        network = job.processes.averaging(job.network)
        if job.processes.share.count > 2 and 0 < state.step < len(job.sets.train):
            loops.rehearse(state, network, job.precision, job.sets.train)
        step = job.captured_step or functools.partial(
            loops.train_step,
            state.task,
            network,
            optimizer,
            job.precision,
            state.meter,
            state.carried,
        )
        clocks = time.perf_counter(), time.process_time()
        with progress:
            loops.train(state, step, job.sets.train, after_step)
        if state.epoch == args.start_epoch and job.processes.first and job.device.type == "cpu":
            warn_of_shared_cores(*clocks)
        state.require_finite()  # before it can be the best network
        job.processes.align(state.model.buffers())  # BatchNorm's: each process has counted only its share of the last batch
        row = {"epoch": state.epoch + 1, "lr": settings["lr"]}
        if args.mode.has_strength or not args.mode.projects:
            row["strength"] = optimizer.strength if optimizer.projecting else 0.0
        row |= _columns("train", state.meter.read()) | _columns("val", validate(job, state))
        with optimizer.hard_quantized():
            if optimizer.projecting:
                row |= _columns("val", validate(job, state), "_bin")
            elif optimizer.frozen:
                row |= {f"val_{name}_bin": row[f"val_{name}"] for name in state.task.figures}
            score = state.task.score(row)
            if state.best is None or state.task.better(score, state.best):
                state.best = score
                job.run.save_best({**state.network(args), "epoch": state.epoch + 1, "results": row})
        last = state.epoch + 1 == args.epochs or regimes.ended(job.regime, state.epoch + 1, [*state.history, row])
        if last and job.sets.test is not None:
            tested = test(job, state)
            row |= {"test_ppl": tested["ppl"]} if tested else {}
    finally:
        state.seconds = time.perf_counter() - began
    return {**row, "seconds": round(state.seconds, 3)}


def warn_of_shared_cores(began: float, worked_before: float) -> None:
    """A warning where the training since these times of ``perf_counter`` and ``process_time`` has shared its cores."""
    seconds, worked = time.perf_counter() - began, time.process_time() - worked_before
    line = shared_cores(torch.get_num_threads(), os.cpu_count() or 1, os.getloadavg()[0], worked, seconds)
    if line:
        warn(line)


def between_steps(job: Job, state: State, progress: loops.Progress) -> None:
    """Shows the step, ends the process after a signal, and saves inside a long epoch; all processes at the same step."""
    minutes = job.args.checkpoint_minutes
    due = job.processes.first and minutes > 0 and time.monotonic() - job.run.saved_at > 60 * minutes
    number, due = job.processes.largest(job.stop.number, int(due))
    if job.args.mode.schedule.every_step and state.optimizer.projecting:
        strength = strength_in(state.epoch, job.args, job.regime, share_over(job, state), state.history)
        state.optimizer.set_strength(strength)
    # After the exchange: the look at the loss waits for the device, and there for ever for a process that is gone.
    progress.step()
    job.stop.answer(number)
    if due:
        job.run.save_checkpoint(state.checkpoint(job.args))
        log.debug(f"saved after step {state.step}")


def align(job: Job, state: State) -> None:
    """Gives all processes the first one's weights, since they drift on unequal machines.

    But not what the model shows of latent weights, which each makes itself: written into the model by a machine that rounds
    otherwise, it would be taken for weights that somebody else put there.
    """
    optimizer, model = state.optimizer, state.model
    quantized = {id(parameter) for parameter in optimizer.parameters.values()}
    others = [parameter.detach() for parameter in model.parameters() if id(parameter) not in quantized]
    job.processes.align([*optimizer.latent.values(), *optimizer.levels.values(), *others, *model.buffers()])


def set_optimizer(job: Job, state: State, settings: dict[str, Any]) -> None:
    """The optimizer and the strength of an epoch."""
    optimizer, args = state.optimizer, job.args
    base, kept = optimizer.base_optimizer, args.keep_optimizer_state
    if (kept or args.capture) and type(base) is regimes.OPTIMIZERS[settings["optimizer"]]:
        regimes.update_settings(base, settings)
        if not kept:
            regimes.zero_state(base)  # in place: a recording finds the state where it was
    else:  # a new one at each epoch, as published: moments and momentum start from zero
        optimizer.base_optimizer = regimes.build_optimizer(state.model.parameters(), settings)
        if args.capture:
            regimes.make_capturable(optimizer.base_optimizer, job.device)
    if optimizer.projecting:
        optimizer.set_strength(strength_in(state.epoch, args, job.regime, share_over(job, state), state.history))


def wrap(base_optimizer: torch.optim.Optimizer, model: nn.Module, args: Namespace) -> quantize.ProjectedOptimizer:
    """The optimizer with the run's projection around its steps; raises UsageError where the mode finds nothing to quantize."""
    try:
        selected = args.mode.select(model)
        return quantize.ProjectedOptimizer(base_optimizer, selected, args.mode, capturable=args.capture, seed=args.seed)
    except ValueError as error:
        raise UsageError(f"--projection_mode {args.projection_mode}: {error}") from None


def strength_in(epoch: int, args: Namespace, regime: regimes.Regime, share: float = 0.0, history: regimes.History = ()) -> float:
    """Strength of the projection in an epoch, before a step's learning rate scales it; ``share`` as in ``share_over``."""
    strength, lr = args.mode.strength(args.rate, epoch, share), regimes.settings_at(regime, epoch, history)["lr"]
    return strength * (regime[0]["lr"] / lr) if args.adjust_reg and args.mode.schedule.flag and lr else strength


def share_over(job: Job, state: State) -> float:
    """The share that is over of the way from the run's first step to the freeze, or to its end where nothing freezes before."""
    first, epochs = job.args.start_epoch, job.args.epochs
    end = epochs if job.args.freeze_epoch == -1 else min(job.args.freeze_epoch, epochs)
    return (state.epoch - first + state.step / len(job.sets.train)) / max(end - first, 1)


def check_strength(args: Namespace, regime: regimes.Regime) -> None:
    """Raises UsageError where the strength, or the strength of a step, grows beyond all numbers while something is projected."""
    last = (args.epochs if args.freeze_epoch == -1 else min(args.freeze_epoch, args.epochs)) - 1
    # It only grows between two entries of the regime: the epochs before each of them tell.
    for epoch in sorted(epoch for epoch in {last, *(entry - 1 for entry in regime)} if args.start_epoch <= epoch <= last):
        strength = strength_in(epoch, args, regime)
        if not math.isfinite(strength * max(1.0, regimes.settings_at(regime, epoch)["lr"])):
            raise UsageError(
                f"--{args.mode.schedule.flag} {args.rate:g}: the strength in epoch {epoch + 1} is not a finite number; "
                "take a smaller one"
            )


def validate(job: Job, state: State) -> dict[str, float]:
    """The task's figures of the network as it is now."""
    return _figures(job, state, state.model, job.sets.validation)


def test(job: Job, state: State) -> dict[str, float]:
    """The task's figures on test data of the best network so far, as it was saved: hard-quantized where a mode is on. Empty
    where it is lost: the run is not."""
    path, model = job.run.folder / checkpoints.BEST, copy.deepcopy(state.model)
    try:
        checkpoints.load_weights(model, checkpoints.read(path), path)
    except UsageError as error:
        warn(f"{error}: nothing is tested")
        return {}
    return _figures(job, state, model, job.sets.test)


def _figures(job: Job, state: State, model: nn.Module, batches: Batches) -> dict[str, float]:
    return loops.validate(
        state.task,
        model,
        batches,
        state.task.meter(job.device, job.processes.total),
        job.precision,
        lambda: job.stop.answer(*job.processes.largest(job.stop.number)),
    )


def finish_epoch(job: Job, state: State, row: dict[str, Any], board: tracking.Board) -> None:
    """Counts the epoch, and writes it down: TensorBoard, log, checkpoint and results, in this order.

    What is written after the checkpoint can be made again from it; what is written before is purged when its epoch is repeated.
    """
    args, optimizer = job.args, state.optimizer
    metrics = quantize.measure(optimizer.latent, optimizer.quantized(), state.start_signs)
    row |= {metric: sum(values.values()) / len(values) for metric, values in metrics.items()}
    state.history.append(row)
    state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
    state.ended = regimes.ended(job.regime, state.epoch, state.history)
    state.meter.reset()
    for tensor in state.carried:
        tensor.zero_()
    board.add_epoch(row, metrics)
    board.add_levels(optimizer.levels, state.epoch)
    if state.epoch % max(1, args.epochs // tracking.HISTOGRAMS) == 0 or state.epoch in (args.freeze_epoch, args.epochs):
        board.add_histograms(optimizer.latent, state.epoch)
    if state.ended or state.epoch == args.epochs:
        board.add_final(args, row, state.best)
    board.flush()
    strength = f", strength {row['strength']:g}" if "strength" in row else ""
    words = f"{state.task.epoch_in_words(row)}, lr {row['lr']:g}{strength}, {row['seconds']:.1f} s"
    log.info(f"epoch {state.epoch}/{args.epochs}: {words}")
    job.run.save_checkpoint(state.checkpoint(args), keep=args.save_all)
    job.run.write_results(state.history)


def _columns(split: str, figures: dict[str, float], suffix: str = "") -> dict[str, float]:
    return {f"{split}_{name}{suffix}": value for name, value in figures.items()}
