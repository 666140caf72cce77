"""The check of DALI on a GPU, on the CPU's backend: it passes, and sees each fault planted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.pipelines.batch import Batch
from m3i_fast.pipelines.loader import Loader
from m3i_fast.pipelines.sources import synthetic
from scripts.gpu.programs import dali_check as check

PROGRAM = Path(check.__file__)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fewer and smaller pictures than the program's."""
    out = tmp_path_factory.mktemp("data") / "synthetic"
    return synthetic.build(out, num_samples=32, size_hw=(60, 80), num_merges=20)


def batches(data: Path) -> Iterator[Batch]:
    small = replace(check.config(data).global_views, size=24)
    return Loader(replace(check.config(data), batch_size=4, global_views=small))


def test_it_passes_on_the_cpu() -> None:
    done = subprocess.run([sys.executable, PROGRAM, "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line.partition(" ")[2]) for line in done.stdout.splitlines()]
    assert len(found) == 9 and all(each["holds"] for each in found)


def reusing_buffers(made: Iterator[Batch], number: int) -> Iterator[Batch]:
    """Hand out views in `number` buffers that are used in turn, as a pipeline that owns them."""
    buffers: list[torch.Tensor] = []
    for index, batch in enumerate(made):
        view = batch.global_views[0]
        if len(buffers) < number:
            buffers.append(view.clone())
        buffer = buffers[index % number]
        buffer.copy_(view)
        yield replace(batch, global_views=(buffer, *batch.global_views[1:]))


@pytest.mark.parametrize("number", [1, 2, check.PREFETCH])
def test_a_batch_that_is_overwritten_while_it_is_held_is_seen(data: Path, number: int) -> None:
    assert check.overwritten_while_held(batches(data)) == 0
    changed = check.overwritten_while_held(reusing_buffers(batches(data), number))
    assert changed == check.BATCHES - number  # all but the last ones


def test_a_batch_of_which_a_part_is_not_written_anew_is_seen(data: Path) -> None:
    """As where a pipeline takes back a buffer that it counts on: the poison shows through."""

    def keeping_rows(made: Iterator[Batch]) -> Iterator[Batch]:
        last: torch.Tensor | None = None
        for batch in made:
            view = batch.global_views[0]
            if last is not None:
                view[-1] = last[-1]
            last = view
            yield batch

    assert check.spoilt_by_poison(batches(data), batches(data)) == 0
    assert check.spoilt_by_poison(keeping_rows(batches(data)), batches(data)) == check.BATCHES - 1


def test_another_batch_after_the_drop_is_seen(data: Path) -> None:
    assert check.spoilt_after_drop(batches(data), batches(data), "cpu") == 0
    late = batches(data)
    next(late)
    assert check.spoilt_after_drop(late, batches(data), "cpu") == check.BATCHES


def test_the_bounds_of_pictures_are_of_a_mean_and_of_a_share() -> None:
    picture = torch.randint(0, 200, (2, 3, 50, 50), dtype=torch.uint8)
    assert check.levels_apart(picture, picture) == (0.0, 0.0)
    assert check.levels_apart(picture, picture + 3) == (3.0, 3.0)
    few = picture.clone()
    few.flatten()[:5] += 50  # of 15,000
    mean, most = check.levels_apart(picture, few)
    assert 0 < mean < 0.1 and most == 0
    few.flatten()[:30] += 20
    assert check.levels_apart(picture, few)[1] >= 20


def test_pillows_squares_are_of_the_samples_that_are_asked(data: Path) -> None:
    squares = check.squares_by_pillow(data, [3, 0])
    assert squares.shape == (2, 3, check.IMAGE, check.IMAGE)
    again = check.squares_by_pillow(data, [0, 3])
    assert torch.equal(squares, again.flip(0)) and not torch.equal(squares[0], squares[1])


def test_a_picture_that_depends_on_its_batch_is_seen(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = check.crops_in_batches

    def by_batch(path: Path, device_id: int | None, batch_size: int, exact: bool) -> torch.Tensor:
        crops = right(path, device_id, batch_size, exact)
        crops[3, 0, 0, 0] ^= int(batch_size == check.BATCH)
        return crops

    monkeypatch.setattr(check, "crops_in_batches", by_batch)
    assert list(check.check_batches(data, "cpu")) == [False, True]  # equal; within levels
