"""Terms of annotations on one, two and four gloo ranks: the same losses and gradients.

The ranks' rows have different numbers of captions, tokens, labels, numbers and regions, and one
rank of four has none of some.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from m3i_fast.objectives.mixing import draw_mix
from m3i_fast.objectives.step_context import Encoded
from m3i_fast.pipelines.batch import Batch
from tests.shared.annotated import NO_TARGETS, annotated_batch, build, objective
from tests.shared.ranks import part, start_ranks
from tests.shared.small_objective import VISION

pytestmark = pytest.mark.distributed
RANKS, SIZE = 4, 8
CASES = [(mean, parallel, 0.0) for mean in ("batch", "members") for parallel in (0.0, 0.75)]
CASES += [("batch", 0.0, 0.7)]  # reversed


def whole_batch() -> Batch:
    """Samples 2 and 3, a rank of four, have nothing."""
    batch = annotated_batch(SIZE)
    rank = torch.arange(SIZE) // 2 == 1
    columns = {
        "tags": batch.columns["tags"].masked_fill(rank[:, None], -2),
        "sizes": batch.columns["sizes"].masked_fill(rank[:, None], torch.nan),
        "alt": batch.columns["alt"].masked_fill(rank[:, None], -1),
        "genus": batch.columns["genus"].masked_fill(rank, -1),
        "objects": batch.columns["objects"].masked_fill(rank[:, None, None, None], -1),
    }
    return replace(batch, num_tokens=batch.num_tokens.masked_fill(rank, 0), columns=columns)


def found(
    batch: Batch, mean: str, parallel: float, reversal: float, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """The losses, what is right of all rows, and the gradients of everything."""
    cfg = objective(parallel=parallel, mean=mean)
    reverses = ("genus", "sizes", "tags")
    terms = (replace(t, reversal=reversal) if t.name in reverses else t for t in cfg.terms)
    cfg = replace(cfg, terms=tuple(terms))
    rng = torch.Generator().manual_seed(2)
    cells = torch.randn(SIZE, 16, VISION.dim, generator=rng, dtype=torch.float64)
    model = build(cfg, process_group=group).double()
    mix = draw_mix(
        cfg.mixing,
        position=batch.position,
        first_position=0,
        grid=4,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )
    encoded = Encoded((cells[batch.sample_id],))
    total, metrics = model(encoded, NO_TARGETS, batch, mix, monitor=True)
    total.backward()
    whole = "loss/", "_accuracy", "_hit", "_r2", "_iou"
    values = {name: v for name, v in metrics.items() if any(of in name for of in whole)}
    assert {name.rpartition("_")[2] for name in values} > {"accuracy", "hit", "r2", "iou"}
    return values | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    pair = dist.new_group([0, 1])
    for mean, parallel, reversal in CASES:
        for ranks, group in ((4, dist.group.WORLD), (2, pair)):
            if rank < ranks:
                own = part(whole_batch(), rank, ranks)
                file = folder / f"{mean}-{parallel}-{reversal}-{ranks}-{rank}.pt"
                torch.save(found(own, mean, parallel, reversal, group), file)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(_work, (folder,), RANKS)
    return folder


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize(("mean", "parallel", "reversal"), CASES)
def test_ranks_equal_one_process(
    mean: str, parallel: float, reversal: float, count: int, ranks: Path
) -> None:
    expected = found(whole_batch(), mean, parallel, reversal, None)
    of_ranks = [
        torch.load(ranks / f"{mean}-{parallel}-{reversal}-{count}-{r}.pt", weights_only=True)
        for r in range(count)
    ]
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        average = torch.stack([each[name] for each in of_ranks]).mean(0)
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-6 * largest, msg=name)
    assert all(each.keys() == expected.keys() for each in of_ranks)
