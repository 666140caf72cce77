"""The real modules of Transformer Engine, through our body, against torch's body.

`make te-contract` collects this file, in an environment of its own. Modules are constructed as on a
GPU; what they would compute there is computed here in torch, as their documentation says it, from
the arguments that our code passes and the settings that the real constructors kept.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformer_engine.pytorch as te
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, dinov3_s_plus, vit_b, vit_s
from m3i_fast.config.objective.heads import DecoderConfig
from m3i_fast.export.transformer_engine import to_transformer_layers
from m3i_fast.models import TextEncoder, ViT
from m3i_fast.models.transformer.layers import LAYER_NORM_EPS
from m3i_fast.models.transformer.te_layers import te_layers
from m3i_fast.objectives.heads import DenseDecoder

SMALL = ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)
CAPTIONS = TextConfig(vocab_size=50, context_length=7, dim=32, depth=2, num_heads=2, embed_dim=8)

MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit_s": lambda **layers: ViT(vit_s(), **layers),
    "vit_b": lambda **layers: ViT(vit_b(class_token=True, num_registers=4), **layers),
    "no bias": lambda **layers: ViT(vit_s(qkv_bias=False, layer_scale_init=0.1), **layers),
    "swiglu": lambda **layers: ViT(dinov3_s_plus(), **layers),
    "text": lambda **layers: TextEncoder(TextConfig(), **layers),
    "decoder": lambda **layers: DenseDecoder(
        DecoderConfig(), input_dim=768, output_dim=588, input_grid=14, **layers
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_is_that_of_torchs_body(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = MODELS[name](), MODELS[name](layers=te_layers())
    assert any(isinstance(m, te.LayerNormMLP) for m in theirs.modules())

    def described(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
        return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]

    assert described(theirs) == described(ours)
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert {p.device.type for p in theirs.parameters()} == {"meta"}


def test_one_seed_gives_one_model() -> None:
    models = []
    for layers in ({}, {"layers": te_layers()}):
        torch.manual_seed(1)
        models.append(ViT(SMALL, **layers))
    with torch.device("meta"):
        late = ViT(SMALL, layers=te_layers())
    late.to_empty(device="cpu")
    torch.manual_seed(1)
    late.reset_parameters()
    torch.manual_seed(1)
    models[0].reset_parameters()
    expected = models[0].state_dict()
    for model in (*models[1:], late):
        for name, value in model.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_weights_go_to_and_fro_and_a_pickled_state_does_not() -> None:
    ours, theirs = ViT(SMALL), ViT(SMALL, layers=te_layers())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    again = ViT(SMALL)
    again.load_state_dict(copy.deepcopy(theirs).state_dict(), strict=True)
    for name, value in again.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    for part in ("layernorm_qkv", "attention.core", "proj", "layernorm_mlp"):
        pickled = {f"blocks.0.{part}._extra_state": torch.tensor([128, 4], dtype=torch.uint8)}
        with pytest.raises(RuntimeError, match="Unexpected key.*_extra_state"):
            theirs.load_state_dict(ours.state_dict() | pickled)


@pytest.mark.parametrize("interleaved", [True, False])
def test_exported_weights_are_those_of_a_transformer_layer(interleaved: bool) -> None:
    """Names and shapes; tests/export/test_transformer_engine.py takes the rows apart as it does."""
    layer = te.TransformerLayer(
        SMALL.dim,
        int(SMALL.dim * SMALL.mlp_ratio),
        SMALL.num_heads,
        layernorm_epsilon=1e-6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        self_attn_mask_type="no_mask",
        attn_input_format="bshd",
        fuse_qkv_params=True,
        qkv_weight_interleaved=interleaved,
        device="meta",
    )
    expected = {
        name: value.shape
        for name, value in layer.state_dict().items()
        if not name.endswith("_extra_state")
    }
    state = to_transformer_layers(ViT(SMALL), interleaved=interleaved)
    block = {name: value for name, value in state.items() if name.startswith("blocks.0.")}
    assert {name.removeprefix("blocks.0."): v.shape for name, v in block.items()} == expected


# ---- What the real forwards are called with, computed in torch -----------------------------------


def bound(method: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments by the real method's names, its defaults filled in."""
    found = inspect.signature(method).bind(*args, **kwargs)
    found.apply_defaults()
    return found.arguments


def normed(module: Any, inp: Tensor) -> Tensor:
    weight, bias = module.layer_norm_weight, module.layer_norm_bias
    assert module.normalization == "LayerNorm" and not module.zero_centered_gamma
    assert module.eps == LAYER_NORM_EPS
    return F.layer_norm(inp, weight.shape, weight, bias, module.eps)


def layernorm_linear(module: Any, given: dict[str, Any]) -> Tensor:
    assert not module.return_bias and not module.return_layernorm_output
    return F.linear(normed(module, given["inp"]), module.weight, getattr(module, "bias", None))


def linear(module: Any, given: dict[str, Any]) -> Tensor:
    assert not module.return_bias
    return F.linear(given["inp"], module.weight, module.bias)


def layernorm_mlp(module: Any, given: dict[str, Any]) -> Tensor:
    assert module.activation == "gelu" and not module.return_bias
    hidden = F.linear(normed(module, given["inp"]), module.fc1_weight, module.fc1_bias)
    hidden = F.gelu(hidden, approximate="tanh")
    return F.linear(hidden, module.fc2_weight, module.fc2_bias)


def attention(module: Any, given: dict[str, Any]) -> Tensor:
    """Padded queries get what no backend promises to leave out: NaN."""
    assert module.qkv_format == "bshd" and module.attention_dropout == 0
    assert module.attention_type == "self" and module.softmax_type == "vanilla"
    qkv = [given[f"{name}_layer"] for name in ("query", "key", "value")]
    q, k, v = (x.transpose(1, 2) for x in qkv)
    assert q.shape[1] == module.num_attention_heads
    assert q.shape[-1] == module.hidden_size_per_attention_head_k
    kind = given["attn_mask_type"] or module.attn_mask_type
    window = given["window_size"] or module.window_size
    assert window in (None, (-1, -1))
    keep = None
    if kind == "padding":
        masked = given["attention_mask"]  # [B, 1, 1, T], True: left out
        lengths = (~masked).sum(-1, keepdim=True)
        keep = torch.arange(masked.shape[-1]) < lengths  # as cu_seqlens say it: a prefix
    else:
        assert kind == "no_mask" and given["attention_mask"] is None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=module.softmax_scale)
    out = out.transpose(1, 2).flatten(2)
    return out if keep is None else out.masked_fill(~keep[:, 0, 0, :, None], float("nan"))


@pytest.fixture
def computed_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = {
        te.LayerNormLinear: layernorm_linear,
        te.Linear: linear,
        te.LayerNormMLP: layernorm_mlp,
        te.DotProductAttention: attention,
    }
    for kind, compute in forwards.items():
        real = inspect.unwrap(kind.forward)

        def forward(self: Any, *args: Any, real: Any = real, compute: Any = compute, **kwargs: Any):
            return compute(self, bound(real, self, *args, **kwargs))

        monkeypatch.setattr(kind, "forward", forward)


def spread(model: nn.Module) -> None:
    """Move every parameter off its initial value, so that each of them matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def expect_equal(ours: nn.Module, theirs: nn.Module, *inputs: Tensor) -> None:
    """To what the two GELUs differ by; outputs and gradients are finite."""
    spread(ours)
    theirs.load_state_dict(ours.state_dict())
    outputs = [model(*inputs) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=4e-3, rtol=4e-3)
    assert not torch.equal(outputs[1], outputs[0])  # the GELUs differ
    for output in outputs:
        output.square().sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        error = (a.grad - b.grad).norm() / a.grad.norm().clamp(min=1e-6)
        assert error < 2e-2, (name, float(error))


@pytest.mark.usefixtures("computed_in_torch")
def test_an_image_encoder_calls_what_it_means() -> None:
    expect_equal(ViT(SMALL), ViT(SMALL, layers=te_layers()), torch.randn(3, 3, 32, 32))


@pytest.mark.usefixtures("computed_in_torch")
def test_a_text_encoder_pads_as_it_means() -> None:
    ids = torch.randint(0, 50, (4, 7))
    models = TextEncoder(CAPTIONS), TextEncoder(CAPTIONS, layers=te_layers())
    expect_equal(*models, ids, torch.tensor([7, 3, 1, 0]))


@pytest.mark.usefixtures("computed_in_torch")
def test_a_decoder_asks_for_the_last_tokens() -> None:
    def build(**layers: Any) -> DenseDecoder:
        cfg = DecoderConfig(dim=32, depth=2, num_heads=2)
        return DenseDecoder(cfg, input_dim=16, output_dim=12, input_grid=4, **layers)

    index = torch.randint(0, 16, (3, 5))
    expect_equal(
        build(), build(layers=te_layers()), torch.randn(3, 5, 16), index, torch.randn(3, 4, 4)
    )
