"""How hard terms pull on the encoder: against autograd through a linear layer, in fp64."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3i_fast.config.columns import ColumnConfig
from m3i_fast.config.objective.balance import BalanceConfig
from m3i_fast.config.objective.objective import ObjectiveConfig
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.mixing import draw_mix, draw_slice_key
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded
from m3i_fast.objectives.term_gradients import TermGradients, separate_views
from m3i_fast.pipelines.batch import Batch
from tests.objectives.test_objective_ranks import small_config
from tests.shared.annotated import regions
from tests.shared.small_objective import NUM_CLASSES, TEXT, VISION, make_batch

BY_THEMSELVES = [name for name, method in METHODS.items() if "frozen" not in
                 {term.encoder for term in method.terms}]  # fmt: skip


def _model(cfg: ObjectiveConfig) -> MutualInformation:
    torch.manual_seed(0)
    columns = (ColumnConfig(name="regions", kind="regions"),)
    return MutualInformation(
        cfg, vision=VISION, text=TEXT, num_classes=NUM_CLASSES, columns=columns
    )


def _batch() -> Batch:
    """With two local views of each picture."""
    batch, rng = make_batch(), torch.Generator().manual_seed(2)
    local = torch.randint(0, 256, (2, 8, 3, 16, 16), generator=rng, dtype=torch.uint8)
    boxes = torch.cat([batch.boxes, batch.boxes.flip(1)], 1)
    columns = {"regions": regions(8, views=4)}
    return replace(batch, local_views=tuple(local), boxes=boxes, columns=columns)


def _terms(
    model: MutualInformation, monitor: bool
) -> tuple[Tensor, dict[str, Tensor], Encoded]:  # the sum, metrics, what the encoder said
    batch = _batch()
    mix = draw_mix(
        model.cfg.mixing,
        position=batch.position,
        first_position=0,
        grid=4,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )
    mix = replace(mix, slice_key=draw_slice_key(0, seed=0))
    with torch.no_grad():
        targets = model.encode_targets(batch, mix)
    encoded = model.encode_inputs(batch, mix)
    total, metrics = model(encoded, targets, batch, mix, monitor=monitor)
    return total, metrics, encoded


def _losses(shared: list[Tensor], slopes: list[Tensor]) -> Tensor:
    return torch.stack([(s * z).sin().sum() for s, z in zip(slopes, shared, strict=True)]).sum()


def test_they_are_gradients_by_a_linear_layer_that_stands_last() -> None:
    """Of terms that read some rows, all, or none, of tensors of several shapes."""
    torch.manual_seed(0)
    z = Encoded(
        views=(torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True),),
        local=tuple(torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True) for _ in "ab"),
    )
    slopes = [torch.randn_like(x) for x in z.every]
    factors = {"first": 0.3, "last": 2.0, "every": 1.0, "none": 1.0}

    def losses(read_by: dict[str, Encoded]) -> dict[str, Tensor]:
        first, last, every = (read_by[name].every for name in ("first", "last", "every"))
        return {
            "first": (slopes[0] * first[0])[:3].tanh().sum(),
            "last": (slopes[0] * last[0])[3:].square().sum() + last[1].exp().mean(),
            "every": _losses(every, slopes),
            "none": slopes[0].sum(),
        }

    read_by = {name: separate_views(z) for name in factors}
    found = losses(read_by)
    watched = TermGradients(read_by)
    sum(w * found[name] for name, w in factors.items()).backward()  # type: ignore[union-attr]
    metrics = {name: float(value) for name, value in watched.metrics().items()}

    layer = nn.Linear(5, 5).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(5))
        layer.bias.zero_()
    through = Encoded(*(tuple(layer(x.detach()) for x in part) for part in (z.views, z.local)))
    expected = {}
    for name, loss in losses(dict.fromkeys(factors, through)).items():
        if name != "none":
            grads = torch.autograd.grad(
                factors[name] * loss, [*layer.parameters()], retain_graph=True
            )
            expected[name] = torch.cat([g.flatten() for g in grads])
    for name, gradient in expected.items():
        assert metrics[f"gradient/{name}"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    for a, b in combinations(expected, 2):
        cosine = F.cosine_similarity(expected[a], expected[b], dim=0)
        assert metrics[f"gradient_cosine/{a}_{b}"] == pytest.approx(float(cosine), rel=1e-10)
    assert metrics["gradient/none"] == metrics["gradient_cosine/every_none"] == 0
    assert len(metrics) == 4 + 6


@pytest.mark.parametrize("mode", ["fixed", "uncertainty"])
def test_of_m3i_they_are_those_of_each_term_with_its_factor(mode: str) -> None:
    cfg = replace(small_config("m3i"), balance=BalanceConfig(mode=mode))  # type: ignore[arg-type]
    cfg = replace(cfg, terms=tuple(replace(t, weight=0.5 + n) for n, t in enumerate(cfg.terms)))
    model = _model(cfg)
    with torch.no_grad():
        if mode == "uncertainty":
            model.balance.log_variance.copy_(torch.tensor([0.5, -1.0, 0.0, 2.0]))
        for parameter in model.decoders.parameters():  # at its start it says nothing of its input
            parameter.add_(0.2 * torch.randn_like(parameter))
    total, logged, encoded = _terms(model, monitor=True)
    z = encoded.every
    total.backward(retain_graph=True)
    found = model.gradient_metrics()
    assert model.gradient_metrics() == {}

    pulls = {}
    for name in model.terms:
        alone = _model(replace(cfg, balance=BalanceConfig(), terms=tuple(
            replace(t, weight=float(t.name == name)) for t in cfg.terms)))  # fmt: skip
        alone.load_state_dict(model.state_dict(), strict=False)
        loss, _, of_alone = _terms(alone, monitor=False)
        grads = torch.autograd.grad(loss, of_alone.every, allow_unused=True)
        pairs = [(g.flatten(0, -2).double(), x.detach().flatten(0, -2).double())
                 for g, x in zip(grads, z, strict=True) if g is not None]  # fmt: skip
        layer = [sum(g.T @ x for g, x in pairs), sum(g.sum(0) for g, _ in pairs)]
        flat = torch.cat([part.flatten() for part in layer])  # type: ignore[union-attr]
        pulls[name] = float(logged[f"weight/{name}"]) * flat
    for name, pull in pulls.items():
        assert float(found[f"gradient/{name}"]) == pytest.approx(float(pull.norm()), rel=1e-4)
    for a, b in combinations(pulls, 2):
        cosine = float(F.cosine_similarity(pulls[a], pulls[b], dim=0))
        assert float(found[f"gradient_cosine/{a}_{b}"]) == pytest.approx(cosine, abs=1e-4)
        assert abs(cosine) > 1e-3  # also of the dense terms, which are asked of different images


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_what_is_watched_trains_as_what_is_not(name: str) -> None:
    """Gradients of a watched step are those of any other, but for the order of additions."""
    found = []
    for monitor in (False, True):
        model = _model(small_config(name))
        total, metrics, _ = _terms(model, monitor)
        total.backward()
        found.append((total.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
        watched = model.gradient_metrics()
        assert len(watched) == (len(model.terms) * (len(model.terms) + 1) // 2) * monitor
        assert all(float(value) > 0 for n, value in watched.items() if n.startswith("gradient/"))
    exact = {"rtol": 0.0, "atol": 0.0} if name == "m3i" else {}
    torch.testing.assert_close(found[0], found[1], **exact)


def test_nothing_is_watched_without_gradients_and_nothing_is_kept() -> None:
    model = _model(small_config("m3i"))
    with torch.no_grad():
        _terms(model, monitor=True)
    assert model.gradient_metrics() == {}
    total, _, encoded = _terms(model, monitor=True)
    kept = weakref.ref(encoded.views[0])
    gc.collect()
    gc.disable()
    try:
        total.backward()
        model.gradient_metrics()
        del total, encoded
        assert kept() is None  # no cycle holds a step's activations until the collector comes
    finally:
        gc.enable()
