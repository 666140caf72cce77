"""InternImage in the other ways it runs: recomputed, compiled, in bf16, on the reference core."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3i_fast.config.models.internimage import InternImageConfig
from m3i_fast.models.internimage.model import InternImage
from m3i_fast.ops import dcnv3, reference
from tests.shared.official_internimage import (
    CASES,
    TINY,
    TINY_H,
    gradient_norms,
    seeded_images,
    seeded_state,
    weigh,
)

SMALL_H = replace(TINY_H, token_dim=64)


def seeded(cfg: InternImageConfig) -> InternImage:
    model = InternImage(cfg)
    model.load_state_dict(seeded_state(model))
    return model


@pytest.mark.parametrize(
    ("cfg", "backend"),
    [
        pytest.param(TINY, "aot_eager", id="plain-aot_eager"),
        pytest.param(SMALL_H, "aot_eager", id="h-aot_eager"),
        pytest.param(TINY, "inductor", id="plain-inductor", marks=pytest.mark.nightly),
        pytest.param(SMALL_H, "inductor", id="h-inductor", marks=pytest.mark.nightly),
    ],
)
def test_compiles_whole_without_graph_breaks(cfg: InternImageConfig, backend: str) -> None:
    model = seeded(replace(cfg, depths=(1, 1, 3, 1))).eval()
    images = seeded_images(32, 32)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
        model.zero_grad()
        output = run(images)
        weigh(output).backward()
        found.append((output, gradient_norms(model)))
    (expected, norms), (got, compiled_norms) = found
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert compiled_norms == pytest.approx(norms, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("case", ["tiny h", "tiny g", "tiny l", "tiny scaled"])
def test_runs_in_bf16_under_autocast(case: str) -> None:
    cfg, image = CASES[case]
    model = seeded(cfg).eval()
    images = seeded_images(*image)
    expected = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(images)
    weigh(got.float()).backward()
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float(), expected, dim=-1).min() > 0.98
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def train(core: Callable[..., Tensor], num_steps: int, dtype: torch.dtype) -> list[float]:
    """Losses of telling noise of seven brightnesses apart, learnt in some tens of steps."""
    torch.manual_seed(0)
    model = InternImage(TINY, channels=16, groups=[1, 2, 4, 8], depths=[1, 1, 1, 1], core=core)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(num_steps):
        label = torch.randint(7, (8,))
        images = torch.randn(8, 3, 32, 32, dtype=dtype) + 0.5 * label.view(8, 1, 1, 1)
        loss = F.cross_entropy(model(images), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("num_steps", "dtype", "tolerance"),
    [
        (10, torch.float32, 1e-4),
        # training amplifies rounding, so that only fp64 stays the same for long
        pytest.param(200, torch.float64, 1e-6, marks=pytest.mark.matrix),
    ],
)
def test_training_is_the_same_with_the_reference_core(
    num_steps: int, dtype: torch.dtype, tolerance: float
) -> None:
    ours, plain = train(dcnv3, num_steps, dtype), train(reference.dcnv3, num_steps, dtype)
    torch.testing.assert_close(ours, plain, atol=tolerance, rtol=tolerance)
    if num_steps > 100:
        assert sum(ours[-20:]) / 20 < 0.5 * ours[0]
