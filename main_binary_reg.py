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

import functools
import logging
import sys
from argparse import Namespace
from pathlib import Path

import torch

import data
import quantize
import utils
from models import MODELS
from training import arguments, captured, checkpoints, computing, loops, regimes, tracking
from training.epoch import Job, describe, facts_of_training, finish_epoch, train_epoch
from training.evaluation import build_model, evaluate, load_data
from training.folder import Run, facts_of_machine, log, log_to_terminal
from training.processes import Processes, here, joined, launch, lost_another, started_by_torchrun, synchronized
from training.state import Diverged, State
from training.tasks import task_of
from utils import UsageError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    processes = here()
    log_to_terminal(logging.INFO if processes.first else logging.ERROR)
    try:
        args, warnings = arguments.parse(
            argv, modes=quantize.MODES, models=MODELS, datasets=data.DATASETS, optimizers=regimes.OPTIMIZERS
        )
        if args.evaluate is not None:
            return evaluate(args) if processes.first else 0
        run = Run(args, writes=processes.first)
        if run.finished:
            run.finish()
            log.info(f"{run.folder}: complete, all {args.epochs} epochs are trained")
            return 0
        gpus = utils.count_gpus(args.device)
        if args.capture:
            captured.check_place(gpus > 0, processes.several or len(args.gpus) > 1)
        if len(args.gpus) > 1 and gpus and not started_by_torchrun():
            return launch([__file__, *(sys.argv[1:] if argv is None else argv)], len(args.gpus))
        computing.keep_freed_memory()
        device, warning = utils.select_device(args.device, args.gpus, "gpus" in args.typed, processes.local)
        with joined(processes, device):
            return train(args, [*warnings, *([warning] if warning else [])], run, device, processes)
    except UsageError as error:
        return _fail(str(error), 2)
    except Diverged as error:
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
        if not (processes.several and lost_another(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        return _fail(f"another process of this run cannot be reached ({reason}): stopped, the last good checkpoint is kept", 1)


def train(args: Namespace, warnings: list[str], run: Run, device: torch.device, processes: Processes) -> int:
    """One run, from its first epoch, or the one that it is continued in, to its last."""
    for line in warnings:
        log.warning(f"warning: {line}")
    if args.deterministic:
        computing.be_deterministic()
    precision = computing.select_precision(args.precision, device, args.tf32)
    task, sets = task_of(args.dataset), load_data(args, args.dataset, device, processes)
    utils.seed_everything(args.seed)
    model = build_model(args.model, args.dataset, args.model_config, sets.classes).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = synchronized(model, device)
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
    meter, carried = task.meter(device, processes.total), task.carried(model, sets.train)
    state = State(task, model, optimizer, start_signs, meter, carried, args.start_epoch)
    steps = (args.epochs - args.start_epoch) * len(sets.train)
    state.compiled = computing.select_compile(args.compile, device, steps)
    state.processes = processes.share.count

    facts = {**facts_of_machine(device), "precision": precision.name, "processes": processes.share.count}
    facts |= facts_of_training(args, sets, regime, state)
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
        network = computing.CompiledNetwork(model, task.length(sets.train)) if state.compiled else model
        captured_step = None
        if args.capture:
            regimes.make_capturable(optimizer.base_optimizer, device)
            step = functools.partial(loops.train_step, task, network, optimizer, precision, state.meter, state.carried)
            captured_step = captured.CapturedStep(step, optimizer, task.length(sets.train))
        job = Job(args, run, sets, mode, regime, device, precision, processes, network, captured_step, loops.StopSignals())
        describe(job, state)
        tb_dir = Path(args.tb_dir) if args.tb_dir else run.folder / "tb"
        purged_from = 0 if run.state is None else state.epoch + 1
        with tracking.Board(task, tb_dir if processes.first else None, purged_from) as board:
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
        log.info(f"{run.folder}: done, {task.best_in_words(state.best)}")
    finally:
        run.close()
    return 0


def _fail(message: str, status: int) -> int:
    print(f"main_binary_reg.py: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
