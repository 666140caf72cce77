"""Batches, epochs and ranks."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config.data import LoaderConfig
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.optional_imports import require
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


@pytest.mark.parametrize("num_shards", [1, 2, 3])
def test_ranks_share_every_epoch_without_overlap(cfg: LoaderConfig, num_shards: int) -> None:
    loaders = [Loader(cfg, shard_id=i, num_shards=num_shards) for i in range(num_shards)]
    steps = {loader.steps_per_epoch for loader in loaders}
    assert steps == {50 // num_shards // 4}
    orders, ever, positions = [], set(), []
    for epoch in range(4):
        batches = [b for r in loaders for b in take(r, r.steps_per_epoch)]
        ids = [i for b in batches for i in b.sample_id.tolist()]
        assert all(b.position.diff().eq(num_shards).all() for b in batches)
        positions += [p for b in batches for p in b.position.tolist()]
        assert len(ids) == len(set(ids)) == num_shards * 4 * loaders[0].steps_per_epoch
        assert {loader.epoch for loader in loaders} == {epoch}
        orders.append(ids)
        ever.update(ids)
    assert ever == set(range(50))  # what one epoch drops, another brings
    assert len({tuple(order) for order in orders}) == 4
    assert sorted(positions) == list(range(len(positions)))
    assert {loader.samples for loader in loaders} == {len(positions)}


def test_ranks_get_other_parts_every_epoch(cfg: LoaderConfig) -> None:
    """Rotating fixed parts among the ranks would leave the same samples together for ever."""
    loaders = [Loader(cfg, shard_id=i, num_shards=3) for i in range(3)]
    first, second = (
        [{i for b in take(r, r.steps_per_epoch) for i in b.sample_id.tolist()} for r in loaders]
        for _ in range(2)
    )
    assert any(sum(bool(part & old) for old in first) > 1 for part in second)


def test_order_and_crops_follow_the_seed_alone(cfg: LoaderConfig) -> None:
    first = take(Loader(cfg), 3)
    again = take(Loader(replace(cfg, num_threads=2, prefetch=3)), 3)
    assert all(equal(a, b) for a, b in zip(first, again, strict=True))
    other = take(Loader(replace(cfg, seed=6)), 3)
    assert not any(torch.equal(a.boxes, b.boxes) for a, b in zip(first, other, strict=True))
    assert [b.sample_id.tolist() for b in first] != [b.sample_id.tolist() for b in other]


def test_ranks_draw_different_crops(cfg: LoaderConfig) -> None:
    first, second = (next(Loader(cfg, shard_id=i, num_shards=2)) for i in range(2))
    assert not torch.equal(first.boxes, second.boxes)


def test_the_gpu_graph_is_defined_and_told_apart_without_a_gpu(cfg: LoaderConfig) -> None:
    on_cpu, on_gpu = Loader(cfg).fingerprint, Loader(cfg, device_id=1).fingerprint
    assert (on_cpu.device, on_gpu.device) == ("cpu", "gpu")
    assert on_cpu.graph != on_gpu.graph
    assert Loader(cfg, device_id=2).fingerprint == on_gpu


def test_the_hardware_decoders_share_is_in_the_graph_of_a_gpu_alone(cfg: LoaderConfig) -> None:
    """A hardware decoder has pixels of its own: a run does not go on with another share."""
    shares = (None, 0.4, 0.65)
    found = {Loader(replace(cfg, hw_decoder_load=s), device_id=0).fingerprint.graph for s in shares}
    assert len(found) == 3
    with pytest.raises(ValueError, match=r"data.hw_decoder_load: expected None without a GPU.*0.4"):
        Loader(replace(cfg, hw_decoder_load=0.4))


def test_batches_keep_their_values_while_held(cfg: LoaderConfig) -> None:
    """Tensors are DALI's own buffers; none may be written again while someone holds it."""
    loader = Loader(cfg)
    held = take(loader, 30)
    copies = [[t.clone() for t in batch.tensors()] for batch in held]
    take(loader, 30)
    loader.close()
    del loader
    for batch, copied in zip(held, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.tensors(), copied, strict=True))


def test_memory_is_flat(cfg: LoaderConfig) -> None:
    loader = Loader(replace(cfg, batch_size=16, global_views=replace(EVERYTHING, size=64)))
    for _ in range(40):
        next(loader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(80):  # 31 MB of views, were they kept
        next(loader)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 15_000  # KiB


def test_close_keeps_the_position(cfg: LoaderConfig) -> None:
    expected = take(Loader(cfg), 4)
    loader = Loader(cfg)
    take(loader, 2)
    loader.close()
    loader.close()
    assert loader.state_dict()["step"] == 2
    assert all(equal(a, b) for a, b in zip(take(loader, 2), expected[2:], strict=True))


def test_bad_settings_name_field_and_value(cfg: LoaderConfig) -> None:
    with pytest.raises(ValueError, match=r"batch_size: expected at most 25 .*50 samples.* got 26"):
        Loader(replace(cfg, batch_size=26), num_shards=2)
    with pytest.raises(ValueError, match=r"split: expected one of \['train'\], got 'test'"):
        Loader(replace(cfg, split="test"))
    with pytest.raises(ValueError, match="shard_id: expected 0 to 1, got 2"):
        Loader(cfg, shard_id=2, num_shards=2)
    with pytest.raises(FileNotFoundError, match="m3i-fast data openmoji .*nowhere"):
        Loader(replace(cfg, path=Path("nowhere")))
    with pytest.raises(ValueError, match="another tokenizer: expected abc, got fff.*num_merges 7"):
        Loader(cfg, tokenizer_fingerprint="abc")
    Loader(cfg, tokenizer_fingerprint=TOKENIZER.fingerprint)


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
