"""Statistics over the rows of several gloo ranks are those of one process with all rows.

One process is the oracle, in float64: test_regularisers.py holds it to code of others. Their code
over ranks is none: lightly's BarlowTwinsLoss standardises each rank's rows by themselves and takes
the ranks to be equally large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.objectives.losses import distillation, regularisers, similarity
from m3i_fast.objectives.losses.sigreg import draw_directions, sigreg
from m3i_fast.objectives.phi_s import PhiStandardise
from m3i_fast.ops import SoftTargets
from tests.shared.ranks import start_ranks

D = 6
ROWS = {2: (7, 9), 3: (5, 0, 11), 4: (4, 6, 0, 6)}  # unequal, and a rank without any

AXES = torch.eye(D, dtype=torch.float64)  # prototypes, so that features are logits

SLICES = draw_directions(torch.tensor(5), D, 9)

LOSSES: dict[str, Callable[..., Tensor]] = {
    "barlow_twins": regularisers.barlow_twins,
    "vicreg": regularisers.vicreg,
    "variance_hinge": lambda a, b, **group: regularisers.variance_hinge(a - b, std=20, **group),
    "covariance": lambda a, b, **group: regularisers.covariance(a * b, **group),
    "coding_rate": lambda a, b, **group: regularisers.coding_rate(a + b, **group),
    "sigreg": lambda a, b, **group: sigreg(torch.stack([a, a * b]), SLICES, **group),
    "mean_entropy": lambda a, b, **group: distillation.mean_entropy(
        a * b, AXES, temperature=0.5, **group
    ),
}


OF_COUNTED = {"nt_xent": partial(similarity.nt_xent, temperature=0.3)}
"""Losses whose caller knows how many rows each rank has, which is none without any."""


def losses_of(ranks: int) -> dict[str, Callable[..., Tensor]]:
    return LOSSES | (OF_COUNTED if all(ROWS[ranks]) else {})


def views() -> tuple[Tensor, Tensor]:  # [16, D] fp64, the same on every rank
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 16, D, generator=rng, dtype=torch.float64)
    return a + 1, 0.5 * a + b


def states(a: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What has no gradient; the assignments are this rank's rows, the others are everyone's."""
    start, scale = torch.ones(D, dtype=torch.float64), torch.tensor(25.0, dtype=torch.float64)
    assigned = SoftTargets.sinkhorn(300 * b, AXES, scale, process_group=group)
    phi_s = PhiStandardise(4, group).double()
    for part in (a, b):
        phi_s(part[:, :4])
    phi_s.fold()
    return {
        "phi_s": torch.cat([phi_s.mean[None], phi_s.covariance]),
        "centre": distillation.update_centre(start, a, AXES, process_group=group),
        "correlation": regularisers.update_correlation(start.diag(), a, b, process_group=group),
        "assignments": torch.cat([b[:0], *(rows.clone() for _, rows in assigned.blocks())]),
    }


def work(rank: int, ranks: int, folder: Path) -> None:
    """What one rank gets: losses and the gradients of a network's two parameters."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    mine = [x.split(ROWS[ranks])[rank] for x in views()]
    results = {}
    for name, loss in losses_of(ranks).items():
        counts = {"counts": ROWS[ranks]} if name in OF_COUNTED else {}
        results[name] = evaluate(loss, *mine, process_group=dist.group.WORLD, **counts)
    torch.save((results, states(*mine, dist.group.WORLD)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def evaluate(loss: Callable[..., Tensor], a: Tensor, b: Tensor, **group: Any) -> list[Tensor]:
    """The loss of two layers' outputs, and its gradients by their weights."""
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(2, D, D, generator=rng, dtype=torch.float64).requires_grad_()
    value = loss(a @ weights[0], b @ weights[1], **group)
    return [value.detach(), torch.autograd.grad(value, weights)[0]]


@pytest.mark.parametrize("ranks", ROWS)
def test_ranks_equal_one_process(ranks: int, tmp_path: Path) -> None:
    start_ranks(work, (ranks, tmp_path), ranks)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
    for name, loss in losses_of(ranks).items():
        value, gradient = evaluate(loss, *views())
        for results, _ in of_ranks:
            torch.testing.assert_close(results[name][0], value, msg=lambda m, n=name: f"{n}: {m}")
        mean = sum(results[name][1] for results, _ in of_ranks) / ranks  # as DDP averages
        assert float(gradient.norm()) > 1e-3
        torch.testing.assert_close(mean, gradient, msg=lambda m, n=name: f"{n}: {m}")
    expected = states(*views(), None)
    for _, got in of_ranks:
        torch.testing.assert_close(got["centre"], expected["centre"])
        torch.testing.assert_close(got["correlation"], expected["correlation"])
        torch.testing.assert_close(got["phi_s"], expected["phi_s"], rtol=1e-10, atol=1e-12)
    both = torch.cat(views())[:, :4]
    torch.testing.assert_close(expected["phi_s"][1:], torch.cov(both.T, correction=0))
    together = torch.cat([got["assignments"] for _, got in of_ranks])
    torch.testing.assert_close(together, expected["assignments"])
