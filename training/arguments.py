"""The command line: flags, help, and every check that needs neither data nor network."""

import argparse
import ast
import json
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import quantize
from training import tasks
from utils import UsageError, is_finite

DESCRIPTION = """\
Trains a ResNet, or an LSTM on text, in full precision or toward quantized weights (ProxQuant, BinaryConnect), logs to
TensorBoard, and continues an unfinished run when the same command is given again."""


_NOT_TYPED = object()
# With other values of these a run may be continued: they change no number, or its rounding alone.
MAY_CHANGE = frozenset(
    {
        "results_dir",
        "save",
        "overwrite",
        "data_dir",
        "tb_dir",
        "save_all",
        "gpus",
        "workers",
        "print_freq",
        "checkpoint_minutes",
        "capture",
        "compile",
        "evaluate",
    }
)
# What an evaluation asks for; the other flags have no effect on it.
_EVALUATED = frozenset(
    {
        "batch_size",
        "bits",
        "by_row",
        "data_dir",
        "dataset",
        "device",
        "evaluate",
        "gpus",
        "holdout",
        "input_size",
        "model",
        "model_config",
        "precision",
        "projection_mode",
        "quantizer",
        "recalibrate",
        "seed",
        "tf32",
        "workers",
    }
)
DERIVED = {"typed", "rate", "mode"}  # what parsing adds to the arguments: no flags of their own


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _number(kind: Callable[[str], Any], accepts: Callable[[Any], bool], words: str) -> Callable[[str], Any]:
    """A checked argparse type."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except (ValueError, OverflowError):
            value = None
        if value is None or not is_finite(value) or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted: {words} is needed")
        return value

    return parse


def _gpu_list(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: GPU numbers like 0 or 0,1,2,3 are needed")
    return [int(part) for part in parts]


def _literal(text: str) -> Any:
    """The value of a literal, None where it is none or has parts that args.json could not hold, like sets and complex numbers."""
    try:
        value = ast.literal_eval(text)
        json.dumps(value, skipkeys=True)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value


def _model_config(text: str) -> dict[str, Any]:
    value = _literal(text or "{}")
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a dict literal like {{'depth': 20}} is needed")
    unknown = [key for key in value if key not in ("depth", "hidden", "num_classes")]
    if unknown:
        raise argparse.ArgumentTypeError(f"the key {unknown[0]!r} is not known: depth, hidden and num_classes are accepted")
    return value


def _regime(text: str) -> dict[int, dict[str, Any]]:
    value = _literal(text)
    if not isinstance(value, dict) or not value:
        example = "{0: {'lr': 0.1}, 10: {'lr': 0.01}}"
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a dict literal like {example} is needed")
    for epoch, settings in value.items():
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise argparse.ArgumentTypeError(f"the key {epoch!r} is not an epoch: a whole number from 0 up is needed")
        if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
            raise argparse.ArgumentTypeError(f"epoch {epoch}: {settings!r} is not a dict of settings like {{'lr': 0.01}}")
    return value


def _word_from(choices: Collection[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not known: {', '.join(choices)} is accepted")
        return text

    return parse


def _file_name(text: str) -> str:
    if text in ("", ".", "..") or "/" in text or "\0" in text or not _is_utf8(text) or _too_long(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: the name of one folder inside --results_dir is needed (UTF-8)")
    return text


def _path(text: str) -> str:
    if not text or "\0" in text or not _is_utf8(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted: a path in UTF-8 is needed")
    if _too_long(text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}... is too long for a path")
    return text


def _is_utf8(text: str) -> bool:
    """False for bytes that Python could not decode: log, results and TensorBoard are written in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_long(text: str) -> bool:
    """More bytes than a file system takes: 255 in a name; of the 4,096 in a path half is left for what goes below it."""
    path = os.fsencode(text)
    return len(path) > 2048 or any(len(name) > 255 for name in path.split(b"/"))


_COUNT = _number(int, lambda value: 1 <= value < 2**31, "a whole number from 1 up")
_COUNT_OR_ZERO = _number(int, lambda value: 0 <= value < 2**31, "a whole number from 0 up")
_RATE = _number(float, lambda value: value >= 0, "a finite number from 0 up")


def build_parser(
    modes: Mapping[str, Any], models: Collection[str], datasets: Collection[str], optimizers: Collection[str]
) -> argparse.ArgumentParser:
    """The parser; the names that flags accept come from the parts that implement them (``modes``: name to mode)."""
    parser = _Parser(
        prog="main_binary_reg.py",
        description=DESCRIPTION,
        allow_abbrev=False,
        epilog=_modes_in_words(modes),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=118),
    )
    add = parser.add_argument_group("data and network").add_argument
    add("--dataset", type=_word_from(datasets), default="cifar10", metavar="NAME", help=f"{', '.join(datasets)} (default: cifar10)")
    add(
        "--data_dir",
        type=_path,
        default="Datasets",
        metavar="DIR",
        help="folder that data sets lie in, of text: that train.txt, valid.txt and test.txt lie in (default: Datasets)",
    )
    add("-j", "--workers", type=_COUNT_OR_ZERO, default=8, metavar="N",
        help="processes that decode imagenet images, for each GPU (default: 8)")  # fmt: skip
    add("--holdout", type=_COUNT_OR_ZERO, default=0, metavar="N",
        help="for tuning: validate on N training images, which are then not trained on (default: 0)")  # fmt: skip
    add("--input_size", type=_number(int, lambda v: 32 <= v <= 2048, "a whole number from 32 to 2048"), metavar="PIXELS",
        help="side of the images that imagenet is cropped to (default: 224); every other data set is 32")  # fmt: skip
    add(
        "-a",
        "--model",
        type=_word_from(models),
        default="resnet",
        metavar="NAME",
        help=f"{', '.join(models)} (default: resnet; text: lstm)",
    )
    add("--model_config", type=_model_config, default={}, metavar="DICT",
        help="dict literal with depth (6n+2, imagenet: 18, 34, 50, 101, 152; default: 20, imagenet: 18), hidden (lstm: units; "
        "default: 300) and num_classes (default: the data set's)")  # fmt: skip

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=_COUNT, default=2500, metavar="N", help="epochs to train in all (default: 2500; text: 80)")
    add("--start-epoch", type=_COUNT_OR_ZERO, default=0, metavar="N",
        help="number of the first epoch, which regime and strength count from (default: 0)")  # fmt: skip
    add(
        "-b",
        "--batch-size",
        type=_COUNT,
        default=256,
        metavar="N",
        help="training images in a batch, of a text: streams that are read side by side (default: 256; text: 20)",
    )
    add("--optimizer", type=_word_from(optimizers), default="SGD", metavar="NAME",
        help=f"{', '.join(optimizers)} (default: SGD, with the network's published regime)")  # fmt: skip
    add("--lr", "--learning_rate", type=_RATE, default=0.1, metavar="LR",
        help="learning rate at epoch 0; later ones in a regime keep their ratio to it (default: 0.1; text: 20)")  # fmt: skip
    add("--momentum", type=_RATE, default=0.9, metavar="M", help="momentum of SGD (default: 0.9; text: 0)")
    add("--weight-decay", "--wd", type=_RATE, default=1e-4, metavar="W",
        help="weight decay (default: 1e-4; 0 with Adam, with a projection mode and for text)")  # fmt: skip
    add("--regime", type=_regime, metavar="DICT",
        help="dict literal {epoch: {setting: value}} in place of the regime, e.g. {0: {'lr': 0.1}, 9: {'lr': 0.01}}; the settings "
        "are the optimizer's, and clip_norm (of the gradient), plateau (divides the rate after an epoch whose validation is not "
        "the best so far) and end_below (a rate)")  # fmt: skip
    add("--binary_regime", action="store_true", help="regime of BinaryConnect: Adam at 0.01, 1e-3 from epoch 81, 1e-4 from 122")
    add("--ttq_regime", action="store_true", help="regime of the TTQ runs: SGD at 0.1, weight decay 2e-4, steps at 80, 120, 300")
    add("--no_adjust", action="store_true", help="keep the regime's settings of epoch 0 for the whole run")
    add("--keep_optimizer_state", action="store_true",
        help="carry momentum and moments from epoch to epoch (default: each starts from zero, as published)")  # fmt: skip
    add("--seed", type=_number(int, lambda v: 0 <= v < 2**63, "a whole number from 0 up"), default=0, metavar="N",
        help="of initial weights, order, augmentation and dropout (default: 0)")  # fmt: skip

    add = parser.add_argument_group("quantization").add_argument
    quantizers = {name: kind for mode in modes.values() for name, kind in mode.choices.items()}
    takers = ", ".join(name for name, kind in quantizers.items() if kind.takes_bits)
    add("--projection_mode", type=_word_from(modes), metavar="MODE",
        help=f"method of quantization: {', '.join(modes)}; the table below says what each is (default: none, full "
        "precision)")  # fmt: skip
    add("--quantizer", type=_word_from(quantizers), metavar="NAME",
        help=f"values of the quantized weights: {', '.join(quantizers)} (default: the mode's own; alternating where a mode takes "
        "any and --bits of 2 or more or --by_row is given)")  # fmt: skip
    add("--bits", type=_number(int, lambda v: 1 <= v <= 8, "a whole number from 1 to 8"), metavar="K",
        help=f"bits of a quantized weight, which has 2^K values; for {takers} (default: the quantizer's own)")  # fmt: skip
    add("--by_row", action="store_true", help="values of their own for each row of a weight tensor, where --bits can be given")
    rated = {flag: [name for name, mode in modes.items() if mode.schedule.flag == flag] for flag in ("reg_rate", "binary_reg")}
    add("--reg_rate", type=_RATE, default=0.0, metavar="R",
        help=f"{', '.join(rated['reg_rate'])}: strength of a step's pull is lr * R * epoch (prox_connect: R * epoch); needed in "
        "these modes (default: 0)")  # fmt: skip
    add("--binary_reg", type=_RATE, default=0.0, metavar="S",
        help=f"{', '.join(rated['binary_reg'])}: strength of the projection, 1 is the sign (default: 1)")  # fmt: skip
    add("--adjust_reg", action="store_true", help="multiply the strength by (initial learning rate / current one)")
    add("--freeze_epoch", type=_number(int, lambda v: -1 <= v < 2**31, "a whole number from 0 up, or -1"), default=-1, metavar="N",
        help="quantize for good after N epochs and train the rest on; 0: before the first, -1: never (default: -1)")  # fmt: skip

    add = parser.add_argument_group("start and evaluation").add_argument
    add("--resume", type=_path, metavar="PATH",
        help="warm start from a checkpoint file, a packed one or a run's folder (its model_best.pth.tar)")  # fmt: skip
    add("-e", "--evaluate", type=_path, metavar="PATH",
        help="print plain and hard-quantized loss and errors of a checkpoint file, a packed one or a run's folder, and "
        "stop")  # fmt: skip
    add("--recalibrate", type=_COUNT_OR_ZERO, default=0, metavar="N",
        help="with --evaluate: also with BatchNorm's statistics re-estimated from N training batches, of the quantized network as "
        "it is and hard-quantized (default: 0)")  # fmt: skip

    add = parser.add_argument_group("results").add_argument
    add("--results_dir", type=_path, default="./results", metavar="DIR", help="folder of all runs (default: ./results)")
    add("--save", type=_file_name, metavar="NAME", help="name of the run's folder (default: date and time, unique)")
    add("--save_all", action="store_true", help="keep the checkpoint of every epoch")
    add("--checkpoint_minutes", type=_RATE, default=30.0, metavar="N",
        help="also save inside an epoch when the last checkpoint is so old; 0: only after epochs (default: 30.0)")  # fmt: skip
    add("--overwrite", action="store_true",
        help="start anew where the folder holds a run of other arguments, or one that cannot be continued")  # fmt: skip
    add("--tb_dir", type=_path, metavar="DIR", help="folder of the TensorBoard events (default: tb inside the run's folder)")
    add("-p", "--print-freq", type=_COUNT, default=10, metavar="N", help="steps between two progress lines (default: 10)")

    add = parser.add_argument_group("device").add_argument
    add("--gpus", "--gpu", type=_gpu_list, default=[0], metavar="LIST",
        help="GPU to use; several, like 0,1,2,3, train one network together, a process on each (default: 0)")  # fmt: skip
    add("--device", type=_word_from(("auto", "cpu", "cuda")), default="auto", metavar="NAME",
        help="cpu, cuda, or auto: a GPU where there is one (default: auto)")  # fmt: skip
    add("--precision", type=_word_from(("auto", "fp32", "bf16")), default="auto", metavar="NAME",
        help="of forward and backward passes: fp32, bf16 (autocast; weights, statistics and optimizer stay fp32), or auto: bf16 "
        "where the hardware computes it natively (default: auto)")  # fmt: skip
    add("--compile", type=_word_from(("auto", "on", "off")), default="auto", metavar="NAME",
        help="compile the network for training (torch.compile): on, off, or auto: on a CPU with a C++ compiler (and "
        "Python's headers) if a run on images is long enough to gain; without CUDA graphs, which --capture is for "
        "(default: auto)")  # fmt: skip
    add("--capture", action="store_true",
        help="record a training step as a CUDA graph and replay it: for small networks on a GPU; a run that was "
        "begun with it may be continued without, and the other way round")  # fmt: skip
    add("--tf32", action="store_true", help="let CUDA round fp32 products to TF32: faster, not exact")
    add("--deterministic", action="store_true", help="bit-identical repetitions on CUDA too, at some cost; the CPU's always are")
    add("--sync_bn", action="store_true", help="several GPUs: BatchNorm statistics over the whole batch, not each GPU's share")
    return parser


def table_of_modes(modes: Mapping[str, quantize.ProjectionMode]) -> list[tuple[str, str, str, str]]:
    """A row for each mode: its name, what it is, the quantizers that it takes and the flag of its strength."""
    rows = []
    for name, mode in modes.items():
        own = mode.shown.name
        values = f"{own}, or another" if mode.any_quantizer else " or ".join(mode.choices)
        taking = any(kind.takes_bits for kind in mode.choices.values())
        rate = f"--{mode.schedule.flag}" + ("" if mode.default_rate else " (needed)") if mode.schedule.flag else "none"
        rows.append((name, mode.title, values + ("; --bits, --by_row" if taking else ""), rate))
    return rows


def _modes_in_words(modes: Mapping[str, quantize.ProjectionMode]) -> str:
    lines = ["projection modes, their quantizers (the first is the default), and the flag of their strength:"]
    for name, title, values, rate in table_of_modes(modes):
        lines += [f"  {name:14} {title}", f"  {'':14} quantizer: {values}; strength: {rate}"]
    return "\n".join(lines)


def parse(argv: list[str] | None, **names: Any) -> tuple[argparse.Namespace, list[str]]:
    """Parses and checks a command line.

    Args:
        argv: the arguments, or None for the process's own.
        names: what ``build_parser`` takes.

    Returns:
        The arguments, with ``typed``: the set of those that the user gave; and warnings, one line each.

    Raises:
        UsageError: on arguments that do not go together. What does not parse ends the process with status 2 and one line.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser(**names)
    if any(word == "--binarize" or word.startswith("--binarize=") for word in argv):
        parser.error("--binarize does nothing in the published script and is not a flag here: use --projection_mode")
    args = parser.parse_args(argv)
    # Attributes that are there already are not overwritten by defaults: what is still absent afterwards was not typed.
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), _NOT_TYPED)))
    args.typed = frozenset(name for name, value in vars(given).items() if value is not _NOT_TYPED)
    tasks.set_defaults(args, args.dataset)
    args.mode = choose_mode(args.projection_mode, args.quantizer, args.bits, args.by_row)
    if args.evaluate is not None:
        idle = [action.option_strings for action in parser._actions if action.dest in args.typed - _EVALUATED]
        warnings = [f"{next(one for one in names if one.startswith('--'))} has no effect with --evaluate" for names in idle]
        return args, warnings + _idle_on_a_cpu(args)
    return args, check(args, args.mode)


def choose_mode(name: str | None, quantizer: str | None, bits: int | None, by_row: bool) -> quantize.ProjectionMode:
    """The mode of these flags; ``quantize.FULL_PRECISION`` where none is named.

    Raises:
        UsageError: where they make no sense together.
    """
    if name is None:
        return quantize.FULL_PRECISION
    try:
        return quantize.mode(name, quantizer, bits, by_row or None)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def as_typed(name: str, value: Any) -> str:
    """A flag with its value, as on the command line."""
    return f"--{name}" if value is True else f"--{name} {value}"


def _idle_on_a_cpu(args: argparse.Namespace) -> list[str]:
    names = ("gpus", "tf32") if args.device == "cpu" else ()
    return [f"--{name} has no effect with --device cpu" for name in names if name in args.typed]


def check(args: argparse.Namespace, mode: quantize.ProjectionMode) -> list[str]:
    """Warnings about arguments without effect; raises UsageError on those that contradict each other."""
    warnings = []
    if args.recalibrate:
        raise UsageError(f"--recalibrate {args.recalibrate}: training does not re-estimate BatchNorm's statistics, only --evaluate")
    tasks.check_model(args.model, args.dataset)
    tasks.task_of(args.dataset).check(args, several=False)
    if args.binary_regime + args.ttq_regime + (args.regime is not None) > 1:
        words = {"--regime": args.regime, "--binary_regime": args.binary_regime, "--ttq_regime": args.ttq_regime}
        given = [flag if value is True else f"{flag} {value}" for flag, value in words.items() if value]
        raise UsageError(f"{' and '.join(given)}: each is a whole regime, one of {', '.join(words)} is accepted")
    for name in ("quantizer", "bits", "by_row") if not mode.projects else ():
        if name in args.typed:
            raise UsageError(f"{as_typed(name, getattr(args, name))}: nothing is quantized without --projection_mode")
    if args.start_epoch >= args.epochs:
        raise UsageError(f"--start-epoch {args.start_epoch}: a number below --epochs {args.epochs} is needed")
    if args.freeze_epoch >= 0 and args.projection_mode is None:
        raise UsageError(f"--freeze_epoch {args.freeze_epoch}: nothing is quantized without --projection_mode")
    if args.freeze_epoch >= args.epochs:
        warnings.append(f"--freeze_epoch {args.freeze_epoch} is not below --epochs {args.epochs}: this run never freezes")
    warnings += _idle_on_a_cpu(args)
    if args.overwrite and args.save is None:
        warnings.append("--overwrite has no effect without --save: the run's folder is a new one")
    if args.compile == "on" and not tasks.task_of(args.dataset).gains_by_compiling:
        warnings.append(f"--compile on has no effect with --dataset {args.dataset}: torch leaves its network uncompiled")
    if "workers" in args.typed and args.dataset != "imagenet":
        warnings.append(f"--workers has no effect with --dataset {args.dataset}, whose samples are kept in memory")
    if not mode.projects:
        idle = {"reg_rate", "binary_reg", "adjust_reg"}
        warnings += [f"--{name} has no effect without --projection_mode" for name in sorted(idle & args.typed)]
        return warnings
    used = mode.schedule.flag
    taken = f"takes --{used}" if used else "has no strength to choose"
    idle = {"reg_rate", "binary_reg"} - {used} | ({"adjust_reg"} if used is None else set())
    warnings += [f"--{name} has no effect with --projection_mode {mode.name}, which {taken}" for name in sorted(idle & args.typed)]
    args.rate = mode.default_rate
    if args.capture and mode.drawn is not None:
        raise UsageError(f"--capture: {mode.name} draws anew at each step, which a captured one would repeat")
    if used is None:
        return warnings
    if used not in args.typed and not mode.default_rate:
        raise UsageError(
            f"--projection_mode {mode.name}: --{used} is needed, nothing would pull the weights to their quantization; "
            f"--{used} 0 is accepted where that is meant"
        )
    if used in args.typed:
        args.rate = getattr(args, used)
    if args.rate == 0:
        warnings.append(f"--{used} is 0: nothing pulls the weights to their quantization with --projection_mode {mode.name}")
    elif args.freeze_epoch > args.start_epoch and mode.strength(args.rate, args.freeze_epoch - 1) == 0:
        warnings.append(
            f"--freeze_epoch {args.freeze_epoch}: nothing pulls the weights before it, in the first epoch the strength is 0"
        )
    return warnings
