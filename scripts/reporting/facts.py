"""What a run says of its training: in args.json as values, and in the log for runs that are older than those."""

import ast
import json
import re
from pathlib import Path
from typing import Any

_OF_THE_REPOSITORY = "the sample in the repository"  # which is no place: it is everywhere the same


def parts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The facts of each part of a run: of its beginning, and of every time that it was continued."""
    found = facts.get("continued")
    return [facts, *(part for part in found if isinstance(part, dict))] if isinstance(found, list) else [facts]


def processes(facts: dict[str, Any]) -> str:
    """How many processes trained a run together: ``4``, or ``1 and 4`` where it went on with another number of them."""
    counts = {str(part.get("processes", 1)) for part in parts(facts)}  # 1: of a version that knew no other number
    *others, last = sorted(counts, key=lambda count: (len(count), count))
    return " and ".join(filter(None, [", ".join(others), last]))


def latest(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of a run's last process, which may have continued it on another machine."""
    continued = facts.get("continued")
    last = continued[-1] if isinstance(continued, list) and continued else None
    return {**facts, **last} if isinstance(last, dict) else facts


def from_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """What args.json says of the training, as attributes of a run; only what it says, and in the kind that it should be."""
    known, found = latest(facts), {}
    if regime := _sound_regime(known.get("regime")):
        found["regime"] = regime
    match known.get("data"):
        case {"source": str(source), "samples": str(samples), "training": int(training), "validation": int(validation)}:
            found["data"] = f"{_without_place(source)}; {training} training and {validation} validation {samples}"
    if words := computed(known):
        found["computed"] = words
    if isinstance(known.get("parameters"), int):
        found["parameters"] = known["parameters"]
    match known.get("quantized"):
        case {"weights": int(weights), "tensors": int(tensors)}:
            found["quantized"] = (weights, tensors)
    return found


def computed(facts: dict[str, Any]) -> str | None:
    """How a process has computed, in words; None where its facts do not say."""
    match facts:
        case {"precision": str(precision), "compiled": bool(compiled), "captured": bool(captured)}:
            return precision + (", compiled" if compiled else "") + (", captured" if captured else "")
    return None


def from_log(path: Path) -> dict[str, Any]:
    """The same out of the log, for runs that are older than these facts; of a continued run, as its last process has them."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    names = ("regime", "data", "run", "network", "mode")
    lines = {name: found[-1] for name in names if (found := re.findall(rf"^\S+ \S+ {name}: (.*)$", text, re.MULTILINE))}
    found = {}
    if "regime" in lines:
        found["regime"] = _regime(lines["regime"])
    if "data" in lines:
        source, _, counts = lines["data"].rpartition("; ")  # a folder's name may have the same in it
        found["data"] = f"{_without_place(source)}; {counts}"
    if match := re.search(r" on (.*), seed \d+$", lines.get("run", "")):
        found["computed"] = match[1]
    if match := re.search(r" (\d[\d,]{0,20}) parameters", lines.get("network", "")):
        found["parameters"] = int(match[1].replace(",", ""))
    if match := re.search(r" (\d[\d,]{0,20}) weights in (\d{1,9}) tensors", lines.get("mode", "")):
        found["quantized"] = (int(match[1].replace(",", "")), int(match[2]))
    return found


def _without_place(source: str) -> str:
    """Where samples come from, less all of the folder and what follows it.

    The folder, and that the samples were just downloaded, say how a machine is set up; how many are held out is ``--holdout``'s.
    """
    return source if source.startswith(_OF_THE_REPOSITORY) else source.partition(" in ")[0]


def _regime(text: str) -> dict[int, dict[str, Any]] | None:
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return _sound_regime(value)


def _sound_regime(value: Any) -> dict[int, dict[str, Any]] | None:
    """A regime with numbers for its epochs, which JSON makes words of; None where it is none."""
    if not isinstance(value, dict) or not value or not all(map(_is_settings, value.values())):
        return None
    if not all(isinstance(epoch, int) or (isinstance(epoch, str) and re.fullmatch(r"\d{1,9}", epoch)) for epoch in value):
        return None
    return {int(epoch): settings for epoch, settings in value.items()}


def _is_settings(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(name, str) for name in entry)
