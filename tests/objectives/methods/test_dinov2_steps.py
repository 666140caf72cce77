"""Twenty steps of iBOT and DINOv2, beside the same networks and losses in lightly's modules.

Both begin with one set of weights, and see the same pictures and masks. Theirs are timm's Vision
Transformer with lightly's mask token, its projection heads, losses and moving averages.
"""

from __future__ import annotations

import pytest
import torch
from lightly import loss as lightly
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.heads import DINOProjectionHead
from lightly.models.utils import update_momentum
from torch import Tensor, nn

from m3i_fast.export.timm import to_timm
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import PrototypeHead
from m3i_fast.objectives.losses.stateful import Centred
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.objective import MutualInformation
from tests.objectives.methods.steps import GRID, Step, build_model, draw, draw_batch

NUM_STEPS, RATE, MOMENTUM = 20, 0.3, 0.9


def backbone(encoder: ViT, token: Tensor) -> MaskedVisionTransformerTIMM:
    return MaskedVisionTransformerTIMM(
        to_timm(encoder),
        mask_token=nn.Parameter(token.detach().clone()),
        weight_initialization="skip",
        pos_embed_initialization="skip",
    )


def projection(head: nn.Module) -> DINOProjectionHead:
    assert isinstance(head, PrototypeHead)
    linear = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    dims = linear[0].in_features, linear[0].out_features, linear[-1].out_features
    theirs = DINOProjectionHead(*dims, len(head.prototypes))
    own = [layer for layer in theirs.layers if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for ours, other in zip(linear, own, strict=True):
            other.weight.copy_(ours.weight)
            other.bias.copy_(ours.bias)
        theirs.last_layer.weight_v.copy_(head.prototypes)
    return theirs


class Lightly:
    """The student and the teacher of lightly's parts, trained by SGD."""

    def __init__(self, model: MutualInformation) -> None:
        terms = {name: model.get_submodule(f"terms.{name}") for name in ("prototypes", "cells")}
        online, average = model.encoder, model.target_encoder.encoder
        assert model.mask_token is not None
        self.student = nn.ModuleDict({n: projection(t.head) for n, t in terms.items()})
        self.student["encoder"] = backbone(online, model.mask_token)
        self.teacher = nn.ModuleDict({n: projection(t.momentum) for n, t in terms.items()})
        self.teacher["encoder"] = backbone(average, model.mask_token)
        self.koleo = lightly.KoLeoLoss() if "spread" in model.terms else None
        centres = {name: term.loss.centre.clone() for name, term in terms.items()}
        self.of_views = lightly.DINOLoss(len(centres["prototypes"]))
        self.of_views.center = centres["prototypes"].expand(1, 1, -1)
        self.of_cells = lightly.IBOTPatchLoss(len(centres["cells"]))
        self.of_cells.center.center = centres["cells"][None]
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.optimiser = torch.optim.SGD(trained, RATE)

    def train(self, step: Step) -> float:
        mask = torch.zeros(len(step.hidden), GRID**2, dtype=torch.bool)
        mask = mask.scatter_(1, step.hidden, True)
        pictures = [step.pictures(view) for view in range(2)]
        encoder = self.student["encoder"]
        views = [encoder.encode(images, idx_mask=step.hidden) for images in pictures]
        small = encoder.encode(step.local_pictures(0)[step.mix.sample])
        with torch.no_grad():
            whole = [self.teacher["encoder"].encode(images) for images in pictures]
            targets = [self.teacher["prototypes"](tokens.mean(1)) for tokens in whole]
            cells = self.teacher["cells"](torch.cat([tokens[mask] for tokens in whole]))
        predicted = [self.student["prototypes"](tokens.mean(1)) for tokens in (*views, small)]
        hidden = self.student["cells"](torch.cat([tokens[mask] for tokens in views]))
        masks = mask.view(-1, GRID, GRID).repeat(2, 1, 1)
        loss = self.of_views(targets, predicted) + self.of_cells(cells, hidden, masks)
        if self.koleo is not None:
            loss = loss + 0.1 * sum(self.koleo(tokens.mean(1)) for tokens in views)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        for name, online in self.student.items():
            update_momentum(online, self.teacher[name], m=MOMENTUM)
        return loss.item()


def train(model: MutualInformation, optimiser: torch.optim.Optimizer, step: Step) -> float:
    """Ours, with the objective's own encoders, terms and pairs of moving averages."""
    batch, mix = step.batch, step.mix
    encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
    loss, _ = model(encoded, targets, batch, mix)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    model.finish_step()
    with torch.no_grad():
        for average, online in model.momentum_pairs():
            for target, source in zip(average.parameters(), online.parameters(), strict=True):
                target.lerp_(source, 1 - MOMENTUM)
    return loss.item()


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_twenty_steps_are_those_of_lightlys_modules(name: str) -> None:
    model = build_model(METHODS[name])
    theirs = Lightly(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    losses: list[tuple[float, float]] = []
    for number in range(NUM_STEPS):
        batch = draw_batch(number % 2, with_local=True)
        step = Step(model, batch, draw(model, number % 2), torch.float32)
        expected = theirs.train(step)
        losses.append((train(model, optimiser, step), expected))
    ours, others = zip(*losses, strict=True)
    assert min(others) < others[0] - 0.1  # something is learnt
    assert ours == pytest.approx(others, rel=1e-4)
    term = model.get_submodule("terms.cells")
    assert isinstance(term.loss, Centred) and isinstance(term.head, PrototypeHead)
    last = theirs.student["cells"].last_layer.weight_v
    torch.testing.assert_close(term.head.prototypes, last, rtol=1e-3, atol=1e-4)
    token = theirs.student["encoder"].mask_token
    assert float(token.detach().norm()) > 0
    torch.testing.assert_close(model.mask_token, token, rtol=1e-3, atol=1e-4)
