"""Texts as numbered words, and their windows: several streams side by side, some steps at a time.

A text is three files in UTF-8 whose words are separated by white space. Each line ends in the word ``<eos>``.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sources.batches import EVERYTHING
from utils import UsageError, reading

END, UNKNOWN = "<eos>", "<unk>"
STEPS = 30  # words of a stream in a window
STREAMS = 20
NO_TARGET = -100  # what cross-entropy passes over
SAMPLE = Path(__file__).parent.parent / "sample" / "pride-and-prejudice"

# Where a data set's parts lie below --data_dir.
FILES = {"ptb": "ptb/ptb.{}.txt", "text": "{}.txt", "sample_text": "{}.txt"}


@dataclass(frozen=True)
class Text:
    """A text's parts as numbers of words, int64 ``(tokens,)``, and its words by number. ``source`` says where it was read."""

    train: Tensor
    validation: Tensor
    test: Tensor
    words: tuple[str, ...]
    source: str


def read_text(name: str, data_dir: Path) -> Text:
    """Reads one of the texts in ``FILES``. Its vocabulary is the words of the training part, the most frequent first.

    Raises:
        UsageError: if a part is missing, empty, shorter than a window or no UTF-8, or has a word that training has not (where
            training has ``<unk>``, that stands for it).
    """
    folder = SAMPLE if name == "sample_text" else data_dir
    paths = [folder / FILES[name].format(part) for part in ("train", "valid", "test")]
    with reading("--data_dir", data_dir):
        missing = [path for path in paths if not path.is_file()]
    if missing:
        why = "; the text of the Penn Treebank cannot be downloaded: its licence is for each user to get" if name == "ptb" else ""
        raise UsageError(f"--data_dir {data_dir}: {name} is not there, no {', '.join(map(str, missing))}{why}")
    lines = [_read_lines(path) for path in paths]
    counts = Counter(word for line in lines[0] for word in line)
    words = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    numbers = {word: number for number, word in enumerate(words)}
    train, validation, test = (_numbered(part, numbers, path) for part, path in zip(lines, paths, strict=True))
    source = f"the sample in the repository ({SAMPLE.name})" if name == "sample_text" else f"{name} in {paths[0].parent}"
    return Text(train, validation, test, words, source)


def _read_lines(path: Path) -> list[list[str]]:
    """The words of each line, with the one that ends it."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"--data_dir: {path} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start})") from None
    except OSError as error:
        raise UsageError(f"--data_dir: {path} cannot be read ({error.strerror or error})") from None
    lines = [[*line.split(), END] for line in text.removesuffix("\n").split("\n")]
    if not text.strip():
        raise UsageError(f"--data_dir: {path} is empty: a text is needed")
    tokens = sum(map(len, lines))
    if tokens <= STEPS:
        raise UsageError(f"--data_dir: {path} has {tokens} words with {END}, fewer than a window of {STEPS} and its next word")
    return lines


def _numbered(lines: list[list[str]], numbers: dict[str, int], path: Path) -> Tensor:
    unknown = numbers.get(UNKNOWN)
    if unknown is None:
        for place, line in enumerate(lines, 1):
            strange = next((word for word in line if word not in numbers), None)
            if strange is not None:
                raise UsageError(
                    f"--data_dir: {path}, line {place}: the word {strange!r} is not in the training text, nor is {UNKNOWN}, "
                    "which would stand for it"
                )
    return torch.tensor([numbers.get(word, unknown) for line in lines for word in line])


class Windows:
    """A text in windows, always in the same order; see ``sources.batches.Batches``. A sample is a word that is predicted.

    Each window is two int64 tensors ``(steps, streams)`` on the device: words, and the words that follow them.

    Attributes:
        streams: that are read side by side.
    """

    share = EVERYTHING

    def __init__(self, inputs: Tensor, targets: Tensor, device: torch.device) -> None:
        self.streams = inputs.shape[1]
        self.samples = int((targets != NO_TARGET).sum())
        self.batch_size = STEPS * self.streams
        self._inputs, self._targets = inputs.to(device), targets.to(device)

    def __len__(self) -> int:
        return -(-len(self._inputs) // STEPS)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows from step ``start`` on; the last may be shorter."""
        for first in range(start * STEPS, len(self._inputs), STEPS):
            part = slice(first, first + STEPS)
            yield self._inputs[part], self._targets[part]


def training_windows(tokens: Tensor, streams: int, device: torch.device) -> Windows:
    """The text cut into streams of one length; what is left over is left out.

    Raises:
        UsageError: if that leaves no whole window.
    """
    length = len(tokens) // streams
    if length <= STEPS:
        raise UsageError(
            f"--batch-size {streams}: the training text has {len(tokens)} words, and {streams} streams of a window of {STEPS} and "
            f"its next word need {streams * (STEPS + 1)}"
        )
    side_by_side = tokens[: length * streams].view(streams, length).t().contiguous()
    return Windows(side_by_side[:-1], side_by_side[1:], device)


def validation_windows(tokens: Tensor, device: torch.device, streams: int = STREAMS) -> Windows:
    """The text in streams that leave no word out: each but the first is predicted once, the first of a stream from the one before.

    The last stream's end, or where a text is short the last streams, have ``NO_TARGET``.
    """
    length = -(-(len(tokens) - 1) // streams)
    padding = torch.zeros(length * streams - (len(tokens) - 1), dtype=torch.int64)
    inputs, targets = torch.cat([tokens[:-1], padding]), torch.cat([tokens[1:], padding + NO_TARGET])
    return Windows(*(part.view(streams, length).t().contiguous() for part in (inputs, targets)), device)


def same_words(words: Sequence[str], others: Sequence[str]) -> str | None:
    """How two vocabularies differ, in words; None where they are the same in the same order."""
    if list(words) == list(others):
        return None
    only = sorted(set(others) - set(words)) or sorted(set(words) - set(others))
    return f"{len(others)} words there, {len(words)} here" + (
        f", {only[0]!r} in only one of them" if only else ", in another order"
    )
