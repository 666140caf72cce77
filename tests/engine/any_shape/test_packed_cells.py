"""Mixing, masks and terms of cells on views of any shape: squares train as squares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.open_loader import open_loader
from m3i_fast.engine.trainer import Trainer
from m3i_fast.objectives.step_context import BatchWeight
from m3i_fast.observe.metrics import read_jsonl
from m3i_fast.pipelines.any_shape.batch import PackedBatch
from tests.engine.any_shape.packed_work import Case, run, work
from tests.engine.any_shape.test_packed_training import trained
from tests.shared.engine.packed_run import (
    in_double,
    of_squares,
    packed_in_double_precision,
    packed_run,
    split,
)
from tests.shared.engine.small_run import assert_same_run
from tests.shared.ranks import start_ranks

SQUARES = "mae", "siameseim", "ibot", "dinov2", "m3i"
MORE = (
    *("dinov3", "mixmim", "data2vec", "siameseim_pixel", "msn", "masked_global"),
    *("novel_view", "autoencoder", "tips"),
)
SLOW = pytest.mark.matrix


def _train_as_squares(cfg: TrainConfig, tmp_path: Path) -> None:
    squares, packed = of_squares(cfg, 8)
    expected = trained(squares, tmp_path / "squares", double=True)
    got = trained(packed, tmp_path / "packed", double=True)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            got[key], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=key: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", SQUARES)
def test_squares_train_as_squares(name: str, dataset: Path, tmp_path: Path) -> None:
    _train_as_squares(packed_run(dataset, name), tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("name", MORE)
def test_squares_train_as_squares_by_more_methods(name: str, dataset: Path, tmp_path: Path) -> None:
    _train_as_squares(packed_run(dataset, name), tmp_path)


def _changed(cfg: TrainConfig, **mixing: object) -> TrainConfig:
    mixed = replace(cfg.objective.mixing, **mixing)
    return replace(cfg, objective=replace(cfg.objective, mixing=mixed))


MIXED: list[tuple[str, dict[str, object]]] = [
    ("m3i", {"num_images": 3, "pattern": "rectangle", "min_contrast": 0, "num_queries": 5}),
    ("m3i", {"mode": "own_image", "mask_per_batch": True, "dense_fraction": 0.5}),
    ("siameseim", {"num_queries": 3, "mask_block": 1, "final_mask_ratio": 0.9}),
    ("dino", {"mode": "own_image"}),  # both views of two images, each with draws of its own
]


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_squares_are_mixed_and_asked_as_squares(number: int, dataset: Path, tmp_path: Path) -> None:
    """Three images, a cell left over; queries drawn; stochastic depth; a prefix; rotary."""
    name, mixing = MIXED[number]
    cfg = _changed(packed_run(dataset, name), **mixing)
    assert isinstance(cfg.vision, ViTConfig)
    vision = replace(
        cfg.vision,
        class_token=True,
        drop_path_rate=0.5,
        drop_path_mode="mask",
        position="rotary" if number else "absolute",
    )
    squares, packed = of_squares(replace(cfg, vision=vision), 12)
    expected = trained(squares, tmp_path / "squares", double=True)
    got = trained(packed, tmp_path / "packed", double=True)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-10, atol=1e-10, msg=key)


# ---- Pictures of unequal grids, one by one -------------------------------------------------------


def _alone(cfg: TrainConfig) -> TrainConfig:
    """The run without what rows of several pictures have in common."""
    terms = tuple(
        replace(
            term,
            regulariser={"covariance": "stop_gradient", "joint_sinkhorn": "centring"}.get(
                term.regulariser, term.regulariser
            ),
            standardise="none",
        )
        for term in cfg.objective.active_terms
        if term.target not in ("summary", "caption")  # KoLeo and CLIP are of pairs of pictures
    )
    return replace(cfg, objective=replace(cfg.objective, terms=terms))


def _losses_and_gradients(
    trainer: Trainer, batch: PackedBatch
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    objective, step = trainer.objective, trainer.train_step
    mix = step.draw_mix(batch)
    loss, metrics = step.model(
        batch, mix, step._stage, monitor=False, measure=False, weight=BatchWeight()
    )
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return {n: v.clone() for n, v in metrics.items() if n.startswith("loss/")}, found


@pytest.mark.parametrize(
    "name",
    [
        "siameseim",
        "dinov3",
        "m3i",
        *(pytest.param(n, marks=SLOW) for n in ("mae", "ibot", "dinov2")),
    ],
)
def test_a_batch_is_the_mean_of_its_pictures_one_by_one(
    name: str, dataset: Path, tmp_path: Path
) -> None:
    cfg = _alone(packed_run(dataset, name))
    with packed_in_double_precision():
        trainer, loader = Trainer(cfg, tmp_path / "run"), open_loader(cfg)
        batch = next(loader)
        assert isinstance(batch, PackedBatch)
        batch = replace(in_double(batch), label=batch.sample_id % 9)
        assert len(set(batch.lengths(0))) > 2
        for module in trainer.objective.modules():
            if hasattr(module, "centre"):  # moved by each batch that is seen
                module.train(False)
        losses, gradients = _losses_and_gradients(trainer, batch)
        images = cfg.objective.mixing.images_per_input
        parts = split(batch, [images] * (batch.batch_size // images))
        singles = [_losses_and_gradients(trainer, replace(part, step_counts=())) for part in parts]
        trainer.close()
        loader.close()
    for name_of, value in losses.items():
        mean = torch.stack([single[name_of] for single, _ in singles]).mean()
        torch.testing.assert_close(value, mean, rtol=1e-10, atol=1e-10, msg=name_of)
    for name_of, gradient in gradients.items():
        mean = torch.stack([of_each[name_of] for _, of_each in singles]).mean(0)
        torch.testing.assert_close(gradient, mean, rtol=1e-10, atol=1e-10, msg=name_of)


# ---- Ranks ---------------------------------------------------------------------------------------


def _case(dataset: Path, name: str, **options: object) -> Case:
    """A method without KoLeo, whose rows are those of a rank."""
    cfg = _changed(packed_run(dataset, name), dense_fraction=1.0)
    terms = tuple(t for t in cfg.objective.terms if t.target != "summary")
    cfg = replace(cfg, objective=replace(cfg.objective, terms=terms))
    return Case(name, cfg, **options)  # type: ignore[arg-type]


def _cases(dataset: Path) -> list[Case]:
    return [
        _case(dataset, "siameseim"),
        _case(dataset, "m3i", all_labelled=True),
        _case(dataset, "ibot"),
        _case(dataset, "dinov3"),
        _case(dataset, "mae", accumulate=2, shard=-1),
    ]


FIRST = 3
"""Cases that are run with the fast tests; the others follow in processes of their own."""


def _ranks(cases: list[Case], folder: Path) -> Path:
    start_ranks(work, (cases, 2, folder), 2)
    return folder


@pytest.fixture(scope="module")
def two(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ranks(_cases(dataset)[:FIRST], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two_more(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _ranks(_cases(dataset)[FIRST:], tmp_path_factory.mktemp("two_more"))


@pytest.mark.parametrize("number", range(FIRST))
def test_two_unequal_ranks_equal_one(number: int, two: Path, dataset: Path, tmp_path: Path) -> None:
    _hold(_cases(dataset)[number], two, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("number", range(FIRST, 5))
def test_two_unequal_ranks_equal_one_in_more_cases(
    number: int, two_more: Path, dataset: Path, tmp_path: Path
) -> None:
    _hold(_cases(dataset)[number], two_more, tmp_path)


def _hold(case: Case, ranks: Path, tmp_path: Path) -> None:
    expected = run(case, 2, tmp_path, None)
    for rank in range(2):
        found = torch.load(ranks / f"{case.name}-{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m3i", pytest.param("dinov2", marks=SLOW)])
def test_twenty_steps_run_and_a_resume_is_exact(name: str, dataset: Path, tmp_path: Path) -> None:
    cfg = replace(packed_run(dataset, name, checkpoint_every=10, log_every=1), num_steps=20)
    Trainer(cfg, tmp_path / "whole").train()

    def end_at_fifteen(step: int, values: dict[str, float]) -> None:
        if step == 15:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Trainer(cfg, tmp_path / "parts").train(end_at_fifteen)
    Trainer(cfg, tmp_path / "parts", resume=True).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    rows = [row for row in read_jsonl(tmp_path / "whole" / "metrics.jsonl") if "loss/total" in row]
    assert rows[-1]["step"] == 20 and all(row["loss/total"] == row["loss/total"] for row in rows)
