"""PHI-S: its basis against scikit-learn's, statistics of parts and files, and when it moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from m3i_fast.engine.teacher import Teacher
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.methods import METHODS, radio
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.phi_s import (
    PhiStandardise,
    hadamard,
    measure,
    read_statistics,
    write_statistics,
)
from m3i_fast.recipes import demo_method
from tests.shared.small_objective import (
    NUM_CLASSES,
    TEXT,
    VISION,
    draw_small_mix,
    loss_of,
    make_batch,
    make_config,
)

DIM = 24
CELLS = METHODS["radio"].terms[1]


def rows(seed: int = 0, count: int = 300) -> Tensor:  # [count, DIM] fp64, of a tilted, far cloud
    rng = torch.Generator().manual_seed(seed)
    tilt = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9)).double()
    spread = torch.linspace(0.01, 4, DIM).double() ** 2
    return (torch.randn(count, DIM, generator=rng).double() * spread) @ tilt + 7


def fitted(x: Tensor) -> PhiStandardise:
    found = PhiStandardise(DIM, None, measure([x])).double()
    found.reset_parameters()
    return found


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 36, 60, 384, 768, 1024, 1152, 1280, 1408])
def test_a_hadamard_matrix_is_orthogonal_and_of_one_size_of_entry(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, size**-0.5))


@pytest.mark.parametrize("size", [0, 3, 6, 92])
def test_a_width_without_a_matrix_is_refused(size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"width for which a Hadamard .*got {size}; take .*running"
    ):
        PhiStandardise(size, None)


def test_every_channel_has_the_same_variance() -> None:
    x = rows()
    z = fitted(x)(x)
    covariance = torch.cov(z.T, correction=0)
    torch.testing.assert_close(covariance.diagonal(), torch.ones(DIM).double(), rtol=1e-6, atol=0)
    assert float(z.mean(0).abs().max()) < 1e-10
    assert float(torch.cov(x.T).diagonal().std()) > 1  # it was not so before


def test_it_is_one_scale_and_a_rotation() -> None:
    x = rows()
    apart = torch.pdist(fitted(x)(x)) / torch.pdist(x)
    torch.testing.assert_close(apart, apart[:1].expand_as(apart), rtol=1e-10, atol=0)
    total = torch.cov(x.T, correction=0).trace() / DIM
    torch.testing.assert_close(apart[0], total.rsqrt(), rtol=1e-10, atol=0)
    torch.testing.assert_close(fitted(x).scale, apart[0], rtol=1e-10, atol=0)


def test_its_basis_is_scikit_learns() -> None:
    x = rows()
    found = PCA().fit(x.numpy())
    components = torch.from_numpy(found.components_[::-1].copy())  # by rising eigenvalue
    scale = 1 / np.sqrt(found.explained_variance_.mean() * (len(x) - 1) / len(x))
    expected = scale * (x - torch.from_numpy(found.mean_)) @ (hadamard(DIM) @ components).T
    torch.testing.assert_close(fitted(x)(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_running_statistics_are_those_of_all_rows(dtype: torch.dtype) -> None:
    ours = PhiStandardise(DIM, None).to(dtype)
    ours.count = ours.count.double()
    steps = [rows(seed, count) for seed, count in enumerate((100, 7, 250))]
    for of_step in steps:
        x = of_step.to(dtype)
        passed = torch.cat([ours(part) for part in x.split(40)])  # several calls a step
        assert torch.equal(passed, x)  # the basis is renewed by `renew` alone
        ours.fold()
    every = torch.cat(steps)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    cov = torch.cov(every.T, correction=0)
    torch.testing.assert_close(ours.mean.double(), every.mean(0), rtol=rtol, atol=0)
    torch.testing.assert_close(
        ours.covariance.double(), cov, rtol=rtol, atol=rtol * float(cov.abs().max())
    )
    assert float(ours.count) == 357
    ours.eval()(rows(5).to(dtype))
    ours.fold()
    assert float(ours.count) == 357
    ours.renew()
    z = ours(every.to(dtype)).double()
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(DIM).double(), rtol=1e-4, atol=0)


def test_a_file_has_them(tmp_path: Path) -> None:
    x, file = rows(), tmp_path / "teacher.safetensors"
    statistics = measure(x.float().split(40))
    write_statistics(file, statistics)
    assert all(map(torch.equal, read_statistics(file, DIM), statistics))
    torch.testing.assert_close(statistics[0], x.mean(0), rtol=1e-6, atol=0)
    with pytest.raises(
        ValueError, match=r"expected mean \[32\] and .*got \[24\] and \[24, 24\] in"
    ):
        read_statistics(file, 32)
    with pytest.raises(FileNotFoundError, match="statistics: no such file: .*other"):
        read_statistics(tmp_path / "other", DIM)
    file.write_bytes(b"nothing of it")
    with pytest.raises(
        ValueError, match=r"expected a file of phi_s.write_statistics, got .*teacher"
    ):
        read_statistics(file, DIM)


def build(*terms: object, seed: int = 5, **changes: object) -> MutualInformation:
    cfg = replace(make_config("none"), terms=terms, **changes)  # type: ignore[arg-type]
    teachers = {}
    for width, name in enumerate(cfg.teachers):
        torch.manual_seed(width)
        teachers[name] = Teacher(ViT(replace(VISION, dim=32 * (width + 1))))
    torch.manual_seed(seed)
    return MutualInformation(
        cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES, teachers=teachers
    )


def take_step(model: MutualInformation, step: int) -> float:
    batch = make_batch()
    batch = replace(batch, global_views=tuple(view + 7 * step for view in batch.global_views))
    model.renew_bases(step)
    value = float(loss_of(model, batch, draw_small_mix(model.cfg, batch))[1]["loss/cells"])
    model.finish_step()
    return value


def test_when_the_basis_moves_and_when_it_stays() -> None:
    model = build(CELLS, phi_s_steps=6)
    basis = model.terms["cells"].standardise.rotation
    moved, counts = [], []
    for step in range(9):
        before = basis.clone()
        take_step(model, step)
        moved.append(not torch.equal(before, basis))
        counts.append(float(model.terms["cells"].standardise.count))
    assert [step for step, of_step in enumerate(moved) if of_step] == [1, 2, 4, 6]
    batch = make_batch()
    mix = draw_small_mix(model.cfg, batch)
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    metrics = model(encoded, targets, batch, mix, monitor=True)[1]
    scale = model.terms["cells"].standardise.scale
    assert float(metrics["monitor/cells_scale"]) == float(scale) != 1
    assert counts == [8 * 4 * min(step + 1, 6) for step in range(9)]


def test_a_model_that_is_loaded_goes_on_alike() -> None:
    whole, begun = (build(CELLS, phi_s_steps=6) for _ in range(2))
    values = [take_step(whole, step) for step in range(8)]
    assert [take_step(begun, step) for step in range(3)] == values[:3]
    resumed = build(CELLS, phi_s_steps=6, seed=6)
    resumed.load_state_dict(begun.state_dict())
    assert [take_step(resumed, step) for step in range(3, 8)] == values[3:]


def test_with_a_file_nothing_is_collected(tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * 3 + 1
    write_statistics(file, measure([x]))
    model = build(replace(CELLS, statistics=str(file)))
    of_term = model.terms["cells"].standardise
    assert {name for name, _ in of_term.named_buffers()} == {"centre", "rotation"}
    before = of_term.rotation.clone()
    take_step(model, 0)
    take_step(model, 1)
    assert torch.equal(before, of_term.rotation)
    torch.testing.assert_close(of_term(x).var(0, correction=0), torch.ones(32), rtol=1e-4, atol=0)
    with torch.device("meta"):  # as a run with sharded weights builds it
        on_meta = PhiStandardise(32, None, read_statistics(file, 32))
    on_meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(on_meta.rotation, before)


def test_radio_of_two_teachers_is_the_sum_of_radio_of_each() -> None:
    terms = radio("a", "b")
    assert [t.name for t in terms] == ["picture_1", "cells_1", "picture_2", "cells_2"]
    assert [t.target_encoder for t in terms] == ["frozen:a"] * 2 + ["frozen:b"] * 2
    model, batch = build(*terms), make_batch()
    mix = draw_small_mix(model.cfg, batch)
    together = loss_of(model, batch, mix)[1]
    for number, pair in enumerate((terms[:2], terms[2:])):
        alone = MutualInformation(
            replace(model.cfg, terms=pair),
            vision=VISION,
            text=TEXT,
            num_classes=NUM_CLASSES,
            teachers=model.teachers,
        )
        alone.load_state_dict({n: model.state_dict()[n] for n in alone.state_dict()})
        found = loss_of(alone, batch, mix)[1]
        for term in pair:
            assert torch.equal(found[f"loss/{term.name}"], together[f"loss/{term.name}"]), number


def test_what_it_is_for() -> None:
    momentum = METHODS["data2vec"].terms[0]
    with pytest.raises(
        ValueError, match=r"standardise: expected phi_s with encoder frozen .*momentum"
    ):
        replace(momentum, standardise="phi_s")
    with pytest.raises(ValueError, match=r"statistics: expected none with standardise running"):
        replace(CELLS, standardise="running", statistics="file")
    cfg = demo_method("radio")
    with pytest.raises(
        ValueError, match=r"objective.terms: expected a file of statistics for phi_s"
    ):
        replace(cfg, cuda_graphs="step", optim=replace(cfg.optim, matrices="adamw"))
