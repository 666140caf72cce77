"""Prototypes of cells through the decoder, from the same or another view, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightly import loss as lightly
from lightly.models.utils import get_at_index
from torch import Tensor, nn

from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.objective.mixing import MixingConfig
from m3i_fast.config.objective.objective import ObjectiveConfig, Term
from m3i_fast.models.transformer.vit import Masking, ViT
from m3i_fast.objectives.methods import METHODS, Method, cell_prototypes
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.step_context import Encoded
from tests.objectives.methods.losses import ALL
from tests.objectives.methods.steps import BATCH, GRID, VISION, Step, build_model, draw, draw_batch

IN_PLACE = cell_prototypes(name="cells")
DECODED = cell_prototypes(name="cells", predictor="decoder")


def build(term: Term, mode: str) -> MutualInformation:
    method = Method(title="cells", paper="", family="M3I", terms=(term,), mode=mode)  # type: ignore[arg-type]
    return build_model(method)


def assigned(head: nn.Module, rows: Tensor) -> Tensor:  # [N, K]
    return (
        F.normalize(head.mlp(rows).double(), dim=1) @ F.normalize(head.prototypes.double(), dim=1).T
    )


@pytest.mark.parametrize("regulariser", ["centring", "sinkhorn"])
@pytest.mark.parametrize(
    ("view", "mode"), [("same", "masked"), ("other", "masked"), ("other", "joint")]
)
def test_the_decoder_predicts_assignments(view: str, mode: str, regulariser: str) -> None:
    """The loss is iBOT's of the decoder's answers, from the input and from local views."""
    term = replace(DECODED, view=view, regulariser=regulariser)
    model, of_other = build(term, mode), view == "other"
    batch = draw_batch(0, with_local=True)
    step = Step(model, batch, draw(model, 0), torch.float32)
    encoded, targets = model.encode_inputs(batch, step.mix), model.encode_targets(batch, step.mix)
    step = replace(step, tokens=encoded.views, local=encoded.local)
    cells = step.every if of_other else step.hidden
    module = model.get_submodule("terms.cells")
    answers = [step.decode("cells", ALL, cells, target=int(of_other))]
    if of_other:
        answers.append(step.decode("cells", ALL, cells, target=1, local=0))
    with torch.no_grad():
        teacher = assigned(
            module.momentum, get_at_index(step.momentum(int(of_other)), cells).flatten(0, 1)
        )
    students = [assigned(module.head, rows.flatten(0, 1)) for rows in answers]
    if regulariser == "centring":
        mask = torch.zeros(BATCH, GRID**2, dtype=torch.bool).scatter_(1, cells, True)
        criterion = lightly.IBOTPatchLoss(teacher.shape[1]).double()
        criterion.center.center = module.loss.centre.double().clone()[None]
        expected = criterion(
            teacher.repeat(len(students), 1),
            torch.cat(students),
            mask.view(-1, GRID, GRID).repeat(len(students), 1, 1),
        )
    else:
        codes = lightly.swav_loss.sinkhorn(teacher, epsilon=0.05)
        expected = F.cross_entropy(torch.cat(students) / 0.1, codes.repeat(len(students), 1))
    total, metrics = model(encoded, targets, batch, step.mix, monitor=True)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=0)
    assert 0 < metrics["monitor/cells_use"] <= 1 and 0 < metrics["monitor/cells_doubt"] <= 1
    learnt = [p for p in module.parameters() if p.requires_grad]
    for ours, theirs in zip(*(torch.autograd.grad(x, learnt, retain_graph=True)
                              for x in (total, expected)), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_hidden_cells_are_the_same_token_in_other_places() -> None:
    """Pixels of a hidden cell change nothing, and its neighbours know where it is."""
    torch.manual_seed(0)
    encoder, token = ViT(VISION).eval(), torch.randn(VISION.dim)
    images = torch.randn(2, 3, VISION.image_size, VISION.image_size)
    hidden = torch.zeros(2, GRID**2, dtype=torch.bool)
    hidden[:, 0] = True
    other = images.clone()
    other[:, :, : VISION.patch_size, : VISION.patch_size] += 1
    ours, same = (encoder.encode_cells(x, None, Masking(hidden, token)) for x in (images, other))
    assert torch.equal(ours, same)
    assert not torch.equal(encoder.encode_cells(images), encoder.encode_cells(other))
    moved = encoder.encode_cells(images, None, Masking(hidden.roll(1, 1), token))
    assert not torch.allclose(moved[:, 1], ours[:, 0])


def test_a_mask_token_learns_and_is_initialised_anew() -> None:
    model = build_model(METHODS["ibot"])
    batch = draw_batch(0, with_local=True)
    mix = draw(model, 0)
    encoded = model.encode_inputs(batch, mix)
    assert isinstance(encoded, Encoded)
    assert [len(view[0]) for view in encoded.views] == [GRID**2, GRID**2]
    total, _ = model(encoded, model.encode_targets(batch, mix), batch, mix)
    total.backward()
    assert model.mask_token is not None and model.mask_token.grad is not None
    assert float(model.mask_token.grad.norm()) > 0
    model.reset_parameters()
    assert not model.mask_token.any()


MASKED = MixingConfig(mode="masked", hidden="mask_token")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: replace(IN_PLACE, view="other"),
            "view: expected same with the predictor mask_tok",
        ),
        (
            lambda: replace(DECODED, symmetric=True),
            "symmetric: expected .*, or the predictor mask_",
        ),
        (lambda: replace(IN_PLACE, predictor="linear"), "predictor: expected one of"),
        (lambda: replace(IN_PLACE, encoder="frozen"), "encoder: expected momentum for cell_proto"),
        (
            lambda: ObjectiveConfig(terms=(IN_PLACE,), mixing=MixingConfig(mode="masked")),
            r"mixing.hidden: expected mask_token, .*\['cells'\], got dropped with mode masked",
        ),
        (
            lambda: ObjectiveConfig(terms=(DECODED,), mixing=MASKED),
            r"mixing.hidden: expected dropped with the predictor decoder of \['cells'\]",
        ),
        (
            lambda: MixingConfig(mode="joint", hidden="mask_token"),
            "mixing.hidden: expected dropped unless mode is masked, got mask_token",
        ),
        (
            lambda: MutualInformation(
                ObjectiveConfig(terms=(IN_PLACE,), mixing=MASKED),
                vision=internimage_demo(),
                text=None,  # type: ignore[arg-type]
                num_classes=0,
            ),
            "mixing.mode: expected joint, blend or none with a convolutional encoder",
        ),
    ],
)
def test_what_does_not_go_together_is_named(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
