"""Trains a ResNet, or a language model, in full precision or toward quantized weights.

Full precision, the warm start of the others:

    python main_binary_reg.py --model resnet --model_config "{'depth': 20}" --save resnet20 --dataset cifar10 --batch-size 128 \\
        --gpu 0 --epochs 200 --tb_dir tb/ResNet20_FP

ProxQuant-binary from there:

    python main_binary_reg.py --model resnet --resume results/resnet20 --model_config "{'depth': 20}" --dataset cifar10 --gpu 0 \\
        --save resnet20_pq_binary_Adam_run_0 --batch-size 128 --epochs 300 --reg_rate 1e-4 --optimizer Adam --lr 0.01 \\
        --projection_mode prox --freeze_epoch 200 --tb_dir tb/resnet20_pq_binary_Adam_Freeze_200_run_0

A language model on the sample text of this repository:

    python main_binary_reg.py --model lstm --dataset sample_text --save austen

One network on four GPUs, and on two machines of eight:

    python main_binary_reg.py --gpus 0,1,2,3 ...
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 main_binary_reg.py ...

The same command given again continues an unfinished run. ``--help`` explains every flag.
"""

import contextlib
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
from training import arguments, captured, checkpoints, computing, endings, loops, regimes, tracking, warm_start
from training.epoch import Job, check_strength, describe, facts_of_training, finish_epoch, train_epoch, wrap
from training.evaluation import build_model, evaluate, load_data, sketch
from training.folder import Run, facts_of_machine
from training.log import log, log_to_terminal, warn
from training.processes import Processes, check_synchronized, here, joined, launch, started_by_torchrun, synchronized
from training.state import State, computed_before
from training.tasks import check_data, check_words, task_of
from utils import CannotWrite, UsageError


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 done, 1 failed, 2 bad input, 128 + n ended by signal n."""
    processes, run = here(), None
    log_to_terminal(logging.INFO if processes.first else logging.ERROR)
    try:
        args, warnings = arguments.parse(
            argv, modes=quantize.MODES, models=MODELS, datasets=data.DATASETS, optimizers=regimes.OPTIMIZERS
        )
        if args.evaluate is not None:
            for line in warnings:
                warn(line)
            return evaluate(args) if processes.first else 0
        run = Run(args, writes=processes.first)
        if run.finished:
            run.finish()
            trained = run.checkpoint["epoch"]
            why = f"all {args.epochs} epochs are trained" if trained >= args.epochs else f"its regime ends after {trained} epochs"
            log.info(f"{run.folder}: complete, {why}")
            return 0
        task_of(args.dataset).check(args, processes.several)
        gpus = utils.count_gpus(args.device)
        if args.capture:
            captured.check_place(gpus > 0, processes.several or len(args.gpus) > 1)
        if len(args.gpus) > 1 and gpus and not started_by_torchrun():
            utils.check_gpu(max(args.gpus), gpus)
            return launch([__file__, *(sys.argv[1:] if argv is None else argv)], len(args.gpus))
        computing.keep_freed_memory()
        device, warning = utils.select_device(args.device, args.gpus, "gpus" in args.typed, processes.local)
        for line in [*warnings, *([warning] if warning else [])]:
            warn(line)
        if device.type == "cpu" and args.device != "cpu" and "tf32" in args.typed:
            warn("--tf32 has no effect on the CPU")
        with joined(processes, device):
            return train(args, run, device, processes)
    except (Exception, KeyboardInterrupt) as error:
        return endings.status_of(error, run, processes)


def train(args: Namespace, run: Run, device: torch.device, processes: Processes) -> int:
    """One run, from its first epoch, or the one that it is continued in, to its last."""
    if args.deterministic:
        computing.be_deterministic()
    precision = computing.select_precision(args.precision, device, args.tf32)
    # What can be refused before the data are read, which may be a download.
    regime = regimes.resolve_regime(args, sketch(args.model, args.dataset, args.model_config).regime, projected=args.mode.projects)
    if args.capture:
        captured.check_regime(regime, args.epochs)
    if args.mode.projects:
        check_strength(args, regime)
    if args.resume and run.checkpoint is None:
        checkpoints.locate("--resume", Path(args.resume))
    task, sets = task_of(args.dataset), load_data(args, args.dataset, device, processes)
    utils.seed_everything(args.seed)
    model = build_model(args.model, args.dataset, args.model_config, sets.classes).to(device, memory_format=torch.channels_last)
    if args.sync_bn:
        model = synchronized(model, device)
        check_synchronized(sets.train.samples, args.batch_size, processes.share.count)
    if run.checkpoint is not None:
        check_words(run.checkpoint, sets.words, run.folder)
        check_data(run.checkpoint, sets.digest, args.data_dir, run.folder)
    begin = functools.partial(warm_start.load, model, args.resume, task, sets, args.holdout)
    started_from = begin() if args.resume and run.checkpoint is None else None

    base_optimizer = regimes.build_optimizer(model.parameters(), regimes.settings_at(regime, args.start_epoch))
    optimizer = wrap(base_optimizer, model, args)
    start_signs = signs_of(optimizer)
    meter, carried = task.meter(device, processes.total), task.carried(model, sets.train)
    begun = {"words": sets.words, "data": sets.digest, "warm_start": started_from}
    state = State(task, model, optimizer, start_signs, meter, carried, args.start_epoch, **begun)
    steps = (args.epochs - args.start_epoch) * len(sets.train)
    compiled = task.gains_by_compiling and computing.select_compile(args.compile, device, steps)

    with processes.first_one_first():
        run.open()
    try:
        facts, before = facts_of_machine(device), {}
        if args.resume and run.checkpoint is None and started_from is None:  # another process has cleared the folder since the look
            state.warm_start, state.start_signs = begin(), signs_of(optimizer)
        if run.checkpoint is not None:
            state.restore(run.checkpoint, regime)
            before = computed_before(run.checkpoint)
            log.info(f"{run.folder}: continuing in epoch {state.epoch + 1}, after step {state.step}/{len(sets.train)}")
            if not processes.first:
                state.meter.reset()  # the first one has the counts of all
        if not processes.alike(state.epoch, state.step):
            raise UsageError(f"--results_dir: the processes do not all see the same {run.folder}; several machines must share it")
        precision, state.computed, warnings = computing.decide(precision, compiled, args, facts["device"], before, processes)
        for line in warnings:
            warn(line)
        run.record({**facts, **facts_of_training(args, sets, regime, state)})
        network = computing.CompiledNetwork(model, task.length(sets.train)) if state.computed["compile"] == "on" else model
        step = functools.partial(loops.train_step, task, network, optimizer, precision, state.meter, state.carried)
        captured_step = captured.prepare(step, optimizer, task.length(sets.train), device) if args.capture else None
        job = Job(args, run, sets, regime, device, precision, processes, network, captured_step, loops.StopSignals())
        describe(job, state)
        purged_from = 0 if run.checkpoint is None else state.epoch + 1
        with tracking.Board(task, run.tb_dir if processes.first else None, purged_from) as board:
            if run.checkpoint is None:
                board.add_start(args, optimizer.latent, state.epoch)
            run.write_results(state.history)
            while state.epoch < args.epochs and not state.ended:
                try:
                    row = train_epoch(job, state)
                except loops.Interrupted as interruption:
                    named = "" if args.save else f" with --save {run.folder.name}"
                    words = f"saved after step {state.step}: the same command{named} continues"
                    content = state.checkpoint(args)
                    # Before it is saved: a continuation keeps the log up to there.
                    log.info(f"{interruption} in epoch {state.epoch + 1}, {words}")
                    run.save_checkpoint(content)
                    raise
                finish_epoch(job, state, row, board)
        log.info(f"{run.folder}: done, {task.best_in_words(state.best, state.history[-1])}")
    except Exception as error:
        if not isinstance(error, loops.Interrupted):
            with contextlib.suppress(CannotWrite):
                log.debug("stopped", exc_info=True)  # in the run's log, which the terminal's one line may outlive
        raise
    finally:
        run.close()
    return 0


def signs_of(optimizer: quantize.ProjectedOptimizer) -> dict[str, torch.Tensor]:
    """The signs of the latent weights, by name."""
    return {name: quantize.binarize(weight) for name, weight in optimizer.latent.items()}


if __name__ == "__main__":
    sys.exit(main())
