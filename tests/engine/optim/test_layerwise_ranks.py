"""LAMB and LARS on FSDP2's sharded parameters are those of one process with all rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from m3i_fast.config.optim import OptimConfig
from m3i_fast.engine.optim import skippable_step
from m3i_fast.engine.optim.layerwise import full_norms
from m3i_fast.engine.optim.optimizers import _expect_usable, build_optimizer, set_schedules
from m3i_fast.engine.optim.schedules import lr_schedule, weight_decay_schedule
from m3i_fast.engine.parallel.local_shards import local
from tests.shared.ranks import start_ranks

RANKS = 2
STEPS = 10
CONFIGS = {
    "lamb": OptimConfig(name="lamb", lr=0.05, weight_decay=0.1, clip_grad_norm=0.1),
    "lars": OptimConfig(name="lars", lr=10.0, weight_decay=0.1, clip_grad_norm=0.1),
    "adamw": OptimConfig(lr=0.01, weight_decay=0.1, clip_grad_norm=0.1),
}


def network() -> nn.Module:
    """Rows that two ranks share unevenly, and a matrix of one row, of which the second has none."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def train(cfg: OptimConfig, model: nn.Module, rows: slice) -> list[float]:
    """All steps on these rows of eight; the norms that clipping saw."""
    optimizer = build_optimizer(cfg, model)
    lr, decay = lr_schedule(cfg, STEPS), weight_decay_schedule(cfg, STEPS)
    norms = []
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 6, generator=rng), torch.randn(8, 1, generator=rng)
        set_schedules(optimizer, lr=lr[step], weight_decay=decay[step])
        (model(x[rows]) - y[rows]).square().mean().backward()
        norm = optimizer.clip_grad_norm(list(model.parameters()), cfg.clip_grad_norm).total
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    for p in model.parameters():  # moments are sharded as what they are of
        moments = [state for state in optimizer.state[p].values() if state.ndim]
        assert moments and all(isinstance(m, DTensor) == isinstance(p, DTensor) for m in moments)
    return norms


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    skippable_step._MAX_ELEMENTS_CPU = 40  # the matrices are stepped in two lists
    found = {}
    for name, cfg in CONFIGS.items():
        model = network()
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=mesh)
        norms = train(cfg, model, slice(4 * rank, 4 * rank + 4))
        found[name] = (norms, {n: p.full_tensor().detach() for n, p in model.named_parameters()})
        with pytest.raises(
            ValueError, match="apex needs .*whole parameters, where these are sharded"
        ):
            _expect_usable("apex", list(model.parameters()))
    found["norms"] = _norms(mesh)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def _norms(mesh: dist.DeviceMesh) -> list[tuple[Tensor, Tensor]]:
    """Ours and DTensor's own, of tensors that are sharded by rows or columns, or not at all."""
    rng = torch.Generator().manual_seed(7)
    replicas = init_device_mesh("cpu", (RANKS, 1))  # as HSDP: copies, and shards of each
    tensors: list[Tensor] = [
        distribute_tensor(torch.randn(shape, generator=rng), among, places)
        for shape, among, places in (
            ((5, 4), mesh, [Shard(0)]),
            ((1, 6), mesh, [Shard(0)]),
            ((2, 6), replicas, [Replicate(), Shard(0)]),
            ((3, 5), mesh, [Shard(1)]),
            ((4, 4), mesh, [Replicate()]),
        )
    ]
    tensors.insert(1, torch.randn(3, 3, generator=rng))
    (ours,) = full_norms([local(tensors)], tensors)
    theirs = [torch.linalg.vector_norm(t) for t in tensors]
    theirs = [t.full_tensor() if isinstance(t, DTensor) else t for t in theirs]
    return list(zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(work, (folder,), RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_step_as_one_process(name: str, of_ranks) -> None:  # type: ignore[no-untyped-def]
    model, start = network(), network()
    norms = train(CONFIGS[name], model, slice(0, 8))
    assert max(norms) > CONFIGS[name].clip_grad_norm
    for found in of_ranks:
        got_norms, whole = found[name]
        assert got_norms == pytest.approx(norms, rel=1e-4)
        for n, p in model.named_parameters():
            change = p.detach() - start.get_parameter(n).detach()
            assert float(change.abs().max()) > 1e-3, n
            torch.testing.assert_close(
                whole[n] - start.get_parameter(n).detach(), change, rtol=1e-3, atol=1e-5
            )


def test_norms_are_those_of_whole_tensors(of_ranks) -> None:  # type: ignore[no-untyped-def]
    for found in of_ranks:
        for ours, theirs in found["norms"]:
            torch.testing.assert_close(ours, theirs)
