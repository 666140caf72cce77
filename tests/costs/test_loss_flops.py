"""Each row of `LOSSES`: its builder, and its matrix products against torch's count of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m3i_fast.config.objective.losses import LOSSES, Loss, LossKey, LossSizes, no_products
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.config.objective.targets import TARGETS
from m3i_fast.objectives.losses.builders import build_loss
from m3i_fast.objectives.losses.stateful import Prototypes, UniGrad
from tests.shared.flop_formulas import FORMULAS

OBJECTIVE = ObjectiveConfig(queue_length=12, num_prototypes=11)
ROWS, DIM, PICTURES, CELLS, CELL_DIM, CLASSES = 8, 7, 2, 5, 9, 6
OF_CLASSES = "category", "caption_tokens", "grounded_caption", "referring_box"
PROTOTYPES = ("prototypes", "cell_prototypes")
# The product of all predictions with the mean target: 1 / D of the others, and left out.
LEFT_OUT = {("features", "gaussian", "covariance"): 2 * ROWS * DIM}


def term_of(key: LossKey) -> Term:
    target, likelihood, regulariser = key
    return Term(
        name="term",
        target=target,  # type: ignore[arg-type]
        view="other" if TARGETS[target].of == "view" else "same",
        encoder=TARGETS[target].encoders[0],  # type: ignore[arg-type]
        column="" if TARGETS[target].has_default else TARGETS[target].column,
        predictor=TARGETS[target].predictors[-1],  # type: ignore[arg-type]
        likelihood=likelihood,
        regulariser=regulariser,
    )


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, requires_grad=grad)


def arguments(key: LossKey, loss: Any, target_grad: bool) -> tuple[list[Any], dict[str, Tensor]]:
    """What a term calls the loss with."""
    target = key[0]
    z_hat = draw(ROWS, DIM, grad=True)
    if target == "labels":
        members = torch.ones(ROWS, dtype=torch.bool)
        return [z_hat, torch.ones(ROWS, DIM)], {"members": members}
    if target in OF_CLASSES or target == "caption":
        count = CLASSES if target in OF_CLASSES else ROWS
        ids = torch.arange(ROWS) % count
        options = {"row_ids": ids, "col_ids": torch.arange(count)}
        if target in OF_CLASSES:
            options = {"targets": ids}
        elif key[1] == "sigmoid":
            options["bias"] = draw(grad=True)
        return [z_hat, draw(count, DIM, grad=True), draw(grad=True).exp()], options
    if key[2] == "sigreg":
        views = [z_hat[None]] if target == "summary" else [z_hat[None], draw(1, ROWS, DIM)]
        return [*views, torch.tensor(3)], {}
    if target == "summary":
        return [z_hat], {}
    if isinstance(loss, Prototypes):
        prototypes = draw(OBJECTIVE.num_prototypes, DIM, grad=True)
        return [[z_hat], loss.targets([draw(ROWS, DIM)], prototypes), prototypes], {}
    if key == ("features", "boltzmann", "queue"):
        z_hat = draw(PICTURES, ROWS // PICTURES, DIM, grad=True)
        z, of_target = draw(PICTURES, CELLS, DIM), draw(PICTURES, CELLS, CELL_DIM)
        return [z_hat, z, draw(PICTURES, ROWS // PICTURES, CELL_DIM), of_target], {}
    return [z_hat, draw(ROWS, DIM, grad=target_grad)], {}


def sizes_of(key: LossKey, target_grad: bool) -> LossSizes:
    columns = dict.fromkeys(OF_CLASSES, CLASSES)
    columns |= dict.fromkeys(PROTOTYPES, OBJECTIVE.num_prototypes)
    return LossSizes(
        rows=ROWS,
        dim=DIM,
        targets=columns.get(key[0], ROWS),
        assigned=ROWS,
        target_grad=target_grad,
        queue_length=OBJECTIVE.queue_length,
        cells=CELLS,
        cell_dim=CELL_DIM,
        decorrelates=True,
        slices=OBJECTIVE.num_slices,
    )


WITH_TARGET_GRAD = ("negatives", "all_views", "cross_correlation", "variance_covariance")
CASES = [(key, key[0] in (*OF_CLASSES, "caption")) for key in LOSSES]
CASES += [(key, True) for key in LOSSES if key[0] == "embedding" and key[2] in WITH_TARGET_GRAD]


@pytest.mark.parametrize(("key", "target_grad"), CASES, ids=str)
def test_a_row_counts_what_its_loss_does(key: LossKey, target_grad: bool) -> None:
    loss: Any = build_loss(term_of(key), OBJECTIVE, DIM, None)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        given, options = arguments(key, loss, target_grad)
        if isinstance(loss, UniGrad):
            loss.observe(given[1:])
        loss(*given, **options).backward()
    row, sizes = LOSSES[key], sizes_of(key, target_grad)
    closed_form = row.flops(sizes) + row.flops_once(sizes)
    assert closed_form.hardware == counter.get_total_flops() - LEFT_OUT.get(key, 0)


def test_without_a_decorrelation_nothing_is_counted() -> None:
    key = "features", "gaussian", "covariance"
    sizes = replace(sizes_of(key, False), decorrelates=False)
    assert LOSSES[key].flops(sizes) == no_products(sizes)


def test_rows_of_prototypes_build_what_has_targets() -> None:
    for key in LOSSES:
        loss = build_loss(term_of(key), OBJECTIVE, DIM, None)
        assert isinstance(loss, Prototypes) == (key[0] in PROTOTYPES)


def test_a_loss_without_its_flops_is_refused() -> None:
    with pytest.raises(TypeError, match="'flops'"):
        Loss(formula="z", build=lambda *_: torch.dist)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^flops of the loss '\|z\|': .*LossSizes.*, got None$"):
        Loss(formula="|z|", build=lambda *_: torch.dist, flops=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("build", ["a.module", ":name", "a.module:", None, 3])
def test_a_loss_without_a_builder_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"^build of the loss '\|z\|': expected .*, got "):
        Loss(formula="|z|", build=build, flops=no_products)


def test_a_builder_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "pixels", "gaussian", "fixed"
    path = "m3i_fast.objectives.losses.builders:gone"
    monkeypatch.setitem(LOSSES, key, replace(LOSSES[key], build=path))
    with pytest.raises(AttributeError, match="gone"):
        build_loss(term_of(key), OBJECTIVE, DIM, None)
