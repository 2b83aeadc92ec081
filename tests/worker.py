"""One of several processes under torchrun, for test_distributed.py. Not a test itself.

    torchrun ... worker.py OUT gradients                  the gradients of one step in float64, to OUT/gradients-RANK.pt
    torchrun ... worker.py OUT train ARGUMENTS...         the script, with each epoch's weights to OUT/weights-RANK-EPOCH.pt
    torchrun ... worker.py OUT apart ARGUMENTS...         the same, each process in the folder OUT/RANK

With FAULT="RANK STEP" in the environment, that process kills itself once, after so many steps. The names of the threads that are
left at the end are in OUT/threads-RANK.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import main_binary_reg
import models
import quantize
import utils
from sources import batches
from sources.images import Split
from training import computing, epoch, loops
from training.processes import Processes, here, joined
from training.tasks import IMAGES

CPU = torch.device("cpu")


def gradients(processes: Processes) -> dict[str, torch.Tensor]:
    """Of one step on 7 images and one on a single image, which leaves a second process without any."""
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8), random.integers(0, 10, 8))
    torch.manual_seed(0)
    model = models.resnet("cifar10", 8).double().eval()  # BatchNorm with its running statistics: no sum over the batch
    mode = quantize.MODES["lazy"]
    optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), mode.select(model), mode)
    network, meter = processes.averaging(model), utils.Meter(CPU, processes.total)
    source, found = batches.TrainingBatches(split, 7, 0, CPU, share=processes.share), {}
    for step, (images, labels) in enumerate(source.epoch(0)):
        weight = processes.share.weight((7, 1)[step])
        precision = computing.Precision("fp32", "cpu")
        loops.train_step(IMAGES, network, optimizer, precision, meter, [], images.double(), labels, weight)
        found |= {f"{step} {name}": parameter.grad for name, parameter in model.named_parameters()}
        found |= {f"{step} {name} after": parameter.detach().clone() for name, parameter in model.named_parameters()}
    aligned = torch.full((3,), float(processes.share.rank), dtype=torch.float64)
    processes.align([aligned])
    found["aligned"] = aligned
    return found | {"meter": torch.tensor(list(meter.read().values()), dtype=torch.float64)}


def train(out: Path, rank: int, arguments: list[str]) -> int:
    finish_epoch, between_steps = epoch.finish_epoch, epoch.between_steps
    assign = quantize.quantizers.LearnedTernary.assign
    steps = 0

    def finish_and_note(job, state, row, board):
        held = {**state.model.state_dict(), **{f"latent {name}": weight for name, weight in state.optimizer.latent.items()}}
        torch.save(held, out / f"weights-{rank}-{state.epoch}.pt")
        finish_epoch(job, state, row, board)
        if rank:  # as on a machine that rounds otherwise; the next epoch begins with the first process's
            for weight in (*state.optimizer.latent.values(), *state.optimizer.levels.values()):
                weight.mul_(1.25)

    def step_or_die(job, state, progress):
        nonlocal steps
        steps += 1
        marker = out / "fault-has-happened"
        if os.environ.get("FAULT") == f"{rank} {steps}" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("WAIT") == f"{rank} {steps}":
            (out / "waits").touch()
            while not job.stop.number:
                time.sleep(0.01)
        between_steps(job, state, progress)

    if rank and "ROUNDS_OTHERWISE" in os.environ:
        quantize.quantizers.LearnedTernary.assign = lambda *given: assign(*given) * (1 + 2**-20)
    main_binary_reg.finish_epoch, epoch.between_steps = finish_and_note, step_or_die
    return main_binary_reg.main(arguments)


def note_threads(file: Path) -> None:
    """Writes the threads' names; the kernel may show one of gloo's for a moment after it was joined."""
    deadline = time.monotonic() + 60
    while "gloo" in (names := threads()) and time.monotonic() < deadline:
        time.sleep(0.01)
    file.write_text(names)


def threads() -> str:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # one that has just ended
            names.append((task / "comm").read_text().strip())
    return " ".join(names)


def main() -> int:
    out, task, *arguments = sys.argv[1:]
    processes = here()
    gc.disable()  # the program itself must let go of what keeps threads, not a collection that happens to come
    atexit.register(note_threads, Path(out).absolute() / f"threads-{processes.share.rank}")
    if task == "apart":
        os.chdir(Path(out) / str(processes.share.rank))
    if task in ("train", "apart"):
        return train(Path(out), processes.share.rank, arguments)
    with joined(processes, CPU):
        torch.save(gradients(processes), Path(out) / f"gradients-{processes.share.rank}.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
