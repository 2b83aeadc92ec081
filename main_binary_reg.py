"""Trains a ResNet in full precision, or toward binary or ternary weights.

Full precision, the warm start of the others:

    python main_binary_reg.py --model resnet --model_config "{'depth': 20}" --save resnet20 --dataset cifar10 --batch-size 128 \\
        --gpu 0 --epochs 200 --tb_dir tb/ResNet20_FP

ProxQuant-binary from there:

    python main_binary_reg.py --model resnet --resume results/resnet20 --model_config "{'depth': 20}" --dataset cifar10 --gpu 0 \\
        --save resnet20_pq_binary_Adam_run_0 --batch-size 128 --epochs 300 --reg_rate 1e-4 --optimizer Adam --lr 0.01 \\
        --projection_mode prox --freeze_epoch 200 --tb_dir tb/resnet20_pq_binary_Adam_Freeze_200_run_0

One network on four GPUs, and on two machines of eight:

    python main_binary_reg.py --gpus 0,1,2,3 ...
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 main_binary_reg.py ...

The same command given again continues an unfinished run. ``--help`` explains every flag.
"""

import ast
import functools
import logging
import sys
import time
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import captured
import checkpoints
import cli
import data
import distributed
import loops
import quantize
import regimes
import runs
import tracking
import utils
from errors import UsageError
from models import MODELS
from runs import log
from state import State


@dataclass(frozen=True)
class Job:
    """What stays the same from a run's first epoch to its last."""

    args: Namespace
    run: runs.Run
    sets: data.Data
    mode: quantize.ProjectionMode
    regime: regimes.Regime
    device: torch.device
    precision: utils.Precision
    processes: distributed.Processes
    network: nn.Module
    captured_step: captured.CapturedStep | None
    stop: loops.StopSignals


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    processes = distributed.here()
    runs.log_to_terminal(logging.INFO if processes.first else logging.ERROR)
    try:
        args, warnings = cli.parse(argv, modes=quantize.MODES, models=MODELS, datasets=data.DATASETS, optimizers=regimes.OPTIMIZERS)
        if args.evaluate is not None:
            return evaluate(args) if processes.first else 0
        run = runs.Run(args, writes=processes.first)
        if run.finished:
            run.finish()
            log.info(f"{run.folder}: complete, all {args.epochs} epochs are trained")
            return 0
        gpus = utils.count_gpus(args.device)
        if args.capture:
            captured.check_place(gpus > 0, processes.several or len(args.gpus) > 1)
        if len(args.gpus) > 1 and gpus and not distributed.started_by_torchrun():
            return distributed.launch([__file__, *(sys.argv[1:] if argv is None else argv)], len(args.gpus))
        utils.keep_freed_memory()
        device, warning = utils.select_device(args.device, args.gpus, "gpus" in args.typed, processes.local)
        with distributed.joined(processes, device):
            return train(args, [*warnings, *([warning] if warning else [])], run, device, processes)
    except UsageError as error:
        return _fail(str(error), 2)
    except loops.Diverged as error:
        return _fail(f"{error}: stopped, the last good checkpoint is kept; a smaller --lr may help", 1)
    except loops.Interrupted as interruption:
        return 128 + interruption.number
    except KeyboardInterrupt:  # before the first step, with nothing to save
        return 130
    except OSError as error:
        return _fail(f"{error}: stopped, the last good checkpoint is kept", 1)
    except RuntimeError as error:
        if "use_deterministic_algorithms" in str(error):
            return _fail(f"--deterministic: torch cannot do without an operation of another kind ({str(error).split('.')[0]})", 2)
        if "DataLoader worker" in str(error):
            return _fail(f"a process that decodes images is gone ({error}): stopped, the last good checkpoint is kept", 1)
        if not (processes.several and distributed.lost_another(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"another process of this run cannot be reached ({reason}): stopped, the last good checkpoint is kept", 1)


def train(args: Namespace, warnings: list[str], run: runs.Run, device: torch.device, processes: distributed.Processes) -> int:
    """One run, from its first epoch, or the one that it is continued in, to its last."""
    for line in warnings:
        log.warning(f"warning: {line}")
    if args.deterministic:
        utils.be_deterministic()
    precision = utils.select_precision(args.precision, device, args.tf32)
    sets = load_data(args, args.dataset, device, processes)
    utils.seed_everything(args.seed)
    model = build_model(args.model, args.dataset, args.model_config, sets.classes).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = distributed.synchronized(model, device)
    if args.resume and run.state is None:
        path = checkpoints.locate(Path(args.resume))
        checkpoints.load_weights(model, checkpoints.read(path), path)

    mode = quantize.MODES.get(args.projection_mode, quantize.FULL_PRECISION)
    regime = regimes.resolve_regime(args, model.regime, projected=args.projection_mode is not None)
    if args.capture:
        captured.check_regime(regime, args.epochs)
    base_optimizer = regimes.build_optimizer(model.parameters(), regimes.settings_at(regime, args.start_epoch))
    optimizer = quantize.ProjectedOptimizer(base_optimizer, mode.select(model), mode, capturable=args.capture)
    start_signs = {name: quantize.binarize(weight) for name, weight in optimizer.latent.items()}
    state = State(model, optimizer, start_signs, utils.Meter(device, processes.total), args.start_epoch)
    steps = (args.epochs - args.start_epoch) * len(sets.train)
    state.compiled = utils.select_compile(args.compile, device, steps)
    state.processes = processes.share.count

    facts = {**runs.facts_of_machine(device), "precision": precision.name, "processes": processes.share.count}
    with processes.first_one_first():
        run.open(facts)
    try:
        if run.state is not None:
            state.restore(run.state, regime)
            log.info(f"{run.folder}: continuing in epoch {state.epoch + 1}, after step {state.step}/{len(sets.train)}")
            if run.state.get("processes", 1) != state.processes:
                log.warning(
                    f"warning: {run.state.get('processes', 1)} processes before, {state.processes} now: sums round differently"
                )
            if not processes.first:
                state.meter.reset()  # the first one has the counts of all
        if not processes.alike(state.epoch, state.step):
            raise UsageError(f"--results_dir: the processes do not all see the same {run.folder}; several machines must share it")
        part = processes.share.part(0, args.batch_size)
        network = utils.CompiledNetwork(model, part.stop - part.start) if state.compiled else model
        captured_step = None
        if args.capture:
            regimes.make_capturable(optimizer.base_optimizer, device)
            step = functools.partial(loops.train_step, network, optimizer, precision, state.meter)
            captured_step = captured.CapturedStep(step, optimizer, args.batch_size)
        job = Job(args, run, sets, mode, regime, device, precision, processes, network, captured_step, loops.StopSignals())
        describe(job, state)
        tb_dir = Path(args.tb_dir) if args.tb_dir else run.folder / "tb"
        purged_from = 0 if run.state is None else state.epoch + 1
        with tracking.Board(tb_dir if processes.first else None, purged_from) as board:
            if run.state is None:
                board.add_start(args, optimizer.latent, state.epoch)
            run.write_results(state.history)
            while state.epoch < args.epochs:
                try:
                    row = train_epoch(job, state)
                except loops.Interrupted as interruption:
                    run.save_state(state.checkpoint(args))
                    named = "" if args.save else f" with --save {run.folder.name}"
                    words = f"saved after step {state.step}: the same command{named} continues"
                    log.info(f"{interruption} in epoch {state.epoch + 1}, {words}")
                    raise
                finish_epoch(job, state, row, board)
        log.info(f"{run.folder}: done, best error {100 - state.best_prec1:.2f}%")
    finally:
        run.close()
    return 0


def train_epoch(job: Job, state: State) -> dict[str, Any]:
    """An epoch's training and validations; returns its row of results."""
    began = time.perf_counter() - state.seconds
    args, optimizer = job.args, state.optimizer
    settings = regimes.settings_at(job.regime, state.epoch)
    if args.freeze_epoch != -1 and state.epoch >= args.freeze_epoch and optimizer.projecting:
        optimizer.freeze()
        log.info(f"frozen after {state.epoch} epochs: the quantized weights stay as they are, the rest trains on")
    if state.step == 0:
        set_optimizer(job, state, settings)
    try:
        words = f"epoch {state.epoch + 1}/{args.epochs}"
        progress = loops.Progress(words, job.sets.train, state, args.print_freq, shown=job.processes.first)
        step = job.captured_step or functools.partial(
            loops.train_step, job.processes.averaging(job.network), optimizer, job.precision, state.meter
        )
        loops.train(state, step, job.sets.train, lambda: between_steps(job, state), progress)
        job.processes.align_buffers(state.model)
        row = {"epoch": state.epoch + 1, "lr": settings["lr"], "strength": optimizer.strength if optimizer.projecting else 0.0}
        row |= _columns("train", state.meter.read()) | _columns("val", validate(job, state))
        with optimizer.hard_quantized():
            if optimizer.projecting:
                row |= _columns("val", validate(job, state), "_bin")
            elif optimizer.frozen:
                row |= {f"val_{name}_bin": row[f"val_{name}"] for name in ("loss", "error1", "error5")}
            prec1 = 100 - row.get("val_error1_bin", row["val_error1"])
            if state.best_prec1 is None or prec1 > state.best_prec1:
                state.best_prec1 = prec1
                job.run.save_best({**state.network(args), "epoch": state.epoch + 1, "results": row})
    finally:
        state.seconds = time.perf_counter() - began
    return {**row, "seconds": round(state.seconds, 3)}


def between_steps(job: Job, state: State) -> None:
    """Ends the process after a signal, and saves inside a long epoch; all processes at the same step."""
    minutes = job.args.checkpoint_minutes
    due = job.processes.first and minutes > 0 and time.monotonic() - job.run.saved_at > 60 * minutes
    number, due = job.processes.largest(job.stop.number, int(due))
    job.stop.answer(number)
    if due:
        job.run.save_state(state.checkpoint(job.args))
        log.debug(f"saved after step {state.step}")


def set_optimizer(job: Job, state: State, settings: dict[str, Any]) -> None:
    """The optimizer and the strength of an epoch."""
    optimizer = state.optimizer
    kind = regimes.OPTIMIZERS[settings["optimizer"]]
    kept = job.args.keep_optimizer_state
    in_place = kept or job.captured_step is not None  # a recording finds the state where it was
    if in_place and type(optimizer.base_optimizer) is kind:
        regimes.update_settings(optimizer.base_optimizer, settings)
        if not kept:
            regimes.zero_state(optimizer.base_optimizer)
    else:  # a new one at each epoch, as published: moments and momentum start from zero
        optimizer.base_optimizer = regimes.build_optimizer(state.model.parameters(), settings)
        if job.captured_step is not None:
            regimes.make_capturable(optimizer.base_optimizer, job.device)
    if optimizer.projecting:
        strength = job.mode.strength(job.args.rate, state.epoch)
        if job.args.adjust_reg and settings["lr"]:
            strength *= job.regime[0]["lr"] / settings["lr"]
        optimizer.set_strength(strength)


def validate(job: Job, state: State) -> dict[str, float]:
    """Loss and errors of the network as it is now."""
    meter = utils.Meter(job.device, job.processes.total)
    return loops.validate(
        state.model, job.sets.validation, meter, job.precision, lambda: job.stop.answer(*job.processes.largest(job.stop.number))
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
    state.meter.reset()
    board.add_epoch(row, metrics)
    if state.epoch % max(1, args.epochs // tracking.HISTOGRAMS) == 0 or state.epoch in (args.freeze_epoch, args.epochs):
        board.add_histograms(optimizer.latent, state.epoch)
    if state.epoch == args.epochs:
        board.add_final(args, row, 100 - state.best_prec1)
    board.flush()
    log.info(f"epoch {state.epoch}/{args.epochs}: {_in_words(row)}")
    job.run.save_state(state.checkpoint(args), keep=args.save_all)
    job.run.write_results(state.history)


def evaluate(args: Namespace) -> int:
    """Prints plain and hard-quantized loss and errors of a checkpoint. What is not given comes from the checkpoint."""
    path = checkpoints.locate(Path(args.evaluate))
    content = checkpoints.read(path)
    model_name = _given_or_kept(args, content, "model", MODELS)
    dataset = _given_or_kept(args, content, "dataset", data.DATASETS)
    args.precision = _given_or_kept(args, content, "precision", ("auto", "fp32", "bf16"))
    args.holdout = _given_or_kept(args, content, "holdout", range(2**31))
    args.input_size = _given_or_kept(args, content, "input_size", (None, *range(32, 2049)))
    mode_name = _given_or_kept(args, content, "projection_mode", [*quantize.MODES, None])
    mode = quantize.MODES.get(mode_name, quantize.FULL_PRECISION)
    config = _config_of(content) | args.model_config
    device, warning = utils.select_device(args.device, args.gpus, "gpus" in args.typed)
    if warning:
        log.warning(f"warning: {warning}")
    precision = utils.select_precision(args.precision, device, args.tf32)
    sets = load_data(args, dataset, device)
    model = build_model(model_name, dataset, config, sets.classes).to(device, memory_format=torch.channels_last)
    checkpoints.load_weights(model, content, path)

    log.info(f"{path}: {model_name} {config} on {sets.source}, projection mode {mode_name or 'none'}")
    figures = {"as it is": loops.validate(model, sets.validation, utils.Meter(device), precision)}
    if mode is not quantize.FULL_PRECISION:
        # A network that this mode has quantized is taken as it is: quantizing it once more could move its levels.
        if not (content.get("hard_quantized") and content.get("projection_mode") == mode_name):
            with torch.no_grad():
                for _, weight in mode.select(model):
                    weight.copy_(mode.hard_quantize(weight))
        figures["hard-quantized"] = loops.validate(model, sets.validation, utils.Meter(device), precision)
    for words, found in figures.items():
        log.info(f"{words}: loss {found['loss']:.6f}, top-1 error {found['error1']:.2f}%, top-5 error {found['error5']:.2f}%")
    return 0


def load_data(
    args: Namespace, dataset: str, device: torch.device, processes: distributed.Processes = distributed.ALONE
) -> data.Data:
    """The data set, with what this process takes of it."""
    return data.load(
        dataset,
        Path(args.data_dir),
        device,
        args.batch_size,
        args.seed,
        log.info,
        workers=args.workers,
        input_size=args.input_size,
        holdout=args.holdout,
        share=processes.share,
    )


def build_model(name: str, dataset: str, config: dict[str, Any], classes: int) -> nn.Module:
    """The network for a data set; raises UsageError on a depth or a number of classes that cannot be."""
    try:
        model = MODELS[name](dataset=dataset, **{"num_classes": classes, **config})
    except (ValueError, TypeError) as error:
        raise UsageError(f"--model_config {config}: {error}") from None
    if config.get("num_classes", classes) < classes:
        raise UsageError(f"--model_config {config}: {dataset} has {classes} classes, num_classes of at least that is needed")
    return model


def describe(job: Job, state: State) -> None:
    """What is about to run, in the log."""
    args, sets = job.args, job.sets
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    computed = f"{job.precision.name} ({job.precision.reason}){', compiled' if state.compiled else ''}"
    computed += ", captured" if job.captured_step else ""
    place = f"{job.processes.share.count} processes, the first on {job.device}" if job.processes.several else str(job.device)
    log.info(f"run: {job.run.folder} on {place}, {computed}, seed {args.seed}")
    log.info(f"data: {sets.source}; {sets.train.samples} training and {sets.validation.samples} validation images")
    log.info(
        f"network: {args.model} of depth {state.model.depth}, {parameters:,} parameters"
        + (f", from {args.resume}" if args.resume else "")
    )
    log.info(f"regime: {job.regime}")
    latent = state.optimizer.latent
    if latent:
        count = sum(weight.numel() for weight in latent.values())
        log.info(f"mode: {job.mode.name} ({job.mode.title}), {count:,} weights in {len(latent)} tensors ({count / parameters:.1%})")
        log.debug(f"quantized: {', '.join(latent)}")


def _given_or_kept(args: Namespace, content: dict[str, Any], name: str, known: Collection[str | int | None]) -> Any:
    """What the user typed, else what the checkpoint says, else the flag's default."""
    value = getattr(args, name) if name in args.typed else content.get(name, getattr(args, name))
    if not isinstance(value, str | int | None) or value not in known:
        raise UsageError(f"--evaluate {args.evaluate}: the checkpoint's {name} {value!r} is not known; give --{name}")
    return value


def _config_of(content: dict[str, Any]) -> dict[str, Any]:
    """Depth and classes from a checkpoint; the published ones hold the flag's text."""
    config = content.get("config") or {}
    if isinstance(config, str):
        try:
            config = ast.literal_eval(config)
        except (ValueError, SyntaxError):
            config = {}
    return {name: config[name] for name in ("depth", "num_classes") if isinstance(config, dict) and name in config}


def _columns(split: str, figures: dict[str, float], suffix: str = "") -> dict[str, float]:
    return {f"{split}_{name}{suffix}": value for name, value in figures.items()}


def _in_words(row: dict[str, Any]) -> str:
    words = f"train loss {row['train_loss']:.4f} error {row['train_error1']:.2f}%, "
    words += f"validation loss {row['val_loss']:.4f} error {row['val_error1']:.2f}%"
    if "val_error1_bin" in row:
        words += f", quantized {row['val_loss_bin']:.4f} {row['val_error1_bin']:.2f}%"
    return f"{words}, lr {row['lr']:g}, strength {row['strength']:g}, {row['seconds']:.1f} s"


def _fail(message: str, status: int) -> int:
    print(f"main_binary_reg.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
