"""A run's schedule in short words, for tables."""

from typing import Any

from reporting.runs import Run, short_path

# Names in a group's identity of what ran, beside what was asked for.
PRECISION, DATA, REGIME, STRENGTH = (
    "precision that ran",
    "images that were read",
    "regime that ran",
    "first strength that ran, and its epoch",
)
PROCESSES = "processes that trained together"  # whose BatchNorm statistics are of their own share of a batch


def schedule_text(run: Run, identity: dict[str, Any]) -> str:
    """Length, freeze, batch size, regime, strength and precision in one line."""
    words = [f"{identity['epochs']} epochs" + (f" from {identity['start_epoch']}" if identity["start_epoch"] else "")]
    if run.mode is not None:
        words.append("no freeze" if run.freeze_epoch is None else f"freeze {run.freeze_epoch}")
    words += [f"batch {identity['batch_size']}", regime_text(run)]
    unsaid = {"reg_rate": (0,), "binary_reg": (0, 1)}  # without effect, or as it is where nobody chooses
    rates = [name for name, values in unsaid.items() if run.mode is not None and identity[name] not in values]
    words += [f"{name} {shown(identity[name])}" for name in rates]
    words += [name for name in ("keep_optimizer_state", "adjust_reg", "tf32") if identity.get(name)]
    if identity[PROCESSES] != "1":
        words.append(f"{shown(identity[PROCESSES])} processes")
    return ", ".join([*words, str(identity.get(PRECISION, "precision ?"))])


def regime_text(run: Run) -> str:
    """Optimizer and learning rates; ``0.01 -> 0.001@3`` changes when 3 epochs are trained."""
    if run.regime is None:
        return f"rate {_rates_of(run)} (no log says the optimizer)"
    first, *later = sorted(run.regime)
    start = run.regime[first]
    rates = " -> ".join([shown(start.get("lr")), *(f"{shown(run.regime[e]['lr'])}@{e}" for e in later if "lr" in run.regime[e])])
    settings = [
        f"{name.replace('_', ' ')} {shown(value)}"
        for name, value in sorted(start.items())
        if name not in ("lr", "optimizer") and value
    ]
    settings += [
        f"{name.replace('_', ' ')} {shown(value)}@{e}" for e in later for name, value in run.regime[e].items() if name != "lr"
    ]
    return ", ".join([f"{start.get('optimizer', 'SGD')} {rates}", *settings])


def _rates_of(run: Run) -> str:
    """Learning rates as results.csv has them."""
    words, last = [], None
    for row in run.rows:
        rate = row.get("lr")
        if rate != last:
            words.append(shown(rate) + (f"@{int(row['epoch']) - 1}" if words else ""))
        last = rate
    return " -> ".join(words) or "?"


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = short_path(" ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}..."
