"""The report on damaged, unfinished or locked folders, and on arguments that make no sense."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import report
from made_runs import collected, damage, make_run, run_report
from reporting import pictures, runs, tables, weights


def test_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "good" / "run", "prox", 0, 20.0)
    for bad in ("nowhere", "empty"):
        done = run_report(tmp_path / "good", tmp_path / bad, "--out", tmp_path / "out")
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert str(tmp_path / bad) in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_run_that_died_before_it_wrote_anything_is_told(tmp_path):
    """By its output, by its folder with a log, and by both; given as they are, or by the folder that they lie in."""
    results = tmp_path / "results"
    make_run(results / "prox_run_0", "prox", 0, 20.0)
    for name, log, output in (("prox_run_1", True, True), ("prox_run_2", False, True), ("prox_run_3", True, False)):
        (results / name).mkdir()
        if log:
            (results / name / "log.txt").write_text("2026-01-01 00:00:00 run: x\n")
        if output:
            (results / f"{name}.out").write_text("Killed\n")
    (results / "prox_run_0.out").write_text("done\n")
    (results / "tb" / "prox_run_1").mkdir(parents=True)  # of another kind: nobody's run
    for number, given in enumerate([[results], sorted(results.glob("*_run_*"))]):
        done = run_report(*given, "--out", tmp_path / str(number))
        assert (done.returncode, done.stderr) == (0, "")
        assert "1 of 4 runs in 1 groups" in done.stdout
        listed = (tmp_path / str(number) / "report.md").read_text().split("## Left out")[1]
        for name in ("prox_run_1", "prox_run_2", "prox_run_3"):
            assert listed.count(f"| results/{name} | - | - | it ended before it began to train: none of args.json") == 1


@pytest.fixture
def locked(tmp_path) -> Iterator[Path]:
    """A folder with a run that is counted, and with runs in folders that may not be read, or not be entered."""
    results = tmp_path / "results"
    for number, (name, mode) in enumerate({"prox_run_0": 0o755, "prox_run_1": 0, "others": 0, "listed": 0o444}.items()):
        make_run(results / name, "prox", number, 20.0)
        (results / name).chmod(mode)
    yield results
    for folder in (results, *results.iterdir()):
        folder.chmod(0o755)


def test_folders_that_may_not_be_read_are_named(locked, tmp_path, ordinary_user):
    done = run_report(locked, "--out", tmp_path / "out", under=ordinary_user)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 4 runs in 1 groups" in done.stdout
    listed = (tmp_path / "out" / "report.md").read_text().split("## Left out")[1]
    for name in ("prox_run_1", "others"):
        assert listed.count(f"| results/{name} | - | - | its folder cannot be read (Permission denied)") == 1
    assert listed.count("| results/listed | - | - | its args.json cannot be read |") == 1


@pytest.mark.parametrize(("mode", "below"), [(0, ""), (0o444, ""), (0, "prox_run_0"), (0, "prox_run_0.out")])
def test_a_place_that_may_not_be_read_is_said_in_one_line(locked, tmp_path, ordinary_user, mode, below):
    """One that was given, and one that lies in such a one."""
    locked.chmod(mode)
    done = run_report(locked / below, "--out", tmp_path / "out", under=ordinary_user)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"report.py: error: {locked / below}: Permission denied\n"


def test_out_that_cannot_be_written(tmp_path, capsys):
    make_run(tmp_path / "run", "prox", 0, 20.0)
    (tmp_path / "file").write_text("kept")
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    (tmp_path / "folder").mkdir()
    for readme, reason in (("nowhere/README.md", "No such file or directory"), ("folder", "Is a directory")):
        path = tmp_path / readme
        assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--readme", str(path)]) == 1
        assert capsys.readouterr().err == f"report.py: error: --readme {path}: {reason}\n"


ODD = (
    b"", b"\0\xff\xfe", b"[]", b"{}", b"null", b'{"arguments": []}', b'{"arguments": {}}', b'{"arguments": {"epochs": "six"}}',
    b"[" * 5000,
    b"epoch\n1\n", b"epoch,train_loss,val_loss,val_error1,val_error1_bin\n1,,,,\n2,1,1,1,1\n", b"1,2,3\n,,,,,,,,\n", b'"\n' * 9,
    b"2026-01-01 00:00:00 regime: {0: 3}\n2026-01-01 00:00:00 data: x\n2026-01-01 00:00:00 run: y\n",
    b"2026-01-01 00:00:00 regime: {0: {1: 2, 'lr': {3}}}\n", b"2026-01-01 00:00:00 regime: {0: {'lr': None}, 1: {'lr': 'x|y'}}\n",
    b"\x07" * 40, b"\x10\0\0\0\0\0\0\0" * 9,
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["args.json", "results.csv", "log.txt", "tb/events.out.tfevents.0.x", "checkpoint_epoch_2.pth.tar"]
)
def test_no_content_of_a_folder_ends_in_a_traceback(tmp_path, name):
    """Each damaged run is told in the list or counted; the sound one beside it is counted always."""
    made = []
    for number, content in enumerate(ODD):
        folder = make_run(tmp_path / f"run_{number}", "prox", number, 20.0)
        (folder / "tb").mkdir()
        made.append(damage(folder, name, content))
    sound = make_run(tmp_path / "sound", "prox", 1000, 20.0)
    found, left_out = collected(*made, sound)
    counted = {run.folder for group in found for run in group.runs}
    assert counted | {one.run.folder for one in left_out} == {*made, sound}
    assert sound in counted
    if name in ("args.json", "results.csv"):
        assert counted == {sound}
    else:
        assert not left_out
    for section in tables.sections(found):
        tables.error_table(section)
        for group in section.groups:
            for run in group.runs:
                weights.layers(run)
                weights.shares(run, "fc.weight", 4)


@pytest.mark.parametrize("value", [None, True, -3, 1e400, "../..", "a\0b", "x" * 5000, [1], {"a": [None]}, "| x |\n# y"])
def test_no_argument_ends_in_a_traceback(tmp_path, value, monkeypatch):
    """An argument of another kind than the flag's: nobody's run, but its folder may lie among the others."""
    monkeypatch.setattr(pictures, "draw", lambda section, note: [])  # they show none of it
    names = ("resume", "results_dir", "tb_dir", "lr", "reg_rate", "regime", "start_epoch", "model", "dataset", "projection_mode",
             "freeze_epoch", "epochs", "seed", "model_config", "batch_size", "holdout", "a_flag_to_come")  # fmt: skip
    for number, name in enumerate(names):
        make_run(tmp_path / f"run_{number}", "prox", number, 20.0)
        path = tmp_path / f"run_{number}" / "args.json"
        content = json.loads(path.read_text())
        content["arguments"][name] = value
        facts = (
            "command",
            "versions",
            "device",
            "continued",
            "regime",
            "data",
            "parameters",
            "quantized",
            "compiled",
            "warm_start",
        )
        path.write_text(json.dumps(content | dict.fromkeys(facts, value)))
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    for number in range(len(names)):
        weights.shares(runs.read(tmp_path / f"run_{number}"), "fc.weight", 4)
    words = (tmp_path / "out" / "report.md").read_text()
    for number in range(len(names)):
        assert f"/run_{number}" in words
    assert "\n# y" not in words


def test_words_are_not_read_as_formulas(tmp_path):
    make_run(tmp_path / "run", "prox", 0, 20.0)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out"), "--data_note", "for $5, | 3% of \\frac$ \n# it"]) == 0
    assert r"(for $5, \| 3% of \frac$ # it)" in (tmp_path / "out" / "report.md").read_text()


def test_only_unfinished_runs(tmp_path, capsys):
    make_run(tmp_path / "run", "prox", 0, 20.0, rows=1)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "No run is finished yet" in (tmp_path / "out" / "report.md").read_text()
    assert "unfinished: 1 of 6 epochs" in (tmp_path / "out" / "report.md").read_text()
    assert "0 of 1 runs" in capsys.readouterr().out
