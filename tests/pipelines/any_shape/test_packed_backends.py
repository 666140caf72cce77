"""Both backends cut the same views of any size, bit for bit, and resume alike."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m3i_fast.config.data import BackendName, LoaderConfig, ViewConfig
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from m3i_fast.pipelines.any_shape.loader import PackedLoader
from m3i_fast.pipelines.dataset.sample_table import ROW
from m3i_fast.pipelines.graph.dali import fn, load_operators, pipeline_def
from m3i_fast.pipelines.graph.dali_backend import DaliBackend
from m3i_fast.pipelines.sample_order.token_budget import grid_of
from tests.shared.pipelines.data import (
    EVERYTHING,
    Packer,
    encode_image,
    pack,
    sample,
    several_captions,
    smooth_picture,
)

SIDES: dict[str, Any] = {
    "token_budget": 300, "patch_size": 4, "global_sides": (2, 6), "local_sides": (1, 3),
}  # fmt: skip


def stored(index: int) -> bytes:
    """Pictures of as many sizes and aspects as there are, JPEG and PNG, some turned by EXIF."""
    shape = 30 + 11 * (index % 7), 120 - 9 * (index % 10)
    picture = Image.fromarray(smooth_picture(index, *shape))
    buffer = io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 1 + index % 8
    options: dict[str, Any] = {} if index % 3 == 0 else {"quality": 90, "exif": exif}
    picture.save(buffer, "JPEG" if options else "PNG", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = [sample(i, stored(i), captions=several_captions(i)) for i in range(40)]
    return pack(tmp_path_factory.mktemp("packed_backends") / "data", samples)


@pytest.fixture
def cfg(path: Path) -> LoaderConfig:
    view = replace(EVERYTHING, ratio=(0.3, 3.0))
    local = replace(view, count=3, scale=(0.05, 0.3), interpolation="linear")
    return LoaderConfig(path=path, global_views=view, local_views=local, seed=3, num_threads=2)


def equal(ours: PackedBatch, theirs: PackedBatch) -> bool:
    """Whether all fields of two batches are the same, in dtype, shape and every bit."""
    for name in PackedBatch.__dataclass_fields__:
        a, b = getattr(ours, name), getattr(theirs, name)
        if isinstance(a, torch.Tensor):
            a, b = (a,), (b,)
        elif name != "patches":
            assert a == b, name
            continue
        assert len(a) == len(b) and all(x.dtype == y.dtype for x, y in zip(a, b, strict=True)), name
        if not all(map(torch.equal, a, b)):
            return False
    return True


def batches(cfg: LoaderConfig, backend: BackendName, **options: Any) -> Iterator[PackedBatch]:
    loader = PackedLoader(replace(cfg, backend=backend), **{**SIDES, **options})
    yield from loader


def expect_alike(cfg: LoaderConfig, count: int, **options: Any) -> None:
    pairs = zip(batches(cfg, "dali", **options), batches(cfg, "torch", **options), strict=False)
    for _, (ours, theirs) in zip(range(count), pairs, strict=False):
        assert equal(ours, theirs)
        assert all(patches.is_contiguous() for patches in ours.patches)


@pytest.mark.parametrize("patch_size", [4, 7])
def test_backends_make_the_same_bits(cfg: LoaderConfig, patch_size: int) -> None:
    expect_alike(cfg, 12, patch_size=patch_size)


def test_one_view_of_each_of_several_ranks(cfg: LoaderConfig) -> None:
    alone = replace(cfg, local_views=None, global_views=replace(cfg.global_views, count=1))
    for rank in range(2):
        expect_alike(alone, 5, local_sides=None, rank=rank, num_ranks=2, accumulate=2)


def test_backends_take_the_same_alternates(packer: Packer) -> None:
    flat = [encode_image(np.full((9, 15, 3), 25 * i, np.uint8)) for i in range(10)]
    samples = [
        sample(i, flat[i], alternates=tuple(flat[j] for j in range(i % 4 + 1))) for i in range(8)
    ]
    cfg = LoaderConfig(path=packer(samples), global_views=EVERYTHING)
    expect_alike(cfg, 6, token_budget=150, local_sides=None)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_it_resumes_where_a_step_ended(cfg: LoaderConfig, backend: BackendName) -> None:
    """At any step, and by the other backend as well."""
    loader = PackedLoader(replace(cfg, backend=backend), accumulate=2, **SIDES)
    states, whole = [], []
    for _ in range(4):
        states.append(loader.state_dict())
        whole += [next(loader) for _ in range(2)]
    loader.close()
    for step, state in enumerate(states):
        for name in ("dali", "torch"):
            again = PackedLoader(replace(cfg, backend=name), accumulate=2, **SIDES)  # type: ignore[arg-type]
            again.load_state_dict(state)
            assert all(equal(batch, next(again)) for batch in whole[2 * step :])
            again.close()


def test_a_damaged_sample_is_replaced_alike(tmp_path: Path) -> None:
    """By the same sample, with views of the size that its position draws."""
    path = pack(tmp_path / "data", [sample(i, stored(i)) for i in range(12)], 12)
    cfg = LoaderConfig(path=path, global_views=EVERYTHING, max_skipped=1)
    ours, theirs = (
        PackedLoader(replace(cfg, backend=name), **{**SIDES, "local_sides": None})
        for name in ("dali", "torch")
    )
    table = np.fromfile(path / "train.samples", ROW)
    (row,) = table[table["sample_id"] == 7]
    shard = path / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[row["offset"] + 700] ^= 1  # after it was opened; of the picture's bytes
    shard.write_bytes(content)
    for _ in range(8):
        batch = next(ours)
        assert equal(batch, next(theirs)) and 7 not in batch.sample_id.tolist()


def test_batches_that_are_held_stay_as_they_are(cfg: LoaderConfig) -> None:
    """Their tensors are DALI's buffers, which the pipeline does not use again."""
    loader = PackedLoader(replace(cfg, backend="dali", prefetch=2), **SIDES)
    held = [next(loader) for _ in range(10)]
    copies = [copy_of(batch) for batch in held]
    for _ in range(10):
        next(loader)
    loader.close()
    assert all(map(equal, held, copies))


def copy_of(batch: PackedBatch) -> PackedBatch:
    """A batch with memory of its own."""
    tensors = {
        name: value.clone()
        for name in PackedBatch.__dataclass_fields__
        if isinstance(value := getattr(batch, name), torch.Tensor)
    }
    return replace(batch, patches=tuple(x.clone() for x in batch.patches), **tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is seen")
def test_gpu_views_are_close_to_the_cpus(tmp_path: Path) -> None:
    """Decoded by another library; grids, boxes and samples are equal."""
    files = [encode_image(smooth_picture(i, 90, 120), "JPEG", quality=95) for i in range(12)]
    path = pack(tmp_path / "data", [sample(i, file) for i, file in enumerate(files)])
    cfg = LoaderConfig(path=path, global_views=ViewConfig(ratio=(0.5, 2.0)))
    options = {**SIDES, "token_budget": 800, "patch_size": 8, "local_sides": None}
    on_cpu, on_gpu = (next(PackedLoader(cfg, device_id=d, **options)) for d in (None, 0))
    assert all(patches.is_cuda for patches in on_gpu.patches) and not on_gpu.grids.is_cuda
    for name in ("grids", "boxes", "sample_id", "token_ids"):
        assert torch.equal(getattr(on_gpu, name).cpu(), getattr(on_cpu, name))
    for ours, theirs in zip(on_gpu.patches, on_cpu.patches, strict=True):
        error = (ours.cpu().float() - theirs.float()).square().mean()
        assert 10 * torch.log10(255.0**2 / error) > 35


def test_dali_is_taken_where_it_can_be_had(cfg: LoaderConfig) -> None:
    loader = PackedLoader(cfg, **SIDES)
    next(loader)
    assert isinstance(loader._backend, DaliBackend)
    loader.close()


# ---- Grids ---------------------------------------------------------------------------------------


def grids_by_dali(crops: np.ndarray, most: np.ndarray) -> np.ndarray:  # [N, 2], [N] -> [N, 2]
    """What the operator chooses for views of one sample."""
    params = np.zeros((1, len(crops), 13), np.float32)
    params[0, :, 2:4] = crops

    @pipeline_def
    def graph() -> Any:
        given = fn.external_source(source=lambda: (params, most[None]), num_outputs=2, batch=True)
        return fn.m3i_view_grids(*given)

    load_operators()
    (grids,) = graph(batch_size=1, num_threads=1, device_id=None).run()
    return grids.as_array()[0]


def test_the_operator_of_grids_chooses_as_python_does() -> None:
    """Of crops of any aspect, of ties between both numbers of rows, and at the ends of a budget."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, math.log(5000), (20_000, 2))).astype(int)
    small = np.stack(np.meshgrid(np.arange(1, 60), np.arange(1, 60)), -1).reshape(-1, 2)
    crops = np.concatenate([sides, small, small])
    most = np.concatenate(
        [rng.integers(1, 40, len(sides)) ** 2, rng.integers(1, 40, len(small)), small[:, 0] ** 2]
    )
    expected = [grid_of(h, w, m) for (h, w), m in zip(crops.tolist(), most.tolist(), strict=True)]
    assert grids_by_dali(crops, most).tolist() == [list(grid) for grid in expected]
