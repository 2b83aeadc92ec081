"""Reports on runs: which error each method reaches, how sure that is, beside the paper's; tables, pictures, and what was left out.

    python scripts/report.py results/short --out results/short
    python scripts/report.py results/a results/b --out compared --data_note cifar10="a JPEG copy, lossy"

    python scripts/report.py results/short --out results/short/report --readme results/short/README.md

Writes report.md, report.csv (one line a group of seeds), report_comparisons.csv and pictures as PNG and SVG. Numbers come from the
run folders alone. Unfinished or damaged runs enter no mean; they, and those that are out of line, are listed with the reason.
"""

import argparse
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from reporting import groups, pictures, runs, tables, text

import data
from utils import UsageError, write_text, write_whole


def read_runs(paths: list[Path]) -> list[runs.Run]:
    """The runs at or below the paths, each once.

    Raises:
        UsageError: if a path is not there, may not be read or has no runs.
    """
    found: dict[Path, runs.Run] = {}
    for path in paths:
        try:
            folders = runs.find(path)
        except FileNotFoundError:
            raise UsageError(f"{path}: no such folder") from None
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror or error}") from None
        if not folders:
            raise UsageError(f"{path}: no run folder in it (one with args.json, results.csv or a checkpoint)")
        found |= {folder.resolve(): runs.read(folder) for folder in folders}
    return list(found.values())


def notes(given: list[str]) -> tables.Note:
    """What --data_note says: ``NAME=TEXT`` of one data set, ``TEXT`` (which may have a = too) of all others."""
    by_name = {}
    for one in given:
        name, _, words = one.partition("=")
        by_name |= {name: words} if name in data.DATASETS else {None: one}
    return lambda dataset: by_name.get(dataset, by_name.get(None))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 written, 1 could not be written, 2 bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, default=[Path("results")],
                        help="run folders, or folders that contain some at any depth (default: results); the repository's "
                        "own are found only by a path of their own")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/report"), metavar="DIR", help="default: results/report")
    parser.add_argument("--data_note", action="append", default=[], metavar="[NAME=]TEXT",
                        help="said beside the name of the data set, of every one or of NAME; may be repeated")  # fmt: skip
    parser.add_argument("--machine", default="", metavar="TEXT", help="said of the hardware, beside what the runs know of it")
    parser.add_argument("--show", action="store_true", help="also print how well each group does and how it is quantized")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="the report's text once more, as this file")
    args = parser.parse_args(argv)
    try:
        found = read_runs(args.results)
    except UsageError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    note = notes(args.data_note)
    grouped, left_out = groups.collect(found)
    sections = tables.sections(grouped)
    comparisons = [tables.compare(section) for section in sections]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        drawn = [[write_picture(args.out, picture) for picture in pictures.draw(section, note)] for section in sections]
        write_text(args.out / "report.csv", tables.groups_csv(sections, note))
        write_text(args.out / "report_comparisons.csv", tables.comparisons_csv([pair for pairs in comparisons for pair in pairs]))
        write_text(args.out / "report.md", text.report(sections, comparisons, drawn, left_out, note, args.machine))
    except OSError as error:
        return not_written(f"--out {args.out}", error)
    if args.readme:
        place = f"{Path(os.path.relpath(args.out, args.readme.parent)).as_posix()}/"
        try:
            write_text(args.readme, text.report(sections, comparisons, drawn, left_out, note, args.machine, place))
        except OSError as error:
            return not_written(f"--readme {args.readme}", error)
    if args.show:
        print("".join(f"{section.title(note)}\n\n{tables.aligned(tables.level_rows(section))}\n\n" for section in sections), end="")
    counted = sum(len(group.runs) for group in grouped)
    print(f"{args.out / 'report.md'}: {counted} of {len(found)} runs in {len(grouped)} groups")
    return 0


def not_written(flag: str, error: OSError) -> int:
    """Says which flag's place cannot be written, and why; returns the exit status."""
    print(f"report.py: error: {flag}: {error.strerror or error}", file=sys.stderr)
    return 1


def write_picture(folder: Path, picture: pictures.Picture) -> text.Picture:
    """Writes a picture's files; returns what the text needs of it."""
    for extension, content in picture.files.items():
        write_whole(folder / f"{picture.name}.{extension}", lambda file, content=content: file.write(content))
    return picture.name, picture.caption


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in any command that is piped to head
    sys.exit(main())
