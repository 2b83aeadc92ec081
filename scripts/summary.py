"""Prints a table of finished runs: final errors, and how far the weights were and are quantized.

    python scripts/summary.py results/run_1 results/run_2 ...

Reads the run folders; see quickstart.sh for an example.
"""

import csv
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import models
import quantize
from training import checkpoints

NEAR = 0.05  # a weight this near to its level counts as settled


def describe(folder: Path) -> list[str]:
    """One row of the table."""
    arguments = json.loads((folder / "args.json").read_text())["arguments"]
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    last, mode_name = rows[-1], arguments["projection_mode"]
    if mode_name is None:
        return [folder.name, "none", f"{float(last['val_error1']):.2f}", "-", "-", "-", "-"]
    mode = quantize.MODES[mode_name]
    final = checkpoints.read(folder / checkpoints.LATEST)["state_dict"]
    model = models.MODELS[arguments["model"]](arguments["dataset"], **arguments["model_config"])
    names = [name for name, _ in mode.select(model)]
    share = sum(final[name].numel() for name in names) / sum(parameter.numel() for parameter in model.parameters())
    freeze_epoch = arguments["freeze_epoch"]
    before = folder / f"checkpoint_epoch_{freeze_epoch}.pth.tar"
    near = error = "-"
    if before.exists():
        content = checkpoints.read(before)
        latent = content["optimizer"]["latent"] or content["state_dict"]
        near = f"{near_their_level(mode, [latent[name] for name in names]):.1%}"
        error = f"{float(rows[freeze_epoch - 1]['quant_error']):.3f}"
    return [
        folder.name,
        mode_name,
        f"{float(last['val_error1_bin']):.2f}",
        f"{share:.1%}",
        near,
        error,
        f"{float(last['quant_error']):.3f}",
    ]


def near_their_level(mode: quantize.ProjectionMode, weights: list[torch.Tensor]) -> float:
    """Share of the weights that are within NEAR of their hard quantization."""
    near = sum(int(((weight - mode.hard_quantize(weight)).abs() <= NEAR).sum()) for weight in weights)
    return near / sum(weight.numel() for weight in weights)


def main() -> None:
    titles = [
        "run",
        "mode",
        "final error %",
        "quantized",
        f"within {NEAR} before freeze",
        "error before freeze",
        "error at the end",
    ]
    table = [titles, *(describe(Path(folder)) for folder in sys.argv[1:])]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for row in table:
        print(
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    print(
        "\nquantized: share of all parameters. within / error before freeze: latent weights near their level, ||w - Q(w)|| / ||w||."
    )


if __name__ == "__main__":
    main()
