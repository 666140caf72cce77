"""The Boltzmann likelihood against open_clip and fp64 loops."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from m3i_fast.objectives.likelihood import boltzmann


def _pair(
    n: int, m: int, dim: int = 16, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n * 100 + m)
    rows = [torch.randn(k, dim, generator=rng, dtype=dtype) for k in (n, m)]
    a, b = (F.normalize(x, dim=-1).requires_grad_() for x in rows)
    return a, b


@pytest.mark.parametrize("n", [1, 2, 33, 64])
@pytest.mark.parametrize("scale", [1.0, 14.285, 100.0])
def test_diagonal_equals_open_clip(n: int, scale: float) -> None:
    a, b = _pair(n, n, dtype=torch.float32)
    s = torch.tensor(scale, requires_grad=True)
    ours = boltzmann(a, b, s)
    theirs = ClipLoss()(a, b, s)
    torch.testing.assert_close(ours, theirs)
    for x, y in zip(
        torch.autograd.grad(ours, (a, b, s)), torch.autograd.grad(theirs, (a, b, s)), strict=True
    ):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4)


def _by_loop(z_hat: Tensor, z: Tensor, scale: float, rows: list[int], cols: list[int]) -> float:
    """Each row's mean over its positives of -log softmax over the annotated columns, both ways."""

    def one_way(logits: Tensor, own: list[int], other: list[int]) -> float:
        candidates = [j for j, c in enumerate(other) if c != -1]
        losses = []
        for i, r in enumerate(own):
            positives = [j for j in candidates if other[j] == r]
            if r == -1 or not positives:
                continue
            denominator = sum(float(logits[i, j].exp()) for j in candidates)
            terms = [-float(torch.log(logits[i, j].exp() / denominator)) for j in positives]
            losses.append(sum(terms) / len(terms))
        return sum(losses) / max(len(losses), 1)

    logits = scale * z_hat @ z.T
    return 0.5 * (one_way(logits, rows, cols) + one_way(logits.T, cols, rows))


@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3]),
        ([0, 1, 1, 3], [1, 0, 1, 3]),  # two variants of a concept
        ([0, -1, 2, 5], [0, 2, -1, 2, 7]),  # no caption, no positive, another size
        ([-1, -1], [-1, -1]),  # nothing is annotated
    ],
)
def test_ids_equal_a_loop(rows: list[int], cols: list[int]) -> None:
    a, b = _pair(len(rows), len(cols))
    loss = boltzmann(
        a, b, torch.tensor(7.0), row_ids=torch.tensor(rows), col_ids=torch.tensor(cols)
    )
    assert float(loss) == pytest.approx(
        _by_loop(a.detach(), b.detach(), 7.0, rows, cols), abs=1e-12
    )
    gradients = torch.autograd.grad(loss, (a, b))
    assert all(bool(g.isfinite().all()) for g in gradients)
    for gradient, ids in zip(gradients, (rows, cols), strict=True):
        ignored = torch.tensor(ids) == -1
        assert float(gradient[ignored].abs().sum()) == 0.0


def test_classes_equal_cross_entropy() -> None:
    a, classes = _pair(12, 5)
    targets = torch.tensor([0, 1, 4, -1, 2, 2, -1, 3, 0, 1, 1, -1])
    ours = boltzmann(a, classes, torch.tensor(10.0), targets=targets)
    theirs = F.cross_entropy(10.0 * a @ classes.T, targets, ignore_index=-1)
    torch.testing.assert_close(ours, theirs)
    none = boltzmann(a, classes, torch.tensor(10.0), targets=torch.full((12,), -1))
    assert float(none) == 0.0
    assert bool(torch.autograd.grad(none, a)[0].isfinite().all())


def test_gradcheck() -> None:
    a, b = _pair(5, 6)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    rows, cols = torch.tensor([0, 1, 1, -1, 9]), torch.tensor([1, 0, 1, -1, 4, 0])
    assert torch.autograd.gradcheck(
        lambda x, y, s: boltzmann(x, y, s, row_ids=rows, col_ids=cols), (a, b, scale)
    )
    targets = torch.tensor([0, 5, -1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x, y, s: boltzmann(x, y, s, targets=targets), (a, b, scale)
    )


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda a, b: boltzmann(a, b[:2], torch.tensor(1.0)), "rows"),
        (lambda a, b: boltzmann(a, b, torch.tensor(1.0), row_ids=torch.arange(3)), "col_ids"),
        (
            lambda a, b: boltzmann(
                a, b, torch.tensor(1.0), targets=torch.arange(3), row_ids=torch.arange(3)
            ),
            "targets",
        ),
    ],
)
def test_wrong_arguments_are_named(call, word: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=word):
        call(*_pair(3, 3))
