"""The floor plan: which room may import which. A reader who knows the table finds his way, as long as it holds."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Room: the rooms and packages that it may import, beside Python's own. No room knows one that stands above it.
ROOMS = {
    "utils.py": {"numpy", "torch"},
    "quantize": {"torch"},
    "models": {"torch"},
    "sources": {"PIL", "numpy", "torch", "torchvision", "tqdm", "utils"},
    "data.py": {"sources", "torch"},
    "training": {"data", "models", "quantize", "sources", "tensorboardX", "torch", "tqdm", "utils"},
    "main_binary_reg.py": {"data", "models", "quantize", "torch", "training", "utils"},
}


def imported(file: Path) -> set[str]:
    """The rooms and packages that a file names in its import statements, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are written in full here"
            found.add(node.module.split(".")[0])
    return found


def files_of(room: str) -> list[Path]:
    place = ROOT / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_its_row_allows(room):
    own = {room.removesuffix(".py")} | sys.stdlib_module_names
    for file in files_of(room):
        assert imported(file) - own <= ROOMS[room], file


def test_every_module_is_in_a_room_of_the_table():
    outside = {"scripts", "tests", "build", ".venv"}  # build: what `pip install .` leaves behind
    found = {file.relative_to(ROOT).parts[0] for file in ROOT.rglob("*.py") if "site-packages" not in file.parts}
    assert {name for name in found if not name.startswith(".")} - outside == set(ROOMS)


def test_nothing_imports_the_scripts():
    names = {path.stem for path in (ROOT / "scripts").iterdir() if path.suffix == ".py" or path.is_dir()}
    for room in ROOMS:
        for file in files_of(room):
            assert not imported(file) & names, file
