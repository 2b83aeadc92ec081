"""The paper's example of what BinaryConnect cannot see and ProxQuant can; draws docs/counter-example.svg and .png.

    python scripts/counter_example.py

The functions f(x) = |x + s/2| - 1/2 for s = +1 and s = -1 have the same gradient at x = 1 and at x = -1, but the better sign is
-s. See docs/counter-example.md.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import quantize

DOCS = Path(__file__).parent.parent / "docs"
STEPS, LEARNING_RATE, RATE = 1000, 0.01, 0.002


def loss(x: torch.Tensor, s: int) -> torch.Tensor:
    """|x + s/2| - 1/2, elementwise."""
    return (x + s / 2).abs() - 0.5


def trajectory(mode_name: str, s: int, start: float) -> list[float]:
    """The latent weight from ``start`` over STEPS steps of gradient descent on f with a projection mode, one epoch a step.

    Returns:
        STEPS + 2 values: the start, after each step, and hard-quantized.
    """
    weight = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    mode = quantize.MODES[mode_name]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD([weight], lr=LEARNING_RATE), [("x", weight)], mode)
    path = [start]
    for epoch in range(STEPS):
        optimizer.set_strength(mode.strength(RATE if mode.strength_grows else 1.0, epoch))
        optimizer.zero_grad()
        loss(weight, s).sum().backward()
        optimizer.step()
        path.append(optimizer.latent["x"].item())
    optimizer.freeze()
    return [*path, weight.item()]


def draw() -> None:
    """The two functions, and the paths of both methods on them from one start."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "counter-example", "font.size": 11})
    from matplotlib import pyplot

    colours, styles = {1: "#0072B2", -1: "#D55E00"}, {1: "-", -1: "--"}
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    x = torch.linspace(-1, 1, 201)
    for s in (1, -1):
        words = f"s = {s:+d}"
        left.plot(x, loss(x, s), styles[s], color=colours[s], label=words)
        left.plot([-1, 1], loss(torch.tensor([-1.0, 1.0]), s), "o", color=colours[s])
        middle.plot(trajectory("lazy", s, 0.3)[:-1], styles[s], color=colours[s], label=words, linewidth=3 if s == 1 else 1.5)
        right.plot(trajectory("prox", s, 0.3)[:-1], styles[s], color=colours[s], label=words)
    left.set(title="f(x) = |x + s/2| - 1/2", xlabel="x", ylabel="f(x)")
    middle.set(title="BinaryConnect: one path for both", xlabel="step", ylabel="latent weight x", ylim=(-1.1, 1.1))
    right.set(title="ProxQuant: the right sign on each", xlabel="step", ylabel="weight x", ylim=(-1.1, 1.1))
    for axes in (left, middle, right):
        axes.legend()
        axes.grid(alpha=0.3)
    for kind, metadata in (("svg", {"Date": None}), ("png", {})):
        figure.savefig(DOCS / f"counter-example.{kind}", dpi=130, metadata=metadata)


if __name__ == "__main__":
    draw()
