"""Weights cast together against torch's autocast, which casts them one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m3i_fast.engine.precision import cast_weights as module
from m3i_fast.engine.precision.cast_weights import cast_weights
from m3i_fast.models.transformer.blocks import Block
from m3i_fast.models.transformer.layers import LayerNormLinear, Linear


class Shared(nn.Module):
    """Two blocks, of which the first runs twice, a convolution, a weight in two places, no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))
        self.convolution = nn.Conv2d(1, 16, 2, stride=2)
        self.head, self.tied = Linear(16, 16), Linear(16, 16)
        self.tied.weight = self.head.weight
        self.without_bias = LayerNormLinear(16, 16, bias=False)
        self.unused = Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convolution(images).flatten(2).mT
        x = self.blocks[1](self.blocks[0](self.blocks[0](x)))
        x = self.without_bias(x)
        return self.tied(self.head(x)).float().square().mean()


def model_and_images() -> tuple[Shared, Tensor]:
    torch.manual_seed(0)
    return Shared(), torch.randn(3, 1, 8, 8)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def by_autocast() -> tuple[Tensor, dict[str, Tensor | None]]:
    model, images = model_and_images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images)
    loss.backward()
    return loss, gradients(model)


@pytest.mark.parametrize("together", [2**24, 600, 1], ids=["all", "some", "each"])
def test_loss_and_gradients_are_autocasts(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOGETHER", together)
    expected, expected_gradients = by_autocast()
    model, images = model_and_images()
    parameters = dict(model.named_parameters())
    with cast_weights(model, dtype=torch.bfloat16, trained=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images)
        loss.backward()
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert torch.equal(loss, expected)
    for name, gradient in gradients(model).items():
        wanted = expected_gradients[name]
        if wanted is None:
            assert gradient is None, name
            continue
        assert gradient is not None and gradient.dtype == torch.float32, name
        torch.testing.assert_close(gradient, wanted, rtol=0.02, atol=1e-6, msg=name)
    assert model.unused.weight.grad is None


def test_products_find_their_weights_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """What autocast would cast by itself: norms, whose weights stay in fp32, and no product's."""
    model, images = model_and_images()
    dtypes: list[torch.dtype] = []
    linear = torch.nn.functional.linear
    for block in model.blocks:
        for part in (block.layernorm_qkv, block.layernorm_mlp, block.proj):
            monkeypatch.setattr(
                part,
                "matmul",
                lambda x, w, b: (dtypes.extend([w.dtype, b.dtype]), linear(x, w, b))[1],
            )
    with cast_weights(model, dtype=torch.bfloat16, trained=True):
        assert model.blocks[0].layernorm_mlp.layer_norm_weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
    assert len(dtypes) == 3 * 4 * 2 and set(dtypes) == {torch.bfloat16}


def test_frozen_and_trained_weights_are_told_apart() -> None:
    model, _ = model_and_images()
    model.head.requires_grad_(False)
    for trained in (True, False):
        with cast_weights(model, dtype=torch.bfloat16, trained=trained):
            weights = model.head.weight, model.blocks[0].proj.weight
            assert [w.dtype == torch.bfloat16 for w in weights] == [not trained, trained]
            assert weights[1].requires_grad
    assert isinstance(model.head.weight, nn.Parameter)


def test_recomputed_activations_see_the_copies() -> None:
    expected, expected_gradients = by_autocast()
    model, images = model_and_images()
    with cast_weights(model, dtype=torch.bfloat16, trained=True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(model, images, use_reentrant=False)
        loss.backward()
    assert torch.equal(loss, expected)
    weight = "blocks.0.proj.weight"
    wanted = expected_gradients[weight]
    assert wanted is not None
    torch.testing.assert_close(gradients(model)[weight], wanted, rtol=0.02, atol=1e-6)


def test_parameters_are_back_after_an_error() -> None:
    model, _ = model_and_images()
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="inside"):
        with cast_weights(model, dtype=torch.bfloat16, trained=True):
            raise RuntimeError("inside")
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
