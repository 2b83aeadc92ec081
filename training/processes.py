"""Several processes that train one network together, one on each GPU (or on CPUs), started by torchrun.

Every process holds the whole network and makes the same steps: each computes the gradient of its share of the batch, the
gradients are averaged (DistributedDataParallel), and optimizer and projection then do the same everywhere. Only the first
process writes.
"""

import atexit
import contextlib
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sources.batches import EVERYTHING, Share
from utils import UsageError, stop_signals


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; by default the only one.

    Attributes:
        share: number of this process and count of all, over all machines.
        local: number of this process on its machine, and of its GPU.
    """

    share: Share = EVERYTHING
    local: int = 0

    @property
    def several(self) -> bool:
        """True where there are others."""
        return self.share.count > 1

    @property
    def first(self) -> bool:
        """True in the one process that writes."""
        return self.share.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.several:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all processes."""
        if not self.several:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)  # on the CPU, by gloo: no GPU is waited for
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def alike(self, *numbers: int) -> bool:
        """Whether each number is the same in all processes."""
        largest = self.largest(*numbers, *(-number for number in numbers))
        return largest[: len(numbers)] == [-number for number in largest[len(numbers) :]]

    def wait(self) -> None:
        """Returns when all processes have called it."""
        self.largest(0)

    @contextlib.contextmanager
    def first_one_first(self) -> Iterator[None]:
        """A context that the first process goes through before the others enter it."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def averaging(self, network: nn.Module) -> nn.Module:
        """The network with gradients that are averaged over all processes.

        Weights are not aligned here. To be made anew for each epoch: after a freeze other gradients are averaged, and a run that is
        continued at an epoch's start then sums in the order of the undisturbed one.
        """
        if not self.several:
            return network
        gc.collect()  # the one before, which refers to itself, holds a copy of all gradients
        return nn.parallel.DistributedDataParallel(network, init_sync=False)

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's values, in place."""
        if self.several:
            for tensor in tensors:
                dist.broadcast(tensor, 0)


ALONE = Processes()


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with BatchNorm statistics over the whole batch; no more than a change of name where a process is alone.

    Raises:
        UsageError: on a CPU, where torch has none.
    """
    if device.type != "cuda":
        raise UsageError(f"--sync_bn: torch has synchronized BatchNorm on GPUs only, and this run is on the {device.type}")
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def check_synchronized(samples: int, batch_size: int, processes: int) -> None:
    """Raises UsageError where a batch has fewer samples than processes: one without any would take one that counts twice.

    Without synchronized BatchNorm that sample has weight 0; in the statistics over the whole batch it could not be left out.
    """
    last = samples % batch_size or batch_size
    if last < processes:
        raise UsageError(
            f"--sync_bn: of {samples} samples in batches of {batch_size} the last batch has {last}, fewer than the {processes} "
            "processes; another --batch-size, of which more are left, is needed"
        )


def lost_another(error: RuntimeError) -> bool:
    """Whether an error comes from talking to the other processes, most often because one of them is gone."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def started_by_torchrun() -> bool:
    """True in a process that torchrun started, also where it is the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


def here() -> Processes:
    """This process, from torchrun's environment."""
    if not started_by_torchrun():
        return ALONE
    return Processes(Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def joined(processes: Processes, device: torch.device) -> Iterator[None]:
    """A context in which the processes can talk to each other: NCCL between GPUs, gloo between CPUs."""
    if not processes.several:
        yield
        return
    # Before there is a group: it has functions with the group as a default, which would keep it, and its threads, to the end.
    import torch.distributed.nn.functional  # noqa: F401

    # A thread of gloo that lets a tensor go while Python ends aborts the process. They are joined with the group's last reference;
    # after an error that is one in the traceback, which lives as long as the caller handles it.
    atexit.register(gc.collect)
    store, rank, count = next(dist.rendezvous("env://"))
    # torchrun may keep its store when it restarts the processes; the addresses of those before must not be found in it.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    try:
        yield
    except BaseException:
        # NCCL would wait here for the others, who wait for this process. Its end is what tells them.
        if device.type != "cuda":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def launch(command: Sequence[str], count: int) -> int:
    """Runs a Python script in so many processes on this machine, and passes signals on to them.

    Args:
        command: the script and its arguments.
        count: of processes.

    Returns:
        The exit status: 128 + n after signal n, else torchrun's (1 if a process failed).
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *command]
    # How long torchrun waits for the processes to save before it kills them: longer than any step should be.
    defaults = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}
    signals = stop_signals()
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGTERM)  # torchrun passes this one on to the processes

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is a process to pass them on to
    # A session of its own: Ctrl-C reaches the processes once, by the way above.
    process = subprocess.Popen(
        torchrun,
        env={**defaults, **os.environ},
        start_new_session=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals),
    )
    for number in signals:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    status = process.wait()
    return 128 + received[0] if received else abs(status)
