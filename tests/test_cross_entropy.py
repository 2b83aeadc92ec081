"""The loss over many classes: in pieces it is what its definition says, and so is its gradient."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from training import cross_entropy as module
from training.cross_entropy import cross_entropy

NONE = -100


def example(rows: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in float64 up to some tens, and targets of which about a quarter do not count, but never all."""
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[1:][torch.rand(rows - 1, generator=generator) < 0.25] = NONE
    return logits, targets


def expected(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient from the softmax in float64, a row after the other."""
    loss, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(logits, dtype=torch.float64)
    counted = [row for row in range(len(logits)) if targets[row] != NONE]
    for row in counted:
        share = torch.softmax(logits[row].double(), 0)
        loss -= share[targets[row]].log() / len(counted)
        gradient[row] = share / len(counted)
        gradient[row, targets[row]] -= 1 / len(counted)
    return loss, gradient


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 40), st.integers(0, 10**6))
def test_loss_and_gradient_by_definition(rows, classes, piece, seed):
    logits, targets = example(rows, classes, seed)
    loss, gradient = expected(logits, targets)
    logits.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        found = cross_entropy(logits, targets, NONE)
        (3 * found).backward()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits.grad, 3 * gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_digits_are_computed_with_in_float32(dtype):
    logits, targets = example(64, 5000, 0)
    logits = logits.to(dtype)
    loss, gradient = expected(logits, targets)
    logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = cross_entropy(logits, targets, NONE)
    found.backward()
    assert (found.dtype, logits.grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(found.detach().double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_the_logits_are_left_as_they_are():
    logits, targets = example(8, 9, 1)
    before = logits.clone()
    cross_entropy(logits.requires_grad_(), targets, NONE).backward()
    assert torch.equal(logits, before)


def test_what_is_not_finite_is_so_in_the_loss():
    logits, targets = example(4, 3, 2)
    for value in (torch.nan, torch.inf):
        broken = logits.clone()
        broken[0, (targets[0] + 1) % 3] = value
        assert not cross_entropy(broken, targets, NONE).isfinite()
    assert cross_entropy(logits, torch.full_like(targets, NONE), NONE).isnan()


def test_as_torch_counts():
    logits, targets = example(50, 7, 3)
    torch.testing.assert_close(cross_entropy(logits, targets, NONE), F.cross_entropy(logits, targets, ignore_index=NONE))
