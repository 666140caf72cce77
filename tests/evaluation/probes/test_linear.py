import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from m3i_fast.evaluation.probes.linear import fit_linear


def _wine() -> tuple[Tensor, Tensor]:
    wine = load_wine()  # columns of very different scales
    return torch.from_numpy(wine.data).float(), torch.from_numpy(wine.target).long()


@pytest.mark.parametrize("l2", [1.0, 0.03, 0.001])
def test_probe_equals_sklearn(l2: float) -> None:
    features, labels = _wine()
    fit, ask = features[::2], features[1::2]
    oracle = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=1 / (l2 * len(fit)), tol=1e-10, max_iter=100_000),
    ).fit(fit.double().numpy(), labels[::2].numpy())
    probe = fit_linear(fit, labels[::2], l2=l2)
    expected = torch.from_numpy(oracle.predict_proba(ask.double().numpy()))
    torch.testing.assert_close(probe.logits(ask).softmax(1), expected, atol=1e-4, rtol=0)
    weight = torch.from_numpy(oracle[-1].coef_)
    torch.testing.assert_close(probe.weight, weight, atol=2e-4 / l2**0.5, rtol=0)
    assert torch.equal(probe.predict(ask), torch.from_numpy(oracle.predict(ask.double().numpy())))


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, labels = _wine()
    cold = fit_linear(features, labels, l2=0.01)
    warm = fit_linear(features, labels, l2=0.01, start=fit_linear(features, labels, l2=1.0))
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-3, rtol=0)


def test_a_constant_feature_changes_nothing() -> None:
    features, labels = _wine()
    padded = torch.cat([features, torch.full((len(features), 1), 3.3)], 1)
    probe = fit_linear(padded, labels, l2=0.1)
    assert bool(probe.weight.isfinite().all())
    torch.testing.assert_close(
        probe.logits(padded),
        fit_linear(features, labels, l2=0.1).logits(features),
        atol=1e-4,
        rtol=0,
    )


def test_training_works_inside_no_grad_and_leaves_no_graph() -> None:
    features, labels = _wine()
    with torch.no_grad():
        probe = fit_linear(features, labels, l2=0.1)
    assert not probe.weight.requires_grad and not probe.bias.requires_grad


def test_no_optimum_is_an_error() -> None:
    features, labels = _wine()
    with pytest.raises(ValueError, match="l2: expected > 0"):
        fit_linear(features, labels, l2=0.0)
    with pytest.raises(RuntimeError, match="stopped after 8 iterations"):
        fit_linear(features, labels, l2=0.001, max_iterations=2)


def test_a_fit_that_one_round_does_not_end_goes_on() -> None:
    features, labels = _wine()
    whole = fit_linear(features, labels, l2=0.001)
    rounds = fit_linear(features, labels, l2=0.001, max_iterations=20)
    torch.testing.assert_close(rounds.weight, whole.weight, rtol=0, atol=1e-3)
