"""Views of any size through the objective: squares give the loss of a batch, others their means."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch
from torch import Tensor

from m3i_fast.objectives.any_shape.draw import draw_packed_mix
from m3i_fast.objectives.methods import METHODS
from m3i_fast.objectives.mixing import Mix, draw_branch_priority, draw_slice_key
from m3i_fast.objectives.objective import MutualInformation
from m3i_fast.objectives.packed_views import encode_packed
from m3i_fast.objectives.targets import normalise_views
from m3i_fast.ops.views import cut_patches
from m3i_fast.pipelines.batch import Batch
from tests.objectives.methods.steps import (
    BATCH,
    CONTEXT,
    NUM_STEPS,
    PATCH,
    build_model,
    draw,
    draw_batch,
)

# Terms of whole pictures without mixing: labels, views, prototypes, queues, frozen teachers.
WHOLE = [
    name
    for name, method in METHODS.items()
    if method.mode == "none" and all(term.kind.summaries != "none" for term in method.terms)
]
GRIDS = (2, 5), (4, 4), (1, 3), (6, 2), (3, 3), (4, 1), (2, 2), (5, 4)


@dataclass(frozen=True)
class Views:
    patches: tuple[Tensor, ...]
    grids: Tensor
    num_global: int


def as_patches(batch: Batch) -> Views:
    views = [*batch.global_views, *batch.local_views]
    grids = [torch.tensor(view.shape[2:]) // PATCH for view in views]
    return Views(
        tuple(cut_patches(view, PATCH).flatten(0, 1) for view in views),
        torch.stack(grids).expand(BATCH, -1, -1),
        len(batch.global_views),
    )


def draw_packed(model: MutualInformation, grids: Tensor) -> Mix:
    """The first step's mix of views of these grids, [B, V, 2]."""
    mix = draw_packed_mix(
        model.cfg.mixing,
        grids=grids[:, :2],
        position=torch.arange(BATCH),
        first_position=0,
        context_length=CONTEXT,
        seed=1,
        step=0,
        num_steps=NUM_STEPS,
    )
    return replace(mix, slice_key=draw_slice_key(0, seed=1))


def gradients(model: MutualInformation) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def with_branches(model: MutualInformation, mix: Mix, num_local: int) -> Mix:
    """Priorities of stochastic depth in a model whose blocks drop half of their branches."""
    encoder = model.encoder
    for block in encoder.blocks:  # type: ignore[union-attr]
        block.drop_path.rate = 0.5
    rows, local = draw_branch_priority(
        model.cfg.mixing,
        position=torch.arange(BATCH),
        num_views=model.cfg.num_encoded_views,
        num_local=num_local,
        num_layers=2,
        seed=0,
    )
    return replace(mix, branch_priority=rows, local_branch_priority=local)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("drops", [False, True])
def test_squares_have_the_loss_and_gradients_of_a_batch(name: str, drops: bool) -> None:
    method = METHODS[name]
    batch = draw_batch(3, with_local=method.local_views)
    results = []
    for is_packed in (False, True):
        model = build_model(method)
        views = as_patches(batch)
        mix = draw_packed(model, views.grids) if is_packed else draw(model, 0, in_order=True)
        if drops:
            mix = with_branches(model, mix, len(batch.local_views))
        if is_packed:
            encoded, targets = encode_packed(model, views, mix)
        else:
            encoded, targets = model.encode_inputs(batch, mix), model.encode_targets(batch, mix)
        loss, metrics = model(encoded, targets, batch, mix, monitor=True)
        loss.backward()
        results.append((loss.detach(), metrics, gradients(model)))
    (expected, _, of_batch), (got, metrics, of_packed) = results
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert of_packed.keys() == of_batch.keys() and any("encoder" in key for key in of_batch)
    for key, gradient in of_batch.items():
        size = float(gradient.abs().max())
        assert float((of_packed[key] - gradient).abs().max()) <= 1e-5 * (1 + size), key
    assert all(bool(value.isfinite().all()) for value in metrics.values())


def draw_pictures() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randint(
            0, 256, (1, 3, PATCH * rows, PATCH * columns), generator=rng, dtype=torch.uint8
        )
        for rows, columns in GRIDS
    ]


def test_pictures_of_any_size_are_the_means_of_their_own_tokens() -> None:
    model = build_model(METHODS["dino"])
    pictures = draw_pictures()
    patches = torch.cat([cut_patches(picture[0], PATCH) for picture in pictures])
    turned = torch.cat([cut_patches(picture[0].transpose(1, 2), PATCH) for picture in pictures])
    grids = torch.tensor(GRIDS)
    views = Views((patches, turned, patches), torch.stack([grids, grids.flip(1), grids], 1), 2)
    mix = draw_packed(model, views.grids)
    encoded, targets = encode_packed(model, views, mix)

    def means(turn: bool, encode: object) -> Tensor:
        rows = []
        for picture in pictures:
            own = picture.transpose(2, 3).contiguous() if turn else picture
            images = normalise_views(own, torch.zeros(1, dtype=torch.int64), torch.float32)
            rows.append(encode(images).mean(1))  # type: ignore[operator]
        return torch.cat(rows)

    order = mix.sample
    for view, turn in enumerate((False, True)):
        online = means(turn, model.encoder.encode_cells)[order]
        torch.testing.assert_close(encoded.views[view][:, 0], online, rtol=1e-4, atol=1e-5)
        target = means(turn, model.target_encoder)[order]
        got = targets.tokens["momentum", view][:, 0]
        torch.testing.assert_close(got, target, rtol=1e-4, atol=1e-5)
        assert not got.requires_grad
    torch.testing.assert_close(
        encoded.local[0][:, 0], means(False, model.encoder.encode_cells), rtol=1e-4, atol=1e-5
    )
    batch = draw_batch(3, with_local=True)
    loss, _ = model(encoded, targets, batch, mix)
    loss.backward()
    assert bool(loss.isfinite()) and gradients(model)


@pytest.mark.parametrize("name", ["coca", "densecl", "supervised"])
def test_what_needs_squares_is_refused(name: str) -> None:
    method = METHODS[name]
    model, batch = build_model(method), draw_batch(3, with_local=False)
    told = {
        "coca": "terms: expected no captioner for views of any size, got 'caption_tokens'",
        "densecl": "terms: expected no match of cells for views of any size, got 'cells'",
        "supervised": "mixing.mode: expected joint, own_image, masked or none.*got blend",
    }
    if name == "supervised":
        blend = replace(model.cfg.mixing, mode="blend")
        model.cfg = replace(model.cfg, mixing=blend)
    with pytest.raises(ValueError, match=told[name]):
        encode_packed(model, as_patches(batch), cast(Mix, None))


def test_a_mix_of_squares_is_refused() -> None:
    model, batch = build_model(METHODS["clip"]), draw_batch(3, with_local=False)
    with pytest.raises(ValueError, match="mix: expected that of draw_packed_mix"):
        encode_packed(model, as_patches(batch), draw(model, 0))
