"""Teachers' features on the disk: equal to their forward, whole after a kill, shared by ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from m3i_fast.config import TrainConfig
from m3i_fast.costs.objective_flops import TARGET
from m3i_fast.costs.step_flops import step_flops
from m3i_fast.engine import teacher_cache
from m3i_fast.engine.parallel.ranks import World
from m3i_fast.engine.precision.arithmetic import capabilities_of, resolve_precision
from m3i_fast.engine.precision.cpu_products import fast_cpu_products
from m3i_fast.engine.teacher import Teacher, load_teacher
from m3i_fast.engine.teacher_cache import CachedFeatures, cache_teachers, encode
from m3i_fast.engine.trainer import Trainer
from m3i_fast.pipelines.loader import Loader
from m3i_fast.planning.step_memory import trace
from m3i_fast.recipes import demo_method, shrink
from tests.shared.engine.small_run import TEXT, assert_same_run
from tests.shared.ranks import start_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def taught(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("taught") / "run"
    Trainer(replace(_small("supervised", dataset), num_steps=2), run_dir).train()
    return run_dir


def _small(name: str, dataset: Path) -> TrainConfig:
    cfg = shrink(demo_method(name), path=dataset, num_classes=9, text=TEXT)
    return replace(
        cfg, device="cpu", num_threads=1, num_steps=6, data=replace(cfg.data, batch_size=8)
    )


def _cached(dataset: Path, taught: Path, cache: Path | None, name: str = "radio") -> TrainConfig:
    """Views that are the same at every step; cells and pictures of a teacher."""
    cfg = _small(name, dataset)
    kept = None if cache is None else str(cache)
    return replace(
        cfg,
        data=replace(cfg.data, augment=False),
        objective=replace(cfg.objective, teacher=str(taught), teacher_cache=kept),
    )


def _fill(
    cfg: TrainConfig,
    rank: int = 0,
    size: int = 1,
    precision: Any = "fp32",
    on_progress: Callable[[], None] = lambda: None,
) -> tuple[CachedFeatures, Teacher, Loader]:
    assert cfg.objective.teacher is not None
    teacher = load_teacher(cfg.objective.teacher, cfg.vision)
    loader = Loader(cfg.data)
    arithmetic = resolve_precision(capabilities_of(CPU), [], precision, "torch", compiled=False)
    world = World(CPU, rank, size)
    found = cache_teachers(cfg, {"frozen": teacher}, loader, world, arithmetic, on_progress)
    return found["frozen"], teacher, loader


@contextmanager
def as_in_a_step(precision: str) -> Iterator[None]:
    """Arithmetic of a step on this CPU."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with low, fast_cpu_products(CPU, dtype):
        yield


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_they_are_the_teachers_forward_to_the_bit(
    backend: Any, precision: str, dataset: Path, taught: Path, tmp_path: Path
) -> None:
    cfg = _cached(dataset, taught, tmp_path / "cache")
    cfg = replace(cfg, data=replace(cfg.data, backend=backend))
    stored, teacher, loader = _fill(cfg, precision=precision)
    seen = 0
    for batch in loader.fixed_views(np.arange(loader.num_rows)):
        with as_in_a_step(precision):
            expected = encode(teacher, batch.global_views[0])
        found = stored.take(batch.position.numpy())
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert not torch.equal(found[0], found[1])
        seen += len(found)
    assert seen == loader.num_rows == stored.num_rows
    loader.features = {"frozen": stored}
    batch = next(loader)
    with as_in_a_step(precision):
        for view in batch.global_views:
            assert torch.equal(batch.features["frozen"], encode(teacher, view))
    assert batch.features["frozen"] is batch.to("cpu").features["frozen"]
    loader.close()


@pytest.mark.parametrize("name", ["radio", "milan"])
def test_a_run_that_reads_them_is_the_run_that_encodes(
    name: str, dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(_cached(dataset, taught, None, name), tmp_path / "encodes").train()
    cfg = _cached(dataset, taught, tmp_path / "cache", name)
    Trainer(cfg, tmp_path / "fills").train()
    assert_same_run(tmp_path / "encodes", tmp_path / "fills")
    calls = _count_calls(monkeypatch)
    trainer = Trainer(cfg, tmp_path / "reads")
    assert calls == [1]  # of the blank picture, by which the width is known
    trainer.train()
    assert calls == [1]
    assert_same_run(tmp_path / "encodes", tmp_path / "reads")


def _count_calls(monkeypatch: pytest.MonkeyPatch, most: int = 10**9) -> list[int]:
    """The pictures of each forward pass of a teacher; the one past `most` of them fails."""
    calls: list[int] = []
    forward: Callable[[Teacher, torch.Tensor], torch.Tensor] = Teacher.encode_cells

    def counted(self: Teacher, images: torch.Tensor) -> torch.Tensor:
        if sum(calls) + len(images) > most:
            raise KeyboardInterrupt
        calls.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Teacher, "encode_cells", counted)
    return calls


def test_a_start_that_was_stopped_goes_on(
    dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "ROWS_A_FILE", 10)
    whole, _, loader = _fill(_cached(dataset, taught, tmp_path / "whole"))
    cfg = _cached(dataset, taught, tmp_path / "part")
    with monkeypatch.context() as stopping:
        _count_calls(stopping, most=1 + 24)
        with pytest.raises(KeyboardInterrupt):
            _fill(cfg)
    (folder,) = (tmp_path / "part").iterdir()
    done = sorted(path.name for path in folder.iterdir())
    assert done == ["000000.bin", "000001.bin", "features.json"]  # 24 rows were encoded
    calls = _count_calls(monkeypatch)
    told: list[int] = []
    part, _, _ = _fill(cfg, on_progress=lambda: told.append(len(calls)))
    assert sum(calls) == 1 + loader.num_rows - 20
    assert told == list(range(2, len(calls) + 1))  # after each batch; the first encodes nothing
    assert part.folder.name == whole.folder.name
    files = sorted(path.name for path in whole.folder.iterdir())
    assert files == sorted(path.name for path in part.folder.iterdir()) and len(files) > 3
    for file in files:
        assert (whole.folder / file).read_bytes() == (part.folder / file).read_bytes()


def test_ranks_write_different_files_of_one_folder(
    dataset: Path, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "ROWS_A_FILE", 10)
    whole, _, _ = _fill(_cached(dataset, taught, tmp_path / "whole"))
    cfg = _cached(dataset, taught, tmp_path / "both")
    with pytest.raises(FileNotFoundError, match=r"that all ranks see, rank 0 does not.*000001.bin"):
        _fill(cfg, 0, 2)  # the other one has not come
    both, _, _ = _fill(cfg, 1, 2)
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (both.folder / path.name).read_bytes()


def _work(rank: int, cfg: TrainConfig, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = Trainer(cfg, folder / "run")
    trainer.train()
    dist.destroy_process_group()


@pytest.mark.matrix
def test_two_ranks_train_on_them(dataset: Path, taught: Path, tmp_path: Path) -> None:
    cfg = _cached(dataset, taught, tmp_path / "cache")
    cfg = replace(cfg, data=replace(cfg.data, batch_size=4))
    start_ranks(_work, (cfg, tmp_path), 2)
    plain = replace(cfg, objective=replace(cfg.objective, teacher_cache=None))
    (tmp_path / "plain").mkdir()
    start_ranks(_work, (plain, tmp_path / "plain"), 2)
    assert_same_run(tmp_path / "run", tmp_path / "plain" / "run")


def test_a_folder_is_of_weights_view_data_and_arithmetic(
    dataset: Path, taught: Path, tmp_path: Path
) -> None:
    cfg = _cached(dataset, taught, tmp_path)
    names = [_fill(cfg)[0].folder.name, _fill(cfg)[0].folder.name]
    linear = replace(cfg.data.global_views, interpolation="linear")
    names.append(_fill(replace(cfg, data=replace(cfg.data, global_views=linear)))[0].folder.name)
    names.append(_fill(replace(cfg, data=replace(cfg.data, split="heldout")))[0].folder.name)
    names.append(_fill(cfg, precision="bf16")[0].folder.name)
    Trainer(_small("supervised", dataset), tmp_path / "other").train()
    other = replace(cfg, objective=replace(cfg.objective, teacher=str(tmp_path / "other")))
    names.append(_fill(other)[0].folder.name)
    assert names[0] == names[1] and len(set(names)) == 5


def test_a_file_of_another_size_is_named(dataset: Path, taught: Path, tmp_path: Path) -> None:
    stored, _, _ = _fill(_cached(dataset, taught, tmp_path))
    file = stored.path(0)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"teacher_cache: expected \d+ bytes, got \d+ in .*: delete"
    ):
        replace(stored, _files={}).take(np.array([0]))


def test_flops_and_memory_know_that_no_teacher_runs(
    dataset: Path, taught: Path, tmp_path: Path
) -> None:
    encodes, reads = (_cached(dataset, taught, cache) for cache in (None, tmp_path))
    before, after = step_flops(encodes), step_flops(reads)
    assert before.pop(TARGET).forward > 0 and before == after
    peaks = [sum(trace(cfg, bf16=False).peak.values()) for cfg in (encodes, reads)]
    vision = TrainConfig.load(taught / "config.json").vision
    held = 4 * reads.data.batch_size * reads.vision.grid**2 * vision.dim
    assert peaks[1] - peaks[0] == held  # at the peak, in the backward pass, no teacher is at work


def test_what_it_is_for(dataset: Path, taught: Path, tmp_path: Path) -> None:
    cfg = _cached(dataset, taught, tmp_path)
    with pytest.raises(ValueError, match=r"data.augment: .*set --data.no-augment"):
        replace(cfg, data=replace(cfg.data, augment=True))
    with pytest.raises(ValueError, match=r"data.mixture: expected none with objective.teacher_cac"):
        replace(cfg, data=replace(cfg.data, mixture=("a:b:1", "c:d:1")))
    with pytest.raises(ValueError, match=r"objective.teacher_cache: expected none without a term"):
        replace(cfg, objective=replace(cfg.objective, terms=demo_method("mae").objective.terms))
    with pytest.raises(ValueError, match="data.augment: expected False for views that are fixed"):
        next(Loader(replace(cfg.data, augment=True)).fixed_views(np.arange(3)))
