"""Both towers for open_clip, whose own modules are built of the config: equal embeddings."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from m3i_fast.config.models.text import TextConfig
from m3i_fast.config.models.vit import ViTConfig, dinov3_s, vit_b, vit_s
from m3i_fast.export.open_clip import to_open_clip
from m3i_fast.export.timm_models import model_of
from m3i_fast.models.transformer.text_encoder import TextEncoder
from m3i_fast.models.transformer.vit import ViT
from m3i_fast.objectives.heads import GlobalHead

VISION = ViTConfig(image_size=32, patch_size=8, dim=64, depth=2, num_heads=4, class_token=True)
TEXT = TextConfig(
    **{"vocab_size": 50, "context_length": 12, "dim": 48, "depth": 2, "num_heads": 3},
    embed_dim=24,
    attention="causal",
)


def drawn(module: nn.Module) -> Any:
    """Give every weight a value that matters, in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.eval()


def towers(
    vision: ViTConfig = VISION, text: TextConfig = TEXT, hidden: int = 0
) -> tuple[ViT, GlobalHead, TextEncoder]:
    torch.manual_seed(0)
    head = GlobalHead(vision.dim, hidden, text.embed_dim)
    return drawn(ViT(vision)), drawn(head), drawn(TextEncoder(text))


def captions(cfg: TextConfig) -> tuple[Tensor, Tensor]:
    """Ids [3, T] of a short, a long and the shortest caption, with their end and padding."""
    num_tokens = torch.tensor([5, cfg.context_length, 2])
    ids = torch.randint(1, cfg.vocab_size - 1, (3, cfg.context_length))
    place = torch.arange(cfg.context_length)
    ids = ids.masked_fill(place == num_tokens[:, None] - 1, cfg.vocab_size - 1)
    return ids.masked_fill(place >= num_tokens[:, None], 0), num_tokens


def built(
    vit: ViT, head: GlobalHead, text: TextEncoder, bias: Tensor | None = None
) -> CustomTextCLIP:
    scale = torch.tensor(2.5)
    made = to_open_clip(vit, head.state_dict(), text, log_scale=scale, bias=bias)
    config = copy.deepcopy(made.config)
    assert config.pop("custom_text")  # chooses the class in open_clip's factory
    model = CustomTextCLIP(**config)
    model.load_state_dict(made.weights, strict=True)
    return model.eval()


@torch.no_grad()
def assert_equal(model: CustomTextCLIP, vit: ViT, head: GlobalHead, text: TextEncoder) -> None:
    images = torch.randn(2, 3, vit.cfg.image_size, vit.cfg.image_size)
    expected = head(vit.encode_cells(images))
    assert expected.std(0).mean() > 1e-2  # of different pictures
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=1e-4)
    ids, num_tokens = captions(text.cfg)
    embedded = text(ids, num_tokens)
    torch.testing.assert_close(model.encode_text(ids), embedded, atol=1e-5, rtol=1e-4)
    assert model.logit_scale.item() == 2.5


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({}, {}),
        ({"pre_norm": True, "norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"mlp": "quick_gelu"}, {"mlp": "quick_gelu"}),
        ({"mlp": "gelu_tanh", "mlp_ratio": 3.0}, {"mlp_ratio": 2.5}),
        ({"layer_scale_init": 0.1, "qkv_bias": False}, {"mlp": "gelu_tanh"}),
        ({"key_bias": False}, {}),
    ],
)
def test_its_own_towers_compute_the_embeddings(
    vision: dict[str, Any], text: dict[str, Any]
) -> None:
    parts = towers(replace(VISION, **vision), replace(TEXT, **text))
    model = built(*parts)
    assert type(model.visual).__name__ == "VisionTransformer" and model.logit_bias is None
    assert_equal(model, *parts)
    with_bias = built(*parts, bias=torch.tensor(-7.0))
    assert with_bias.logit_bias.item() == -7.0


@pytest.mark.parametrize(
    ("name", "vision", "hidden"),
    [
        (
            "vit_tiny_patch16_224",
            ViTConfig(dim=192, num_heads=3, class_token=True, num_registers=0),
            40,
        ),
        (
            "vit_medium_patch16_gap_256",
            ViTConfig(
                **{"image_size": 256, "dim": 512, "num_heads": 8},
                qkv_bias=False,
                layer_scale_init=0.1,
            ),
            0,
        ),
        ("vit_tiny_patch16_dinov3_qkvb", dinov3_s(image_size=64, dim=192, num_heads=3), 48),
    ],
)
def test_a_model_that_timm_builds_by_its_name(name: str, vision: ViTConfig, hidden: int) -> None:
    """Without class token; with a hidden layer that is narrower than open_clip's; rotary."""
    parts = towers(vision, hidden=hidden)
    made = to_open_clip(
        parts[0], parts[1].state_dict(), parts[2], log_scale=torch.tensor(2.5), bias=None
    )
    assert made.image_tower == name
    assert_equal(built(*parts), *parts)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "vision"),
    [
        ("vit_base_patch16_siglip_gap_224", vit_b()),
        ("vit_small_patch14_reg4_dinov2", None),
        ("vit_base_patch32_clip_quickgelu_224", None),
    ],
)
def test_larger_models_of_timm(name: str, vision: ViTConfig | None) -> None:
    """The recipes' ViT-B, DINOv2 and CLIP, each by the name that timm has for it."""
    from m3i_fast.config.models.vit import clip_b32, dinov2_s

    other = {
        "vit_small_patch14_reg4_dinov2": dinov2_s(image_size=518),
        "vit_base_patch32_clip_quickgelu_224": clip_b32(mlp="quick_gelu"),
    }
    parts = towers(vision or other[name], hidden=48)
    found = model_of(parts[0])
    assert found is not None and found[0] == name
    assert_equal(built(*parts), *parts)


def test_what_open_clip_has_no_form_of_is_refused_with_the_flags_of_a_run_that_it_has() -> None:
    vision, text = replace(VISION, class_token=False, num_registers=2), TEXT
    parts = towers(vision, replace(text, attention="bidirectional"), hidden=64)
    with pytest.raises(ValueError) as error:
        built(*parts)
    said = str(error.value)
    assert said.startswith("--to open_clip: open_clip can build no such model: image tower: ")
    assert "--objective.head-hidden-dim 0 --vision.class-token --vision.num-registers 0;" in said
    assert "objective.head_hidden_dim at most 48 (got 64): --objective.head-hidden-dim 48" in said
    assert "text.attention causal (got bidirectional): --text.attention causal" in said
    assert "--to safetensors or --to hf" in said
    # what the flags say is taken
    parts = towers(replace(vision, class_token=True, num_registers=0), text, hidden=0)
    assert_equal(built(*parts), *parts)


def test_an_image_tower_that_timm_has_no_name_for_is_told_its_sizes() -> None:
    parts = towers(vit_s(image_size=64, depth=1), hidden=48)
    with pytest.raises(ValueError, match=r"vision\.dim 384 and vision\.patch_size 16 .*224.*384"):
        built(*parts)
    with pytest.raises(ValueError, match=r"vision\.mlp gelu \(got swiglu\): --vision\.mlp gelu"):
        built(*towers(replace(VISION, mlp="swiglu")))


def test_its_own_towers_have_quick_gelu_both_or_neither() -> None:
    parts = towers(replace(VISION, mlp="quick_gelu"))
    with pytest.raises(ValueError, match=r"text tower: expected text\.mlp quick_gelu \(got gelu\)"):
        built(*parts)


def test_a_bias_of_keys_that_turn_is_no_part_of_timms_dinov3() -> None:
    vit = drawn(ViT(dinov3_s(image_size=32, dim=192, num_heads=3, key_bias=True)))
    assert model_of(vit) is None
