"""The training scripts: seeds side by side, queues, failures, interrupts; and the sample's maker."""

import ast
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

SCRIPTS = {
    "train-cifar10-fp.sh": "resnet8",
    "train-cifar10-pq-binary.sh": "resnet8_pq_binary_Adam",
    "train-cifar10-binaryconnect.sh": "resnet8_bc_Adam",
    "train-cifar10-pq-ternary.sh": "resnet8_pq_ternary_Adam",
}


def environment(folder: Path, data: Path, **more: str) -> dict[str, str]:
    settings = {
        "PYTHON": sys.executable,
        "DEPTH": "8",
        "EPOCHS": "2",
        "FREEZE_EPOCH": "1",
        "SEEDS": "0 1",
        "GPUS": "",
        "DATA_DIR": str(data),
    }
    places = {
        "RESULTS_DIR": str(folder / "results"),
        "TB_DIR": str(folder / "tb"),
        "EXTRA": "--precision fp32",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **settings, **places, **more}


def run(script: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "scripts" / script], capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts")


def test_all_four_one_after_another(folder, tiny_data):
    for script, name in SCRIPTS.items():
        done = run(script, env=environment(folder, tiny_data))
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == f"{name}: all seeds done: 0 1"
        for seed in (0, 1):
            assert (folder / "results" / f"{name}_run_{seed}" / "model_best.pth.tar").exists()
            assert list((folder / "tb" / f"{name}_run_{seed}").iterdir())
    again = run("train-cifar10-fp.sh", env=environment(folder, tiny_data))
    assert again.returncode == 0
    assert again.stdout.count("complete") == 2


def fake_python(folder: Path, body: str) -> str:
    """An interpreter in name: gets main_binary_reg.py's arguments, so that queues can be tested without training."""
    path = folder / "fake-python"
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_seed_is_named(tmp_path):
    fake = fake_python(tmp_path, 'case "$*" in *"--seed 1 "*) echo broken; exit 3;; *) echo fine;; esac')
    done = run("train-cifar10-pq-binary.sh", env=environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0 1 2"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed 1: FAILED with status 3: broken" in done.stderr
    assert done.stderr.splitlines()[-1] == "resnet8_pq_binary_Adam: 1 of 3 seeds FAILED: 1"
    assert "seed 2: fine" in done.stdout


@pytest.mark.parametrize(("gpus", "per_gpu", "at_once"), [("", "1", 1), ("0 1", "1", 2), ("0 1", "2", 4)])
def test_more_seeds_than_places_queue_up(tmp_path, gpus, per_gpu, at_once):
    body = (
        f'mkdir {tmp_path}/on_$$; ls -d {tmp_path}/on_* | wc -l; sleep 0.6; rmdir {tmp_path}/on_$$; echo "$*" >> {tmp_path}/calls'
    )
    fake = fake_python(tmp_path, body)
    settings = environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0 1 2 3 4", GPUS=gpus, RUNS_PER_GPU=per_gpu)
    assert run("train-cifar10-fp.sh", env=settings).returncode == 0
    counts = [int((tmp_path / "results" / f"resnet8_run_{seed}.out").read_text()) for seed in range(5)]
    assert max(counts) == at_once
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 5
    used = {call.split("--gpu ")[1].split()[0] for call in calls if "--gpu " in call}
    assert used == set(gpus.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children(tmp_path, number):
    body = f"trap 'echo stopped >> {tmp_path}/stopped; exit 143' TERM; echo $$ >> {tmp_path}/started; while :; do sleep 0.05; done"
    settings = environment(tmp_path, tmp_path, PYTHON=fake_python(tmp_path, body), GPUS="0 1")
    # A shell in the background starts its children with SIGINT ignored, and a script cannot trap what was ignored at its start.
    script, silent = ROOT / "scripts" / "train-cifar10-fp.sh", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([script], env=settings, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **silent)
    began = time.monotonic()
    while not (tmp_path / "started").exists() or len((tmp_path / "started").read_text().split()) < 2:
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert (tmp_path / "stopped").read_text().split() == ["stopped"] * 2
    for child in map(int, (tmp_path / "started").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_summary_of_runs(folder, tiny_data):
    test_all_four_one_after_another(folder, tiny_data) if not (folder / "results").exists() else None
    runs = [folder / "results" / f"{name}_run_0" for name in SCRIPTS.values()]
    done = subprocess.run([sys.executable, ROOT / "scripts" / "summary.py", *runs], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == [path.name for path in runs]
    assert "95.8%" in lines[2]
    assert lines[2].split()[-1] == "0.000"


def test_a_short_soak(tiny_data):
    """Runs killed at random moments end as undisturbed ones do; scripts/soak.py does this at length."""
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--kills", "3", "--kinds", "lazy", "--seed", "7"]
    command += ["--dataset", "cifar10", "--data_dir", tiny_data, "--epochs", "15", "--batch-size", "10"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills" in done.stdout.splitlines()[-1]
    assert "0 differences" in done.stdout.splitlines()[-1]


def test_the_sample_is_what_its_maker_makes(tmp_path):
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.exists():
        pytest.skip("the four files of Fashion-MNIST are not here (Debian: dataset-fashion-mnist)")
    (tmp_path / "scripts").mkdir()
    maker = tmp_path / "scripts" / "make_sample.py"
    maker.write_text((ROOT / "scripts" / "make_sample.py").read_text())
    subprocess.run([sys.executable, maker, source], check=True, capture_output=True)
    with (
        np.load(tmp_path / "sample" / "fashion-mnist-7000.npz") as made,
        np.load(ROOT / "sample" / "fashion-mnist-7000.npz") as kept,
    ):
        for name in kept.files:
            assert np.array_equal(made[name], kept[name])


def slurm(folder: Path, fake: str, task: int, **more: str) -> subprocess.Popen:
    (folder / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$*" >> {folder}/scontrol-calls\n')
    (folder / "scontrol").chmod(0o755)
    settings = environment(folder, folder, PYTHON=fake, SEEDS="3 5", PATH=f"{folder}:{os.environ['PATH']}")
    settings |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), **more}
    script = folder / "copied-by-slurm"
    script.write_text((ROOT / "scripts" / "slurm-seeds.sbatch").read_text())
    return subprocess.Popen(["bash", script], env=settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_slurm_task_is_one_method_and_seed(tmp_path):
    fake = fake_python(tmp_path, f'case "$1" in scripts/*) exec {sys.executable} "$@";; *) echo "$@";; esac')
    found = [slurm(tmp_path, fake, task, SCHEDULE="short", SLURM_GPUS_ON_NODE="2").communicate()[0] for task in range(6)]
    names = ["bc_run_3", "bc_run_5", "pq_binary_run_3", "pq_binary_run_5", "pq_ternary_run_3", "pq_ternary_run_5"]
    for line, name in zip(found, names, strict=True):
        assert f"--save resnet8_{name} " in line
        assert f"--seed {name[-1]} " in line
        assert "--gpus 0,1 " in line
        assert "resnet8_run_3 " in line  # the warm start: there is no seed 0
    assert "--epochs 12 " in found[0]
    assert "--epochs 300 " in slurm(tmp_path, fake, 1).communicate()[0]
    beyond = slurm(tmp_path, fake, 6)
    assert "tasks 0 to 5" in beyond.communicate()[1]
    assert beyond.returncode == 2


@pytest.mark.parametrize(("number", "status", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)])
def test_a_slurm_task_saves_and_is_requeued(tmp_path, number, status, requeued):
    wait = f"trap 'sleep 0.2; exit 138' USR1; trap 'exit 143' TERM; touch {tmp_path}/started; while :; do sleep 0.05; done"
    fake = fake_python(tmp_path, f'case "$1" in scripts/*) exec {sys.executable} "$@";; *) {wait};; esac')
    process = slurm(tmp_path, fake, 0)
    began = time.monotonic()
    while not (tmp_path / "started").exists():
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    calls = tmp_path / "scontrol-calls"
    assert (calls.read_text() == "requeue 77\n") if requeued else not calls.exists()


@pytest.mark.parametrize(
    ("method", "regime"),
    [*itertools.product(("bc", "pq_binary", "pq_ternary"), ("published", "common")), ("pq_binary", "tuned")],
)
@pytest.mark.parametrize("shorter", [1, 10, 25, 60])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_shorter_study_pulls_as_the_published_one(method, regime, shorter, batch_size):
    """The summed strength, counted step by step from the command line's own arguments."""

    def pull(found: dict[str, str]) -> float:
        regime, rate, total = ast.literal_eval(found.get("--regime", "{}")), float(found["--lr"]), 0.0
        for epoch in range(int(found["--freeze_epoch"])):
            rate = regime.get(epoch, {}).get("lr", rate)
            total += -(-50_000 // int(found["--batch-size"])) * rate * float(found["--reg_rate"]) * epoch
        return total

    command = [sys.executable, ROOT / "scripts" / "study.py", "arguments", method, regime, str(shorter)]
    command += [] if batch_size is None else [str(batch_size)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    found = dict(zip(lines[::2], lines[1::2], strict=True))
    epochs = 600 if (method, regime) == ("pq_ternary", "published") else 300
    assert int(found["--epochs"]) == pytest.approx(epochs / shorter, abs=1)
    assert int(found["--freeze_epoch"]) == pytest.approx(int(found["--epochs"]) * 2 / 3, abs=1)
    assert int(found["--batch-size"]) == (batch_size or (256 if (method, regime) == ("pq_ternary", "published") else 128))
    if method == "bc":
        assert "--reg_rate" not in found
    else:
        expected = 0.01 * 1e-4 * (391 * 200 * 199 / 2 if method == "pq_binary" else 196 * 400 * 399 / 2)
        assert pull(found) == pytest.approx(expected / 16 if regime == "tuned" else expected, rel=1e-3)


def test_the_whole_study(tmp_path, tiny_data):
    """All methods under both regimes from one command; given again it finds everything complete."""
    settings = environment(tmp_path, tiny_data, SCHEDULE="short", SHORTER="100", DEPTHS="8", RUNS_PER_GPU="2")
    settings["METHODS"] = "fp bc pq_binary pq_ternary"
    done = run("reproduce.sh", env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["resnet8", *(f"resnet8_{m}{r}" for r in ("", "_common") for m in ("bc", "pq_binary", "pq_ternary"))]
    said = [line for line in done.stdout.splitlines() if "all seeds done" in line]
    assert said == [f"{name}: all seeds done: 0 1" for name in names]
    assert "an epoch (measured now, alone)" in done.stdout
    assert [line.split(":")[0].strip() for line in done.stdout.splitlines() if "epochs left" in line] == names
    assert "hours with 2 runs at a time" in done.stdout
    again = run("reproduce.sh", env=settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("complete") == 14
    assert "about 0.0 hours" in again.stdout


def test_nothing_starts_from_a_network_that_is_half_trained(tmp_path):
    measured = tmp_path / "results" / "resnet8_run_9"
    measured.mkdir(parents=True)
    (measured / "results.csv").write_text("epoch,seconds\n1,36\n")
    main = 'echo "$*" >> "$TB_DIR.calls"; case "$*" in *resnet8_run_1*) echo killed; exit 137;; esac; echo trained'
    fake = fake_python(tmp_path, f'case "$1" in scripts/*) exec {sys.executable} "$@";; *) {main};; esac')
    settings = {"PYTHON": fake, "SCHEDULE": "short", "DEPTHS": "8", "SEEDS": "1 2", "REGIMES": "common"}
    done = run("reproduce.sh", env=environment(tmp_path, tmp_path, **settings))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "about 0.9 hours" in done.stdout  # 2 seeds of 8 epochs, and 3 x 2 of 12, of 36 s each, one after another
    assert "seed 1: FAILED with status 137: killed" in done.stderr
    assert done.stderr.splitlines()[-1] == "FAILED: resnet8"
    calls = (tmp_path / "tb.calls").read_text()
    assert calls.count("--save") == 2
    assert "--resume" not in calls


@pytest.mark.parametrize(("slots", "length"), [(1, 12), (2, 6), (3, 5), (4, 5)])
def test_how_long_runs_take_side_by_side(slots, length):
    """Runs of 5, 2, 0, 4 and 1 epochs, each begun when a slot is free."""
    code = f"import sys; sys.path.insert(0, 'scripts'); import study; print(study.one_after_another([5, 2, 0, 4, 1], {slots}))"
    assert int(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True).stdout) == length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCHEDULE", "shrt"),
        ("METHODS", "bc lazzy"),
        ("REGIMES", "comon"),
        ("REGIMES", "tuned"),
        ("SHORTER", "0"),
        ("BATCH_SIZE", "0"),
    ],
)
def test_a_study_that_cannot_be_is_refused_at_once(tmp_path, name, value):
    done = run("reproduce.sh", env=environment(tmp_path, tmp_path, **{"SCHEDULE": "short", name: value}))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr
    assert value.split()[-1] in done.stderr
