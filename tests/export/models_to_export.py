"""Small models of every architecture, off their initial weights, for tests of exported graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import m3i_fast
from m3i_fast.config.models.internimage import internimage_demo
from m3i_fast.config.models.vision import VisionConfig
from m3i_fast.config.models.vit import ViTConfig
from m3i_fast.engine.run.data_record import Preprocessing
from m3i_fast.inference.transform import Transform
from m3i_fast.models.image_encoder import build_encoder
from m3i_fast.models.internimage.deformable import DCNv3
from m3i_fast.ops import IMAGENET_MEAN, IMAGENET_STD
from tests.shared.groups import at_gate

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2}
INTERNIMAGE: dict[str, Any] = {
    "image_size": 64,
    "channels": 16,
    "groups": (1, 2, 4, 8),
    "token_dim": 32,
    "pool_heads": 2,
    "pooled_dim": 48,
}
ARCHITECTURES: dict[str, VisionConfig] = {
    "vit": ViTConfig(**VIT),
    "dinov2": ViTConfig(**VIT, class_token=True, num_registers=4, layer_scale_init=1.0),
    "dinov3": ViTConfig(
        **VIT,
        **{"class_token": True, "num_registers": 4, "layer_scale_init": 1.0},
        **{"position": "rotary", "mlp": "swiglu", "key_bias": False, "norm_eps": 1e-5},
    ),
    "clip": ViTConfig(
        **VIT, class_token=True, pre_norm=True, mlp="quick_gelu", norm_eps=1e-5, final_norm=False
    ),
    "siglip": ViTConfig(**VIT, mlp="gelu_tanh"),
    "internimage": internimage_demo(**INTERNIMAGE),
    "internimage_l": internimage_demo(
        **INTERNIMAGE, post_norm=True, layer_scale=1.0, offset_scale=2.0
    ),
    "internimage_h": internimage_demo(
        **INTERNIMAGE,
        **{"res_post_norm": True, "center_feature_scale": True, "dw_kernel_size": 5},
        **{"level2_post_norm": True, "level2_post_norm_block_ids": (1,)},
    ),
}
FAST = "internimage_h"  # which has most options; a run's ViT is exported as well
FAST_AND_SLOW = at_gate((FAST,), ARCHITECTURES)


@torch.no_grad()
def perturb(module: nn.Module) -> None:
    """Move every parameter off its initial value, and samples between pixels and off the image."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    for layer in module.modules():
        if isinstance(layer, DCNv3):
            layer.offset.bias.uniform_(-2.5, 2.5)


def make_model(architecture: str) -> m3i_fast.Model:
    """Return what `load` would of a run without heads."""
    torch.manual_seed(0)
    cfg = ARCHITECTURES[architecture]
    encoder = build_encoder(cfg)
    perturb(encoder)
    made = Preprocessing(
        size=cfg.image_size, interpolation="cubic", mean=IMAGENET_MEAN, std=IMAGENET_STD
    )

    def no_record() -> Any:
        raise AssertionError("a model without heads needs no names")

    model = m3i_fast.Model(
        encoder=encoder,
        caption=None,
        category=None,
        columns=[],
        transform=Transform(made),
        compute_dtype=torch.float32,
        without_heads="it never had any",
        read_record=no_record,
    )
    return model.requires_grad_(False).eval()


def pixels_for(model: m3i_fast.Model, count: int) -> Tensor:  # [count, 3, S, S] uint8
    size = model.transform.preprocessing.size
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def expected_of(model: m3i_fast.Model, pixels: Tensor) -> dict[str, Tensor]:
    """Return by the names of a graph's outputs what the model itself gives."""
    outputs = {"tokens": model.forward_features(pixels), "pooled": model(pixels)}
    if model.caption is not None:
        outputs["image_embedding"] = model.encode_image(pixels)
    if model.category is not None:
        outputs["logits"] = model.classify(pixels)
    return outputs


def assert_same(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Hold that outputs by name are equal to 1e-4, and not all the same number."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        theirs = torch.as_tensor(got[name])
        assert theirs.dtype == torch.float32 and value.std() > 1e-3, name
        torch.testing.assert_close(
            theirs, value, rtol=0, atol=1e-4, msg=f"{name}: {theirs} {value}"
        )
