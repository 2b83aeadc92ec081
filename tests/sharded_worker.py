"""One of several processes under torchrun, for test_sharded.py: sharded training beside the same training in one piece. Not a test.

    torchrun ... sharded_worker.py FOLDER save    every mode and quantizer, and a checkpoint of each by torch.distributed.checkpoint
    torchrun ... sharded_worker.py FOLDER load    every mode, and training on from those checkpoints
    torchrun ... sharded_worker.py FOLDER mesh    four processes, FSDP2 and tensor parallelism at once

Raises in words where something differs; prints the modes.
"""

import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parent.parent))

import quantize

STEPS = 20
SAMPLES = 12  # a batch, shared among 1, 2 or 3 processes
ACROSS = "2.weight"  # is cut across its rows


def modes(every_quantizer: bool) -> Iterator[quantize.ProjectionMode]:
    """Every mode that a sharded tensor can have, by tensor and by row."""
    yield from (mode for name, mode in quantize.MODES.items() if mode.drawn is None and name != "prox_median")
    yield quantize.mode("prox_alt", bits=2, by_row=True)
    yield quantize.mode("lazy_alt", bits=2, by_row=True)
    if every_quantizer:
        yield quantize.mode("prox_alt", bits=3)
        yield quantize.mode("prox_alt", "uniform", bits=2)
        yield quantize.mode("lazy_alt", "uniform_with_zero", bits=2, by_row=True)
        yield quantize.mode("lazy_alt", "greedy_mean", bits=2)
        yield quantize.mode("parq", "ternary")


def network() -> nn.Sequential:
    """Odd numbers of rows, so that shards differ in size, and one row alone, so that some are empty."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 4), nn.Flatten(), nn.Linear(12, 7), nn.Linear(7, 1), nn.Linear(1, 4))
    return nn.Sequential(*layers).double()


def placement(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.shape == (7, 12) else None  # ACROSS


class Training:
    """A network with its optimizer, sharded or whole."""

    def __init__(self, mode: quantize.ProjectionMode, sharded: bool) -> None:
        self.model = network()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
        if sharded:
            fully_shard(self.model, shard_placement_fn=placement)
        pairs = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.dim() > 1]
        self.mode = mode
        self.optimizer = quantize.ProjectedOptimizer(torch.optim.Adam(self.model.parameters(), lr=0.01), pairs, mode)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            strength = self.mode.strength(0.5, step // 5, share=step / STEPS)
            self.optimizer.set_strength(strength)
            drawn = torch.Generator().manual_seed(step)
            inputs = torch.randn(SAMPLES, 1, 5, 5, dtype=torch.float64, generator=drawn)
            labels = torch.randint(4, (SAMPLES,), generator=drawn)
            self.optimizer.zero_grad()
            mine = slice(self.rank * SAMPLES // self.count, (self.rank + 1) * SAMPLES // self.count)
            cross_entropy(self.model(inputs[mine]), labels[mine]).backward()
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        found = {**dict(self.model.named_parameters())}
        found |= {f"latent {name}": weight for name, weight in self.optimizer.latent.items()}
        found |= {f"quantized {name}": weight for name, weight in self.optimizer.quantized().items()}
        found |= {f"levels {name}": levels for name, levels in self.optimizer.levels.items()}
        return {name: whole(weight.detach()) for name, weight in found.items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def assert_equal(sharded: Training, alone: Training, when: str) -> None:
    mine, theirs = sharded.weights(), alone.weights()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        difference = (weight - theirs[name]).abs().max().item()
        assert difference < 1e-9, f"{sharded.mode.name} {sharded.mode.quantizer.in_words} {when}: {name} differs by {difference}"


def saved(training: Training, place: Path) -> None:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=str(place))


def loaded(mode: quantize.ProjectionMode, place: Path) -> Training:
    training = Training(mode, True)
    model, optimizer = get_state_dict(training.model, training.optimizer)
    content = {"model": model, "optimizer": optimizer}
    dcp.load(content, checkpoint_id=str(place))
    set_state_dict(training.model, training.optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    return training


def train_beside(mode: quantize.ProjectionMode, task: str, place: Path) -> None:
    sharded, alone = Training(mode, True), Training(mode, False)
    sharded.train(0, STEPS)
    alone.train(0, STEPS)
    assert_equal(sharded, alone, "trained")
    if task == "save":
        saved(sharded, place)
    else:
        sharded = loaded(mode, place)
        assert_equal(sharded, alone, "loaded")
    sharded.train(STEPS, STEPS + 3)
    alone.train(STEPS, STEPS + 3)
    assert_equal(sharded, alone, "trained on")
    before = sharded.weights()
    with sharded.optimizer.hard_quantized(), alone.optimizer.hard_quantized():
        assert_equal(sharded, alone, "quantized for a while")
    assert all(torch.equal(weight, before[name]) for name, weight in sharded.weights().items())
    for training in (sharded, alone):
        training.optimizer.freeze()
        training.train(STEPS + 3, STEPS + 5)
    assert_equal(sharded, alone, "frozen")


def check_drawn_signs() -> None:
    """Each process draws its own, and the finished network is that of any other way to train it."""
    training = Training(quantize.mode("stoch_bin"), True)
    training.train(0, 1)
    with torch.no_grad():
        for _, weight in training.model.named_parameters():
            weight.mul_(0)
    training.optimizer.set_strength(0.0)
    signs = whole(training.model[0].weight.detach()).chunk(dist.get_world_size())
    assert all(part.abs().eq(1).all() for part in signs)
    assert not torch.equal(signs[0][0], signs[1][0])


def check_writes_in_one_process() -> None:
    """Weights that one process alone writes, past torch's count, become latent ones, and nobody waits for ever."""
    training = Training(quantize.mode("lazy_alt"), True)
    if dist.get_rank() == 1:
        training.model[0].weight.data.to_local().fill_(0.5)
    training.train(0, 1)
    latent = whole(training.optimizer.latent["0.weight"])
    assert ((latent - 0.5).abs() < 0.02).flatten(1).all(1).sum() == len(latent.chunk(dist.get_world_size())[1])


def check_what_is_taken_out(folder: Path) -> None:
    """Metrics, and the network as a file, are those of the whole."""
    sharded, alone = Training(quantize.mode("prox_alt", bits=3), True), Training(quantize.mode("prox_alt", bits=3), False)
    start = [{name: weight.detach().clone() for name, weight in one.optimizer.latent.items()} for one in (sharded, alone)]
    for frozen in (False, True):
        found, expected = (quantize.measure(one.optimizer.latent, one.optimizer.quantized(), before)
                           for one, before in zip((sharded, alone), start, strict=True))  # fmt: skip
        assert found.keys() == expected.keys()
        for metric, row in found.items():
            assert row == pytest.approx(expected[metric]), metric
        path = folder / "sharded.safetensors"
        quantize.save_packed(path, sharded.model, sharded.optimizer)
        dist.barrier()
        packed, finished = quantize.load_packed(path), alone.optimizer.quantized()
        for name, value in alone.model.state_dict().items():
            assert (packed[name] - finished.get(name, value)).abs().max() < 1e-12, name
        dist.barrier()
        for one in (sharded, alone) if not frozen else ():
            one.train(0, 2)
            one.optimizer.freeze()


def check_a_mesh() -> None:
    """Four processes, where FSDP2 shards what tensor parallelism has: the levels are those of whole tensors and whole rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    both_ways = [Shard(0), Shard(1)]
    for mode in (quantize.mode("prox_ternary"), quantize.mode("prox_alt", bits=2), quantize.mode("prox_alt", bits=2, by_row=True)):
        found = []
        for sharded in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12), nn.Linear(12, 4)).double()
            if sharded:
                model[3].weight = nn.Parameter(distribute_tensor(model[3].weight.detach(), mesh, both_ways))
                parallelize_module(model, mesh["tensor"], {"1": ColwiseParallel(), "2": RowwiseParallel()})
                for layer in (model[1], model[2]):
                    fully_shard(layer, mesh=mesh["data"])
                assert type(model[1].weight.placements[0]) is not Shard, "no strided shard, which this is about"
            pairs = [(name, weight) for name, weight in model.named_parameters() if name in ("1.weight", "2.weight", "3.weight")]
            optimizer = quantize.ProjectedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), pairs, mode)
            optimizer.set_strength(0.5)
            for _, weight in pairs:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            found.append([whole(weight.detach()) for _, weight in pairs])
            optimizer.freeze()
            found[-1] += [whole(weight.detach()) for _, weight in pairs]
        for here, alone in zip(*found, strict=True):
            assert (here - alone).abs().max() < 1e-9, f"{mode.name} {mode.quantizer.in_words}"


def check_refusals() -> None:
    for by_row, name in ((False, "0.weight"), (True, ACROSS)):
        with pytest.raises(ValueError, match=f"{name}.*median of a tensor whose parts"):
            Training(quantize.mode("prox_alt", "greedy_median", by_row=by_row), True)
    training = Training(quantize.mode("prox_alt"), True)
    if dist.get_rank() == 1:
        training.model[0].weight.data.to_local().view(-1)[0] = torch.nan
    with pytest.raises(quantize.NotFinite, match=r"0\.weight"):  # in all processes
        training.optimizer.freeze()


def main() -> None:
    folder, task = Path(sys.argv[1]), sys.argv[2]
    faulthandler.enable()
    dist.init_process_group("gloo")
    if task == "mesh":
        check_a_mesh()
    else:
        for number, mode in enumerate(modes(every_quantizer=task == "save")):
            train_beside(mode, task, folder / str(number))
            sys.stdout.write(f"{mode.name} {mode.quantizer.in_words}\n")
        check_drawn_signs()
        check_writes_in_one_process()
        check_what_is_taken_out(folder)
        check_refusals()
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo's that still runs while Python ends aborts the process now and then


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # as at the end of main: a failure must not look like a crash
