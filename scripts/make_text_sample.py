"""Makes the embedded sample text: Jane Austen's "Pride and Prejudice" (1813), from the data of the R package janeaustenr.

    python scripts/make_text_sample.py /usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

Debian has the package as r-cran-janeaustenr; neither R nor anything beside Python's own library is needed. The result is the same
three files, byte for byte, wherever they are made from the same file.

One sentence a line, in lower case, without punctuation; a number is N, and a word that comes only once in the training part <unk>.
"""

import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "sample" / "pride-and-prejudice"
TITLE = "PRIDE AND PREJUDICE"
LAST_CHAPTER = {"train": 49, "valid": 55, "test": 61}
ABBREVIATIONS = re.compile(r"\b(mr|mrs|dr|st|esq|rev|col)\.")
WORD = re.compile(r"[a-z]+(?:['-][a-z]+)*|[0-9]+")


def texts(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R database: each a length, then a compressed serialization (format X, strings with lengths)."""
    while database:
        part = zlib.decompressobj()
        content = part.decompress(database[4:])
        database = part.unused_data
        start = content.index(b"\x00\x00\x00\x10", 14)  # the mark of a character vector, behind the header
        (count,) = struct.unpack_from(">i", content, start + 4)
        place, lines = start + 8, []
        for _ in range(count):
            (length,) = struct.unpack_from(">i", content, place + 4)
            lines.append(content[place + 8 : place + 8 + max(length, 0)].decode())
            place += 8 + max(length, 0)
        yield lines


def chapters(lines: list[str]) -> list[str]:
    """The text of each chapter, in lower case."""
    text = "\n".join(lines).replace("_", "").replace("\u2019", "'").lower()
    return re.split(r"^chapter \d+$", text, flags=re.MULTILINE)[1:]


def sentences(chapter: str) -> list[list[str]]:
    """The words of each sentence; a paragraph ends one too."""
    pieces = re.split(r"[.!?]+|\n\s*\n", ABBREVIATIONS.sub(r"\1", chapter.replace("--", " ")))
    found = (["N" if word.isdigit() else word for word in WORD.findall(piece)] for piece in pieces)
    return [words for words in found if words]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("make_text_sample.py: error: one file is needed, janeaustenr's Rdata.rdb")
    book = chapters(next(lines for lines in texts(Path(sys.argv[1]).read_bytes()) if lines[0] == TITLE))
    parts, first = {}, 0
    for name, last in LAST_CHAPTER.items():
        parts[name] = [words for chapter in book[first:last] for words in sentences(chapter)]
        first = last
    counts = Counter(word for words in parts["train"] for word in words)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = (" ".join(word if counts[word] > 1 else "<unk>" for word in words) for words in part)
        (FOLDER / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        print(f"{name}: {len(part)} sentences, {sum(map(len, part))} words")


if __name__ == "__main__":
    main()
