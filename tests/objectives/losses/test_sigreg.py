"""SIGReg against its formula in fp64 and lightly's, its directions, and what it keeps in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.loss.lejepa_loss import LeJEPALoss
from lightly.loss.lejepa_loss import SIGReg as LightlySigReg
from torch import Tensor

from m3i_fast.benchmarks.core.random_batch import draw_batch
from m3i_fast.config import TextConfig
from m3i_fast.engine.train_step import draw_step_mix
from m3i_fast.keyed_draws import Purpose, finalise, words
from m3i_fast.objectives.losses.sigreg import LeJepa, SigReg, draw_directions, sigreg
from m3i_fast.objectives.mixing import draw_slice_key
from m3i_fast.recipes import demo_method, shrink
from tests.objectives.losses.oracles import draw, gradient

V, N, E, M = 3, 24, 10, 40
KEY = torch.tensor(-(2**62) + 12345)
A = draw_directions(KEY, E, M).double()


def rows(seed: int = 0) -> Tensor:  # neither centred nor even
    return draw(V, N, E, seed=seed) * torch.linspace(0.2, 1.5, E).double() + 0.3


def by_the_formula(z: Tensor) -> Tensor:
    """Algorithm 1 with complex exponentials, on both signs of t, by torch's trapezoidal rule."""
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal = torch.exp(-(t**2) / 2)
    values = []
    for view in z:
        for direction in A.T:
            phi = torch.exp(1j * t[:, None] * (view @ direction)[None]).mean(1)
            error = (phi - normal).abs().square() * normal
            values.append(len(view) * torch.trapezoid(error, t))
    return torch.stack(values).mean()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_it_is_the_papers_formula(dtype: torch.dtype, bound: float) -> None:
    z = rows()
    expected = by_the_formula(z)
    ours = sigreg(z.to(dtype), A)
    assert ours.dtype == dtype
    assert float(ours) == pytest.approx(float(expected), rel=bound)
    slope = gradient(lambda x: sigreg(x, A), z.to(dtype)).double()
    reference = gradient(by_the_formula, z)
    assert float((slope - reference).norm() / reference.norm()) < bound
    assert torch.autograd.gradcheck(lambda x: sigreg(x, A[:, :3]), z[:1, :4].requires_grad_())


def test_it_is_lightlys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LightlySigReg, "_generate_unit_vectors", lambda *_, **__: A)
    z = rows()
    assert float(sigreg(z, A)) == pytest.approx(float(LightlySigReg()(z)), rel=1e-6)
    centre = z[:2].mean(0).expand_as(z)
    theirs = LeJEPALoss()(global_proj=z[:2], local_proj=z[2:])
    ours = LeJepa(0.05, M, None)(z, centre, KEY)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_directions_are_the_keyed_draws_of_a_step() -> None:
    key = draw_slice_key(7, seed=3)
    word = words(np.array([7]), 1, seed=3, purpose=Purpose.SLICES)[0, 0]
    assert int(key) == word.view(np.int64)
    steps = np.uint64(0x9E3779B97F4A7C15) * np.arange(1, 4, dtype=np.uint64)
    drawn = finalise(word + steps)
    radius = np.sqrt(-2 * np.log(((drawn >> np.uint64(40)) + np.uint64(1)) * 2.0**-24))
    turn = 2 * np.pi * ((drawn >> np.uint64(8)) & np.uint64(2**24 - 1)) * 2.0**-24
    normal = np.concatenate([radius * np.cos(turn), radius * np.sin(turn)]).reshape(3, 2)
    expected = normal / np.linalg.norm(normal, axis=0)
    np.testing.assert_allclose(draw_directions(key, 3, 2), expected, rtol=1e-5, atol=1e-6)


def test_directions_are_even_over_the_sphere() -> None:
    many = draw_directions(KEY, 5, 20_000).double()
    torch.testing.assert_close(many.norm(dim=0), torch.ones(20_000).double())
    assert float(many.mean(1).abs().max()) < 0.015  # 5 deviations of 1 / sqrt(5 x 20,000)
    assert float((many @ many.T / 20_000 - torch.eye(5) / 5).abs().max()) < 0.01
    assert torch.equal(draw_directions(KEY, E, M), A.float())
    assert not torch.equal(draw_directions(KEY + 1, E, M), A.float())


def test_the_key_is_of_the_step_and_the_seed() -> None:
    text = TextConfig(vocab_size=90, context_length=24, dim=32, depth=1, num_heads=2)
    cfg = shrink(demo_method("lejepa"), path=Path("nowhere"), num_classes=9, text=text)
    batch = draw_batch(cfg, seed=0)

    def key(seed: int, first: int) -> int:
        mix = draw_step_mix(replace(cfg, seed=seed), batch, first_position=first, step=0)
        assert mix.slice_key is not None
        return int(mix.slice_key)

    assert key(0, 0) == key(0, 0)
    assert len({key(0, 0), key(0, 64), key(1, 0), key(1, 64)}) == 4
    dino = shrink(demo_method("dino"), path=Path("nowhere"), num_classes=9, text=text)
    assert draw_step_mix(dino, batch, first_position=0, step=0).slice_key is None


def test_its_least_value_is_an_isotropic_gaussian() -> None:
    """Descent from a flat, shifted cloud ends with a mean of 0 and a covariance of nearly 1."""
    z = (draw(1, 256, 4) * torch.tensor([0.2, 0.5, 1.0, 1.5]).double() + 0.5).requires_grad_()
    descent = torch.optim.Adam([z], lr=0.05)
    for step in range(400):
        descent.zero_grad()
        SigReg(16, None)(z, KEY + step).backward()
        descent.step()
    found = z.detach()[0]
    assert float(found.mean(0).norm()) < 0.1
    torch.testing.assert_close(torch.cov(found.T), torch.eye(4).double(), rtol=0, atol=0.2)


def test_no_array_of_rows_and_knots_is_kept() -> None:
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    z = rows().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        sigreg(z, A)
    assert max(saved) == V * N * M and saved.count(V * N * M) == 1


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"z, directions: .*\[V, N, E\] and \[E, M\], got \[24, 10\]"
    ):
        sigreg(rows()[0], A)
    with pytest.raises(ValueError, match=r"got \[3, 24, 10\] and \[9, 40\]"):
        sigreg(rows(), A[1:])
