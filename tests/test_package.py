"""`pip install .` installs the package quantize and nothing else, and it works from elsewhere with torch alone."""

import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT
from test_rooms import ROOMS

# In a process of its own, isolated from this folder and from the environment's variables.
USE = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
import quantize
layer, mode = torch.nn.Linear(3, 1), quantize.MODES["prox"]
with torch.no_grad():
    layer.weight.copy_(torch.tensor([[0.5, -0.5, 0.9]]))
optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), mode.select(layer), mode)
optimizer.set_strength(mode.strength(1.0, epoch=2))
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
stepped = layer.weight.tolist()
with optimizer.hard_quantized():
    quantized = layer.weight.tolist()
quantize.save_packed("layer", layer, optimizer)
assert quantize.load_packed("layer")["weight"].tolist() == quantized
imported = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps({"file": quantize.__file__, "stepped": stepped, "quantized": quantized, "imported": imported}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what pip installs of a copy of this repository, since building leaves files beside the sources."""
    copy, target = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("site")
    for name in (*ROOMS, "scripts", "tests", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(copy)]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_nothing_but_quantize_is_installed(installed):
    assert {path.name for path in installed.iterdir()} == {"quantize", "proxquant-1.0.dist-info"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "quantize").rglob("*.py")}
    files = [path for path in (installed / "quantize").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {path.relative_to(installed) for path in files} == sources
    assert all(path.read_bytes() == (ROOT / path.relative_to(installed)).read_bytes() for path in files)


def test_it_needs_torch_alone(installed):
    (package,) = metadata.distributions(path=[str(installed)])
    assert (package.metadata["Name"], package.version) == ("proxquant", "1.0")
    assert package.requires == ["torch>=2.9"]


def test_it_trains_from_elsewhere_with_torch_alone(installed, tmp_path):
    command = [sys.executable, "-I", "-c", USE, str(installed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(installed)
    # The gradient is 1 and the rate 0.1; then each weight moves by up to 0.1 * 1 * 2 toward its sign.
    assert found["stepped"] == [pytest.approx([0.6, -0.8, 1.0])]
    assert found["quantized"] == [[1.0, -1.0, 1.0]]
    rooms = {name.removesuffix(".py") for name in ROOMS}
    assert rooms & set(found["imported"]) == {"quantize"}
