"""Bytes that ranks send: by hand, and counted where losses over all ranks send them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from m3i_fast.costs import traffic
from m3i_fast.costs.traffic import Collective, Nodes, Traffic, Unit, total
from m3i_fast.objectives.losses.similarity import info_nce, nt_xent
from m3i_fast.ops import boltzmann
from tests.shared.ranks import start_ranks

ONE, NODE, TWO_NODES = Nodes(1, 8), Nodes(8, 8), Nodes(16, 8)
RANKS, ROWS, DIM = 3, 5, 8


UNITS = [
    Unit(gathered=60, reduced=60, gathers=4, weight_bytes=2),
    Unit(gathered=30, reduced=0, gathers=1, weight_bytes=2),
]
SHARDED = {"num_scalars": 2}


def test_one_rank_sends_nothing() -> None:
    sent = (
        traffic.ddp(ONE, num_parameters=100),
        traffic.fsdp(ONE, UNITS, num_shards=1, **SHARDED),
        traffic.candidates(ONE, num_rows=8, dim=4, weight_bytes=2),
        traffic.views_of_ranks(ONE, num_rows=8, dim=4),
    )
    assert all(total(one) == Traffic(0, 0) for one in sent)


def test_ranks_of_one_node_use_no_network() -> None:
    # a ring's 2 (n - 1) / n of 400 bytes
    assert total(traffic.ddp(NODE, num_parameters=100)) == Traffic(2 * 7 / 8 * 400, 0)


def test_nodes_share_what_a_rank_holds_of_their_sum() -> None:
    assert total(traffic.ddp(TWO_NODES, num_parameters=100)) == Traffic(700, 2 * (400 / 8) / 2)


def test_a_ranks_part_goes_to_every_other_rank() -> None:
    for call in ("all_gather", "reduce_scatter"):
        found = Collective(call=call, size=10, nodes=NODE, count=3)  # type: ignore[arg-type]
        assert found.sent.nvlink == pytest.approx(3 * 10 * 7)


def test_fsdp_gathers_every_pass_and_scatters_what_is_trained_once() -> None:
    found = traffic.fsdp(NODE, UNITS, num_shards=8, **SHARDED)
    shown = [(one.call, one.size, one.count) for one in found]
    assert shown == [
        ("all_gather", 120, 4),
        ("reduce_scatter", 240, 1),
        ("all_gather", 60, 1),
        ("all_reduce", 8, 1),
        ("all_reduce", 4, 1),
    ]
    sums = 2 * 7 / 8 * (8 + 4)
    assert total(found).nvlink == pytest.approx(7 * (4 * 120 + 240 + 60) + sums)


def test_hsdp_shards_within_groups_and_adds_up_over_them() -> None:
    found = traffic.fsdp(TWO_NODES, UNITS, num_shards=8, **SHARDED)
    assert {one.nodes for one in found[:2]} == {Nodes(8, 8)}
    across = found[2]
    assert (across.call, across.size, across.nodes) == ("all_reduce", 240, Nodes(2, 1))
    assert across.sent == Traffic(0, 2 * 240 / 2)
    # Two groups of a node: nothing goes through the network.
    found = traffic.fsdp(NODE, UNITS, num_shards=4, **SHARDED)
    assert found[2].nodes == Nodes(2, 2) and total(found).network == 0


def test_candidates_go_round_and_their_gradients_home() -> None:
    sizes = {"num_rows": 3, "dim": 4, "weight_bytes": 2}
    sent = total(traffic.candidates(TWO_NODES, **sizes, on_gpu=False))
    assert sent.nvlink == sent.network == 12 * (2 * 15 * 2 + 16 * 4)
    assert total(traffic.candidates(TWO_NODES, **sizes)).nvlink == 12 * (4 * 15 * 2 + 16 * 4)
    sigmoid = traffic.candidates(NODE, **sizes, sigmoid=True)
    assert total(sigmoid) == Traffic(12 * (7 * 2 + 8 * 4), 0)


def _count(rank: int, folder: Path) -> None:
    """What a rank sends of rows and of their gradients; vectors are not counted."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    send, sent = dist.batch_isend_irecv, []

    def counting(ops: list[Any]) -> Any:
        sent.extend(op.tensor.nbytes for op in ops if op.op is dist.isend and op.tensor.dim() == 2)
        return send(ops)

    dist.batch_isend_irecv = counting
    found = []
    for form in ("softmax", "sigmoid"):
        sent.clear()
        rng = torch.Generator().manual_seed(rank)
        z_hat, z = (torch.randn(ROWS, DIM, generator=rng, requires_grad=True) for _ in range(2))
        scale = torch.tensor(1.0, requires_grad=True)
        boltzmann(z_hat, z, scale, form=form, process_group=dist.group.WORLD).backward()  # type: ignore[arg-type]
        found.append(sum(sent))
    sent.clear()
    info_nce(z_hat, z.detach(), temperature=0.5, process_group=dist.group.WORLD).backward()  # type: ignore[arg-type]
    found.append(sum(sent))
    torch.save((found, _all_reduced_by_nt_xent(rank)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def _all_reduced_by_nt_xent(rank: int) -> list[int]:
    """Bytes of each all-reduce of a loss and of its backward pass; vectors are not counted."""
    add_up, sizes = dist.all_reduce, list[int]()

    def counting(rows: torch.Tensor, **options: Any) -> Any:
        if rows.dim() == 2:
            sizes.append(rows.nbytes)
        return add_up(rows, **options)

    dist.all_reduce = counting
    rng = torch.Generator().manual_seed(rank)
    z_a, z_b = (torch.randn(ROWS, DIM, generator=rng, requires_grad=True) for _ in range(2))
    nt_xent(z_a, z_b, temperature=0.5, process_group=dist.group.WORLD).backward()  # type: ignore[arg-type]
    dist.all_reduce = add_up
    return sizes


def test_candidates_are_what_the_losses_send(tmp_path: Path) -> None:
    start_ranks(_count, (tmp_path,), RANKS)
    nodes, sizes = Nodes(RANKS, 8), {"num_rows": ROWS, "dim": DIM, "weight_bytes": 4}
    expected = [
        total(traffic.candidates(nodes, **sizes, **options, on_gpu=False)).nvlink
        for options in ({}, {"sigmoid": True}, {"target_grad": False})
    ]
    (views,) = traffic.views_of_ranks(nodes, num_rows=ROWS, dim=DIM)
    for rank in range(RANKS):
        sent, all_reduced = torch.load(tmp_path / f"{rank}.pt")
        assert sent == expected
        assert all_reduced == views.count * [views.size]
