"""What is taken from batches: real drawings, some without a label or a caption."""

from pathlib import Path

import pytest
import torch

from m3i_fast.evaluation.feature_extraction import collect_features, labelled_drawings
from m3i_fast.pipelines.loader import evaluation_batches


def _batches(dataset: Path) -> list:  # type: ignore[type-arg]
    settings = {"image_size": 16, "batch_size": 13, "representatives_only": True}
    return list(evaluation_batches(dataset, "train", **settings))


def test_only_items_with_a_caption_are_captioned(dataset: Path) -> None:
    batches = _batches(dataset)
    views = torch.cat([batch.global_views[0] for batch in batches]).float()
    got = collect_features(
        batches,
        lambda views: (views.float().flatten(2).mT, views.float().mean((2, 3))),
        lambda ids, counts: counts[:, None].float().expand(-1, 3),
        torch.device("cpu"),
    )
    assert torch.equal(got.captioned, got.text[:, 0] > 0)
    assert 0 < int(got.captioned.sum()) < len(got.captioned)
    torch.testing.assert_close(got.encoder, views.mean((2, 3)))
    assert torch.equal(got.group, torch.cat([batch.group_id for batch in batches]))


@pytest.mark.parametrize("most", [1, 20, 10_000])
def test_the_first_labelled_drawings_are_taken(dataset: Path, most: int) -> None:
    batches = _batches(dataset)
    views, label, group = labelled_drawings(batches, most)
    every = torch.cat([batch.label for batch in batches])
    rows = (every >= 0).nonzero()[:most, 0]
    assert torch.equal(label, every[rows]) and 0 < len(rows) < len(every)
    assert torch.equal(views, torch.cat([batch.global_views[0] for batch in batches])[rows])
    assert torch.equal(group, torch.cat([batch.group_id for batch in batches])[rows])
