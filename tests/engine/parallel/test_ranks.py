"""Ranks that share a run equal one process: DDP, FSDP2, HSDP, over gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import dinov3_h_plus
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.engine.run.data_fields import take_data_fields
from m3i_fast.engine.trainer import Trainer
from m3i_fast.recipes import demo, demo_method, shrink
from tests.engine.parallel.parallel_work import Case, run, work
from tests.shared.engine.small_run import TEXT
from tests.shared.pipelines.with_regions import with_regions

# Batch norms, queues, Sinkhorn, centres, prototypes, a snapshot, captioner, no EMA encoder.
OTHERS = ("moco_v3", "byol", "dinov3", "mae", "densecl", "siglip2")
# DINOv2 without KoLeo is iBOT.
ON_FOUR = ("ibot", "dinov3", "tips", "siglip2", "cappa", "coca", "locca", "lejepa", "radio")
GATE = ("m3i, shard 1", "m3i, shard -1")
BATCH_NORMS = ("moco_v3", "byol", "lejepa", "radio")
Found = dict[str, Tensor]


def _config(dataset: Path, cfg: TrainConfig) -> TrainConfig:
    """Eight pictures a step, all of them asked; AdamW, which may be spread."""
    cfg = shrink(cfg, path=dataset, num_classes=9, text=TEXT)
    mixing = replace(cfg.objective.mixing, dense_fraction=1.0)
    return replace(
        cfg,
        data=replace(cfg.data, batch_size=8),
        optim=replace(cfg.optim, matrices="adamw"),
        objective=replace(cfg.objective, mixing=mixing),
    )


def _method(name: str) -> TrainConfig:
    """A method without KoLeo, which is of the rows of one rank, as its authors have it."""
    cfg = demo_method(name)
    terms = tuple(term for term in cfg.objective.terms if term.regulariser != "koleo")
    return replace(cfg, objective=replace(cfg.objective, terms=terms))


def _cases(dataset: Path) -> dict[int, list[Case]]:
    """By the number of ranks."""
    m3i = _config(dataset, demo())
    balanced = replace(
        m3i,
        objective=replace(m3i.objective, balance=BalanceConfig(mode="gradient_norm", every=2)),
    )
    vision = m3i.vision
    shape = {"dim": vision.dim, "depth": vision.depth, "num_heads": vision.num_heads}
    sized = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    frozen = replace(m3i, optim=replace(m3i.optim, freeze_encoder=True))
    dinov3 = replace(m3i, vision=dinov3_h_plus(**shape, **sized))
    return {
        2: [
            *(Case(f"m3i, shard {s}", m3i, s, num_steps=20) for s in (1, -1)),
            Case("m3i of dinov3_h_plus", dinov3, -1),
            *(Case(f"m3i in fp32, shard {s}", m3i, s, 20, double=False) for s in (1, -1)),
            *(Case(f"m3i by chunks, shard {s}", m3i, s, chunk=3) for s in (1, -1)),
            Case("m3i of a frozen encoder, shard 1", frozen, 1),
            Case("m3i of a frozen encoder, shard -1", frozen, -1, chunk=3),
            Case("m3i balanced", balanced, 1, num_steps=4),
            *(Case(name, _config(dataset, _method(name)), -1) for name in OTHERS),
        ],
        4: [Case(f"m3i, shard {s}", m3i, s, num_steps=20) for s in (2, -1)],
    }


def _on_four(dataset: Path, teacher: Path, regions: Path) -> list[Case]:
    """Two pictures a rank; of PHI-S's steps the last has a basis of the first two's statistics."""
    cases = []
    for name in ON_FOUR:
        cfg = _config(dataset, _method(name))
        cfg = replace(cfg, objective=replace(cfg.objective, phi_s_steps=2))
        if name == "radio":
            cfg = replace(cfg, objective=replace(cfg.objective, teacher=str(teacher)))
        if cfg.columns:
            cfg = take_data_fields(replace(cfg, data=replace(cfg.data, path=regions)))
        cases.append(Case(name, cfg, -1))
    return cases


@pytest.fixture(scope="module")
def teacher(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose encoder teaches RADIO."""
    run_dir = tmp_path_factory.mktemp("taught") / "teacher"
    cfg = replace(_config(dataset, demo_method("supervised")), num_steps=2)
    Trainer(cfg, run_dir).train()
    return run_dir


@pytest.fixture(scope="module")
def regions(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set with regions."""
    return with_regions(dataset, tmp_path_factory.mktemp("regions") / "data")


@pytest.fixture(scope="module")
def four_ranks(
    dataset: Path, teacher: Path, regions: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What each of four ranks found of every method."""
    folder = tmp_path_factory.mktemp("four")
    cases = _on_four(dataset, teacher, regions)
    mp.start_processes(work, (cases, 4, folder), nprocs=4, start_method="spawn")
    return folder


@pytest.fixture(scope="module")
def two_ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two ranks found of the cases at the gate."""
    folder = tmp_path_factory.mktemp("ranks")
    _start(2, [case for case in _cases(dataset)[2] if case.name in GATE], folder)
    return folder


@pytest.fixture(scope="module")
def ranks(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank found of every other case."""
    folder = tmp_path_factory.mktemp("ranks")
    _start(2, [case for case in _cases(dataset)[2] if case.name not in GATE], folder)
    _start(4, _cases(dataset)[4], folder)
    return folder


def _start(num_ranks: int, cases: list[Case], folder: Path) -> None:
    out = folder / str(num_ranks)
    out.mkdir()
    mp.start_processes(work, (cases, num_ranks, out), nprocs=num_ranks, start_method="spawn")


def _compared(
    ranks: Path, dataset: Path, num_ranks: int, name: str, tmp_path: Path
) -> tuple[Found, list[Found]]:
    """Of the one process, of each rank."""
    [case] = [case for case in _cases(dataset)[num_ranks] if case.name == name]
    files = [ranks / str(num_ranks) / f"{name}-{rank}.pt" for rank in range(num_ranks)]
    found = [torch.load(file, weights_only=True) for file in files]
    return run(case, num_ranks, tmp_path, None), found


def _is_rounding(gradient: Tensor) -> Tensor:
    """Whether each element is too small to be more; one that is 0 belongs to what was not seen."""
    size = gradient.abs()
    return (size > 0) & (size < max(1e-12, 1e-10 * float(size.max())))


def _worst(ours: Found, theirs: Found, kind: str) -> float:
    """The largest error of any tensor of a kind, relative to the largest of its values.

    Of values below 0.01, which a few of AdamW's steps change as a whole, relative to that. Of the
    state without what has a gradient that is nothing but rounding, such as biases in front of a
    batch norm, or of keys beside those of queries and values, since AdamW makes whole steps of it;
    it may be exactly 0 in one of the two.
    """
    assert ours.keys() == theirs.keys()
    learnt = {
        f"state/{prefix}{name.removeprefix('gradient/')}": ~(
            _is_rounding(value) | _is_rounding(ours[name])
        )
        for name, value in theirs.items()
        for prefix in ("", "target_encoder.")  # whose average follows
        if name.startswith("gradient/")
    }
    errors = [
        float(((ours[name] - value).abs() * learnt.get(name, True)).max())
        / max(float(value.abs().max()), 1e-2)
        for name, value in theirs.items()
        if name.startswith(kind)
    ]
    assert errors, kind
    return max(errors)


@pytest.mark.parametrize("name", GATE)
def test_two_ranks_equal_one_process(
    name: str, two_ranks: Path, dataset: Path, tmp_path: Path
) -> None:
    """M3I over twenty steps, with two terms whose softmax is over all ranks' rows."""
    _assert_equal(*_compared(two_ranks, dataset, 2, name, tmp_path), name)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("num_ranks", "name"),
    [(4, "m3i, shard 2"), (4, "m3i, shard -1")]
    + [(2, "m3i by chunks, shard 1"), (2, "m3i by chunks, shard -1")]
    + [(2, f"m3i of a frozen encoder, shard {shard}") for shard in (1, -1)]
    + [(2, "m3i balanced"), (2, "m3i of dinov3_h_plus")]
    + [(2, name) for name in OTHERS],
)
def test_ranks_equal_one_process(
    num_ranks: int, name: str, ranks: Path, dataset: Path, tmp_path: Path
) -> None:
    _assert_equal(*_compared(ranks, dataset, num_ranks, name, tmp_path), name)


def _assert_equal(one: Found, found: list[Found], name: str) -> None:
    for of_rank in found:
        for kind in ("gradient/", "norm", "losses"):
            assert _worst(of_rank, one, kind) < 1e-10, kind
        # What AdamW makes of rounding is in the means of the batch norms behind it.
        assert _worst(of_rank, one, "state/") < (1e-9 if name in BATCH_NORMS else 1e-10)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_equal_one_process(
    name: str, four_ranks: Path, dataset: Path, teacher: Path, regions: Path, tmp_path: Path
) -> None:
    """The whole objective of methods of several targets, with sharded weights."""
    [case] = [case for case in _on_four(dataset, teacher, regions) if case.name == name]
    files = [four_ranks / f"{name}-{rank}.pt" for rank in range(4)]
    found = [torch.load(file, weights_only=True) for file in files]
    _assert_equal(run(case, 4, tmp_path, None), found, name)


@pytest.mark.parametrize(
    ("name", "fixture"),
    [
        ("m3i", "two_ranks"),
        pytest.param("m3i by chunks", "ranks", marks=pytest.mark.distributed),
    ],
)
def test_sharded_weights_do_not_change_how_terms_are_watched(
    name: str, fixture: str, request: pytest.FixtureRequest
) -> None:
    ranks = request.getfixturevalue(fixture)
    pulls = []
    for shard, rank in ((s, r) for s in (1, -1) for r in range(2)):
        file = ranks / "2" / f"{name}, shard {shard}-{rank}.pt"
        found = torch.load(file, weights_only=True)
        pulls.append({k: float(v) for k, v in found.items() if k.startswith("pull/")})
    assert len(pulls[0]) == 4 + 6 and pulls[0]["pull/gradient/intra"] > 0
    assert pulls[:2] == [pytest.approx(of_rank, rel=1e-9) for of_rank in pulls[2:]]
    assert pulls[0] != pytest.approx(pulls[1], rel=1e-3)  # of the own rows


@pytest.mark.distributed
@pytest.mark.parametrize("shard", [1, -1])
def test_in_fp32_the_first_gradients_and_all_losses_are_equal(
    shard: int, ranks: Path, dataset: Path, tmp_path: Path
) -> None:
    """Gradients beside the whole one: a sum of which little is left has few digits of its own."""
    one, found = _compared(ranks, dataset, 2, f"m3i in fp32, shard {shard}", tmp_path)
    names = [name for name in one if name.startswith("gradient/")]
    largest = max(float(one[name].abs().max()) for name in names)
    for of_rank in found:
        errors = [float((of_rank[name] - one[name]).abs().max()) for name in names]
        assert max(errors) < 1e-6 * largest
        assert _worst(of_rank, one, "losses") < 1e-5
