"""Packs a trained network into a file of bits, reads it back and compares it bit for bit.

    python scripts/export.py results/resnet20_pq_binary_Adam_run_0 --out resnet20.safetensors
    python scripts/export.py results/resnet20_pq_binary_Adam_run_0 --out resnet20.safetensors --half bfloat16 --verify

The format is docs/packed-format.md; --evaluate and --resume take the file in a checkpoint's place. A network that is not
hard-quantized yet is so first. Flags of the data and the device (--data_dir, --dataset, --batch-size, --device, ...) are those of
main_binary_reg.py; what is not given comes from the checkpoint.
"""

import argparse
import functools
import logging
import signal
import sys
from argparse import Namespace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import quantize
from models import MODELS
from quantize import packing
from quantize.codes import Coded
from training import arguments, computing, evaluation, regimes
from training.log import log_to_terminal
from training.state import NETWORK_KEYS
from training.tasks import task_of
from utils import UsageError, select_device, write_whole

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def finished_network(args: Namespace, kept: evaluation.Kept) -> tuple[nn.Module, bool]:
    """The network with its final weights: hard-quantized, and where that is asked for with BatchNorm's statistics anew; and whether
    that made another network of it."""
    device, _ = select_device(args.device, args.gpus, "gpus" in args.typed)
    sets = evaluation.load_data(args, kept.dataset, device) if args.recalibrate else None
    classes = sets.classes if sets else kept.config.get("num_classes") or _classes(kept)
    model = evaluation.load_model(kept, classes).to(device, memory_format=torch.channels_last)
    averages = any(name.endswith("running_mean") for name in kept.content["state_dict"])
    advice = "; its BatchNorm has the statistics of other weights (see --recalibrate)" if averages else ""
    changed = evaluation.hard_quantize(model, kept.mode, kept.content)
    if changed:
        print(f"{kept.path}: not frozen, hard-quantized now{advice}")
    elif not kept.content.get("frozen", True):
        print(f"{kept.path}: hard-quantized before the freeze{advice}")
    if sets:
        precision = computing.select_precision(args.precision, device, args.tf32)
        evaluation.recalibrate(model, sets, precision, args.recalibrate)
        print(f"BatchNorm's statistics are re-estimated from {args.recalibrate} training batches")
    return model.cpu(), changed or sets is not None


def _classes(kept: evaluation.Kept) -> int:
    matrices = [value for value in kept.content["state_dict"].values() if isinstance(value, Tensor) and value.dim() == 2]
    if not matrices:
        raise UsageError(f"{kept.path}: it has no classifier; --model_config \"{{'num_classes': N}}\" says the number of classes")
    return len(matrices[-1])


def halved(state: dict[str, Tensor], quantized: set[str], kind: torch.dtype) -> dict[str, Tensor]:
    """The state with what is not quantized in half precision; says what that costs.

    Raises:
        UsageError: if a number is too large for it.
    """
    found, largest, worst = {}, 0.0, ""
    for name, value in state.items():
        found[name] = value.to(kind) if value.is_floating_point() and name not in quantized else value
        if found[name].dtype is kind and value.numel():
            if not found[name].isfinite().all():
                raise UsageError(f"--half {str(kind)[6:]}: {name!r} holds {float(value.abs().max()):g}, which is too large for it")
            error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-300))
            largest, worst = max((largest, worst), (error, name))
    print(f"--half {str(kind)[6:]}: relative error of at most {largest:.2g} in a tensor ({worst})")
    return found


def table(packed: packing.Packed, state: dict[str, Tensor], content: bytes) -> str:
    """Each quantized tensor, the rest and the sums, beside float32."""
    size, around = len(content), 8 + int.from_bytes(content[:8], "little") + 4  # the header with its length, and the checksum
    rows = [("tensor", "values", "levels", "bits a weight", "bytes")]
    coded_bytes = coded_count = 0
    for name, value in packed.tensors.items():
        if isinstance(value, Coded):
            count = state[name].numel()
            coded_bytes, coded_count = coded_bytes + value.nbytes, coded_count + count
            levels = f"{value.levels.shape[1]}{' a row' if value.by_row else ''}"
            rows.append((name, f"{count:,}", levels, f"{8 * value.nbytes / count:.2f}", f"{value.nbytes:,}"))
    total = sum(value.numel() for value in state.values())
    rest = size - around - coded_bytes  # less than they take in memory: a number that tensors share is stored once
    bits = f"{8 * coded_bytes / max(coded_count, 1):.2f}"
    rows.append(("all that is quantized", f"{coded_count:,}", "", bits, f"{coded_bytes:,}"))
    rest_bits = f"{8 * rest / max(total - coded_count, 1):.2f}"
    rows.append(("the rest, with buffers", f"{total - coded_count:,}", "", rest_bits, f"{rest:,}"))
    rows.append(("names, facts, checksum", "", "", "", f"{around:,}"))
    rows.append(("the file", f"{total:,}", "", f"{8 * size / total:.2f}", f"{size:,}"))
    rows.append(("in float32", f"{total:,}", "", "32.00", f"{4 * total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)


def export(args: Namespace, out: Path, half: str | None) -> None:
    """Writes the file, after decoding what it will hold; raises UsageError where the network cannot be packed."""
    kept = evaluation.read_kept(args)
    if kept.mode is quantize.FULL_PRECISION:
        raise UsageError(
            f"{kept.path}: trained in full precision, nothing in it is quantized; --projection_mode says to what it is to be"
        )
    model, changed = finished_network(args, kept)
    quantized = {name for name, _ in kept.mode.select(model)}
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if half:
        state = halved(state, quantized, HALVES[half])
    # What builds and judges the network; how it came about is in its run's folder, and a packed network is always hard-quantized.
    task = task_of(kept.dataset)
    names = (NETWORK_KEYS | {task.best_key}) - {"state_dict", "hard_quantized", "frozen", "warm_start"}
    facts = {name: kept.content[name] for name in kept.content if name in names}
    facts |= {
        "model": kept.model,
        "config": kept.config,
        "dataset": kept.dataset,
        **kept.quantizer,
        "projection_mode": None,  # which is the file's mode
    }
    if changed or half or "optimizer" in kept.content:  # the best score is another network's
        facts.pop(task.best_key, None)
    facts = {name: value for name, value in facts.items() if value not in (None, False) or name == task.best_key}
    try:
        content = packing.pack(state, quantized, kept.mode.name, facts)
    except packing.PackedError as error:
        raise UsageError(f"{kept.path}: {error}") from None
    packed = packing.unpack(content)
    found = packed.state_dict()
    differing = [
        name for name in {**state, **found} if name not in found or name not in state or not same(found[name], state[name])
    ]
    if differing:
        raise OSError(f"{out}: not written, {differing[0]!r} would not be read back as it is")
    write_whole(out, lambda file: file.write(content))
    times = sum(value.nbytes for value in state.values()) / len(content)
    print(table(packed, state, content))
    print(f"{out}: {len(content):,} bytes, the tensors take {times:.1f} times that")
    print("read back: every tensor is the same to the last bit")


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are the same to the last bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 written, 1 could not be written, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("network", help="a run's folder (its model_best.pth.tar) or a checkpoint; before all borrowed flags")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--half", choices=HALVES, help="keep what is not quantized in half precision")
    parser.add_argument("--verify", action="store_true", help="evaluate the network and the file on the validation set")
    parser.add_argument("--recalibrate", metavar="N", help="re-estimate BatchNorm's statistics from N training batches first")
    parser.error = functools.partial(_refuse, parser)
    own, others = parser.parse_known_args(argv)
    log_to_terminal(logging.INFO)
    recalibrate = ["--recalibrate", own.recalibrate] if own.recalibrate else []
    known = {"modes": quantize.MODES, "models": MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
    try:
        args, _ = arguments.parse(["--evaluate", own.network, *recalibrate, *others], **known)
        if not own.out.parent.is_dir() or own.out.is_dir():
            raise UsageError(f"--out {own.out}: a file in a folder that is there is needed")
        export(args, own.out, own.half)
        for network, again in ((own.network, recalibrate), (str(own.out), [])) if own.verify else ():
            evaluation.evaluate(arguments.parse(["--evaluate", network, *again, *others], **known)[0])
    except UsageError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"export.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    parser.exit(2, f"export.py: error: {message}\n")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in any command that is piped to head
    sys.exit(main())
