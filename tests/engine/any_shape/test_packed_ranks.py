"""Ranks and accumulated batches of unequal numbers of pictures equal one process with all of them.

In fp64, so that only rounding is left of the order of sums.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.trainer import Trainer
from m3i_fast.observe.metrics import read_jsonl
from tests.engine.any_shape.packed_work import Case, run, train, work
from tests.shared.engine.packed_run import packed_run
from tests.shared.ranks import start_ranks

# Labels, captions, InfoNCE with a batch norm, a centre.
METHODS = "supervised", "clip", "moco_v3", "dino"
# A sigmoid, NT-Xent, rows of one rank, statistics of both views, and their running correlation.
OTHERS = "siglip", "simclr", "byol", "barlow_twins", "vicreg", "unigrad"


def _regularised(dataset: Path, name: str, regulariser: str) -> Case:
    """A method with another regulariser, of which no method without masks is."""
    cfg = packed_run(dataset, name)
    (term,) = cfg.objective.terms
    term = replace(term, regulariser=regulariser, symmetric=regulariser != "queue")
    return Case(regulariser, replace(cfg, objective=replace(cfg.objective, terms=(term,))))


def _cases(dataset: Path) -> dict[int, list[Case]]:
    """By the number of ranks; those of 3 are more cases of two."""

    def of(name: str) -> Case:
        return Case(name, packed_run(dataset, name))

    supervised = packed_run(dataset, "supervised")
    return {
        2: [
            *map(of, METHODS),
            _regularised(dataset, "moco_v3", "queue"),
            _regularised(dataset, "dino", "mean_entropy"),
            Case("sharded", supervised, accumulate=2, shard=-1, all_labelled=True),
        ],
        3: [
            *map(of, OTHERS),
            *(_regularised(dataset, "dino", name) for name in ("sinkhorn", "joint_sinkhorn")),
            Case("accumulated", supervised, accumulate=2, all_labelled=True),
            Case("dino, sharded", packed_run(dataset, "dino"), shard=-1),
        ],
        4: list(map(of, METHODS)),
    }


def _ranks(dataset: Path, folder: Path, key: int) -> Path:
    cases, num_ranks = _cases(dataset)[key], 4 if key == 4 else 2
    start_ranks(work, (cases, num_ranks, folder), num_ranks)
    return folder


@pytest.fixture(scope="module")
def two(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ranks(dataset, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def two_more(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ranks(dataset, tmp_path_factory.mktemp("two_more"), 3)


@pytest.fixture(scope="module")
def four(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ranks(dataset, tmp_path_factory.mktemp("four"), 4)


def _hold(case: Case, ranks: Path, num_ranks: int, out: Path) -> None:
    expected = run(case, num_ranks, out, None)
    for rank in range(num_ranks):
        found = torch.load(ranks / f"{case.name}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("num_batches_tracked"):
                continue
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(METHODS) + 3))
def test_two_ranks_equal_one(number: int, two: Path, dataset: Path, tmp_path: Path) -> None:
    _hold(_cases(dataset)[2][number], two, 2, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(OTHERS) + 4))
def test_two_ranks_equal_one_in_more_cases(
    number: int, two_more: Path, dataset: Path, tmp_path: Path
) -> None:
    _hold(_cases(dataset)[3][number], two_more, 2, tmp_path)


@pytest.mark.distributed
@pytest.mark.parametrize("number", range(len(METHODS)))
def test_four_ranks_equal_one(number: int, four: Path, dataset: Path, tmp_path: Path) -> None:
    _hold(_cases(dataset)[4][number], four, 4, tmp_path)


@pytest.mark.parametrize("number", [2, 3])
def test_accumulated_batches_equal_one(number: int, dataset: Path, tmp_path: Path) -> None:
    cfg = packed_run(dataset, "supervised")
    case = Case("accumulated", cfg, accumulate=number, all_labelled=True)
    found = run(case, 1, tmp_path / "parts", 0)
    expected = run(case, 1, tmp_path / "whole", None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.distributed
def test_a_run_of_two_ranks_is_that_of_two_batches_and_goes_on_as_it(
    dataset: Path, tmp_path: Path
) -> None:
    """Loader, log and checkpoints included: the second half is taken by one rank."""
    cfg = replace(packed_run(dataset, "supervised", checkpoint_every=3), num_steps=3)
    start_ranks(train, (cfg, 2, tmp_path), 2)
    alone = replace(cfg, num_steps=6, parallel=ParallelConfig(accumulate=2))
    Trainer(alone, tmp_path / "alone").train()
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    Trainer(replace(alone, num_steps=3), tmp_path / "three").train()
    expected = read_jsonl(tmp_path / "three" / "metrics.jsonl")[-1]
    for name in ("batch/images", "batch/tokens", "members/category", "loss/total"):
        assert first[name] == pytest.approx(expected[name], rel=1e-5), name
    resumed = Trainer(alone, tmp_path / "run", resume=True, new_num_steps=True)
    samples = resumed.train_step.samples_taken
    assert (resumed.step, samples) == (3, round(3 * 2 * first["batch/images"]))
    resumed.train()
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    whole = read_jsonl(tmp_path / "alone" / "metrics.jsonl")[-1]
    assert last["step"] == whole["step"] == 6
    assert last["batch/images"] == whole["batch/images"] != first["batch/images"]
    assert last["batch/tokens"] == whole["batch/tokens"]
