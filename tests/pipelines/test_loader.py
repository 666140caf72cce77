"""Batches, epochs and ranks."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.batch_rows import TrainingRows
from m3i_fast.pipelines.dataset.sample_table import ROW, Rows, SampleTable
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.optional_imports import require
from m3i_fast.pipelines.sample_order.positions import StepLayout, shuffled
from m3i_fast.pipelines.storage.shards import LocalShards
from tests.shared.pipelines.data import (
    EVERYTHING,
    TOKENIZER,
    equal,
    take,
)


def test_shapes_types_and_devices(cfg: LoaderConfig) -> None:
    batch = next(Loader(cfg))
    expected = [((4, 3, 16, 16), torch.uint8)] * 2 + [((4, 3, 8, 8), torch.uint8)] * 3
    expected += [((4, 5, 5), torch.float32), ((4, 2), torch.float32)]
    expected += [((4, TOKENIZER.context_length), torch.int32)] + [((4,), torch.int64)] * 5
    assert [(tuple(t.shape), t.dtype) for t in batch.tensors()] == expected
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in batch.tensors())
    assert batch.batch_size == 4
    assert equal(batch.to("cpu"), batch)


def test_missing_captions_are_zeros_and_no_tokens(cfg: LoaderConfig) -> None:
    seen = set()
    for batch in take(Loader(cfg), 12):
        for i, index in enumerate(batch.sample_id.tolist()):
            num_tokens = 0 if index % 5 == 0 else 3 + index % 5
            assert batch.num_tokens[i] == num_tokens
            assert batch.token_ids[i].tolist() == [
                *range(1, 1 + num_tokens),
                *[0] * (TOKENIZER.context_length - num_tokens),
            ]
            assert batch.label[i] == (-1 if index % 7 == 0 else index % 3)
            seen.add(num_tokens)
    assert 0 in seen and len(seen) > 3


def test_a_pass_takes_every_sample_once_in_the_orders_turn(cfg: LoaderConfig) -> None:
    """The table's rows stand as the samples do in the shards."""
    loader = Loader(replace(cfg, batch_size=5))
    assert loader.steps_per_epoch == 10
    in_shards = SampleTable.open(cfg.path, loader.manifest, "train").rows["sample_id"]
    for epoch in range(3):
        assert loader.samples == 50 * epoch
        batches = take(loader, 10)
        positions = torch.cat([batch.position for batch in batches])
        assert positions.tolist() == list(range(50 * epoch, 50 * epoch + 50))
        ids = torch.cat([batch.sample_id for batch in batches])
        assert sorted(ids.tolist()) == list(range(50))
        assert np.array_equal(ids, in_shards[shuffled(positions.numpy(), size=50, seed=5)])


def joined(batches: list[Batch]) -> list[torch.Tensor]:
    """The tensors of batches as those of one, in the order of positions."""
    whole = [torch.cat(parts) for parts in zip(*(b.tensors() for b in batches), strict=True)]
    order = torch.cat([batch.position for batch in batches]).argsort()
    return [tensor[order] for tensor in whole]


SPLITS = [(1, 24, 1), (2, 12, 1), (4, 6, 1), (3, 4, 2), (1, 6, 4), (2, 6, 2)]


@pytest.mark.parametrize("images_per_input", [1, 2])
@pytest.mark.parametrize(("num_ranks", "batch_size", "accumulate"), SPLITS[1:])
def test_a_step_is_the_same_on_any_ranks_and_batches(
    cfg: LoaderConfig, num_ranks: int, batch_size: int, accumulate: int, images_per_input: int
) -> None:
    """Samples, views, boxes, captions; and the images of an input are in one batch."""
    alone = Loader(replace(cfg, batch_size=24), images_per_input=images_per_input)
    loaders = [
        Loader(
            replace(cfg, batch_size=batch_size, backend="torch" if rank % 2 else "dali"),
            rank=rank,
            num_ranks=num_ranks,
            accumulate=accumulate,
            images_per_input=images_per_input,
        )
        for rank in range(num_ranks)
    ]
    for step in range(3):  # past the end of an epoch, which is in the middle of a step
        batches = [batch for loader in loaders for batch in take(loader, accumulate)]
        for ours, expected in zip(joined(batches), next(alone).tensors(), strict=True):
            assert torch.equal(ours, expected)
        inputs = [batch.position.view(-1, images_per_input) for batch in batches]
        assert all(
            (rows % images_per_input == torch.arange(images_per_input)).all() for rows in inputs
        )
        assert {loader.samples for loader in loaders} == {24 * step + 24}


def test_order_and_crops_follow_the_seed_alone(cfg: LoaderConfig) -> None:
    first = take(Loader(cfg), 3)
    again = take(Loader(replace(cfg, num_threads=2, prefetch=3)), 3)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    other = take(Loader(replace(cfg, seed=6)), 3)
    assert not any(torch.equal(a.boxes, b.boxes) for a, b in zip(first, other, strict=True))
    assert [b.sample_id.tolist() for b in first] != [b.sample_id.tolist() for b in other]


def test_a_sample_is_cut_anew_in_every_epoch(cfg: LoaderConfig) -> None:
    loader = Loader(replace(cfg, batch_size=50))
    first, second = take(loader, 2)
    boxes = [dict(zip(b.sample_id.tolist(), b.boxes, strict=True)) for b in (first, second)]
    assert not any(torch.equal(boxes[0][i], boxes[1][i]) for i in range(50))


def test_batches_keep_their_values_while_held(cfg: LoaderConfig) -> None:
    """Tensors are DALI's own buffers; none may be written again while someone holds it."""
    loader = Loader(replace(cfg, backend="dali"))
    held = take(loader, 30)
    copies = [[t.clone() for t in batch.tensors()] for batch in held]
    take(loader, 30)
    loader.close()
    del loader
    for batch, copied in zip(held, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), copied, strict=True))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_memory_is_flat(cfg: LoaderConfig, backend: str) -> None:
    views = replace(EVERYTHING, size=64)
    loader = Loader(replace(cfg, batch_size=16, global_views=views, backend=backend))
    expect_flat(loader, before=40, batches=80)  # 31 MB of views, were they kept


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_memory_is_flat_over_ten_thousand_batches(cfg: LoaderConfig, backend: str) -> None:
    expect_flat(Loader(replace(cfg, backend=backend)), before=500, batches=10_000)


def expect_flat(loader: Loader, *, before: int, batches: int) -> None:
    for _ in range(before):
        next(loader)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(batches):
        next(loader)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 15_000  # KiB


def test_close_keeps_the_position(cfg: LoaderConfig) -> None:
    expected = take(Loader(cfg), 4)
    loader = Loader(cfg)
    take(loader, 2)
    loader.close()
    loader.close()
    assert loader.state_dict()["samples"] == 8
    assert all(equal(a, b) for a, b in zip(take(loader, 2), expected[2:], strict=True))


def test_bad_settings_name_field_and_value(cfg: LoaderConfig) -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected at most 25 .*50 samples.* got 26"):
        Loader(replace(cfg, batch_size=26), num_ranks=2)
    with pytest.raises(
        ValueError, match=r"expected at most 24 .*, got 32: add --data.batch-size 24"
    ):
        Loader(replace(cfg, batch_size=32), num_ranks=2, images_per_input=4)
    with pytest.raises(ValueError, match=r"expected at most 0 .*: pack at least 60 pictures"):
        Loader(replace(cfg, batch_size=4), num_ranks=30, images_per_input=2)
    with pytest.raises(ValueError, match="expected a multiple of images_per_input = 3, got 4"):
        Loader(cfg, images_per_input=3)
    with pytest.raises(ValueError, match=r"split: expected one of \['train'\], got 'test'"):
        Loader(replace(cfg, split="test"))
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        Loader(cfg, rank=2, num_ranks=2)
    with pytest.raises(ValueError, match=r"data.hw_decoder_load: expected None without a GPU.*0.4"):
        Loader(replace(cfg, hw_decoder_load=0.4))
    with pytest.raises(FileNotFoundError, match="m3i-fast data openmoji .*nowhere"):
        Loader(replace(cfg, path=Path("nowhere")))


def test_positions_far_into_a_large_run_are_those_of_the_order(tmp_path: Path) -> None:
    """Nothing is shuffled or kept on the way there."""
    rows = np.zeros(300_000, ROW)
    rows["sample_id"] = np.arange(len(rows))
    table = SampleTable(rows, ("a.tar",), has_bad=False)
    start = 256 * 8 * 10**9
    layout = StepLayout(batch_size=256, num_ranks=8)
    source = TrainingRows(table, LocalShards(tmp_path, table), layout, rank=3, seed=1, start=start)
    for step in range(100):  # more than are planned at once
        positions = start + 256 * 8 * step + 3 + 8 * np.arange(256)
        found = next(source)
        assert np.array_equal(found.positions, positions)
        assert np.array_equal(found.sample_id, shuffled(positions, size=len(rows), seed=1))
        assert found.path(255) == str(tmp_path / "a.tar")


@pytest.mark.parametrize(("has_bad", "most"), [(False, 32), (True, 1024 + 32)])
def test_a_start_reads_few_rows_of_the_table(tmp_path: Path, has_bad: bool, most: int) -> None:
    """Rows of a file that is not in memory are slow, and without bad ones a batch needs its own."""
    rows = np.zeros(300_000, ROW)
    rows["sample_id"] = np.arange(len(rows))
    read: list[int] = []

    class Counted(SampleTable):
        def at(self, numbers: NDArray[np.int64]) -> Rows:
            read.extend(numbers.tolist())
            return super().at(numbers)

    table = Counted(rows, ("a.tar",), has_bad=has_bad)
    shards = LocalShards(tmp_path, table)
    layout = StepLayout(batch_size=32)
    source = TrainingRows(table, shards, layout, rank=0, seed=1, start=0, skipped=frozenset([7]))
    next(source)
    assert 32 <= len(read) <= most


def test_nothing_but_the_graph_imports_dali() -> None:
    code = (
        "import sys; import m3i_fast.pipelines.batch, m3i_fast.pipelines.loader, "
        "m3i_fast.pipelines.sources.openmoji, m3i_fast.pipelines.sources.synthetic; "
        "sys.exit(any(m.split('.')[0] in ('nvidia', 'open_clip', 'PIL') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r'nvidia.dali .* pip install "m3i-fast\[data\]"'):
        require("nvidia.dali")
