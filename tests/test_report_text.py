"""The report on language models, which are judged by their perplexity."""

import csv

import pytest
import report
from made_runs import add_facts, collected, make_run, make_text_run
from reporting import runs, tables


def test_differences_of_signs_are_in_points_whatever_networks_are_judged_by(tmp_path):
    for mode in ("prox", "lazy"):
        make_text_run(tmp_path / f"{mode}_run_0", mode, 0, 100.0)
    (section,) = tables.sections(collected(*runs.find(tmp_path))[0])
    rows = [line.split(" | ") for line in tables.comparison_table(tables.compare(section)).splitlines()]
    assert [cells[4] for cells in rows] == ["A - B", "---", "+0.00 of perplexity", "+0.00 points"]


def test_a_perplexity_beyond_all_numbers_is_reported(tmp_path):
    """Of each number of seeds that is treated in its own way: it has a mean, and no spread."""
    for count in (2, 3):
        for seed in range(count):
            make_text_run(tmp_path / str(count) / f"lazy_run_{seed}", "lazy", seed, 100.0 + seed)
            folder = make_text_run(tmp_path / str(count) / f"prox_run_{seed}", "prox", seed, 100.0, freeze_epoch=-1)
            first, *rows = [line.split(",") for line in (folder / "results.csv").read_text().splitlines()]
            for row in rows if seed else ():
                row[first.index("val_ppl_bin")] = "inf"
            (folder / "results.csv").write_text("\n".join(",".join(cells) for cells in (first, *rows)) + "\n")
        assert report.main([str(tmp_path / str(count)), "--out", str(tmp_path / f"out{count}"), "--show"]) == 0
        words = (tmp_path / f"out{count}" / "report.md").read_text()
        assert f"| inf (n={count}) |" in words
    assert "| inf | 3 seeds, 101.00, inf, inf: no interval, not all are finite |" in words


def test_perplexity_has_tables_and_pictures_of_its_own(tmp_path):
    start = make_text_run(tmp_path / "fp_run_0", None, 0, 90.0)
    for seed in range(3):
        make_text_run(tmp_path / f"prox_run_{seed}", "prox", seed, 100.0 + seed, resume=str(start))
        make_text_run(tmp_path / f"lazy_run_{seed}", "lazy", seed, 120.0 - seed**2, resume=str(start))
    make_run(tmp_path / "images_run_0", "prox", 0, 20.0)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    words = (tmp_path / "out" / "report.md").read_text()
    (of_text,) = (part for part in words.split("\n## ") if part.startswith("ptb, LSTM"))
    assert "Text: ptb; 929589 training and 73760 validation tokens." in of_text
    assert "| best perplexity | test perplexity there | warm start's perplexity |" in of_text
    assert "| 102.00 (1.00, n=3) | 96.00 (1.00, n=3) |" in of_text
    assert "90.00 (" in of_text
    assert "+12.00" in of_text  # the gap to the warm start
    assert "error" not in of_text.replace("quantization error", "")
    assert "- Images: validation is on the test set" in words
    assert {"ptb_lstm_shared_6_epochs_perplexities.png", "cifar10_resnet20_own_6_epochs_errors.png"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        lines = {(line["data_set"], line["method"]): line for line in csv.DictReader(file)}
    line = lines["ptb", "ProxQuant-binary"]
    assert float(line["final_perplexity_mean"]) == pytest.approx(102)
    assert float(line["test_perplexity_mean"]) == pytest.approx(96)
    assert line["final_error_mean"] == ""
    assert lines["cifar10", "ProxQuant-binary"]["final_perplexity_mean"] == ""
    with open(tmp_path / "out" / "report_comparisons.csv", newline="") as file:
        (one,) = (one for one in csv.DictReader(file) if one["quantity"] == "best perplexity")
    assert float(one["first_minus_second"]) == pytest.approx((100 + 101 + 102 - 120 - 119 - 116) / 3)
    assert one["verdict"].startswith("ProxQuant-binary")


def test_a_run_that_its_regime_ended_is_finished(tmp_path):
    """Seeds that end after different numbers of epochs are one group; one that ended before its freeze is judged like them."""
    ends = {"0": {"optimizer": "SGD", "lr": 20.0, "plateau": 1.2, "end_below": 30.0}}
    folders = [make_text_run(tmp_path / f"prox_run_{seed}", "prox", seed, 100.0 + seed, epochs=80) for seed in range(2)]
    folders.append(make_text_run(tmp_path / "lazy_run_0", "lazy", 0, 100.0, epochs=80, freeze_epoch=50))
    for folder in folders:
        add_facts(folder, regime=ends)
    longer = folders[1] / "results.csv"
    *rows, last = longer.read_text().splitlines()
    longer.write_text("\n".join([*rows, last.removesuffix(",96.0") + ",", "7" + last.removeprefix("6")]) + "\n")
    found, left_out = collected(*folders)
    assert [group.method for group in found] == ["BinaryConnect", "ProxQuant-binary"]
    assert [group.judged() for group in found] == [{0: 101.0}, {0: 101.0, 1: 102.0}]
    assert found[1].tests() == {0: 95.0, 1: 96.0}
    assert found[1].at_the_end("epoch") == {0: 6, 1: 7}
    assert left_out == []


def test_networks_of_text_are_judged_by_their_best_epoch_whether_they_froze_or_not(tmp_path):
    """As the paper does: the hard-quantized network that is best on the validation text, and its perplexity on the test text."""
    for seed in range(3):
        for mode, freeze_epoch, perplexity in (("lazy", 3, 130.0), ("prox", -1, 100.0)):
            folder = make_text_run(tmp_path / f"{mode}_run_{seed}", mode, seed, perplexity + seed, freeze_epoch=freeze_epoch)
            text = (folder / "results.csv").read_text()
            first, *rows = [line.split(",") for line in text.splitlines()]
            place = first.index("val_ppl_bin")
            rows[-1][place], rows[-2][place] = rows[-2][place], rows[-1][place]  # the best epoch is the last but one
            (folder / "results.csv").write_text("\n".join(",".join(cells) for cells in (first, *rows)) + "\n")
    found, left_out = collected(*sorted(tmp_path.iterdir()))
    assert left_out == []
    assert [(group.mode, group.freeze_epoch) for group in found] == [("lazy", 3), ("prox", None)]
    assert [group.judged() for group in found] == [{0: 131.0, 1: 132.0, 2: 133.0}, {0: 101.0, 1: 102.0, 2: 103.0}]
    assert [group.tests() for group in found] == [{0: 125.0, 1: 126.0, 2: 127.0}, {0: 95.0, 1: 96.0, 2: 97.0}]
    (section,) = tables.sections(found)
    (one,) = tables.compare(section)  # their changes of signs are taken at the freeze, which one of them has not
    assert (one.quantity, one.difference.mean, one.verdict) == ("best perplexity", -30.0, "ProxQuant-binary (#2) lower")
    assert "| 102.00 (1.00, n=3) | 96.00 (1.00, n=3) |" in tables.error_table(section)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--show"]) == 0
    words = (tmp_path / "out" / "report.md").read_text()
    assert tables.NEVER_FROZE not in words
    assert "never quantized for good" not in words
