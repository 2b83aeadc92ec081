"""What the report knows of the networks that runs began with."""

import pytest
from made_runs import add_facts, collected, make_run
from reporting import tables, text


def test_a_warm_start_that_cannot_be_known(tmp_path):
    gone = make_run(tmp_path / "gone", "prox", 0, 20.0, resume="/nowhere/fp_run_0")
    unfinished = make_run(tmp_path / "fp", None, 0, 20.0, rows=2)
    began = make_run(tmp_path / "began", "prox", 0, 20.0, resume=str(unfinished))
    other = make_run(tmp_path / "held_out", None, 0, 20.0, holdout=5)
    held = make_run(tmp_path / "held", "prox", 0, 20.0, resume=str(other))
    for folder in (gone, began, held):
        (group,) = collected(folder)[0]
        assert group.warm_start[1] is None
        assert "| ? (" in tables.error_table(tables.Section((group,)))


def test_runs_that_were_moved_keep_their_warm_start(tmp_path, monkeypatch):
    """Where the report is made there is another run of the same name."""
    make_run(tmp_path / "here" / "results" / "fp", None, 0, 30.0, epochs=3)
    make_run(tmp_path / "kept" / "runs" / "fp", None, 0, 17.0, epochs=3)
    monkeypatch.chdir(tmp_path / "here")
    for place, expected in (("kept/runs", 17.0), ("here/results", 30.0)):
        (group,) = collected(make_run(tmp_path / place / "prox", "prox", 0, 20.0, resume="results/fp"))[0]
        assert group.warm_start[1] == pytest.approx(expected)


def test_a_checkpoint_as_warm_start(tmp_path):
    start = make_run(tmp_path / "fp", None, 0, 17.0, epochs=3)
    for name, expected in (("model_best.pth.tar", 17.0), ("checkpoint.pth.tar", 17.5), ("checkpoint_epoch_1.pth.tar", 19.0)):
        (start / name).write_bytes(b"")
        (group,) = collected(make_run(tmp_path / f"from_{name}", "prox", 0, 20.0, resume=str(start / name)))[0]
        assert group.warm_start[1] == pytest.approx(expected)


def test_the_error_of_a_warm_start_is_that_of_the_weights_that_the_run_began_with(tmp_path):
    """The full-precision run went on afterwards, to a better network."""
    start = make_run(tmp_path / "fp_run_0", None, 0, 17.0)
    folder = make_run(tmp_path / "prox_run_0", "prox", 0, 20.0, resume=str(start))
    add_facts(folder, warm_start={"path": str(start), "epoch": 2, "score": 81.5, "sha256": "ab" * 32, "finished": False})
    (group,) = collected(folder)[0]
    assert group.warm_start[1] == pytest.approx(18.5)


@pytest.mark.parametrize(("began", "error"), [((2, True), 23.0), ((2, False), None), ((None, None), 17.5)])
def test_the_error_of_the_last_checkpoint_is_that_of_its_epoch_then(tmp_path, began, error):
    """The full-precision run was lengthened afterwards; what an unfinished one had, between two epochs, is not known."""
    start = make_run(tmp_path / "fp_run_0", None, 0, 17.0)
    (start / "checkpoint.pth.tar").write_bytes(b"")
    folder = make_run(tmp_path / "prox_run_0", "prox", 0, 20.0, resume=str(start / "checkpoint.pth.tar"))
    epoch, finished = began
    add_facts(folder, warm_start={"path": str(start), "epoch": epoch, "score": 80.0, "sha256": "ab" * 32, "finished": finished})
    (group,) = collected(folder)[0]
    assert group.warm_start[1] == error


def test_one_warm_start_is_claimed_only_of_equal_weights(tmp_path):
    """The same place may have held other weights: checksums decide, and where there are none the report says so."""
    start = make_run(tmp_path / "fp_run_0", None, 0, 17.0)

    def make(name, seed, sha256=None, **more):
        folder = make_run(tmp_path / f"{name}_run_{seed}", "prox", seed, 20.0, resume=str(start))
        facts = {"path": str(start), "epoch": 6, "score": 83.0, "sha256": sha256, "finished": True, "of_epochs": 6, **more}
        return add_facts(folder, warm_start=facts) if sha256 else folder

    def words(*folders):
        found = tables.sections(collected(*folders)[0])
        return [len(section.groups) for section in found], text.caveats(found)

    same = [make("same", 0, "ab" * 32), make("same", 1, "ab" * 32)]
    assert words(*same)[0] == [1]
    assert "have one checksum. The spread" in words(*same)[1]
    assert "network, the epoch of it that was best on the validation data: " in words(*same)[1]
    last = make_run(tmp_path / "last_run_0", "prox", 0, 20.0, resume=str(start / "checkpoint.pth.tar"))
    (start / "checkpoint.pth.tar").write_bytes(b"")
    assert "from the same full-precision network, as far as" in words(last)[1]
    other = make("same", 2, "cd" * 32, finished=False)
    assert words(*same, other)[0] == [2]
    old = [make("old", 0), make("old", 1)]
    assert words(*old)[0] == [1]
    assert "as far as can be known" in words(*old)[1]
    older_and_newer = [make("old", 7), *same]
    assert words(*older_and_newer)[0] == [1]
    assert "checksum, or (" in words(*older_and_newer)[1]
    assert words(*older_and_newer, other)[0] == [3], "which of the two the older one began with is not known"
    (one,) = (one for one in collected(*same, other)[1] if "not at its end" in one.reason)
    assert one.run.folder == other
    assert one.reason.startswith(f"it started from {start.parent.name}/fp_run_0, a run that was not at its end then, of 6 epochs")
