"""Collapse monitors against numpy, scipy, scikit-learn, closed forms and known cases."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from scipy.stats import entropy
from sklearn.cluster import KMeans
from sklearn.metrics import r2_score
from torch import Tensor

from m3i_fast.models.effective_rank import rankme
from m3i_fast.objectives.monitors import (
    MAX_ROWS,
    NUM_CLUSTERS,
    alignment,
    constant_energy,
    explained_variance,
    feature_std,
    kmeans,
    kmeans_entropy,
    log_prediction,
    mean_cosine,
    subsample,
    target_monitors,
    uniformity,
)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _blobs(sizes: list[int], dim: int, noise: float = 0.01) -> tuple[Tensor, Tensor]:
    """Rows around corners of the cross-polytope, in mixed order: [N, D], [N]."""
    label = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(1))]
    corners = torch.cat([torch.eye(dim), -torch.eye(dim)]).double()
    return corners[label] + noise * _normal(len(label), dim), label


def test_collapse_is_seen() -> None:
    spread = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    collapsed = torch.ones(4000, 32)
    assert float(feature_std(spread)) == pytest.approx(1.0, abs=0.02)
    assert float(feature_std(collapsed)) == 0.0
    assert float(rankme(spread)) > 30
    assert float(rankme(collapsed)) == pytest.approx(1.0, abs=1e-3)
    assert float(rankme(spread * float("nan"))) != float(rankme(spread))  # NaN, and no error
    assert float(mean_cosine(spread, -2 * spread)) == pytest.approx(-1.0)


def test_alignment_and_uniformity_equal_scipy() -> None:
    a, b = _normal(40, 6), 3 * _normal(40, 6, seed=1)
    u, v = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (a, b))
    expected = np.mean(np.linalg.norm(u - v, axis=1) ** 2)
    assert float(alignment(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(alignment(a, b)) == pytest.approx(2 - 2 * float(mean_cosine(a, b)), rel=1e-6)
    expected = np.log(np.mean(np.exp(-2 * pdist(u, "sqeuclidean"))))
    assert float(uniformity(a)) == pytest.approx(expected, rel=1e-12)


def test_alignment_and_uniformity_have_their_closed_forms() -> None:
    rows = torch.eye(5, dtype=torch.float64)
    assert float(uniformity(7 * rows)) == pytest.approx(-4)  # orthogonal: |u - v|^2 = 2
    assert float(uniformity(torch.stack([rows[0], -rows[0]]))) == pytest.approx(-8)
    assert float(uniformity(torch.ones(9, 5))) == 0
    assert math.isnan(uniformity(rows[:1]))
    assert float(alignment(rows, 2 * rows)) == 0
    assert float(alignment(rows, rows.roll(1, 0))) == pytest.approx(2)
    assert float(alignment(rows, -rows)) == pytest.approx(4)
    # On a sphere of many dimensions random rows are nearly orthogonal.
    assert float(uniformity(_normal(400, 2000))) == pytest.approx(-4, abs=0.01)


def test_kmeans_finds_the_clusters_that_scikit_learn_finds() -> None:
    rows, label = _blobs([90, 40, 20, 10, 5, 30], dim=4)
    ours = kmeans(rows, 6)
    theirs = KMeans(6, n_init=10, random_state=0).fit(rows.numpy()).labels_
    pairs = {(int(a), int(b), int(c)) for a, b, c in zip(ours, theirs, label, strict=True)}
    assert len(pairs) == 6  # one to one with both
    assert torch.equal(ours, kmeans(rows, 6))


def test_kmeans_moves_its_centres() -> None:
    """Where the starts are not the answer: the spread within is scikit-learn's, nearly."""
    rows = _normal(300, 3)
    cluster = kmeans(rows, 8)
    within = sum(
        float((rows[cluster == k] - rows[cluster == k].mean(0)).square().sum()) for k in range(8)
    )
    best = KMeans(8, n_init=10, random_state=0).fit(rows.numpy()).inertia_
    assert best * (1 - 1e-9) <= within < 1.15 * best


def test_kmeans_entropy_is_that_of_the_cluster_sizes() -> None:
    sizes = [64, 32, 16, 8, 4, 4]
    rows, _ = _blobs(sizes, dim=4, noise=1e-3)
    expected = entropy(sizes, base=6)
    assert float(kmeans_entropy(rows, 6)) == pytest.approx(expected, rel=1e-12)
    assert float(kmeans_entropy(_blobs([8] * 16, dim=8)[0])) == pytest.approx(1.0, rel=1e-12)
    two = torch.eye(2).repeat(40, 1)
    assert float(kmeans_entropy(two)) == pytest.approx(math.log(2) / math.log(NUM_CLUSTERS))
    assert float(kmeans_entropy(torch.ones(80, 4))) == 0
    assert math.isnan(kmeans_entropy(torch.full((80, 4), torch.nan)))


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_explained_variance_equals_scikit_learn(noise: float, offset: float) -> None:
    z = _normal(6, 20, 8) * torch.arange(1.0, 9.0) + offset
    z_hat = 0.7 * z + noise * _normal(6, 20, 8, seed=1)
    rows = z.flatten(0, 1).numpy(), z_hat.flatten(0, 1).numpy()
    expected = r2_score(*rows, multioutput="variance_weighted")
    assert float(explained_variance(z_hat, z)) == pytest.approx(expected, rel=1e-12)
    of_floats = float(explained_variance(z_hat.float(), z.float()))
    assert of_floats == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_energy_of_the_constant_is_what_numpy_says() -> None:
    z = _normal(5, 30, 12) + torch.linspace(-1, 2, 12)
    rows = z.flatten(0, 1).numpy()
    energy = (rows**2).sum(1).mean()
    assert float(constant_energy(z)) == pytest.approx((rows.mean(0) ** 2).sum() / energy, rel=1e-12)
    # what is left is the variance that there is to explain
    assert float(constant_energy(z)) == pytest.approx(1 - rows.var(0).sum() / energy, rel=1e-12)


def test_a_constant_explains_nothing_though_its_cosine_is_high() -> None:
    """Targets of which 0.87 is one vector, as a starved run had them: the cosine calls it well."""
    rest = _normal(4000, 64)
    rest -= rest.mean(0)
    constant = torch.zeros(64).double()
    constant[0] = 1.0
    z = 0.13**0.5 * rest / rest.square().sum(1).mean().sqrt() + 0.87**0.5 * constant
    z_hat = z.mean(0).expand_as(z)
    assert float(constant_energy(z)) == pytest.approx(0.87, abs=1e-9)
    assert float(mean_cosine(z_hat, z)) == pytest.approx(0.87**0.5, abs=0.01)
    assert float(explained_variance(z_hat, z)) == pytest.approx(0, abs=1e-12)
    assert float(explained_variance(0.5 * z_hat, z)) < -1
    assert float(explained_variance(z, z)) == 1


def test_targets_without_variance_explain_nothing_and_are_finite() -> None:
    z = torch.ones(8, 4, 3) / 3
    assert float(constant_energy(z)) == pytest.approx(1)
    assert float(explained_variance(z, z)) == 1
    wrong = float(explained_variance(z + 1, z))
    assert math.isfinite(wrong) and wrong < -1e3


def test_a_dense_prediction_is_watched_under_its_name() -> None:
    found: dict[str, Tensor] = {}
    z, z_hat = _normal(3, 4, 5), _normal(3, 4, 5, seed=1).requires_grad_()
    log_prediction(found.__setitem__, "intra", z_hat=z_hat, z=z)
    assert list(found) == ["intra_cosine", "intra_explained", "intra_constant"]
    assert not any(value.requires_grad for value in found.values())
    found.clear()
    log_prediction(found.__setitem__, "intra", z_hat=z_hat[:1, :1], z=z[:1, :1])
    assert list(found) == ["intra_cosine"]  # of one row there is no variance


def test_the_subsample_is_fixed_and_favours_no_column() -> None:
    column = torch.arange(16.0).repeat(32 * 16)  # of 32 grids of 16 x 16 cells
    drawn = subsample(column.view(32, 256, 1))
    assert drawn.shape == (MAX_ROWS, 1)
    assert torch.equal(drawn, subsample(column[:, None]))
    assert len(subsample(torch.arange(8192.0)[:, None]).unique()) == MAX_ROWS
    counts = drawn.flatten().long().bincount(minlength=16)
    assert counts.min() > 10 and counts.max() < 60  # 32 each, on the average
    few = torch.randn(7, 3)
    assert torch.equal(subsample(few), few)


def test_monitors_ignore_autocast_and_leave_the_generator_alone() -> None:
    tokens = _normal(64, 16, 32).float()
    state = torch.get_rng_state()
    plain = target_monitors(tokens, tokens.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = target_monitors(tokens, tokens.flip(0))
    assert torch.equal(state, torch.get_rng_state())
    assert plain == mixed and all(value.dtype == torch.float32 for value in plain.values())
