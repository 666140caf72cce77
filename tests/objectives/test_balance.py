"""How terms are weighted: against gradients written out in fp64, and optima in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.objectives.balance import MAX_SCALE, Balance
from m3i_fast.ops import boltzmann, gaussian

WEIGHTS = {"intra": 0.3, "inter": 1.0, "caption": 2.0}
NAMES = tuple(WEIGHTS)


def _balanced(momentum: float = 0.0, weights: dict[str, float] = WEIGHTS) -> Balance:
    return Balance(BalanceConfig(mode="gradient_norm", momentum=momentum), weights)


def _linear(z: Tensor, slopes: Tensor) -> dict[str, Tensor]:
    """L_k = slope_k . z, whose gradient is slope_k."""
    return dict(zip(NAMES, (slopes * z).flatten(1).sum(1).unbind(), strict=True))


def _slopes(seed: int = 0) -> Tensor:  # [3, 4, 5], of very different norms
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1)
    return torch.randn(3, 4, 5, generator=rng) * size


def _norms(slopes: Tensor) -> Tensor:  # [3, ...] -> [3] fp64
    return slopes.double().square().flatten(1).sum(1).sqrt()


def test_fixed_is_the_plain_sum_bit_for_bit() -> None:
    balance = Balance(BalanceConfig(), WEIGHTS)
    for dtype in (torch.float32, torch.float64):
        values = torch.rand(3, dtype=dtype) * torch.tensor([1e-3, 1, 1e3], dtype=dtype)
        losses = dict(zip(NAMES, values, strict=True))
        total, factors = balance(losses)
        expected = torch.zeros((), dtype=dtype)
        for name, weight in WEIGHTS.items():
            expected = expected + weight * losses[name]
        assert torch.equal(total, expected)
        assert {k: float(v) for k, v in factors.items()} == pytest.approx(WEIGHTS)
    assert not balance.state_dict() and not balance.due(0)


def test_norms_are_a_bias_corrected_average_of_the_gradients() -> None:
    momentum, balance = 0.7, _balanced(momentum=0.7)
    z = torch.randn(4, 5, requires_grad=True)
    average = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 4):
        slopes = _slopes(seed=step)
        balance.measure(_linear(z, slopes), [z])
        average = momentum * average + (1 - momentum) * _norms(slopes)
        expected = average / (1 - momentum**step)
        torch.testing.assert_close(balance.norm.double(), expected, rtol=1e-6, atol=0)
    assert z.grad is None


def test_terms_pull_on_the_shared_tensors_by_their_weights() -> None:
    balance = _balanced()
    shared = [torch.randn(4, 5, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    heads = [[torch.randn_like(z) * 10.0**k for z in shared] for k in range(-2, 1)]

    def losses() -> dict[str, Tensor]:
        values = [sum((s * z).tanh().sum() for s, z in zip(h, shared, strict=True)) for h in heads]
        return dict(zip(NAMES, values, strict=True))  # type: ignore[arg-type]

    def pull(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, shared)
        return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))

    plain = [pull(loss) for loss in losses().values()]
    balance.measure(losses(), shared)
    _, factors = balance(losses())
    pulls = {name: pull(factors[name] * loss) for name, loss in losses().items()}
    mean = sum(w * n for w, n in zip(WEIGHTS.values(), plain, strict=True)) / sum(WEIGHTS.values())
    assert pulls == pytest.approx({name: w * mean for name, w in WEIGHTS.items()}, rel=1e-5)
    weighted = [w * n for w, n in zip(WEIGHTS.values(), plain, strict=True)]
    assert sum(pulls.values()) == pytest.approx(sum(weighted), rel=1e-5)

    total, _ = balance(losses())
    expected = sum(factors[name] * loss for name, loss in losses().items())
    torch.testing.assert_close(total, expected)


def test_before_the_first_measurement_weights_are_the_configured_ones() -> None:
    z = torch.randn(4, 5, requires_grad=True)
    losses = _linear(z, _slopes())
    total, factors = _balanced()(losses)
    torch.testing.assert_close(total, sum(w * losses[name] for name, w in WEIGHTS.items()))
    assert {name: float(f) for name, f in factors.items()} == pytest.approx(WEIGHTS)


@pytest.mark.parametrize("absent", ["unused", "constant", "zero", "nan"])
def test_a_term_without_a_gradient_keeps_its_norm(absent: str) -> None:
    balance = _balanced(momentum=0.5)
    z, elsewhere = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    no_gradient = {
        "unused": elsewhere.sum(),
        "constant": torch.zeros(()),
        "zero": (z * 0).sum(),
        "nan": (z * math.nan).sum(),
    }[absent]
    balance.measure(_linear(z, _slopes()) | {"inter": no_gradient}, [z])
    assert balance.num_measured.tolist() == [1, 0, 1]
    _, factors = balance(_linear(z, _slopes()))
    assert float(factors["inter"]) == WEIGHTS["inter"]  # never measured
    assert all(math.isfinite(float(factor)) for factor in factors.values())

    balance.measure(_linear(z, _slopes()), [z])
    before = balance.norm.clone()
    torch.testing.assert_close(before.double(), _norms(_slopes()), rtol=1e-6, atol=0)
    balance.measure(_linear(z, 2 * _slopes()) | {"inter": no_gradient}, [z])
    assert balance.norm[1] == before[1] and (balance.norm[[0, 2]] > before[[0, 2]]).all()


def test_a_solved_term_is_not_raised_without_bound() -> None:
    balance, z = _balanced(), torch.randn(4, 5, requires_grad=True)
    slopes = _slopes() * torch.tensor([1e-9, 1, 1]).view(3, 1, 1)
    balance.measure(_linear(z, slopes), [z])
    factor = balance(_linear(z, slopes))[1]["intra"]
    assert float(factor) == pytest.approx(WEIGHTS["intra"] * MAX_SCALE)


class _Counted(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        _Counted.calls += 1
        return grad


def test_measuring_stays_above_the_shared_tensors_and_keeps_the_graph() -> None:
    """With the likelihoods of the package, whose backward can be taken once more."""
    encoder, head = nn.Linear(6, 8), nn.Linear(8, 8)
    _Counted.calls = 0
    z = _Counted.apply(encoder(torch.randn(5, 6)))
    scale = torch.tensor(10.0, requires_grad=True)
    predicted = head(z)
    losses = {
        "dense": gaussian(predicted, torch.randn(5, 8), normalise=True, decorrelation_weight=0.02),
        "caption": boltzmann(nn.functional.normalize(predicted, dim=-1), torch.randn(5, 8), scale),
    }
    weights = {"dense": 0.5, "caption": 1.0}
    parameters = [*encoder.parameters(), *head.parameters(), scale]
    expected = torch.autograd.grad(
        sum(weights[n] * x for n, x in losses.items()), parameters, retain_graph=True
    )
    calls = _Counted.calls
    balance = _balanced(weights=weights)
    balance.measure(losses, [z])
    assert _Counted.calls == calls == 1
    assert all(parameter.grad is None for parameter in parameters)
    for k, loss in enumerate(losses.values()):
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert float(balance.norm[k]) == pytest.approx(float(gradient.double().norm()), rel=1e-5)
    sum(weights[n] * x for n, x in losses.items()).backward()  # type: ignore[union-attr]
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_uncertainty_has_its_optimum_where_s_is_the_logarithm_of_the_loss() -> None:
    balance = Balance(BalanceConfig(mode="uncertainty"), WEIGHTS)
    values = torch.tensor([0.02, 0.9, 5.0])
    losses = dict(zip(NAMES, values, strict=True))
    plain = sum(w * losses[name] for name, w in WEIGHTS.items())
    torch.testing.assert_close(balance(losses)[0], plain)  # s = 0
    optimizer = torch.optim.LBFGS(balance.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        total, _ = balance(losses)
        total.backward()
        return total

    optimizer.step(closure)  # type: ignore[arg-type]
    torch.testing.assert_close(balance.log_variance.detach(), values.log(), atol=1e-3, rtol=0)
    _, factors = balance(losses)
    for name, weight in WEIGHTS.items():
        assert float(factors[name] * losses[name]) == pytest.approx(weight, rel=1e-3)


def test_uncertainty_is_the_gaussian_likelihood_of_a_learnt_variance() -> None:
    """Twice torch's negative log-likelihood, its variance moved by log 2; the same slopes."""
    balance = Balance(BalanceConfig(mode="uncertainty"), {"dense": 1.0})
    z_hat, z = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    sigma, s = 0.8, 0.4
    with torch.no_grad():
        balance.log_variance.fill_(s)
    total, _ = balance({"dense": gaussian(z_hat, z, sigma=sigma)})
    variance = torch.full_like(z, 2 * math.exp(s) * sigma**2)
    expected = 2 * nn.functional.gaussian_nll_loss(z_hat, z, variance)
    constant = math.log(2 * sigma**2)
    torch.testing.assert_close(total, expected - constant)
    gradients = [torch.autograd.grad(value, z_hat)[0] for value in (total, expected)]
    torch.testing.assert_close(*gradients)


def test_a_term_of_no_member_does_not_move_its_variance() -> None:
    balance = Balance(BalanceConfig(mode="uncertainty"), {"caption": 1.0, "intra": 1.0})
    total, _ = balance({"caption": torch.zeros(()), "intra": torch.tensor(0.25)})
    total.backward()
    assert balance.log_variance.grad is not None
    assert balance.log_variance.grad.tolist() == [0.0, 0.75]


@pytest.mark.parametrize("mode", ["gradient_norm", "uncertainty"])
def test_state_survives_a_round_trip(mode: str) -> None:
    cfg = BalanceConfig(mode=mode)  # type: ignore[arg-type]
    balance, other = Balance(cfg, WEIGHTS), Balance(cfg, WEIGHTS)
    z = torch.randn(4, 5, requires_grad=True)
    if mode == "gradient_norm":
        for seed in range(2):
            balance.measure(_linear(z, _slopes(seed)), [z])
    else:
        nn.init.normal_(balance.log_variance)
    other.load_state_dict(balance.state_dict())
    losses = _linear(z, _slopes())
    assert torch.equal(balance(losses)[0], other(losses)[0])
    if mode == "gradient_norm":  # the average goes on as it would have
        for each in (balance, other):
            each.measure(_linear(z, _slopes(3)), [z])
        assert torch.equal(balance.norm, other.norm)


@pytest.mark.parametrize("mode", ["fixed", "gradient_norm", "uncertainty"])
def test_nothing_is_read_by_the_host(mode: str) -> None:
    """A tensor of the meta device has no value to be read."""
    with torch.device("meta"):
        balance = Balance(BalanceConfig(mode=mode), WEIGHTS)  # type: ignore[arg-type]
        z = torch.randn(4, 5, requires_grad=True)
        losses = _linear(z, _slopes_of("meta"))
    if mode == "gradient_norm":
        balance.measure(losses, [z])
    total, factors = balance(losses)
    assert total.is_meta and all(factor.is_meta for factor in factors.values())
    balance.to_empty(device="cpu").reset_parameters()
    assert balance.weight.tolist() == pytest.approx(list(WEIGHTS.values()))
    assert all(not value.any() for value in balance.state_dict().values())


def _slopes_of(device: str) -> Tensor:
    return torch.ones(3, 4, 5, device=device)


def test_due_every_so_many_steps() -> None:
    balance = Balance(BalanceConfig(mode="gradient_norm", every=3), WEIGHTS)
    assert [step for step in range(8) if balance.due(step)] == [0, 3, 6]


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="balance.every: expected >= 1, got 0"):
        BalanceConfig(every=0)
    with pytest.raises(ValueError, match=r"balance.momentum: expected in \[0, 1\), got 1.0"):
        BalanceConfig(momentum=1.0)
    with pytest.raises(ValueError, match="weights: expected at least one term"):
        Balance(BalanceConfig(), {})
    with pytest.raises(ValueError, match=r"weights\['a'\]: expected > 0, got 0"):
        Balance(BalanceConfig(), {"a": 0.0})
    z = torch.randn(4, 5, requires_grad=True)
    losses = _linear(z, _slopes())
    with pytest.raises(ValueError, match="expected gradient_norm to measure, got fixed"):
        Balance(BalanceConfig(), WEIGHTS).measure(losses, [z])
    balance = _balanced()
    with pytest.raises(ValueError, match=r"losses: expected the terms .* got \['intra'\]"):
        balance({"intra": losses["intra"]})
    with pytest.raises(ValueError, match=r"shared: expected .* got \[\]"):
        balance.measure(losses, [])
    with pytest.raises(ValueError, match=r"shared: expected .* got \[True, False\]"):
        balance.measure(losses, [z, z.detach()])
