"""Batches, epochs, ranks and exact resume."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.extras import require
from m3i_fast.pipelines.loader import Loader, LoaderConfig, ViewConfig, evaluation_batches
from tests.pipelines.conftest import TOKENIZER, Packer, encode_image, sample, smooth_picture

EVERYTHING = ViewConfig(size=16, blur_probability=0.5, solarize_probability=0.3)


@pytest.fixture
def cfg(fifty: Path) -> LoaderConfig:
    """12 batches of 4 an epoch, every random op in use."""
    return LoaderConfig(
        path=fifty,
        batch_size=4,
        global_views=EVERYTHING,
        local_views=replace(EVERYTHING, size=8, count=3, scale=(0.05, 0.3)),
        seed=5,
        initial_fill=16,
    )


def tensors(batch: Batch) -> list[Tensor]:
    return [
        *batch.global_views,
        *batch.local_views,
        batch.boxes,
        batch.image_size,
        batch.token_ids,
        batch.num_tokens,
        batch.label,
        batch.sample_id,
        batch.group_id,
    ]


def equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


def take(loader: Loader, number: int) -> list[Batch]:
    return [next(loader) for _ in range(number)]


def test_shapes_types_and_devices(cfg: LoaderConfig) -> None:
    batch = next(Loader(cfg))
    expected = [((4, 3, 16, 16), torch.uint8)] * 2 + [((4, 3, 8, 8), torch.uint8)] * 3
    expected += [((4, 5, 5), torch.float32), ((4, 2), torch.float32)]
    expected += [((4, TOKENIZER.context_length), torch.int32)] + [((4,), torch.int64)] * 4
    assert [(tuple(t.shape), t.dtype) for t in tensors(batch)] == expected
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors(batch))
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
    orders, ever = [], set()
    for epoch in range(4):
        ids = [i for r in loaders for b in take(r, r.steps_per_epoch) for i in b.sample_id.tolist()]
        assert len(ids) == len(set(ids)) == num_shards * 4 * loaders[0].steps_per_epoch
        assert {loader.epoch for loader in loaders} == {epoch}
        orders.append(ids)
        ever.update(ids)
    assert ever == set(range(50))  # what one epoch drops, another brings
    assert len({tuple(order) for order in orders}) == 4


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


@pytest.mark.parametrize("position", [0, 1, 5, 11, 12, 13, 24, 30])
def test_resume_is_exact(cfg: LoaderConfig, position: int) -> None:
    """Before the first batch, in mid-epoch, at an epoch's last batch, and after it."""
    original = Loader(cfg)
    take(original, position)
    state = json.loads(json.dumps(original.state_dict()))
    expected = take(original, 15)
    resumed = Loader(replace(cfg, num_threads=2, prefetch=3))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert all(equal(a, b) for a, b in zip(take(resumed, 15), expected, strict=True))
    assert resumed.epoch == original.epoch
    assert resumed.state_dict()["step"] == original.state_dict()["step"]


def test_resume_in_a_running_loader_and_twice(cfg: LoaderConfig) -> None:
    loader = Loader(cfg)
    take(loader, 4)
    state = loader.state_dict()
    expected = take(loader, 9)
    for _ in range(2):
        loader.load_state_dict(state)
        assert all(equal(a, b) for a, b in zip(take(loader, 9), expected, strict=True))
    later = loader.state_dict()
    expected = take(loader, 3)
    fresh = Loader(cfg)
    fresh.load_state_dict(later)  # the state of a resumed loader is as good as another
    assert all(equal(a, b) for a, b in zip(take(fresh, 3), expected, strict=True))


def test_resume_on_a_rank(cfg: LoaderConfig) -> None:
    loader = Loader(cfg, shard_id=2, num_shards=3)
    take(loader, 7)
    state, expected = loader.state_dict(), take(loader, 6)
    resumed = Loader(cfg, shard_id=2, num_shards=3)
    resumed.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(resumed, 6), expected, strict=True))


def test_resume_after_the_data_set_moved(cfg: LoaderConfig, tmp_path: Path) -> None:
    loader = Loader(cfg)
    take(loader, 3)
    state, expected = loader.state_dict(), take(loader, 3)
    moved = Loader(replace(cfg, path=Path(shutil.copytree(cfg.path, tmp_path / "moved"))))
    moved.load_state_dict(state)
    assert all(equal(a, b) for a, b in zip(take(moved, 3), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size: expected 4, got 8"),
        ({"seed": 6}, "seed: expected 5, got 6"),
        ({"global_views": replace(EVERYTHING, scale=(0.2, 1.0))}, "graph: expected '.*', got '"),
        ({"local_views": None}, "graph: expected '.*', got '"),
        ({"initial_fill": 17}, "graph: expected '.*', got '"),
    ],
)
def test_the_state_of_another_run_is_refused(
    cfg: LoaderConfig, change: dict[str, Any], message: str
) -> None:
    loader = Loader(cfg)
    take(loader, 1)
    with pytest.raises(ValueError, match=message):
        Loader(replace(cfg, **change)).load_state_dict(loader.state_dict())


def test_the_state_of_other_ranks_data_and_versions_is_refused(
    cfg: LoaderConfig, packer: Packer
) -> None:
    state = Loader(cfg, shard_id=0, num_shards=2).state_dict()
    with pytest.raises(ValueError, match="num_shards: expected 2, got 3"):
        Loader(cfg, num_shards=3).load_state_dict(state)
    with pytest.raises(ValueError, match="shard_id: expected 0, got 1"):
        Loader(cfg, shard_id=1, num_shards=2).load_state_dict(state)
    picture = encode_image(smooth_picture(0, 9, 9))
    other = replace(cfg, path=packer([sample(i, picture) for i in range(50)]))
    with pytest.raises(ValueError, match="dataset: expected '.*', got '"):
        Loader(other, num_shards=2).load_state_dict(state)
    state["fingerprint"]["dali_version"] = "1.0.0"
    with pytest.raises(ValueError, match=r"dali_version: expected '1.0.0', got '"):
        Loader(cfg, num_shards=2).load_state_dict(state)
    with pytest.raises(ValueError, match="expected version 1, got 9"):
        Loader(cfg, num_shards=2).load_state_dict({**state, "version": 9})


def test_the_gpu_graph_is_defined_and_told_apart_without_a_gpu(cfg: LoaderConfig) -> None:
    on_cpu, on_gpu = Loader(cfg).fingerprint, Loader(cfg, device_id=1).fingerprint
    assert (on_cpu.device, on_gpu.device) == ("cpu", "gpu")
    assert on_cpu.graph != on_gpu.graph
    assert Loader(cfg, device_id=2).fingerprint == on_gpu


def test_batches_keep_their_values_while_held(cfg: LoaderConfig) -> None:
    """Tensors are DALI's own buffers; none may be written again while someone holds it."""
    loader = Loader(cfg)
    held = take(loader, 30)
    copies = [[t.clone() for t in tensors(batch)] for batch in held]
    take(loader, 30)
    loader.close()
    del loader
    for batch, copied in zip(held, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(batch), copied, strict=True))


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


@pytest.mark.parametrize("kind", ["truncated", "header", "garbage", "empty"])
def test_a_corrupt_sample_is_named(packer: Packer, kind: str) -> None:
    jpeg = encode_image(smooth_picture(0, 200, 200), "JPEG", quality=98)
    bad = {
        "truncated": jpeg[: len(jpeg) // 2],
        "header": jpeg[:200],
        "garbage": b"\x00garbage" * (len(jpeg) // 8),
        "empty": b"",
    }[kind]
    # The packer refuses such a sample, so the bytes are damaged behind its back.
    path = packer([sample(i, jpeg) for i in range(8)])
    index = path / "train-000000.idx"
    rows = index.read_text().splitlines()
    row = next(i for i, text in enumerate(rows) if "000000003-picture-3.jpg" in text)
    parts = rows[row].split(" ")
    with (path / "train-000000.tar").open("r+b") as file:
        file.seek(int(parts[1]))
        file.write(bad)
    parts[2] = str(len(bad))
    rows[row] = " ".join(parts)
    index.write_text("\n".join(rows) + "\n")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["index_bytes"] = index.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))
    loader = Loader(LoaderConfig(path=path, batch_size=8, global_views=EVERYTHING))
    message = "corrupt sample .*000000003-picture-3.jpg.*m3i-fast data verify"
    with pytest.raises(RuntimeError, match=message):
        next(loader)
    with pytest.raises(RuntimeError, match=message):
        list(evaluation_batches(path, "train", image_size=8, batch_size=8))


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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 7, "pairs": True}, "batch_size: expected an even number.*, got 7"),
        ({"num_threads": 0}, "num_threads: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected .*, got -1"),
    ],
)
def test_loader_config_is_validated(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": (0.5, 1.2)}, r"scale: expected .* got \(0.5, 1.2\)"),
        ({"scale": (0.0, 1.0)}, "scale: expected"),
        ({"scale": (0.8, 0.5)}, "scale: expected"),
        ({"ratio": (0.0, 1.0)}, "ratio: expected"),
        ({"size": 0}, "size: expected at least 1, got 0"),
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"flip_probability": 1.5}, r"flip_probability: expected a probability .* got 1.5"),
        ({"hue": 0.7}, "hue: expected"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma: expected"),
        ({"brightness": float("nan")}, "brightness: expected .* got nan"),
    ],
)
def test_view_config_is_validated(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViewConfig(**fields)


def test_nothing_but_the_graph_imports_dali() -> None:
    code = (
        "import sys; import m3i_fast.pipelines.batch, m3i_fast.pipelines.loader, "
        "m3i_fast.pipelines.openmoji, m3i_fast.pipelines.synthetic; "
        "sys.exit(any(m.split('.')[0] in ('nvidia', 'open_clip', 'PIL') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r'nvidia.dali .* pip install "m3i-fast\[data\]"'):
        require("nvidia.dali")
