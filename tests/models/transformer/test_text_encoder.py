"""Text encoder against torch's own Transformer, and what padding must not do."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.models.transformer.blocks import TORCH_LAYERS, Attention
from m3i_fast.models.transformer.layers import activate
from m3i_fast.models.transformer.text_encoder import TextEncoder

CFG = TextConfig(
    vocab_size=50, context_length=12, dim=32, depth=2, num_heads=2, mlp_ratio=2.0, embed_dim=24
)

CAUSAL = replace(CFG, attention="causal")


def make_encoder(cfg: TextConfig = CFG) -> TextEncoder:
    torch.manual_seed(0)
    encoder = TextEncoder(cfg)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return encoder


def torch_twin(encoder: TextEncoder) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True,
        norm_first=True,
    )  # fmt: skip
    twin = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32, 1e-6), enable_nested_tensor=False)
    state = {"norm.weight": encoder.norm.weight, "norm.bias": encoder.norm.bias}
    for i, block in enumerate(encoder.blocks):
        qkv, mlp, at = block.layernorm_qkv, block.layernorm_mlp, f"layers.{i}."
        state |= {
            at + "norm1.weight": qkv.layer_norm_weight,
            at + "norm1.bias": qkv.layer_norm_bias,
            at + "self_attn.in_proj_weight": qkv.weight,
            at + "self_attn.in_proj_bias": qkv.bias,
            at + "self_attn.out_proj.weight": block.proj.weight,
            at + "self_attn.out_proj.bias": block.proj.bias,
            at + "norm2.weight": mlp.layer_norm_weight,
            at + "norm2.bias": mlp.layer_norm_bias,
            at + "linear1.weight": mlp.fc1_weight,
            at + "linear1.bias": mlp.fc1_bias,
            at + "linear2.weight": mlp.fc2_weight,
            at + "linear2.bias": mlp.fc2_bias,
        }
    twin.load_state_dict(state)
    return twin


def make_batch() -> tuple[Tensor, Tensor]:
    num_tokens = torch.tensor([12, 1, 5, 8, 0])
    ids = torch.randint(1, 50, (5, 12), dtype=torch.int32)
    return ids.masked_fill(torch.arange(12) >= num_tokens[:, None], 0), num_tokens


def test_equals_torchs_transformer_and_a_mean_over_the_real_tokens() -> None:
    encoder = make_encoder()
    twin = torch_twin(encoder)
    ids, num_tokens = make_batch()
    out = encoder(ids, num_tokens)
    x = encoder.token_embedding(ids) + encoder.pos_embed
    for row, length in enumerate(num_tokens.tolist()[:-1]):
        tokens = twin(x[row : row + 1, :length])
        expected = tokens.mean(1) @ encoder.projection.weight.T
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_causal_attention_equals_torchs_and_its_last_real_token() -> None:
    encoder = make_encoder(CAUSAL)
    twin = torch_twin(encoder)
    ids, num_tokens = make_batch()
    out = encoder(ids, num_tokens)
    x = encoder.token_embedding(ids) + encoder.pos_embed
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    tokens = twin(x, mask=mask, is_causal=True)
    last = tokens[torch.arange(4), num_tokens[:4] - 1]
    torch.testing.assert_close(out[:4], last @ encoder.projection.weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "quick_gelu"])
def test_other_activations_are_those_of_timm(activation: str) -> None:
    from timm.layers import create_act_layer

    x = torch.randn(5, 7)
    expected = create_act_layer(activation)(x)
    torch.testing.assert_close(activate(x, activation), expected)  # type: ignore[arg-type]
    assert not torch.allclose(activate(x, "gelu"), expected, atol=1e-5)


@pytest.mark.parametrize("cfg", [CFG, CAUSAL], ids=["bidirectional", "causal"])
def test_padding_changes_nothing(cfg: TextConfig) -> None:
    encoder = make_encoder(cfg)
    ids, num_tokens = make_batch()
    padding = torch.arange(12) >= num_tokens[:, None]
    other = torch.where(padding, torch.randint(1, 50, ids.shape, dtype=torch.int32), ids)
    torch.testing.assert_close(encoder(other, num_tokens), encoder(ids, num_tokens))
    shorter = encoder(ids[1:3, :5].long(), num_tokens[1:3])
    torch.testing.assert_close(shorter, encoder(ids, num_tokens)[1:3], atol=1e-6, rtol=1e-5)


def test_order_of_the_words_matters() -> None:
    encoder = make_encoder()
    ids = torch.tensor([[3, 7, 9], [9, 7, 3]])
    a, b = encoder(ids, torch.tensor([3, 3]))
    assert (a - b).abs().max() > 1e-2


class NaiveAttention(Attention):
    """The softmax as written: over nothing it is NaN, which some backends' own kernels avoid."""

    def prepare_mask(self, key_mask: Tensor, dtype: torch.dtype) -> Tensor:
        return key_mask

    def forward(
        self, qkv: Tensor, key_mask: Tensor | None = None, rotation: Tensor | None = None
    ) -> Tensor:
        assert rotation is None
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in qkv.chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        assert key_mask is not None
        weights = scores.masked_fill(~key_mask[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def test_no_backend_of_the_attention_sees_a_softmax_over_nothing() -> None:
    encoder = make_encoder()
    naive = TextEncoder(CFG, layers=replace(TORCH_LAYERS, attention=NaiveAttention))
    naive.load_state_dict(encoder.state_dict())
    batch = make_batch()
    torch.testing.assert_close(naive(*batch), encoder(*batch), atol=1e-5, rtol=1e-5)
    naive(*batch).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in naive.parameters())


@pytest.mark.parametrize("cfg", [CFG, CAUSAL], ids=["bidirectional", "causal"])
def test_an_empty_caption_is_zero_and_gives_no_gradient(cfg: TextConfig) -> None:
    encoder = make_encoder(cfg)
    ids = torch.zeros(3, 12, dtype=torch.int32)
    out = encoder(ids, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(3, 24))
    nn.functional.normalize(out, dim=-1).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("cfg", [CFG, CAUSAL], ids=["bidirectional", "causal"])
def test_gradients_reach_every_parameter_and_stay_finite_beside_an_empty_caption(
    cfg: TextConfig,
) -> None:
    encoder = make_encoder(cfg)
    encoder(*make_batch()).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_longer_captions_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match=r"context_length = 12, got \[2, 13\]"):
        TextEncoder(CFG)(torch.zeros(2, 13, dtype=torch.int32), torch.tensor([1, 1]))


@pytest.mark.parametrize(("field", "value"), [("dim", 33), ("vocab_size", 0), ("mlp_ratio", 0.0)])
def test_bad_sizes_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected .*got {value}"):
        TextConfig(**{field: value})


def test_built_on_meta_equals_built_directly() -> None:
    torch.manual_seed(0)
    direct = TextEncoder(CFG).state_dict()
    with torch.device("meta"):
        encoder = TextEncoder(CFG)
    encoder.to_empty(device="cpu")
    torch.manual_seed(0)
    encoder.reset_parameters()
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, direct[name]), name
