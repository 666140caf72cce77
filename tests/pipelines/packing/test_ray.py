"""Shards as tasks of a Ray cluster that this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from m3i_fast.pipelines.packing.workers import with_ray
from tests.pipelines.packing.helpers import contents, pack_with, put, refused_of


@pytest.mark.slow
def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    for i in range(40):
        put(tmp_path / "source", f"{'ab'[i % 2]}/{i}.png", b"none" if i % 9 == 0 else None)
    flags = {"samples_per_shard": 8, "name": "set"}
    here = pack_with(tmp_path / "source", tmp_path / "here", **flags)
    there = pack_with(tmp_path / "source", tmp_path / "there", with_ray("local"), **flags)
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert refused_of(there) == refused_of(here) and len(there.refused) == 5
