"""Gradient caching: the gradients of the whole batch, in the memory of a part."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3i_fast.config import TrainConfig
from m3i_fast.config.models.vit import vit_demo
from m3i_fast.config.parallel import ParallelConfig
from m3i_fast.engine.build import build_objective
from m3i_fast.engine.parallel.gradient_caching import run_in_chunks
from m3i_fast.engine.train_step import ForwardPass
from m3i_fast.models.transformer.blocks import Block
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.mixing import draw_mix
from m3i_fast.recipes import recipes, shrink
from tests.shared.annotated import regions
from tests.shared.small_objective import NUM_CLASSES, TEXT, make_batch

B = 12


def _config(name: str, chunk: int, **vision: str) -> TrainConfig:
    cfg = shrink(recipes()[name](), path=Path("data"), num_classes=NUM_CLASSES, text=TEXT)
    parallel = ParallelConfig(chunk=chunk)
    return replace(cfg, vision=replace(cfg.vision, drop_path_rate=0.0, **vision), parallel=parallel)


def _step(cfg: TrainConfig) -> tuple[dict[str, Tensor], int]:
    """Gradients, and bytes that the forward pass kept for them."""
    torch.manual_seed(0)
    objective = build_objective(cfg)
    batch = make_batch(B)
    size = cfg.vision.image_size
    views = tuple(v.repeat(1, 1, size // 32, size // 32) for v in batch.global_views)
    columns = {"regions": regions(B, views=2)}
    batch = replace(batch, global_views=views, columns=columns)
    mix = draw_mix(
        cfg.objective.mixing,
        position=batch.position,
        first_position=0,
        grid=cfg.vision.grid,
        context_length=6,
        seed=0,
        step=0,
        num_steps=1,
    )
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = ForwardPass(objective)(
            batch, mix, lambda _: nullcontext(), monitor=True, measure=False
        )
    loss.backward()
    found = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
    found |= objective.gradient_metrics()
    return found, sum(kept.values())


@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("demo", {}),
        ("demo", {"position": "rotary"}),
        ("demo_internimage", {}),
        ("demo_coca", {}),
        ("demo_locca", {}),
    ],
)
def test_gradients_are_those_of_the_whole_batch(name: str, vision: dict[str, str]) -> None:
    cfgs = (_config(name, size, **vision) for size in (0, 2))
    (whole, of_whole), (chunked, of_chunks) = (_step(cfg) for cfg in cfgs)
    assert chunked.keys() == whole.keys()
    largest = max(float(value.abs().max()) for value in whole.values())
    for parameter, value in whole.items():
        torch.testing.assert_close(
            chunked[parameter], value, rtol=1e-4, atol=1e-6 * largest, msg=parameter
        )
    assert of_chunks < of_whole / 2


def test_stochastic_depth_draws_the_same_in_both_passes() -> None:
    block = Block(16, 2, drop_path=0.5)
    rows = torch.randn(10, 3, 16, generator=torch.Generator().manual_seed(0))

    def gradient(of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        block.zero_grad()
        torch.manual_seed(1)
        out = of(rows)
        out.square().sum().backward()
        assert block.proj.weight.grad is not None
        return out.detach(), block.proj.weight.grad.clone()

    found = gradient(partial(run_in_chunks, block, 4))
    expected = gradient(lambda x: torch.cat([block(part) for part in x.tensor_split(3)]))
    assert not torch.equal(expected[0], rows)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_chunks_of_rows_drop_the_branches_of_their_rows() -> None:
    vit = ViT(vit_demo(dim=32, depth=3, num_heads=2, drop_path_rate=0.5))
    rows = torch.randn(10, 4, 32)
    priority = torch.randint(2**24, (10, 6), dtype=torch.int32)

    def gradient(of: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        vit.zero_grad()
        out = of(rows, None, priority)
        out.square().sum().backward()
        assert vit.blocks[1].proj.weight.grad is not None  # type: ignore[union-attr]
        return out.detach(), vit.blocks[1].proj.weight.grad.clone()  # type: ignore[union-attr]

    found, expected = gradient(partial(run_in_chunks, vit.encode, 4)), gradient(vit.encode)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = vit.encode(rows, None, priority.flip(0))
    assert not torch.allclose(other, expected[0], atol=1e-3)


def test_without_a_gradient_the_rows_are_the_same() -> None:
    rows = torch.randn(7, 5)
    seen = []

    def double(part: Tensor) -> Tensor:
        seen.append(len(part))
        return 2 * part

    with torch.no_grad():
        assert torch.equal(run_in_chunks(double, 3, rows), 2 * rows)
    assert seen == [3, 2, 2]
    assert torch.equal(run_in_chunks(double, 7, rows), 2 * rows) and seen[3:] == [7]
    assert run_in_chunks(double, 3, rows[:0]).shape == (0, 5)


def test_a_chunk_is_not_negative() -> None:
    with pytest.raises(ValueError, match="parallel.chunk: expected 0 to 16777216, got -1"):
        ParallelConfig(chunk=-1)
