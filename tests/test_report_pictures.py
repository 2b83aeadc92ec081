"""What the report draws: curves, bands, histograms of weights, learned levels."""

import re

import numpy as np
import pytest
import report
import torch
from made_runs import LAYERS, collected, damage, make_events, make_run, row_after, run_report, write_rows
from reporting import families, pictures, runs, tables, weights

from training import checkpoints, tracking
from training.tasks import IMAGES


def test_runs_that_were_moved_keep_their_events(tmp_path, monkeypatch):
    """And take none of another run that has their name where the report is made."""
    make_events(tmp_path / "here" / "tb" / "prox")
    monkeypatch.chdir(tmp_path / "here")
    moved = make_run(tmp_path / "kept" / "runs" / "prox", "prox", 0, 20.0, tb_dir="tb/prox")
    assert runs.read(moved).board is None
    make_events(tmp_path / "kept" / "tb" / "prox")
    assert weights.layers(runs.read(moved)) == list(LAYERS)
    for name, results_dir in (("absolute", str(tmp_path / "elsewhere")), ("relative", "../elsewhere")):  # from here
        folder = make_run(tmp_path / "elsewhere" / name, "prox", 0, 20.0, tb_dir="tb/prox", results_dir=results_dir)
        assert weights.layers(runs.read(folder)) == list(LAYERS)


def test_pictures_families(tmp_path):
    """Methods under one schedule are drawn together; what each ran under its own schedule, by like length."""

    def make(name, mode, **more):
        return make_run(tmp_path / name, mode, 0, 20.0, **more)

    shared = [make("a", "lazy"), make("b", "prox"), make("c", "prox_ternary")]
    own = [
        make("d", "lazy", rate=0.1),
        make("e", "prox", rate=0.2),
        make("f", "prox_ternary", epochs=12),
        make("g", "prox", epochs=40),
    ]
    (section,) = tables.sections(collected(*shared, *own)[0])
    drawn = families.families(section)
    found = {family.name: sorted(line.group.runs[0].folder.name for line in family.lines) for family in drawn}
    assert found == {"shared_6_epochs": ["a", "b", "c"], "own_6_to_12_epochs": ["d", "e", "f"], "own_40_epochs": ["g"]}


def test_bands_are_the_range_over_the_seeds(tmp_path):
    folders = [make_run(tmp_path / str(seed), "prox", seed, error) for seed, error in enumerate((20.0, 21.0, 26.0))]
    (section,) = tables.sections(collected(*folders)[0])
    ((line,),) = (family.lines for family in families.families(section))
    epochs, mean, least, greatest = line.values("val_error1_bin")
    assert list(epochs) == [1, 2, 3, 4, 5, 6]
    for curve, value in ((mean, 67 / 3), (least, 20.0), (greatest, 26.0)):
        assert curve == pytest.approx(value + np.array([8, 6, 4, 2, 0, 0.5]))
    assert line.values("sign_change", factor=100)[1][3] == pytest.approx(17)


@pytest.mark.parametrize("continued", [False, True])
def test_histograms_of_tensorboard(tmp_path, continued):
    folder = make_run(tmp_path / "results" / "short" / "run", "prox", 0, 20.0, results_dir="./results/short", tb_dir="tb/short/run")
    start = make_events(tmp_path / "tb" / "short" / "run", continued)
    run = runs.read(folder)
    assert weights.layers(run) == list(LAYERS)
    found = weights.shares(run, LAYERS[1], 4)
    assert list(found) == [0, 4]
    expected = 100 * np.histogram(start.clip(-1, 1), weights.EDGES)[0] / len(start)
    assert np.abs(found[0] - expected).max() < 0.5
    assert found[4][0] == pytest.approx(100 * np.mean(start < 0))
    assert found[4][-1] == pytest.approx(100 * np.mean(start > 0))
    assert weights.shares(run, LAYERS[1], 3).keys() == {0}


def test_histograms_of_checkpoints(tmp_path):
    folder = make_run(tmp_path / "run", "lazy", 0, 20.0)
    random = torch.Generator().manual_seed(1)
    latent = {epoch: torch.randn(500, generator=random) * epoch / 4 for epoch in range(1, 5)}
    for epoch, weight in latent.items():
        kept = {"fc.weight": weight} if epoch > 1 else {}  # where the latent weights are the model's own
        shown = weight.sign() if epoch > 1 else weight
        content = {"state_dict": {"fc.weight": shown}, "optimizer": {"latent": kept, "base_optimizer": {}}}
        checkpoints.save(folder / f"checkpoint_epoch_{epoch}.pth.tar", content)
    damage(folder, "checkpoint_epoch_3.pth.tar", b"damaged")
    checkpoints.save(folder / checkpoints.LATEST, {"state_dict": {}, "start_signs": {"fc.weight": torch.ones(1)}})
    run = runs.read(folder)
    assert weights.layers(run) == ["fc.weight"]
    found = weights.shares(run, "fc.weight", 4)
    assert list(found) == [1, 2, 4]
    for epoch, share in found.items():
        expected = np.histogram(latent[epoch].clamp(-1, 1).numpy(), weights.EDGES)[0] / 5
        assert share == pytest.approx(expected)


def test_strange_figures_are_drawn(tmp_path):
    """No error at all, one epoch alone, a freeze at the end, a loss beyond all numbers before the freeze."""
    perfect = make_run(tmp_path / "perfect", "prox", 0, 0.0, epochs=2, freeze_epoch=2)
    row = row_after(1, 1, "lazy", 0.0, 0.01) | {"val_error1": 0.0, "val_error1_bin": 0.0, "val_loss_bin": "inf"}
    one = make_run(tmp_path / "one", "lazy", 0, 0.0, epochs=1, freeze_epoch=0)
    write_rows(one, [row])
    write_rows(perfect, [{**row_after(epoch, 2, "prox", 0, 0.01), "val_error1": 0.0, "val_error1_bin": 0.0} for epoch in (1, 2)])
    done = run_report(tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 runs" in done.stdout


def test_each_quantizer_has_its_own_line_of_errors_by_bits(tmp_path):
    """Points of another quantizer, or by row, are not joined with those of the mode alone, and do not look like them."""
    for number, (mode, more) in enumerate(
        [("prox_alt", {}), ("prox_alt", {"quantizer": "uniform"}), ("prox_alt", {"by_row": True}), ("lazy_alt", {})]
    ):
        for bits in (2, 3):
            make_run(tmp_path / f"{number}_{bits}_run_0", "prox", 0, 20.0, **{"projection_mode": mode, "bits": bits, **more})
    (section,) = tables.sections(collected(*runs.find(tmp_path))[0])
    (axes,) = pictures._draw_bits(section, "title").axes
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    pq = "ProxQuant-alternating"
    assert set(lines) == {pq, f"{pq} (uniform)", f"{pq} (by row)", "alternating"}
    assert [list(line.get_xdata()) for line in lines.values()] == [[2, 3]] * 4
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 4


def test_learned_levels_are_drawn(tmp_path):
    folder = make_run(tmp_path / "run", "prox", 0, 20.0)
    with tracking.Board(IMAGES, folder / "tb", 0) as board:
        for epoch in range(1, 5):
            sides = {"positive": 1 + epoch / 10, "negative": 1 - epoch / 10}
            tags = {f"ternary_value/{layer}/{side}": value for layer in LAYERS for side, value in sides.items()}
            board._add_scalars(tags, epoch)
    found = weights.learned_levels(runs.read(folder))
    assert set(found) == set(LAYERS)
    for levels in found.values():
        assert levels["positive"] == pytest.approx({epoch: 1 + epoch / 10 for epoch in range(1, 5)})
        assert levels["negative"] == pytest.approx({epoch: 1 - epoch / 10 for epoch in range(1, 5)})
    (section,) = tables.sections(collected(folder)[0])
    names = {picture.name for picture in pictures.draw(section, lambda name: None)}
    assert "cifar10_resnet20_own_6_epochs_learned_levels" in names


def test_weights_near_their_level_before_the_freeze(tmp_path, capsys):
    """Counted by hand: the share that the freeze moves by 0.05 at most, in a mode with one level for each sign."""
    folder = make_run(tmp_path / "run", "lazy", 0, 20.0)
    latent = {"fc.weight": torch.tensor([0.96, -0.97, 0.9, -0.3]), "conv1.weight": torch.tensor([[1.0, -0.951]])}
    final = {name: weight.sign() for name, weight in latent.items()}
    kept = {"state_dict": final | {"fc.bias": torch.ones(9)}, "optimizer": {"latent": latent, "base_optimizer": {}}}
    checkpoints.save(folder / "checkpoint_epoch_4.pth.tar", kept)
    checkpoints.save(folder / checkpoints.LATEST, {"state_dict": final, "start_signs": final})
    assert weights.near_their_level(runs.read(folder), 0.05) == pytest.approx(4 / 6)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0
    heads, row = capsys.readouterr().out.splitlines()[2:4]
    assert re.split(r"  +", heads)[:5] == ["#", "method", "final error %", "quantized", "within 0.05 before the freeze"]
    assert re.split(r"  +", row) == ["1", "BinaryConnect", "20.50 (n=1)", "98.5%", "66.7%", "0.400 (n=1)", "0.400 (n=1)"]
    assert "| 98.5% | 66.7% | 0.400 (n=1) | 0.400 (n=1) |" in (tmp_path / "out" / "report.md").read_text()
