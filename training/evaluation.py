"""Evaluation of a checkpoint, as it is and hard-quantized; and what it shares with a run: the data and the network."""

import ast
import copy
import functools
import itertools
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
import quantize
from models import MODELS
from training import checkpoints, loops, tasks
from training.arguments import as_typed, choose_mode
from training.batch_norm import re_estimate
from training.computing import Precision, select_precision
from training.log import log, warn
from training.processes import ALONE, Processes
from utils import UsageError, select_device


@dataclass(frozen=True)
class Kept:
    """A checkpoint, and what the user or else the checkpoint says that it is of.

    ``quantizer``: by which the mode was chosen beside its name: ``quantizer``, ``bits``, ``by_row``, as of the command line.
    """

    path: Path
    content: dict[str, Any]
    model: str
    dataset: str
    config: dict[str, Any]
    mode: quantize.ProjectionMode
    quantizer: dict[str, Any]


def read_kept(args: Namespace) -> Kept:
    """Reads the checkpoint that ``args.evaluate`` names; what the user has not given of precision and data is set from it."""
    path = checkpoints.locate("--evaluate", Path(args.evaluate))
    content = checkpoints.read(path)
    model, dataset = _given_or_kept(args, content, "model", MODELS), _given_or_kept(args, content, "dataset", data.DATASETS)
    args.dataset = dataset
    tasks.set_defaults(args, dataset)
    tasks.check_model(model, dataset)
    tasks.task_of(dataset).check(args, several=False)
    args.precision = _given_or_kept(args, content, "precision", ("auto", "fp32", "bf16"))
    args.holdout = _given_or_kept(args, content, "holdout", range(2**31))
    args.input_size = _given_or_kept(args, content, "input_size", (None, *range(32, 2049)))
    mode, quantizer = _choose_mode(args, content)
    _check_quantizer(args, content, mode)
    return Kept(
        path,
        content,
        model,
        dataset,
        _config_of(content) | args.model_config,
        mode,
        quantizer,
    )


def _choose_mode(args: Namespace, content: dict[str, Any]) -> tuple[quantize.ProjectionMode, dict[str, Any]]:
    """The mode, and by which quantizer's flags it was chosen. Those that the checkpoint has do not hold where the user gives
    another mode or quantizer that they do not go with, which is said."""
    name = _given_or_kept(args, content, "projection_mode", [*quantize.MODES, None])
    kept = {
        "quantizer": _given_or_kept(args, content, "quantizer", [*quantize.ALL_QUANTIZERS, None]),
        "bits": _given_or_kept(args, content, "bits", [*range(1, 9), None]),
        "by_row": _given_or_kept(args, content, "by_row", [False, True]),
    }
    given = {flag: getattr(args, flag) for flag in kept}
    tried = [kept]
    if {"projection_mode", "quantizer"} & args.typed:
        tried += [kept | {"quantizer": given["quantizer"]}, given | {"quantizer": kept["quantizer"]}, given]
    for chosen in tried:
        try:
            mode = choose_mode(name, **chosen)
        except UsageError as error:
            refused = error
            continue
        if left := [as_typed(flag, value) for flag, value in kept.items() if value != chosen[flag]]:
            asked = [as_typed(flag, getattr(args, flag)) for flag in ("projection_mode", *kept) if flag in args.typed]
            warn(f"{' '.join(left)} of the checkpoint: left out, does not go with {' '.join(asked)}")
        return mode, chosen
    raise refused


def evaluate(args: Namespace) -> int:
    """Prints plain and hard-quantized figures of a checkpoint, of a text also on its test part; what is not given is read there."""
    kept = read_kept(args)
    path, mode = kept.path, kept.mode
    device, warning = select_device(args.device, args.gpus, "gpus" in args.typed)
    if warning:
        warn(warning)
    precision = select_precision(args.precision, device, args.tf32)
    sets = load_data(args, kept.dataset, device)
    source, held = sets.source, kept.content.get("holdout")
    held = held if isinstance(held, int) else 0
    if args.holdout > held:  # the images of a larger number are those of a smaller one and more
        warn(f"--holdout {args.holdout}: {held} images were held out of this network's training; it was trained on the others")
        source = source.replace(" held out", "")
    if held and args.holdout and kept.content.get("data", sets.digest) != sets.digest:
        warn(f"--data_dir {args.data_dir}: other images than this network was trained on, or in another order: it may have been "
             "trained on those that are held out here")  # fmt: skip
    tasks.check_words(kept.content, sets.words, path)
    model = load_model(kept, sets.classes).to(device, memory_format=torch.channels_last)

    quantizer = f", quantizer {mode.shown.in_words}" if mode.projects else ""
    log.info(f"{path}: {kept.model} {kept.config} on {source}, projection mode {mode.name}{quantizer}, in {precision.in_words}")
    task = tasks.task_of(kept.dataset)

    def say(words: str, network: nn.Module) -> None:
        for batches, split in ((sets.validation, ""), (sets.test, ", test")):
            if batches is not None:
                figures = loops.validate(task, network, batches, task.meter(device), precision)
                log.info(f"{words}{split}: {task.evaluation_in_words(figures)}")

    def say_all(words: str) -> None:
        say(words, model)
        if args.recalibrate:
            again = copy.deepcopy(model)
            recalibrate(again, sets, precision, args.recalibrate)
            say(f"{words}, BatchNorm's statistics from {args.recalibrate} training batches", again)

    if args.recalibrate and not mode.projects:
        raise UsageError(f"--recalibrate {args.recalibrate}: {path} is in full precision, nothing changes under its statistics")
    say_all("as it is")
    if mode.projects:
        hard_quantize(model, mode, kept.content)
        say_all("hard-quantized")
    return 0


def load_model(kept: Kept, classes: int) -> nn.Module:
    """A checkpoint's network with its weights; one that is not what the checkpoint says of it is refused before it is made."""
    fits = functools.partial(checkpoints.fitting, content=kept.content, path=kept.path)
    model = build_model(kept.model, kept.dataset, kept.config, classes, fits)
    checkpoints.load_weights(model, kept.content, kept.path)
    return model


def hard_quantize(model: nn.Module, mode: quantize.ProjectionMode, content: dict[str, Any]) -> bool:
    """Hard-quantizes a network that holds a checkpoint's weights; returns whether there was anything left to do.

    Raises:
        UsageError: if the latent weights and levels in the checkpoint are not this network's.
    """
    # A network that this mode has quantized is taken as it is: quantizing it once more could move its levels.
    if content.get("hard_quantized") is True and _own_quantizer(content, mode) == mode.shown.in_words:
        return False
    # As the run itself does it, to the last bit, and from the latent weights and learned levels where the checkpoint has them.
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), mode.select(model), mode)
    if "optimizer" in content and content.get("projection_mode") == mode.name:
        try:
            optimizer.load_projection(content["optimizer"])
        except (LookupError, ValueError, TypeError, RuntimeError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"the checkpoint's optimizer is not this network's ({' '.join(str(error).split())[:200]})") from None
    optimizer.freeze()
    return True


def _check_quantizer(args: Namespace, content: dict[str, Any], mode: quantize.ProjectionMode) -> None:
    """Raises UsageError where a quantizer is asked for that is not the one which the levels of a run's checkpoint are of."""
    own = _own_quantizer(content, mode)
    if "optimizer" in content and own not in (None, mode.shown.in_words):
        words = f"it is of quantizer {own}, not {mode.shown.in_words}"
        raise UsageError(f"--evaluate {args.evaluate}: {words}; leave out --bits, --quantizer and --by_row")


def _own_quantizer(content: dict[str, Any], mode: quantize.ProjectionMode) -> str | None:
    """In words, which quantizer of this mode a checkpoint is of; None where it is of another mode or says nothing sensible."""
    if content.get("projection_mode") != mode.name:
        return None
    try:
        own = choose_mode(mode.name, content.get("quantizer"), content.get("bits"), content.get("by_row") is True)
    except (UsageError, TypeError):
        return None
    return own.shown.in_words


def recalibrate(model: nn.Module, sets: data.Data, precision: Precision, count: int) -> None:
    """Re-estimates BatchNorm's statistics from so many training batches, for weights that they were not taken with.

    Raises:
        UsageError: if the network has none.
    """

    def passes() -> Iterator[Tensor]:
        for inputs, _ in itertools.islice((batch for epoch in itertools.count() for batch in sets.train.epoch(epoch)), count):
            with precision.autocast():
                outputs = model(inputs)
            yield outputs

    if not re_estimate(model, passes()):
        raise UsageError(f"--recalibrate {count}: this network has no BatchNorm")


def load_data(args: Namespace, dataset: str, device: torch.device, processes: Processes = ALONE) -> data.Data:
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


MOST_PARAMETERS = 1_000_000_000  # far above any of these networks: what cannot be is said before it is made


def build_model(
    name: str, dataset: str, config: dict[str, Any], classes: int, check: Callable[[nn.Module], object] = lambda sketch: None
) -> nn.Module:
    """The network for a data set.

    Args:
        name: a key of ``models.MODELS``.
        dataset: its name.
        config: the network's arguments.
        classes: of the data set.
        check: is given the network without memory first; what it raises keeps a network from being made.

    Raises:
        UsageError: on a depth, a number of classes or a size that cannot be.
    """
    sketched = sketch(name, dataset, config, classes)
    if config.get("num_classes", classes) < classes:
        raise UsageError(f"--model_config {config}: {dataset} has {classes} classes, num_classes of at least that is needed")
    check(sketched)
    return _builder(name, dataset, config, classes)()


def sketch(name: str, dataset: str, config: dict[str, Any], classes: int = 2) -> nn.Module:
    """The same without memory. Raises UsageError on a depth or a size that cannot be."""
    try:
        with torch.device("meta"):
            found = _builder(name, dataset, config, classes)()
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise UsageError(f"--model_config {config}: {_first_line(error)}") from None
    parameters = sum(parameter.numel() for parameter in found.parameters())
    if parameters > MOST_PARAMETERS:
        raise UsageError(f"--model_config {config}: {parameters:,} parameters; at most {MOST_PARAMETERS:,} are accepted")
    return found


def _builder(name: str, dataset: str, config: dict[str, Any], classes: int) -> Callable[[], nn.Module]:
    return functools.partial(MODELS[name], dataset=dataset, **{"num_classes": classes, **config})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _given_or_kept(args: Namespace, content: dict[str, Any], name: str, known: Collection[str | int | None]) -> Any:
    """What the user typed, else what the checkpoint says, else the flag's default."""
    value = getattr(args, name) if name in args.typed else content.get(name, getattr(args, name))
    # A range looks at its numbers one by one for anything but a whole number.
    searched = isinstance(value, int) or not isinstance(known, range)
    if not isinstance(value, str | int | None) or not searched or value not in known:
        raise UsageError(f"--evaluate {args.evaluate}: the checkpoint's {name} {value!r} is not known; give --{name}")
    return value


def _config_of(content: dict[str, Any]) -> dict[str, Any]:
    """Depth and classes from a checkpoint; the published ones hold the flag's text."""
    config = content.get("config") or {}
    if isinstance(config, str):
        try:
            config = ast.literal_eval(config)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            config = {}
    return {name: config[name] for name in ("depth", "hidden", "num_classes") if isinstance(config, dict) and name in config}
