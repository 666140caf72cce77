"""A run is measured from a bucket as from a folder, through the cache that its config names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.engine import evaluator
from m3i_fast.pipelines.storage.upload import push
from tests.shared.engine.small_run import small_run
from tests.shared.pipelines.data import equal


def test_every_reader_of_an_evaluation_uses_the_cache_of_the_run(
    dataset: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures in order, and crops of each concept, which are drawn by the place in the order."""
    push(dataset, url)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # the default cache folder is in it
    local = small_run(dataset)
    data = replace(local.data, path=Path(url), cache_dir=tmp_path / "cache", buffer_gib=0.01)
    bucket = replace(local, data=data)
    for split in ("train", "heldout"):
        ours, theirs = (list(evaluator._whole_pictures(cfg, split, 16)) for cfg in (bucket, local))
        assert all(equal(*pair) for pair in zip(ours, theirs, strict=True))
    (views, boxes, group), (_, _, expected) = (
        evaluator._two_crops(cfg, "heldout") for cfg in (bucket, local)
    )
    assert torch.equal(group, expected) and len(views[0]) == len(boxes) == len(group)
    splits = {file.name.split("-")[0] for file in (tmp_path / "cache/clumps/files").iterdir()}
    assert len(splits) == 2
    assert not (tmp_path / "home").exists()
