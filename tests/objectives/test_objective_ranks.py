"""The whole objective on two gloo ranks is that of one process with both batches.

One rank has neither labels nor captions: it runs those terms all the same, and they count the
members of both. What is compared is the average of the ranks' gradients, as DDP and FSDP take it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.config.objective.heads import CaptionerConfig, DecoderConfig, ProjectorConfig
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.mixing import Mix, draw_mix
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.pipelines.batch import Batch
from tests.shared.ranks import part, start_ranks
from tests.shared.small_objective import NUM_CLASSES, TEXT, VISION, make_batch

RANKS, B = 2, 4
CHOSEN = (
    "supervised",
    "clip",
    "siglip",
    "cappa",
    "coca",
    "mae",
    "densecl",
    "moco_v3",
    "byol",
    "barlow_twins",
    "vicreg",
    "unigrad",
    "simclr",
    "slip",
    "dino",
    "ibot",
    "msn",
    "siameseim",
    "m3i",
)


def small_config(name: str) -> ObjectiveConfig:
    """A method's terms and inputs, on networks of a few rows."""
    method = METHODS[name]
    return ObjectiveConfig(
        terms=method.terms,
        mixing=MixingConfig(mode=method.mode, mask_block=1, hidden=method.hidden),
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        captioner=CaptionerConfig(dim=16, depth=1, num_heads=2, parallel=method.parallel_captions),
        projector=ProjectorConfig(hidden_dim=16, output_dim=8, predictor_hidden_dim=8),
        head_hidden_dim=16,
        num_prototypes=12,
        queue_length=12,
    )


def _model(cfg: ObjectiveConfig, group: dist.ProcessGroup | None) -> MutualInformation:
    torch.manual_seed(0)
    return MutualInformation(
        cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES, process_group=group
    )


def _batch() -> Batch:
    batch = make_batch(RANKS * B)
    annotated = torch.arange(RANKS * B) < B
    return replace(
        batch,
        label=batch.label.masked_fill(~annotated, -1),
        num_tokens=batch.num_tokens * annotated,
    )


def _mix(cfg: ObjectiveConfig, batch: Batch) -> Mix:
    return draw_mix(
        cfg.mixing,
        position=batch.position,
        first_position=0,
        grid=4,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )


def _gradients(model: MutualInformation, batch: Batch, mix: Mix) -> dict[str, Tensor]:
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    total, _ = model(encoded, targets, batch, mix)
    total.backward()
    model.finish_step()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    kept = ("queue", "centre", "standardise.mean", "standardise.variance")
    buffers = {n: b.clone() for n, b in model.named_buffers() if n.endswith(kept)}
    return found | buffers


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    for name in CHOSEN:
        cfg = small_config(name)
        model = _model(cfg, dist.group.WORLD)
        own = part(_batch(), rank, RANKS)
        found = _gradients(model, own, _mix(cfg, own))
        torch.save(found, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_work, (folder,), RANKS)
    return folder


@pytest.mark.parametrize("name", CHOSEN)
def test_two_ranks_equal_one_process(name: str, ranks: Path) -> None:
    cfg = small_config(name)
    expected = _gradients(_model(cfg, None), _batch(), _mix(cfg, _batch()))
    of_ranks = [torch.load(ranks / f"{name}-{r}.pt", weights_only=True) for r in range(RANKS)]
    largest = max(float(value.abs().max()) for value in expected.values())
    for parameter, value in expected.items():
        mean = torch.stack([found[parameter] for found in of_ranks]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5 * largest, msg=parameter)
    assert all(found.keys() == expected.keys() for found in of_ranks)
