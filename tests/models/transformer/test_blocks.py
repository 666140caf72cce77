"""The block against timm's; its parameters' names; padding mask; DropPath."""

import pytest
import torch
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn

from m3i_fast.models.transformer.blocks import Attention, Block
from m3i_fast.models.transformer.drop_path import DropPath

# the names that Transformer Engine's LayerNormLinear, Linear and LayerNormMLP give
TIMM_TO_OURS = {
    "norm1.weight": "layernorm_qkv.layer_norm_weight",
    "norm1.bias": "layernorm_qkv.layer_norm_bias",
    "attn.qkv.weight": "layernorm_qkv.weight",
    "attn.qkv.bias": "layernorm_qkv.bias",
    "attn.proj.weight": "proj.weight",
    "attn.proj.bias": "proj.bias",
    "norm2.weight": "layernorm_mlp.layer_norm_weight",
    "norm2.bias": "layernorm_mlp.layer_norm_bias",
    "mlp.fc1.weight": "layernorm_mlp.fc1_weight",
    "mlp.fc1.bias": "layernorm_mlp.fc1_bias",
    "mlp.fc2.weight": "layernorm_mlp.fc2_weight",
    "mlp.fc2.bias": "layernorm_mlp.fc2_bias",
    "ls1.gamma": "layer_scale_1",
    "ls2.gamma": "layer_scale_2",
}


def perturb(module: nn.Module) -> None:
    """Move every parameter off its initial value, so that each of them matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)


def test_parameter_names_are_transformer_engines() -> None:
    block = Block(32, 2, layer_scale_init=0.1)
    assert set(block.state_dict()) == set(TIMM_TO_OURS.values())
    assert block.layernorm_qkv.weight.shape == (96, 32)
    assert block.layernorm_mlp.fc1_weight.shape == (128, 32)
    assert block.layernorm_mlp.fc2_weight.shape == (32, 128)
    plain = set(Block(32, 2, qkv_bias=False).state_dict())
    assert set(TIMM_TO_OURS.values()) - plain == {
        "layernorm_qkv.bias",
        "layer_scale_1",
        "layer_scale_2",
    }


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_values_and_gradients_equal_timm(scale: float | None, qkv_bias: bool) -> None:
    torch.manual_seed(0)
    timm_block = TimmBlock(48, 3, qkv_bias=qkv_bias, init_values=scale).double()
    perturb(timm_block)
    block = Block(48, 3, qkv_bias=qkv_bias, layer_scale_init=scale).double()
    block.load_state_dict({TIMM_TO_OURS[k]: v for k, v in timm_block.state_dict().items()})
    x = torch.randn(4, 9, 48, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 9, 48, dtype=torch.float64)

    def run(module: nn.Module) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        y = module(x)
        names, parameters = zip(*module.named_parameters(), strict=True)
        dx, *grads = torch.autograd.grad((y * weight).sum(), [x, *parameters])
        return y, dx, dict(zip(names, grads, strict=True))

    (y, dx, grads), (y_timm, dx_timm, grads_timm) = run(block), run(timm_block)
    torch.testing.assert_close(y, y_timm)
    torch.testing.assert_close(dx, dx_timm)
    for name, expected in grads_timm.items():
        torch.testing.assert_close(grads[TIMM_TO_OURS[name]], expected)


def test_masked_keys_are_as_if_absent() -> None:
    block = Block(32, 2)
    perturb(block)
    x = torch.randn(3, 7, 32)
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    masked = block(x, mask)
    for row, length in enumerate((7, 4, 1)):
        alone = block(x[row : row + 1, :length])
        torch.testing.assert_close(masked[row : row + 1, :length], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_last", [0, 1, 3, 7])
def test_the_last_tokens_alone_are_the_last_of_all(num_last: int) -> None:
    block = Block(32, 2, layer_scale_init=0.5)
    perturb(block)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(block(x, num_last=num_last), block(x)[:, 7 - num_last :])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads = 5, got 32"):
        Block(32, 5)


def test_attention_is_the_softmax_formula() -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8, dtype=torch.float64)  # [B, T, H, D / H]
    qkv = torch.stack([q, k, v], 2).flatten(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(Attention(4, 8)(qkv), expected)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.rand(4000, 3, 5) + 1
    out = drop(x)
    kept = out.flatten(1).ne(0).all(1)
    assert torch.equal(kept, out.flatten(1).ne(0).any(1))
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert abs(kept.float().mean().item() - 0.75) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert drop.eval()(x) is x


def test_dropped_samples_pass_the_block_unchanged() -> None:
    torch.manual_seed(0)
    block = Block(32, 2, drop_path=0.9)
    perturb(block)
    x = torch.randn(200, 3, 32)
    unchanged = (block(x) == x).flatten(1).all(1).float().mean().item()
    assert abs(unchanged - 0.81) < 0.12  # both branches dropped; 4 standard errors
    assert not torch.equal(block.eval()(x), x)


def test_reset_parameters_restores_the_layer_scale() -> None:
    block = Block(32, 2, layer_scale_init=0.3)
    perturb(block)
    block.reset_parameters()
    assert block.layer_scale_1 is not None
    torch.testing.assert_close(block.layer_scale_1, torch.full((32,), 0.3))
    assert block.layernorm_qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
