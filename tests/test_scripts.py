"""The training scripts: seeds side by side, queues, failures, interrupts; and the sample's maker."""

import ast
import contextlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import forks
import numpy as np
import pytest
import soak
import study
import torch
from conftest import PATIENCE, ROOT, until
from soaking import jobs

import data
import quantize
from models import MODELS
from training import arguments, regimes

SCRIPTS = {
    "train-cifar10-fp.sh": "resnet8",
    "train-cifar10-pq-binary.sh": "resnet8_pq_binary_Adam",
    "train-cifar10-binaryconnect.sh": "resnet8_bc_Adam",
    "train-cifar10-pq-ternary.sh": "resnet8_pq_ternary_Adam",
}


WHOLE = {"EPOCHS": "", "FREEZE_EPOCH": ""}  # for the schedule's own


def environment(folder: Path, data: Path, **more: str) -> dict[str, str]:
    settings = {
        "PYTHON": forks.python(),
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
    return subprocess.run([ROOT / "scripts" / script], capture_output=True, text=True, timeout=PATIENCE, **options)


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


def fake_python(folder: Path, body: str, gpus: str = "0 1") -> str:
    """An interpreter in name: gets main_binary_reg.py's arguments, so that queues can be tested without training."""
    path = folder / "fake-python"
    asked = f'case "$1" in -c) echo "GPUs: {gpus}"; exit;; scripts/study.py) exec {sys.executable} "$@";; esac'
    path.write_text(f"#!/usr/bin/env bash\n{asked}\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_failing_seed_is_named(tmp_path):
    fake = fake_python(tmp_path, 'case "$*" in *"--seed 1 "*) echo broken; exit 3;; *) echo fine;; esac')
    done = run("train-cifar10-pq-binary.sh", env=environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0 1 2"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed 1: FAILED with status 3: broken" in done.stderr
    assert done.stderr.splitlines()[-1] == "resnet8_pq_binary_Adam: 1 of 3 seeds FAILED: 1"
    assert "seed 2: fine" in done.stdout


def test_a_seed_whose_output_cannot_be_written_is_named(tmp_path):
    (tmp_path / "results" / "resnet8_pq_binary_Adam_run_1.out").mkdir(parents=True)
    done = run("train-cifar10-pq-binary.sh", env=environment(tmp_path, tmp_path, PYTHON=fake_python(tmp_path, "echo fine")))
    assert done.returncode == 1
    assert "seed 1: FAILED with status 1: its output cannot be read" in done.stderr
    assert done.stderr.splitlines()[-1] == "resnet8_pq_binary_Adam: 1 of 2 seeds FAILED: 1"
    assert "seed 0: fine" in done.stdout


@pytest.mark.parametrize("script", ["train-cifar10-pq-binary.sh", "reproduce.sh"])
def test_no_seeds_are_no_success(tmp_path, script):
    done = run(script, env=environment(tmp_path, tmp_path, SCHEDULE="short", SEEDS=" "))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'error: SEEDS=" ": at least one seed is needed\n'
    assert list(tmp_path.iterdir()) == []


def test_a_search_path_of_cd_leads_nowhere_else(tmp_path):
    (tmp_path / "scripts").mkdir()
    fake = fake_python(tmp_path, "pwd")
    settings = environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0", CDPATH=str(tmp_path))
    done = subprocess.run(
        ["scripts/train-cifar10.sh", "fp"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=settings
    )
    assert done.returncode == 0, done.stderr
    assert f"seed 0: {ROOT}" in done.stdout


@pytest.mark.parametrize(("gpus", "per_gpu", "at_once"), [("", "1", 1), ("0 1", "1", 2), ("0 1", "2", 4)])
def test_more_seeds_than_places_queue_up(tmp_path, gpus, per_gpu, at_once):
    """Each run waits until as many have begun as may run at once, and the log says how many there ever were."""
    log = tmp_path / "log"
    wait = f'until [ "$(grep -c began {log})" -ge {at_once} ]; do sleep 0.02; done'
    fake = fake_python(tmp_path, f'echo "began $*" >> {log}; {wait}; echo ended >> {log}')
    settings = environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0 1 2 3 4", GPUS=gpus, RUNS_PER_GPU=per_gpu)
    assert run("train-cifar10-fp.sh", env=settings).returncode == 0
    lines = log.read_text().splitlines()
    running = list(itertools.accumulate(1 if line.startswith("began") else -1 for line in lines))
    assert max(running) == at_once
    assert (len(lines), running[-1]) == (10, 0)
    used = {line.split("--gpu ")[1].split()[0] for line in lines if "--gpu " in line}
    assert used == set(gpus.split())


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({"RUNS_PER_GPU": "2"}, "3"),
        ({"RUNS_PER_GPU": "9"}, "1"),
        ({"RUNS_PER_GPU": "9", "SEEDS": "0 1 2"}, "2"),
        ({"GPUS": "0 1", "RUNS_PER_GPU": "2"}, "1"),
        ({"RUNS_PER_GPU": "2", "OMP_NUM_THREADS": "5"}, "5"),
        ({}, "as many as there are"),
    ],
)
def test_each_of_several_runs_has_its_share_of_the_cores(tmp_path, settings, threads):
    (tmp_path / "nproc").write_text("#!/bin/sh\necho 6\n")
    (tmp_path / "nproc").chmod(0o755)
    fake = fake_python(tmp_path, 'echo "${OMP_NUM_THREADS-as many as there are}"')
    given = {"SEEDS": "0 1 2 3 4 5", "PATH": f"{tmp_path}:{os.environ['PATH']}", **settings}
    there = environment(tmp_path, tmp_path, PYTHON=fake, **given)
    if "OMP_NUM_THREADS" not in settings:
        del there["OMP_NUM_THREADS"]
    done = run("train-cifar10-fp.sh", env=there)
    assert done.returncode == 0, done.stderr
    assert {line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("seed ")} == {threads}


def test_gpus_that_are_not_here(tmp_path):
    settings = environment(tmp_path, tmp_path, SEEDS="0", GPUS="7")
    done = run("train-cifar10-fp.sh", env={**settings, "PYTHON": fake_python(tmp_path, 'echo "$*"', gpus="")})
    assert done.returncode == 0, done.stderr
    assert "GPUS=7: there is no GPU here, so the CPU is used" in done.stderr
    assert "seeds 0 on the CPU" in done.stdout
    assert "--gpu" not in done.stdout
    done = run("train-cifar10-fp.sh", env={**settings, "PYTHON": fake_python(tmp_path, 'echo "$*"', gpus="0 1")})
    assert (done.returncode, done.stderr) == (2, "error: GPUS=7: there is no GPU 7 here, only 0 1\n")
    assert "--save" not in done.stdout


@pytest.mark.parametrize("script", ["train-cifar10-fp.sh", "reproduce.sh", "quickstart.sh", "test.sh"])
def test_a_python_that_cannot_run_gives_its_reason(tmp_path, script):
    (tmp_path / "file").write_text("no program")
    for python, reason in (("missing", "No such file or directory"), ("file", "Permission denied")):
        done = run(script, env=environment(tmp_path, tmp_path, PYTHON=str(tmp_path / python)))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"error: PYTHON={tmp_path / python} cannot be run: {reason}\n"


def test_relative_places_are_those_of_the_callers_folder(tmp_path):
    fake_python(tmp_path, 'printf "<%s>" "$@"')
    places = {"RESULTS_DIR": "a b", "TB_DIR": "tb", "DATA_DIR": "../data", "RESUME": "start", "PYTHON": "./fake-python"}
    done = run("train-cifar10-pq-binary.sh", env=environment(tmp_path, tmp_path, **{**places, "SEEDS": "0"}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a b" / "resnet8_pq_binary_Adam_run_0.out").exists()
    for flag, place in (("results_dir", "a b"), ("data_dir", "../data"), ("resume", "start")):
        assert f"<--{flag}><{tmp_path}/{place}>" in done.stdout
    assert f"<--tb_dir><{tmp_path}/tb/resnet8_pq_binary_Adam_run_0>" in done.stdout
    places |= {"RESULTS_DIR": f"{tmp_path}/whole", "PYTHON": f"{tmp_path}/fake-python", "SEEDS": "0"}
    done = run("train-cifar10-pq-binary.sh", env=environment(tmp_path, tmp_path, **places), cwd=ROOT)
    assert "<--tb_dir><tb/resnet8_pq_binary_Adam_run_0>" in done.stdout  # as it was given, where it is the same


def test_two_scripts_at_once_make_one_environment(tmp_path):
    """The second one is started while the first one installs; it waits, and finds everything there."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "environment.sh", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("something\n")
    os.mkfifo(tmp_path / "go")
    maker = tmp_path / "bin" / "python3"
    maker.parent.mkdir()
    made = "mkdir -p .venv/bin; printf '#!/bin/sh\n' > .venv/bin/python; chmod +x .venv/bin/python"
    maker.write_text(f"#!/usr/bin/env bash\necho made >> log; {made}; read -r _ < go\n")
    maker.chmod(0o755)
    there = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    there["PATH"] = f"{maker.parent}:{there['PATH']}"
    script = "set -e; . scripts/environment.sh; make_environment requirements.txt; echo done with $PYTHON"
    started = []
    try:
        for expected in ("Installing requirements.txt", "Waiting for another script"):
            own = {"cwd": tmp_path, "env": there, "start_new_session": True}
            process = subprocess.Popen(["bash", "-c", script], stdout=subprocess.PIPE, text=True, **own)
            started.append(process)
            assert process.stdout.readline().startswith(expected)
        with open(tmp_path / "go", "w") as go:
            go.write("on\n")
        for process in started:
            assert process.communicate()[0] == f"done with {tmp_path}/.venv/bin/python\n"
            assert process.returncode == 0
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and what it started too
                os.killpg(process.pid, signal.SIGKILL)
    assert (tmp_path / "log").read_text() == "made\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children(tmp_path, number):
    body = f"trap 'echo stopped >> {tmp_path}/stopped; exit 143' TERM; echo $$ >> {tmp_path}/started; while :; do sleep 0.05; done"
    settings = environment(tmp_path, tmp_path, PYTHON=fake_python(tmp_path, body), GPUS="0 1")
    # A shell in the background starts its children with SIGINT ignored, and a script cannot trap what was ignored at its start.
    script, silent = ROOT / "scripts" / "train-cifar10-fp.sh", {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([script], env=settings, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **silent)
    started = tmp_path / "started"
    until(lambda: started.exists() and len(started.read_text().split()) == 2, process)
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == -number
    assert (tmp_path / "stopped").read_text().split() == ["stopped"] * 2
    for child in map(int, (tmp_path / "started").read_text().split()):
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_the_check_of_a_gpu_goes_on_after_what_takes_too_long(tiny_data, tmp_path):
    """Here without a GPU, with what is quick."""
    command = [ROOT / "scripts" / "gpu_check.sh", "--out", tmp_path, "--parts", "bench,capture,repeat", "--limits", "bench=1"]
    command += ["--dataset", "cifar10", "--data_dir", tiny_data]
    settings = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=settings)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU here")
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    ended = {name: row["ended"] for name, row in found["parts"].items()}
    assert ended == {"bench": "over 1 s", "capture": "left out: needs a GPU", "repeat": "passed"}
    assert found["machine"]["gpus"] == []
    assert all(words in done.stdout for words in ended.values())
    summary = (tmp_path / "gpu_check.json").read_text()
    (tmp_path / "epoch").mkdir()  # what an earlier call has left is none of this one's
    (tmp_path / "epoch" / "results.csv").write_text("epoch,seconds\n1,0.001\n")
    command[command.index("--parts") + 1 : command.index("--parts") + 4] = ["epoch", "--limits", "epoch=0"]
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE, env=settings).returncode == 1
    again = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert {name: again[name] for name in found["parts"]} == json.loads(summary)["parts"]
    assert (again["epoch"]["ended"], again["epoch"]["figures"]) == ("over 0 s", None)
    one, other = tmp_path / "repeat-1", tmp_path / "repeat-2"
    content = torch.load(other / "checkpoint.pth.tar", weights_only=True)
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, other / "checkpoint.pth.tar")
    again = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--compare", one, other]
    assert subprocess.run(again, capture_output=True, timeout=PATIENCE).returncode == 1


def test_what_checks_a_gpu_ends_with_what_it_started(tiny_data, tmp_path):
    """The device's own limit sends SIGTERM; a part that ran on would slow down whatever is measured next."""
    command = [sys.executable, ROOT / "scripts" / "gpu_check.py", "--out", tmp_path, "--parts", "epoch"]
    command += ["--dataset", "cifar10", "--data_dir", tiny_data]
    process = subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.DEVNULL)
    until((tmp_path / "epoch.out").exists, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: children.read_text().strip(), process)
    child = int(children.read_text().split()[0])
    process.terminate()
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("gpu_check.py", ("--limits", "bench"), "--limits bench="),
        ("gpu_check.py", ("--limits", "bench:9"), "there is no part bench:9"),
        ("soak.py", ("--each", "0"), "--each 0"),
        ("soak.py", ("--folder", ROOT / "docs"), "--folder"),
        ("soak.py", ("--folder", ROOT / "README.md"), "--folder"),
        ("gpu_check.py", ("--out", ROOT / "README.md"), "--out"),
        ("bench.py", ("--json", "nowhere/figures.json"), "--json nowhere/figures.json"),
        ("bench.py", ("--json", ROOT / "docs"), "--json"),
        ("bench.py", ("--device", "cuda"), "--device cuda"),
    ],
)
def test_wrong_flags_of_the_measuring_scripts(script, words, said):
    command = [sys.executable, ROOT / "scripts" / script, *words]
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=settings)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_soak_kills_nothing_that_has_ended_meanwhile(tmp_path):
    class Job:
        pids = (1,)
        ended = iter([None, 0, 0])

        def wait(self, seconds: float | None = None) -> int | None:
            return next(self.ended)

        def kill(self, which: int | None = None) -> None:
            pytest.fail("killed")

    soak.kill(Job(), "lazy", tmp_path, "inside a write", 1.0, 0.3, random.Random(0))


def test_the_soak_kills_the_workers_with_torchrun(tmp_path):
    """They have sessions of their own, and would train on in the folder that the next process needs."""
    script = tmp_path / "script.py"
    script.write_text("import os, pathlib, time\npathlib.Path(__file__).with_name(os.environ['RANK']).touch()\ntime.sleep(600)\n")
    job = jobs.Started(script, [], tmp_path / "out", count=2)
    until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), job._process)
    _, *workers = job.pids
    assert len(workers) == 2
    job.kill()
    assert job.wait() == -9
    deadline = time.monotonic() + PATIENCE
    while any(map(runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_short_soak():
    """Runs killed at random moments end as undisturbed ones do; scripts/soak.py does this at length."""
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--small", "--kills", "3", "--kinds", "lazy", "--seed", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "OMP_NUM_THREADS": "1"})
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


def make_text(tmp_path: Path, source: Path) -> dict[str, str]:
    (tmp_path / "scripts").mkdir()
    maker = tmp_path / "scripts" / "make_text_sample.py"
    maker.write_text((ROOT / "scripts" / "make_text_sample.py").read_text())
    subprocess.run([sys.executable, maker, source], check=True, capture_output=True)
    return {part: (tmp_path / "sample" / "pride-and-prejudice" / f"{part}.txt").read_text() for part in ("train", "valid", "test")}


def test_the_sample_text_is_what_its_maker_makes(tmp_path):
    source = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    if not source.exists():
        pytest.skip("Jane Austen's novels are not here (Debian: r-cran-janeaustenr)")
    for part, made in make_text(tmp_path, source).items():
        assert made == (ROOT / "sample" / "pride-and-prejudice" / f"{part}.txt").read_text()


def test_a_text_sample_of_another_book_of_that_form(tmp_path):
    book = ["PRIDE AND PREJUDICE", ""]
    for chapter in range(1, 62):
        book += ["", f"Chapter {chapter}", "", f"_Mr. Darcy_ said 'No'--{chapter} times!", "", f"Once{'x' * chapter} upon\u2019s"]
    strings = b"".join(b"\0\4\0\t" + len(line.encode()).to_bytes(4, "big") + line.encode() for line in book)
    content = b"X\n\0\0\0\3\0\4\2\1\0\3\5\0\0\0\0\5UTF-8" + b"\0\0\0\x10" + len(book).to_bytes(4, "big") + strings
    source = tmp_path / "Rdata.rdb"
    source.write_bytes(2 * (len(content).to_bytes(4, "big") + zlib.compress(content)))
    chapter = "mr darcy said no N times\n<unk> upon's\n"
    assert make_text(tmp_path, source) == {"train": 49 * chapter, "valid": 6 * chapter, "test": 6 * chapter}


@pytest.mark.parametrize(
    ("method", "bits", "name", "expected"),
    [
        ("fp", "2", "ptb_lstm", []),
        ("alt", "1", "ptb_lstm_alt_1bit", ["--projection_mode lazy "]),
        ("alt", "2", "ptb_lstm_alt_2bit", ["--projection_mode lazy_alt --bits 2 --by_row "]),
        ("pq", "1", "ptb_lstm_pq_1bit", ["--projection_mode prox ", "--reg_rate 1e-5 "]),
        ("pq", "3", "ptb_lstm_pq_3bit", ["--projection_mode prox_alt --bits 3 --by_row ", "--reg_rate 1e-5 "]),
    ],
)
def test_penn_treebank_scripts(tmp_path, method, bits, name, expected):
    settings = {"PYTHON": fake_python(tmp_path, 'echo "$@"'), "SEEDS": "3", "BITS": bits, "EPOCHS": "9", "FREEZE_EPOCH": ""}
    out = run(f"train-ptb-{method}.sh", env=environment(tmp_path, tmp_path, **settings)).stdout
    for words in ("--dataset ptb ", "--model lstm ", f"--save {name}_run_3 ", "--epochs 9 ", *expected):
        assert words in out
    assert (f"--resume {tmp_path}/results/ptb_lstm_run_3 " in out) == (method != "fp")  # there is no seed 0
    assert "--model_config" not in out


@pytest.mark.parametrize(
    ("method", "settings", "name", "expected"),
    [
        ("pq", {"MODE": "prox_ternary"}, "prox_ternary", "--projection_mode prox_ternary --reg_rate 1e-5"),
        ("alt", {"MODE": "prox_ternary"}, "prox_ternary", "--projection_mode prox_ternary --reg_rate 1e-5"),
        ("alt", {"MODE": "ttq"}, "ttq", "--projection_mode ttq"),
        ("pq", {"MODE": "stoch_bin"}, "stoch_bin", "--projection_mode stoch_bin"),
        ("pq", {"MODE": "prox"}, "prox", "--projection_mode prox --reg_rate 1e-5"),
        ("pq", {"MODE": "parq", "BITS": "3"}, "parq_3bit", "--projection_mode parq --bits 3 --by_row"),
        ("pq", {"MODE": "prox_median"}, "prox_median_2bit", "--projection_mode prox_median --bits 2 --by_row --reg_rate 1e-5"),
        ("pq", {"MODE": "prox_connect", "REG_RATE": "0.02", "BITS": "2"}, "prox_connect_2bit",
         "--projection_mode prox_connect --bits 2 --by_row --reg_rate 0.02"),
        ("alt", {"QUANTIZER": "uniform", "BITS": "3"}, "alt_uniform_3bit",
         "--projection_mode lazy_alt --quantizer uniform --bits 3 --by_row"),
        ("alt", {"QUANTIZER": "ternary"}, "alt_ternary", "--projection_mode lazy_alt --quantizer ternary"),
    ],
)  # fmt: skip
def test_penn_treebank_modes_get_the_flags_that_they_take(tmp_path, method, settings, name, expected):
    fake = fake_python(tmp_path, 'echo "$@"')
    there = environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0", BATCH_SIZE="10", **{**WHOLE, "EPOCHS": "9", **settings})
    done = run(f"train-ptb-{method}.sh", env=there)
    assert done.returncode == 0, done.stderr
    assert f"--save ptb_lstm_{name}_run_0 " in done.stdout
    words = done.stdout.split("--epochs 9 --batch-size 10 --resume ")[1].splitlines()[0].split()
    assert " ".join(words[1:-2]) == expected  # after the warm start's place and before EXTRA
    given = [word for word in words[1:-2] if word != "--by_row"]
    flags = dict(zip(given[::2], given[1::2], strict=True))
    bits = int(flags["--bits"]) if "--bits" in flags else None
    assert quantize.mode(flags["--projection_mode"], flags.get("--quantizer"), bits, "--by_row" in words)


@pytest.mark.parametrize(
    "settings",
    [
        {"SCHEDULE": "short"},
        {"SHORTER": "4"},
        {"REGIME": "common"},
        {"BY_ROW": "0"},
        {"MODE": "lazzy"},
        {"MODE": "prox", "BITS": "2"},
        {"QUANTIZER": "ternary", "BITS": "2"},
        {"QUANTIZER": "uniform", "MODE": "ttq"},
        {"MODE": "prox_connect", "REG_RATE": ""},
    ],
)
def test_penn_treebank_refuses_what_it_cannot_honour(tmp_path, settings):
    fake = fake_python(tmp_path, 'echo "$@"')
    done = run("train-ptb-pq.sh", env=environment(tmp_path, tmp_path, PYTHON=fake, SEEDS="0", **{**WHOLE, **settings}))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    name, value = list(settings.items())[-1]
    assert name.lower() in done.stderr.lower()
    assert value in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["fake-python"]


@pytest.mark.parametrize("script", [*SCRIPTS, *(f"train-ptb-{name}.sh" for name in ("fp", "alt", "pq")), "reproduce.sh"])
def test_arguments_are_refused_and_not_dropped(tmp_path, script):
    """The run's own flags are variables here: a run of 300 epochs that was to have 3 used to begin."""
    fake = fake_python(tmp_path, 'echo "$@"')
    settings = environment(tmp_path, tmp_path, PYTHON=fake, **WHOLE)
    done = subprocess.run([ROOT / "scripts" / script, "--epochs", "3"], capture_output=True, text=True, env=settings)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --epochs 3: ")
    assert "EPOCHS=300" in line
    assert [path.name for path in tmp_path.iterdir()] == ["fake-python"]


def slurm(folder: Path, fake: str, task: int, **more: str) -> subprocess.Popen:
    (folder / "scontrol").write_text(f'#!/usr/bin/env bash\necho "$*" >> {folder}/scontrol-calls\n')
    (folder / "scontrol").chmod(0o755)
    settings = environment(folder, folder, PYTHON=fake, SEEDS="3 5", PATH=f"{folder}:{os.environ['PATH']}")
    settings |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(ROOT), **more}
    script = folder / "copied-by-slurm"
    script.write_text((ROOT / "scripts" / "slurm-seeds.sbatch").read_text())
    return subprocess.Popen(["bash", script], env=settings, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_each_slurm_task_is_one_method_and_seed(tmp_path):
    fake = fake_python(tmp_path, 'echo "$@"')
    more = {"EPOCHS": "", "FREEZE_EPOCH": "", "SCHEDULE": "short", "SLURM_GPUS_ON_NODE": "2"}
    found = [slurm(tmp_path, fake, task, **more).communicate()[0] for task in range(6)]
    names = ["bc_Adam_run_3", "bc_Adam_run_5", "pq_binary_Adam_run_3", "pq_binary_Adam_run_5", "pq_ternary_Adam_run_3"]
    names.append("pq_ternary_Adam_run_5")
    for line, name in zip(found, names, strict=True):
        assert f"--save resnet8_{name} " in line
        assert f"--seed {name[-1]} " in line
        assert "--gpus 0,1 " in line
        assert "resnet8_run_3 " in line  # the warm start: there is no seed 0
    assert "--epochs 12 " in found[0]
    assert "--epochs 300 " in slurm(tmp_path, fake, 1, EPOCHS="", FREEZE_EPOCH="").communicate()[0]
    scaled = slurm(tmp_path, fake, 1, EPOCHS="30", FREEZE_EPOCH="").communicate()[0]
    assert "--epochs 30 " in scaled
    assert "--freeze_epoch 20 " in scaled
    beyond = slurm(tmp_path, fake, 6)
    assert "tasks 0 to 5" in beyond.communicate()[1]
    assert beyond.returncode == 2


@pytest.mark.parametrize(("number", "status", "requeued"), [(signal.SIGUSR1, 0, True), (signal.SIGTERM, 143, False)])
def test_a_slurm_task_saves_and_is_requeued(tmp_path, number, status, requeued):
    wait = f"trap 'sleep 0.2; exit 138' USR1; trap 'exit 143' TERM; touch {tmp_path}/started; while :; do sleep 0.05; done"
    process = slurm(tmp_path, fake_python(tmp_path, wait), 0)
    until((tmp_path / "started").exists, process)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == status
    calls = tmp_path / "scontrol-calls"
    assert (calls.read_text() == "requeue 77\n") if requeued else not calls.exists()


def study_arguments(method: str, regime: str, **settings: str) -> dict[str, str]:
    """Flags and values; the value of a switch is nothing."""
    words = study.arguments(method, regime, study.Wishes.of(settings))
    return {
        word: "" if following.startswith("--") else following
        for word, following in itertools.pairwise([*words, "--"])
        if word.startswith("--")
    }


def test_the_published_arguments_are_those_of_the_readme():
    """So that a run by hand and its script's are one and the same."""
    commands = re.findall(r"^    python main_binary_reg\.py (.*--epochs .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    by_mode = {"fp": "", "bc": "lazy", "pq_binary": "prox", "pq_ternary": "prox_ternary"}
    names = {"modes": quantize.MODES, "models": MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
    placed = {"save", "tb_dir", "resume", "model_config", "gpus", "seed", "typed"}
    for method, mode in by_mode.items():
        command = next(one for one in commands if (f"--projection_mode {mode} " in f"{one} ") or not mode)
        by_hand = vars(arguments.parse(shlex.split(command), **names)[0])
        given = [word for pair in study_arguments(method, "published").items() for word in pair if word]
        by_script = vars(arguments.parse(given, **names)[0])
        assert {name for name in by_hand if by_hand[name] != by_script[name]} <= placed, method


@pytest.mark.parametrize("epochs", [1, 2, 3, 30, 450])
@pytest.mark.parametrize("method", ["bc", "pq_binary", "pq_ternary", "ttq", "prox_alt"])
def test_the_freeze_goes_with_the_epochs(method, epochs):
    found = study_arguments(method, "published", EPOCHS=str(epochs))
    assert int(found["--epochs"]) == epochs
    assert 0 <= int(found["--freeze_epoch"]) < epochs
    assert int(found["--freeze_epoch"]) == pytest.approx(2 / 3 * epochs, abs=0.7)
    given = study_arguments(method, "published", EPOCHS=str(epochs), FREEZE_EPOCH="7", LR="0.5", REG_RATE="3")
    assert (given["--freeze_epoch"], given["--lr"]) == ("7", "0.5")
    assert given.get("--reg_rate") == ("3.0" if "--reg_rate" in found else None)


def test_every_mode_can_be_studied():
    names = {"modes": quantize.MODES, "models": MODELS, "datasets": data.DATASETS, "optimizers": regimes.OPTIMIZERS}
    modes = set()
    for method, regime in itertools.product(study.PUBLISHED, ("published", "common")):
        found = study_arguments(method, regime)
        parsed, warnings = arguments.parse([word for pair in found.items() for word in pair if word], **names)
        assert warnings == [], method
        modes.add(parsed.projection_mode)
    assert modes == {None, *quantize.MODES}


def test_a_quantizer_is_in_the_name_of_its_runs():
    command = [sys.executable, ROOT / "scripts" / "study.py", "name", "prox_alt", "common", "resnet20"]
    wished = {**os.environ, "BITS": "2", "BY_ROW": "1", "QUANTIZER": "uniform"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=wished)
    assert done.stdout == "resnet20_prox_alt_uniform_2bit_row_Adam_common\n"
    found = study_arguments("prox_alt", "common", BITS="2", BY_ROW="1", QUANTIZER="uniform")
    assert (found["--quantizer"], found["--bits"], found["--by_row"]) == ("uniform", "2", "")
    assert "--by_row" not in study_arguments("prox_alt", "common", BY_ROW="0")


@pytest.mark.parametrize("regime", study.REGIMES)
def test_the_warm_start_has_one_name_under_every_regime(regime):
    """Its schedule is one, and the others look for it under that name."""
    assert study.run_name("resnet20", "fp", regime, study.Wishes()) == "resnet20"
    assert study_arguments("fp", regime) == study_arguments("fp", "published")


@pytest.mark.parametrize(
    ("method", "regime"),
    [*itertools.product(("bc", "pq_binary", "pq_ternary"), ("published", "common")), ("pq_binary", "tuned")],
)
@pytest.mark.parametrize("shorter", [1, 10, 25, 60])
@pytest.mark.parametrize("batch_size", [None, 16])
def test_a_shorter_study_pulls_as_the_published_one(method, regime, shorter, batch_size):
    """The summed strength, counted step by step from the command line's own arguments."""

    def pull(found: dict[str, str]) -> float:
        published = {} if "--binary_regime" not in found else {0: {"lr": 0.01}, 81: {"lr": 0.001}, 122: {"lr": 0.0001}}
        regime, rate, total = ast.literal_eval(found.get("--regime", str(published))), float(found["--lr"]), 0.0
        for epoch in range(int(found["--freeze_epoch"])):
            rate = regime.get(epoch, {}).get("lr", rate)
            total += -(-50_000 // int(found["--batch-size"])) * rate * float(found["--reg_rate"]) * epoch
        return total

    found = study_arguments(method, regime, SHORTER=str(shorter), BATCH_SIZE="" if batch_size is None else str(batch_size))
    epochs = 600 if (method, regime) == ("pq_ternary", "published") else 300
    assert int(found["--epochs"]) == pytest.approx(epochs / shorter, abs=1)
    assert int(found["--freeze_epoch"]) == pytest.approx(int(found["--epochs"]) * 2 / 3, abs=1)
    assert int(found["--batch-size"]) == (batch_size or (256 if (method, regime) == ("pq_ternary", "published") else 128))
    if method == "bc":
        assert "--reg_rate" not in found
    else:
        expected = 0.01 * 1e-4 * (391 * 200 * 199 / 2 if method == "pq_binary" else 196 * 400 * 399 / 2)
        assert pull(found) == pytest.approx(expected / 16 if regime == "tuned" else expected, rel=1e-3)


@pytest.mark.parametrize(("method", "rate"), [("fp", 0.1), ("bc", 0.01), ("ttq", 0.1)])
def test_the_shortest_schedule_begins_at_the_published_rate(method, rate):
    found = study_arguments(method, "published", EPOCHS="1")
    regime = ast.literal_eval(found.get("--regime", "{}"))
    assert float(found.get("--lr", regime.get(0, {}).get("lr", "nan"))) == rate


@pytest.mark.parametrize("regime", ["published", "common"])
@pytest.mark.parametrize("settings", [{}, {"SHORTER": "25"}, {"BATCH_SIZE": "16"}, {"EPOCHS": "30"}, {"SHORTER": "10", "LR": "1"}])
def test_a_pull_that_does_not_add_up_reaches_the_sign_at_the_freeze(regime, settings):
    """ProxConnect's strength is the rate times the epoch, whatever learning rate and number of steps are."""
    found = study_arguments("prox_connect", regime, **settings)
    rate, freeze = float(found["--reg_rate"]), int(found["--freeze_epoch"])
    assert quantize.mode("prox_connect").strength(rate, freeze) == pytest.approx(1, rel=1e-3)
    assert study_arguments("prox_connect", regime)["--reg_rate"] == "0.005"


def test_which_pulls_add_up_is_what_their_modes_say():
    for method, chosen in study.PUBLISHED.items():
        if chosen.reg_rate is not None:
            assert chosen.adds_up == quantize.MODES[chosen.mode[1]].schedule.scaled_by_lr, method


def test_the_whole_study(tmp_path, tiny_data):
    """All methods under both regimes from one command; given again it finds everything complete."""
    settings = environment(tmp_path, tiny_data, SCHEDULE="short", SHORTER="100", DEPTHS="8", RUNS_PER_GPU="2", **WHOLE)
    settings["METHODS"] = "fp bc pq_binary pq_ternary"
    done = run("reproduce.sh", env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["resnet8", *(f"resnet8_{m}_Adam{r}" for r in ("", "_common") for m in ("bc", "pq_binary", "pq_ternary"))]
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
    main = f'case "$1" in scripts/report.py) exec {sys.executable} "$@";; esac; '
    main += 'echo "$*" >> "$TB_DIR.calls"; case "$*" in *resnet8_run_1*) echo killed; exit 137;; esac; echo trained'
    settings = {
        "PYTHON": fake_python(tmp_path, main),
        **WHOLE,
        "SCHEDULE": "short",
        "DEPTHS": "8",
        "SEEDS": "1 2",
        "REGIMES": "common",
    }
    done = run("reproduce.sh", env=environment(tmp_path, tmp_path, **settings))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "about 0.9 hours" in done.stdout  # 2 seeds of 8 epochs, and 3 x 2 of 12, of 36 s each, one after another
    assert "seed 1: FAILED with status 137: killed" in done.stderr
    assert done.stderr.splitlines()[-1] == "FAILED: resnet8"
    calls = (tmp_path / "tb.calls").read_text()
    assert calls.count("--save") == 2
    assert "--resume" not in calls


def test_the_studys_report_takes_what_else_is_named_like_a_run_for_what_it_is(tmp_path):
    """An exported network is none; a folder without anything that a run writes is one that died at once."""
    results = tmp_path / "results"
    (results / "resnet8_run_0").mkdir(parents=True)
    (results / "resnet8_run_0.safetensors").write_bytes(b"")
    (results / "resnet8_run_0_notes").mkdir()
    (results / "resnet8_run_9").mkdir()
    (results / "resnet8_run_9" / "results.csv").write_text("epoch,seconds\n1,36\n")
    main = f'case "$1" in scripts/report.py) exec {sys.executable} "$@";; esac; echo died'
    settings = environment(tmp_path, tmp_path, PYTHON=fake_python(tmp_path, main), DEPTHS="8", SEEDS="0", METHODS="bc", **WHOLE)
    done = run("reproduce.sh", env={**settings, "REGIMES": "published"})
    assert (done.returncode, done.stderr) == (0, "")
    listed = (results / "report" / "report.md").read_text().split("## Left out")[1].splitlines()
    found = {line.split(" | ")[0].removeprefix("| results/"): line.split(" | ")[3] for line in listed if "results/" in line}
    assert {name: reason.split(":")[0].removesuffix(" |") for name, reason in found.items()} == {
        "resnet8_run_0": "it ended before it began to train",
        "resnet8_bc_Adam_run_0": "it never began",
        "resnet8_run_9": "no args.json",
    }


@pytest.mark.parametrize(
    ("content", "epochs", "seconds"),
    [
        ("epoch,val_error1\n1,20\n2,19\n", 2, []),
        ("epoch,seconds,val_error1\n1,36,20\n2,38", 1, [36.0]),
        ("epoch,seconds\n1,36\n2,oops\n", 2, [36.0]),
        ("epoch,seconds\n1,36\n2", 1, [36.0]),
        (b"\xff\xfe", 0, []),
    ],
)
def test_a_plan_reads_what_is_whole_in_damaged_results(tmp_path, content, epochs, seconds):
    (tmp_path / "results.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert study.trained(tmp_path) == epochs
    assert study.measured_seconds(tmp_path) == seconds


@pytest.mark.parametrize(("schedule", "epochs"), [({}, "12"), ({"SCHEDULE": "short"}, "12"), ({"SCHEDULE": "published"}, None)])
def test_shorter_is_never_passed_over(tmp_path, schedule, epochs):
    """Given alone it used to train at the full length."""
    settings = {**WHOLE, "SHORTER": "25", "SEEDS": "0", "RESUME": str(tmp_path), **schedule}
    python = fake_python(tmp_path, 'echo "$*" >> "$TB_DIR.calls"')
    done = run("train-cifar10-binaryconnect.sh", env=environment(tmp_path, tmp_path, PYTHON=python, **settings))
    calls = tmp_path / "tb.calls"
    if epochs is None:
        assert (done.returncode, calls.exists()) == (2, False)
        assert "SHORTER=25" in done.stderr
    else:
        assert f"--epochs {epochs} " in calls.read_text()


@pytest.mark.parametrize(("slots", "length"), [(1, 12), (2, 6), (3, 5), (4, 5)])
def test_how_long_runs_take_side_by_side(slots, length):
    """Runs of 5, 2, 0, 4 and 1 epochs, each begun when a slot is free."""
    assert study.one_after_another([5, 2, 0, 4, 1], slots) == length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCHEDULE", "shrt"),
        ("METHODS", "bc lazzy"),
        ("REGIMES", "comon"),
        ("REGIMES", "tuned"),
        ("SHORTER", "0"),
        ("BATCH_SIZE", "0"),
        ("EPOCHS", "0"),
        ("FREEZE_EPOCH", "later"),
        ("BITS", "2"),
        ("BY_ROW", "yes"),
        ("RUNS_PER_GPU", "0"),
        ("RUNS_PER_GPU", "x"),
    ],
)
def test_a_study_that_cannot_be_is_refused_at_once(tmp_path, name, value):
    done = run("reproduce.sh", env=environment(tmp_path, tmp_path, **{"SCHEDULE": "short", **WHOLE, name: value}))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert name in done.stderr
    assert value.split()[-1] in done.stderr
    assert list(tmp_path.iterdir()) == []
